from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate.demo_images import (
    CLASSES,
    HOSPITALS,
    PUBLIC_CLASSES,
    generate_hospitals,
    generate_public,
    write_union,
)
from merge_kit.errors import UsageError


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]) / 255


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return generate_hospitals(tmp_path_factory.mktemp("hospitals"), seed=0)


def test_the_same_seed_writes_the_same_bytes(hospitals: dict[str, Path], tmp_path: Path) -> None:
    again = generate_hospitals(tmp_path, seed=0)

    assert {site: digests(folder) for site, folder in again.items()} == {
        site: digests(folder) for site, folder in hospitals.items()
    }


def test_another_seed_draws_other_images(tmp_path: Path) -> None:
    first = digests(generate_public(tmp_path / "0", seed=0, per_class=2))
    second = digests(generate_public(tmp_path / "1", seed=1, per_class=2))

    assert first.pop("labels.csv") == second.pop("labels.csv")
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_no_image_occurs_twice(hospitals: dict[str, Path]) -> None:
    all_digests = [
        digest
        for folder in hospitals.values()
        for name, digest in digests(folder).items()
        if name.endswith(".png")
    ]

    assert len(set(all_digests)) == len(all_digests)


def test_each_hospital_has_a_table_of_its_images(hospitals: dict[str, Path]) -> None:
    assert list(hospitals) == ["north", "river", "hill", "coast"]
    for folder in hospitals.values():
        rows = read_table(folder / "labels.csv")
        assert list(rows[0]) == ["file", "label", "patient", "split"]
        listed = sorted(row["file"] for row in rows)
        assert listed == sorted(f"images/{p.name}" for p in (folder / "images").iterdir())
        assert 80 <= len(rows) <= 220


def test_images_are_small_and_rgb(hospitals: dict[str, Path]) -> None:
    with Image.open(next((hospitals["north"] / "images").iterdir())) as image:
        assert (image.mode, image.size, image.format) == ("RGB", (72, 72), "PNG")


def test_one_hospital_lacks_one_class(hospitals: dict[str, Path]) -> None:
    seen = {
        site: {row["label"] for row in read_table(folder / "labels.csv")}
        for site, folder in hospitals.items()
    }

    assert set(CLASSES) - seen.pop("hill") == {"eosinophil_like"}
    assert all(labels == set(CLASSES) for labels in seen.values())


def test_every_class_of_a_hospital_is_in_every_split(hospitals: dict[str, Path]) -> None:
    for site, folder in hospitals.items():
        rows = read_table(folder / "labels.csv")
        seen = {(row["label"], row["split"]) for row in rows}
        assert len(seen) == 3 * len({row["label"] for row in rows}), site


def test_splits_are_about_60_15_25(hospitals: dict[str, Path]) -> None:
    for folder in hospitals.values():
        rows = read_table(folder / "labels.csv")
        count = Counter(row["split"] for row in rows)
        shares = [count[split] / len(rows) for split in ("train", "val", "test")]
        assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.02)


def test_a_patient_has_several_images_but_one_split(hospitals: dict[str, Path]) -> None:
    splits = defaultdict(list)
    for folder in hospitals.values():
        for row in read_table(folder / "labels.csv"):
            splits[row["patient"]].append(row["split"])

    assert all(len(set(of_patient)) == 1 for of_patient in splits.values())
    assert np.mean([len(of_patient) for of_patient in splits.values()]) > 2


def test_class_mix_differs_between_hospitals(hospitals: dict[str, Path]) -> None:
    share = {}
    for site, folder in hospitals.items():
        labels = [row["label"] for row in read_table(folder / "labels.csv")]
        share[site] = labels.count("neutrophil_like") / len(labels)

    assert share["hill"] > 0.4 > 0.2 > share["river"]


def test_acquisition_differs_between_hospitals(hospitals: dict[str, Path]) -> None:
    images = {site: pixels(folder) for site, folder in hospitals.items()}
    blue = {site: x[..., 2].mean() / x[..., 0].mean() for site, x in images.items()}
    contrast = {site: x.std(axis=(1, 2)).mean() for site, x in images.items()}
    grain = {site: np.abs(np.diff(x, 2, axis=2)).mean() for site, x in images.items()}

    assert blue["river"] > 1.05 > 0.75 > blue["coast"]
    assert contrast["hill"] > 1.4 * contrast["river"]
    assert grain["coast"] > 1.5 * grain["river"]


@pytest.mark.parametrize("site", HOSPITALS)
def test_mean_colour_alone_does_not_tell_the_classes(hospitals: dict[str, Path], site: str) -> None:
    rows = sorted(read_table(hospitals[site] / "labels.csv"), key=lambda row: row["file"])
    labels = np.array([row["label"] for row in rows])
    classes = sorted(set(labels))
    colours = pixels(hospitals[site]).mean(axis=(1, 2))
    centroids = np.stack([colours[labels == label].mean(axis=0) for label in classes])
    nearest = np.linalg.norm(colours[:, None] - centroids, axis=2).argmin(axis=1)

    assert np.mean(np.array(classes)[nearest] == labels) < 0.55


def test_the_public_set_has_other_classes_in_equal_number(tmp_path: Path) -> None:
    rows = read_table(generate_public(tmp_path, per_class=3) / "labels.csv")

    assert list(rows[0]) == ["file", "label"]
    assert Counter(row["label"] for row in rows) == dict.fromkeys(PUBLIC_CLASSES, 3)
    assert not set(PUBLIC_CLASSES) & set(CLASSES)
    assert all((tmp_path / row["file"]).is_file() for row in rows)


def test_the_union_lists_every_image_with_its_site(hospitals: dict[str, Path]) -> None:
    folder = hospitals["north"].parent
    path = write_union(folder, hospitals)
    rows = read_table(path)

    assert path == folder / "all.csv"
    assert list(rows[0]) == ["file", "label", "site", "patient", "split"]
    assert all((folder / row["file"]).is_file() for row in rows)
    assert all(row["file"].startswith(f"{row['site']}/images/") for row in rows)
    assert {row["file"] for row in rows if row["site"] == "hill"} == {
        f"hill/{row['file']}" for row in read_table(hospitals["hill"] / "labels.csv")
    }
    assert {row["site"] for row in rows} == set(HOSPITALS)


@pytest.mark.parametrize("generate", [generate_hospitals, generate_public])
def test_a_negative_seed_is_refused(generate, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        generate(tmp_path, seed=-1)

    assert str(caught.value) == (
        "The seed of the demo's images is -1: give one that is 0 or larger."
    )
