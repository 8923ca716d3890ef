from __future__ import annotations

import csv
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from evaluate.demo_backbone import ARCHITECTURE, INPUT_SIZE, MEAN, STD, prepare_backbone
from evaluate.demo_images import PUBLIC_CLASSES, generate_hospitals, generate_public
from merge_kit.errors import ImageError, LabelError


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_public(tmp_path_factory.mktemp("public"), per_class=40)


@pytest.fixture(scope="module")
def backbone(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "base" / "backbone.safetensors"
    return prepare_backbone(public, out, epochs=4)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return generate_public(tmp_path / "public", per_class=4)


def test_the_file_loads_strictly_into_timm(backbone: Path) -> None:
    model = timm.create_model(ARCHITECTURE, num_classes=len(PUBLIC_CLASSES))

    model.load_state_dict(load_file(backbone), strict=True)

    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_the_file_has_no_metadata_and_finite_values(backbone: Path) -> None:
    with safe_open(backbone, framework="pt") as file:
        assert not file.metadata()
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_the_file_has_the_permissions_of_the_umask(small: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        out = prepare_backbone(small, tmp_path / "b.safetensors", epochs=1)
    finally:
        os.umask(before)

    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "public"]


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    def train(seed: int) -> bytes:
        torch.rand(seed + 1)  # what torch's global generator did before must not matter
        return prepare_backbone(small, tmp_path / "b", seed=seed, epochs=2).read_bytes()

    assert train(0) == train(0) != train(1)


def test_the_global_random_state_is_left_alone(small: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()

    prepare_backbone(small, tmp_path / "b", epochs=1)

    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_every_step(small: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    prepare_backbone(
        small, tmp_path / "b", epochs=2, batch_size=16, progress=lambda *at: seen.append(at)
    )

    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_missing_public_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError) as caught:
        prepare_backbone(tmp_path, tmp_path / "b")

    assert str(caught.value) == (
        f"{tmp_path / 'labels.csv'} does not exist: generate the demo's public images first."
    )


def test_an_unknown_public_class_is_named_with_its_line(small: Path, tmp_path: Path) -> None:
    table = small / "labels.csv"
    table.write_text(table.read_text().replace(",sickle_like", ",moon_like", 1))

    with pytest.raises(LabelError, match=r"labels\.csv, line 6: 'moon_like' is not a class"):
        prepare_backbone(small, tmp_path / "b")


def test_a_table_without_images_is_refused(small: Path, tmp_path: Path) -> None:
    (small / "labels.csv").write_text("file,label\n")

    with pytest.raises(LabelError, match="lists no image"):
        prepare_backbone(small, tmp_path / "b")


def test_an_unreadable_public_image_is_named(small: Path, tmp_path: Path) -> None:
    (small / "images" / "mast_like_0001.png").write_bytes(b"no image")

    with pytest.raises(ImageError, match=r"mast_like_0001\.png cannot be read as an image"):
        prepare_backbone(small, tmp_path / "b")

    assert not (tmp_path / "b").exists()


def features_and_labels(model: torch.nn.Module, folder: Path) -> tuple[np.ndarray, ...]:
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    images = [
        Image.open(folder / row["file"]).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
        for row in rows
    ]
    x = (np.stack([np.asarray(image) for image in images]) / 255 - MEAN) / STD
    with torch.no_grad():
        features = model(torch.from_numpy(x).float().permute(0, 3, 1, 2)).numpy()
    test = np.array([row["split"] == "test" for row in rows])
    return features, np.array([row["label"] for row in rows]), test


def test_a_linear_probe_on_a_hospital_beats_chance_clearly(backbone: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in load_file(backbone).items() if not k.startswith("fc.")}
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    model.load_state_dict(state, strict=True)
    x, y, test = features_and_labels(model.eval(), generate_hospitals(tmp_path)["north"])
    mean, spread = x[~test].mean(axis=0), x[~test].std(axis=0) + 1e-6
    x = (x - mean) / spread

    probe = LogisticRegression(C=0.1, max_iter=2000).fit(x[~test], y[~test])

    most_common = max(np.mean(y[test] == label) for label in set(y))
    assert probe.score(x[test], y[test]) > most_common + 0.25
