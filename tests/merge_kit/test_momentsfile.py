"""Moments as they travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import momentsfile
from merge_kit.errors import VectorError
from merge_kit.moments import Moments, measure
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.conftest import drawn
from tests.merge_kit.helpers import quick, says


@given(st.integers(0, 100), st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(1, 9))
@quick
def test_what_is_read_is_what_was_measured(tmp_path, seed, counts, width):
    features, labels = drawn(counts, seed=seed, features=width)
    found = measure(features, labels, len(counts))
    write_tensors(tmp_path / "m.safetensors", momentsfile.to_tensors(found))
    with TensorFile(tmp_path / "m.safetensors") as file:
        momentsfile.check_specs(file.specs, width, len(counts), "m")
        again = momentsfile.read(file)
    assert torch.equal(again.gram, found.gram)
    assert torch.equal(again.sums, found.sums)
    assert torch.equal(again.counts, found.counts)
    assert momentsfile.fault(found) == (None if sum(counts) else "is of no image")


def test_the_file_holds_one_triangle():
    tensors = momentsfile.to_tensors(measure(*drawn((2, 3, 1), seed=0, features=5), 3))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "counts": (3,), "gram": (15,), "sums": (3, 5),
    }  # fmt: skip
    assert {str(t.dtype) for n, t in tensors.items() if n != "counts"} == {"torch.float64"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.sums[0, 0].fill_(torch.nan), "holds NaN or infinite values"),
        (lambda m: m.gram[1, 1].fill_(torch.inf), "holds NaN or infinite values"),
        (lambda m: m.counts[0].fill_(-1), "holds counts that do not fit its sums"),
        (lambda m: m.counts[0].fill_(0), "holds counts that do not fit its sums"),
        (lambda m: m.counts[0].fill_(1), "holds sums of squares that are too small for its sums"),
        (lambda m: m.gram[2, 2].mul_(0.1), "holds sums of squares that are too small for its sums"),
        (lambda m: m.sums.mul_(3), "holds sums of squares that are too small for its sums"),
    ],
)
def test_what_no_images_can_have_given_is_named(change, sentence):
    found = measure(*drawn((8, 8, 8), seed=1, features=6), 3)
    assert momentsfile.fault(found) is None
    change(found)
    assert momentsfile.fault(found) == sentence


def test_rounding_is_no_fault():
    same = torch.full((50, 4), 0.1)
    assert momentsfile.fault(measure(same, torch.zeros(50, dtype=torch.long), 2)) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("gram"), "m lacks the tensor 'gram': the site must calibrate again."),
        (lambda t: t.update(more=t["sums"]), "m has the tensor 'more', which moments do not have."),
        (
            lambda t: t.update(sums=t["sums"].float()),
            "m: tensor 'sums' is F32 [3, 4], for this backbone it is F64 [3, 4].",
        ),
        (
            lambda t: t.update(sums=t["sums"][:2]),
            "m: tensor 'sums' is F64 [2, 4], for this backbone it is F64 [3, 4].",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, sentence):
    tensors = momentsfile.to_tensors(measure(*drawn((2, 2, 2), seed=1, features=4), 3))
    change(tensors)
    write_tensors(tmp_path / "m.safetensors", tensors)
    with TensorFile(tmp_path / "m.safetensors") as file, says(VectorError, sentence):
        momentsfile.check_specs(file.specs, 4, 3, "m")


def test_moments_without_an_image_are_none():
    nothing = Moments(torch.zeros(2, 2), torch.zeros(3, 2), torch.zeros(3))
    assert momentsfile.fault(nothing) == "is of no image"
