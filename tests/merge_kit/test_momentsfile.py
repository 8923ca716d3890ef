"""Moments as they travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import findings, momentsfile
from merge_kit.errors import VectorError
from merge_kit.moments import Moments, measure
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import TensorSpec
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


# Findings


def of_findings(seed, size=30, width=6):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, 2, (size, 3), generator=generator)
    targets[:, 2] = targets[:, 1].clamp(max=0)  # nobody has the last one
    return findings.measure(torch.randn(size, width, generator=generator), targets)


@given(st.integers(0, 100), st.integers(1, 30), st.integers(1, 9))
@quick
def test_moments_of_findings_are_read_as_they_were_measured(tmp_path, seed, size, width):
    found = of_findings(seed, size, width)
    write_tensors(tmp_path / "m.safetensors", momentsfile.to_tensors(found))
    with TensorFile(tmp_path / "m.safetensors") as file:
        momentsfile.check_specs(file.specs, width, 3, "m", multi_label=True)
        assert dict(file.specs) == momentsfile.specs_like(file.specs, multi_label=True)
        again = momentsfile.read(file)
    assert torch.equal(again.grams.tril(), found.grams.tril())
    assert torch.equal(again.grams, again.grams.mT)
    for name in ("annotated", "totals", "sizes", "present", "positives"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name
    assert momentsfile.fault(found) == (None if found.size else "is of no image")


ORDER = "holds patterns that are not in ascending order, or one twice"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.present[0].fill_(torch.nan), "holds NaN or infinite values"),
        (lambda m: m.grams[0, 1, 1].fill_(torch.inf), "holds NaN or infinite values"),
        (lambda m: m.totals[0, 1].fill_(torch.nan), "holds NaN or infinite values"),
        (lambda m: m.annotated[:2].copy_(m.annotated[:2].flip(0)), ORDER),
        (lambda m: m.annotated[1].copy_(m.annotated[0]), ORDER),
        (lambda m: m.annotated[0].fill_(False), "holds a pattern of no class or of no image"),
        (lambda m: m.sizes[0].fill_(0), "holds a pattern of no class or of no image"),
        (
            lambda m: m.positives[0].fill_(1),
            "holds sums of classes that it says are not annotated",
        ),
        (lambda m: m.present[0].fill_(1), "holds sums of classes that it says are not annotated"),
        (lambda m: m.positives[-1, 0].fill_(-1), "holds counts that do not fit its sums"),
        (lambda m: m.positives[-1, 0].fill_(99), "holds counts that do not fit its sums"),
        (lambda m: m.positives[-1, 0].fill_(0), "holds counts that do not fit its sums"),
        (lambda m: m.positives[-1, 0].copy_(m.sizes[-1]), "holds counts that do not fit its sums"),
        (lambda m: m.totals[-1].add_(99), "holds sums of squares that are too small for its sums"),
        (lambda m: m.present[-1].mul_(9), "holds sums of squares that are too small for its sums"),
        (lambda m: m.grams[-1].mul_(0.1), "holds sums of squares that are too small for its sums"),
    ],
)
def test_moments_of_findings_that_no_images_can_have_given_are_named(change, sentence):
    found = of_findings(1)
    assert momentsfile.fault(found) is None
    change(found)
    assert momentsfile.fault(found) == sentence


def test_rounding_of_a_finding_that_all_have_is_no_fault():
    same = torch.full((50, 4), 0.1)
    told = findings.measure(same, torch.tensor([[1, 0]]).expand(50, 2))
    assert momentsfile.fault(told) is None


def test_moments_of_one_kind_are_refused_where_the_other_is_asked_for():
    one = momentsfile.to_tensors(measure(*drawn((2, 2, 2), seed=1, features=4), 3))
    several = momentsfile.to_tensors(of_findings(1, width=4))
    specs = [{n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in m.items()} for m in (one, several)]
    with says(VectorError, "m lacks the tensor 'annotated': the site must calibrate again."):
        momentsfile.check_specs(specs[0], 4, 3, "m", multi_label=True)
    with says(VectorError, "m has the tensor 'annotated', which moments do not have."):
        momentsfile.check_specs(specs[1], 4, 3, "m")
