"""Masks and a running sum are made again and compared, whoever changed them."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit import publishing, site
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.conftest import write_run
from tests.merge_kit.helpers import load

EQUAL = ("ok", "as merging again gives it")
MASK, SUMS, RECORD = (
    "masks/b.safetensors",
    "running-sum/sums.safetensors",
    "running-sum/record.json",
)


@pytest.fixture
def masked(bench):
    bench.merge("--method", "emr")
    return bench


@pytest.fixture
def summed(bench):
    bench.merge("--keep-sum", "--weights", "uniform")
    return bench


def rewrite(path, change, **says):
    """Other tensors in a file, or another metadata key."""
    with TensorFile(path) as file:
        metadata = dict(file.metadata)
    tensors = load(path)
    change(tensors)
    for key, value in says.items():
        told = json.loads(metadata["merge-kit"])
        metadata["merge-kit"] = json.dumps({**told, key: value}, sort_keys=True)
    write_tensors(path, tensors, next(iter(metadata.items()), None))


def test_masks_are_made_again(masked):
    found = masked.states()
    assert {name: found[f"masks/{name}.safetensors"] for name in "abc"} == dict.fromkeys(
        "abc", EQUAL
    )
    assert masked.differing() == {}


def test_masks_of_two_vectors_of_a_site_are_told_apart(bench, hub, tmp_path):
    joined = site.open_site(tmp_path / "a")
    write_run(joined, tmp_path / "second", seed=9)
    parcel = publishing.prepare(joined, tmp_path / "second", hub, alongside=True)
    publishing.publish(joined, tmp_path / "second", hub, parcel)
    bench.merge("--method", "dare", "--option", "rule=emr")
    found = bench.states()
    assert found[f"masks/a.{parcel.manifest.id[:12]}.safetensors"] == EQUAL
    assert bench.differing() == {}


def bit(tensors):
    next(iter(tensors.values()))[0] ^= 1


def one_more(tensors):
    tensors["zz"] = torch.zeros(1, dtype=torch.uint8)


def one_less(tensors):
    tensors.pop(max(tensors))


def shorter(tensors):
    name = max(tensors)
    tensors[name] = tensors[name][:-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bit, "differs in 'bn1.bias' from what merging again gives."),
        (one_more, "has the tensor 'zz', which merging again does not give."),
        (one_less, "has nothing for 'layer4.0.downsample.2.weight', merging again gives U8 [12]."),
        (shorter, "has U8 [11] for 'layer4.0.downsample.2.weight', merging again gives U8 [12]."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mask_that_was_changed_is_named(masked, change, words):
    rewrite(masked.folder / MASK, change)
    (subject, text), *rest = masked.differing().items()
    assert (subject, rest) == (MASK, [])
    assert words in text


def test_a_rescaler_that_was_changed_is_named(masked):
    rewrite(masked.folder / MASK, lambda t: None, rescalers={"fc.bias": 2.0})
    assert masked.differing() == {MASK: "says other things of itself than merging again gives."}


def test_masks_that_are_gone_or_damaged_are_named(masked):
    (masked.folder / MASK).unlink()
    (masked.folder / "masks" / "a.safetensors").write_bytes(b"{")
    assert list(masked.differing()) in (
        [f"masks/{a}.safetensors" for a in order] for order in ("ab", "ba")
    )


def test_a_running_sum_is_made_again(summed):
    found = summed.states()
    assert (found[SUMS], found[RECORD]) == (EQUAL, EQUAL)
    assert summed.differing() == {}


def test_a_running_sum_that_was_updated_is_that_of_a_merge_from_scratch(summed, contribute):
    contribute("d", seed=9)
    summed.merge("--replace", "--weights", "uniform")
    found = summed.states()
    assert (found[SUMS], found[RECORD]) == (EQUAL, EQUAL)


def test_a_sum_that_was_changed_is_named(summed):
    rewrite(summed.folder / SUMS, lambda t: t["bn1.bias"].add_(1))
    assert summed.differing() == {SUMS: "differs in 'bn1.bias' from what merging again gives."}


def test_a_record_that_was_changed_is_named(summed):
    path = summed.folder / RECORD
    path.write_text(path.read_text().replace('"weights":{', '"weights":{"x":1.0,'))
    assert summed.differing() == {
        RECORD: "is not what merging again gives: merge with --keep-sum again."
    }


def test_half_a_running_sum_differs(summed):
    (summed.folder / RECORD).unlink()
    assert summed.differing() == {RECORD: "is missing, or cannot be read."}


def test_a_running_sum_that_no_merge_keeps_is_unknown(bench):
    """TIES is not linear."""
    bench.merge("--method", "ties")
    (bench.folder / "running-sum").mkdir()
    (bench.folder / SUMS).write_bytes(b"anything")
    assert bench.states()[SUMS] == ("unknown", "no merge by this recipe writes it")
    assert bench.differing() == {}
