"""Predictions of real small networks on drawn images: what is computed, kept and read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.labelled import LabelledSet
from evaluate.loading import load
from evaluate.models import classes_in_common, find_apart, find_models
from evaluate.predicting import Predicted, predict
from finetune import kept, network, outputs
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit.errors import DataError, ImageError, MergeKitError
from merge_kit.tensorfile import TensorFile, read_all, write_tensors
from tests.conftest import CLASSES
from tests.evaluate.helpers import draw_images

CPU = torch.device("cpu")
PATIENCE = 120.0


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "BATCH", 4)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten images of three classes at two sites."""
    (tmp_path / "images").mkdir()
    return write_table(tmp_path / "images", draw_images(tmp_path / "images", 10))


def write_table(folder: Path, files: list[str]) -> Path:
    rows = [f"{file},{CLASSES[i % 3]},{'ab'[i % 2]}" for i, file in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["file,label,site", *rows]) + "\n")
    return folder / "labels.csv"


@pytest.fixture
def models(hub, tmp_path: Path) -> list[Any]:
    return find_models([f"base={random_head(hub.root / 'base', tmp_path / 'model', seed=0)}"])


def random_head(base: Path, folder: Path, seed: int) -> Path:
    """The base with weights in its head, which is zero in a new federation."""
    shutil.copytree(base, folder)
    with TensorFile(base / "model.safetensors") as file:
        tensors = dict(read_all(file))
    shape = tensors["fc.weight"].shape
    tensors["fc.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def cases(table: Path) -> LabelledSet:
    return load([table], CLASSES).chosen


def run(models: Any, table: Path, cache: Path | None, **options: Any) -> Predicted:
    found = predict(models, cases(table), CPU, cache=cache, **options)
    assert found is not None
    return found


def written(cache: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the cache: its time and its bytes."""
    return {
        path.relative_to(cache).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in cache.rglob("*")
        if path.is_file()
    }


def test_probabilities_are_the_networks_own_whatever_the_batches(models, table, tmp_path):
    found = run(models, table, tmp_path / "cache")
    images, _ = decode(load_cases(table, classes=CLASSES), models[0].preprocessing)
    expected = network.logits(network.load(models[0].folder), images, CPU).double().softmax(dim=1)
    np.testing.assert_allclose(found.predictions[0].probabilities, expected.numpy(), atol=1e-6)
    assert found.predictions[0].fingerprint.startswith("sha256:")
    assert len(written(tmp_path / "cache")) == 3


def test_several_labels_have_a_probability_each(models, table):
    lines = [",".join(["file", *CLASSES]), "0.png,1,1,0", "1.png,0,,1"]
    table.write_text("\n".join(lines) + "\n")
    several = load([table], CLASSES, multi_label=True).chosen
    found = predict(models, several, CPU)
    assert found is not None
    assert found.predictions[0].multi_label
    images, _ = decode(several.cases, models[0].preprocessing)
    expected = network.logits(network.load(models[0].folder), images, CPU).double().sigmoid()
    np.testing.assert_allclose(found.predictions[0].probabilities, expected.numpy(), atol=1e-6)


def test_a_second_call_computes_nothing_and_says_the_same(models, table, tmp_path):
    stages: list[str] = []
    first = run(
        models, table, tmp_path / "cache", progress=lambda name, done, of: stages.append(name)
    )
    assert set(stages) == {"decoding", "base"}
    before = written(tmp_path / "cache")
    second = run(models, table, tmp_path / "cache", progress=lambda *_: pytest.fail("computed"))
    assert written(tmp_path / "cache") == before
    same = first.predictions[0].probabilities == second.predictions[0].probabilities
    assert same.all()


def test_nothing_is_kept_without_a_folder_for_it(models, table, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    run(models, table, None)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "ids"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "a flipped bit"),
        (lambda data: data[:-3], "cut"),
        (lambda data: b"", "empty"),
        (lambda data: data.replace(b"logits", b"logist"), "another name"),
    ],
    ids=["a flipped bit", "cut", "empty", "another name"],
)
def test_a_damaged_batch_is_computed_again(models, table, tmp_path, damage, ids):
    run(models, table, tmp_path / "cache")
    before = written(tmp_path / "cache")
    path = tmp_path / "cache" / min(before)
    path.write_bytes(damage(path.read_bytes()))
    run(models, table, tmp_path / "cache")
    after = written(tmp_path / "cache")
    assert [name for name in after if after[name][0] != before[name][0]] == [min(before)]
    assert {n: data for n, (_, data) in after.items()} == {n: d for n, (_, d) in before.items()}


def test_a_batch_under_another_batchs_name_is_not_believed(models, table, tmp_path):
    run(models, table, tmp_path / "cache")
    first, second, _ = sorted(written(tmp_path / "cache"))
    shutil.copy(tmp_path / "cache" / first, tmp_path / "cache" / second)
    before = written(tmp_path / "cache")
    run(models, table, tmp_path / "cache")
    assert written(tmp_path / "cache")[second] != before[second]


def test_a_changed_image_is_computed_again_with_its_batch_alone(models, table, tmp_path):
    run(models, table, tmp_path / "cache")
    before = written(tmp_path / "cache")
    shutil.copy(table.parent / "9.png", table.parent / "5.png")
    run(models, table, tmp_path / "cache")
    after = written(tmp_path / "cache")
    assert len(after.keys() - before.keys()) == 1
    assert {name: after[name] for name in before} == before


def test_images_at_the_end_leave_the_batches_before_them(models, table, tmp_path):
    run(models, table, tmp_path / "cache")
    before = written(tmp_path / "cache")
    write_table(table.parent, draw_images(table.parent, 14))
    run(models, table, tmp_path / "cache")
    after = written(tmp_path / "cache")
    assert len(after.keys() - before.keys()) == 2  # the batch of two is one of four now
    assert {name: after[name] for name in before} == before


def test_weights_configuration_and_precision_have_a_place_of_their_own(models, table, tmp_path):
    cache = tmp_path / "cache"
    run(models, table, cache)
    run(models, table, cache, precision="bfloat16")
    assert len(list(cache.iterdir())) == 2
    config = models[0].folder / "config.json"
    config.write_text(config.read_text() + "\n")
    run(models, table, cache)
    assert len(list(cache.iterdir())) == 3
    with TensorFile(models[0].folder / "model.safetensors") as file:
        tensors = dict(read_all(file))
    tensors["fc.bias"] = tensors["fc.bias"] + 1
    write_tensors(models[0].folder / "model.safetensors", tensors)
    run(models, table, cache)
    assert len(list(cache.iterdir())) == 4


def test_bfloat16_is_near_and_not_the_same(models, table):
    full, half = (
        run(models, table, None, precision=p).predictions[0].probabilities
        for p in ("float32", "bfloat16")
    )
    assert 0 < np.abs(full - half).max() < 0.05


def test_images_are_decoded_once_for_models_that_look_at_them_alike(models, table, tmp_path, hub):
    other = random_head(hub.root / "base", tmp_path / "other", seed=1)
    two = find_models([f"base={models[0].folder}", str(other)])
    run(two[:1], table, tmp_path / "cache")
    stages: list[tuple[str, int, int]] = []
    found = run(two, table, tmp_path / "cache", progress=lambda *told: stages.append(told))
    assert {name for name, _, _ in stages} == {"decoding", "other"}
    assert [one.model for one in found.predictions] == ["base", "other"]
    assert (found.predictions[0].probabilities != found.predictions[1].probabilities).any()


def test_little_memory_changes_nothing(models, table, tmp_path, monkeypatch):
    run(models, table, tmp_path / "one")
    monkeypatch.setattr(outputs, "HELD", 1)
    run(models, table, tmp_path / "two")
    one, two = (written(tmp_path / name) for name in ("one", "two"))
    assert {n: data for n, (_, data) in one.items()} == {n: data for n, (_, data) in two.items()}


def test_an_unreadable_image_is_left_out_and_its_batch_not_kept(models, table, tmp_path):
    (table.parent / "5.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"5\.png cannot be read as an image"):
        run(models, table, tmp_path / "cache")
    found = run(models, table, tmp_path / "cache", skip_unreadable=True)
    assert "5.png" not in found.labelled.files
    assert len(found.labelled) == len(found.predictions[0]) == 9
    (sentence,) = found.left_out
    assert "5.png cannot be read as an image" in sentence
    assert len(written(tmp_path / "cache")) == 2
    again = run(models, table, tmp_path / "cache", skip_unreadable=True)
    assert again.left_out == found.left_out
    assert (again.predictions[0].probabilities == found.predictions[0].probabilities).all()


def test_a_batch_of_unreadable_images_alone_is_left_out(models, table):
    for index in (8, 9):
        (table.parent / f"{index}.png").write_bytes(b"broken %d" % index)
    assert len(run(models, table, None, skip_unreadable=True).labelled) == 8
    for index in range(8):
        (table.parent / f"{index}.png").write_bytes(b"broken %d" % index)
    with pytest.raises(DataError, match="no image can be read"):
        run(models, table, None, skip_unreadable=True)


def test_the_cache_names_no_file_and_no_folder(models, table, tmp_path):
    secret = "canary-of-a-folder"
    shutil.move(table.parent, tmp_path / secret)
    for file in (tmp_path / secret).glob("*.png"):
        file.rename(file.with_name(f"canary-{file.name}"))
    names = [f"canary-{index}.png" for index in range(10)]
    run(models, write_table(tmp_path / secret, names), tmp_path / "cache")
    files = written(tmp_path / "cache")
    assert files
    for name, (_, data) in files.items():
        assert b"canary" not in name.encode() + data
        assert str(tmp_path).encode() not in data


def test_what_a_killed_process_left_is_removed_and_what_is_fresh_stays(models, table, tmp_path):
    run(models, table, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    old, fresh = folder / ".old.partial", folder / ".fresh.partial"
    for path in (old, fresh):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    run(models, table, tmp_path / "cache")
    assert (old.exists(), fresh.exists()) == (False, True)


def test_kept_logits_of_another_shape_are_not_read(tmp_path):
    kept.write(tmp_path, "m", "c", torch.ones(2, 3))
    assert kept.read(tmp_path, "m", "c", (3, 2)) is None
    assert kept.read(tmp_path, "m", "c", (2, 3)) is not None
    assert kept.read(tmp_path, "m", "d", (2, 3)) is None


def test_imported_predictions_are_joined_to_the_same_cases(models, table, tmp_path):
    (table.parent / "5.png").write_bytes(b"broken")
    path = tmp_path / "clinic.csv"
    rows = [f"{index}.png,0.25,0.25,0.5" for index in reversed(range(10))]
    path.write_text("\n".join(["file,p_granular,p_round,p_lobed", *rows]) + "\n")
    both = find_models([str(models[0].folder), f"clinic={path}"])
    found = run(both, table, None, skip_unreadable=True)
    assert found.predictions[1].classes == CLASSES
    assert found.predictions[1].probabilities.tolist() == [[0.25, 0.5, 0.25]] * 9
    alone = run(find_models([str(path)]), table, None)
    assert (alone.predictions[0].model, len(alone.labelled)) == ("clinic", 10)
    assert alone.predictions[0].fingerprint is None


def test_models_of_other_classes_are_compared_on_those_in_common(models, table, tmp_path):
    folder = models[0].folder
    other = shutil.copytree(folder, tmp_path / "other")
    config = (other / "config.json").read_text().replace('"granular"', '"striped"')
    (other / "config.json").write_text(config.replace('"round"', '"Round"'))
    with pytest.raises(DataError, match="use 'merge-kit compare' for the classes in common"):
        find_models([str(folder), str(other)])
    apart = find_apart([str(folder), f"other={other}"])
    common = classes_in_common(apart)
    assert common == ("round", "lobed")
    part = cases(table).restricted_to(common)
    found = predict(apart, part, CPU)
    assert found is not None
    whole = (
        run(models, table, None).predictions[0].probabilities[[i for i in range(10) if i % 3 < 2]]
    )
    expected = whole[:, :2] / whole[:, :2].sum(axis=1, keepdims=True)
    for one in found.predictions:
        np.testing.assert_allclose(one.probabilities, expected, rtol=1e-6)


def test_models_with_one_class_in_common_are_refused(models, tmp_path):
    other = shutil.copytree(models[0].folder, tmp_path / "other")
    config = (other / "config.json").read_text().replace('"granular"', '"x"')
    (other / "config.json").write_text(config.replace('"lobed"', '"y"'))
    with pytest.raises(DataError) as caught:
        classes_in_common(find_apart([f"base={models[0].folder}", str(other)]))
    assert str(caught.value) == (
        "the models have 1 class in common (base: round, lobed, granular; other: round, y, x): "
        "compare models that share two or more."
    )


def test_a_set_without_images_cannot_be_predicted(models, table):
    found = cases(table)
    bare = LabelledSet(found.classes, found.files, found.targets, found.sites)
    with pytest.raises(DataError, match="has no images to predict"):
        predict(models, bare, CPU)


def test_weights_that_are_no_numbers_are_named(models, table):
    path = models[0].folder / "model.safetensors"
    with TensorFile(path) as file:
        tensors = dict(read_all(file))
    tensors["fc.bias"][0] = torch.nan
    write_tensors(path, tensors)
    with pytest.raises(MergeKitError, match=r"fc\.bias"):
        run(models, table, None)
