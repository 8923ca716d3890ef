"""Means of groups in the place of moments: what follows exactly, and what is estimated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import classmeans, momentsfile
from merge_kit.classmeans import GroupMeans, fault, measure, to_moments
from merge_kit.errors import UsageError, VectorError
from merge_kit.moments import measure as measure_moments
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.helpers import quick, says


def drawn(n, d, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, d, generator=generator) + labels[:, None], labels


@quick
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_sums_and_counts_are_those_of_the_images_and_groups_are_full(n, d, size, seed):
    features, labels = drawn(n, d, seed)
    found = measure(features, labels, 3, size)
    exact, followed = measure_moments(features, labels, 3), to_moments(found)
    assert torch.equal(followed.counts, exact.counts)
    torch.testing.assert_close(followed.sums, exact.sums, rtol=1e-5, atol=1e-5)
    assert int(found.sizes.sum()) == n
    full = found.sizes >= torch.minimum(found.counts[found.labels], torch.tensor(size))
    assert bool(full.all())
    alone = len(found.labels) == int((found.counts > 0).sum())
    assert (fault(found) is None) != alone


def test_groups_of_one_image_give_the_moments_themselves():
    features, labels = drawn(50, 4)
    exact, followed = (
        measure_moments(features, labels, 3),
        to_moments(measure(features, labels, 3, 1)),
    )
    torch.testing.assert_close(followed.gram, exact.gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [2, 5, 10])
def test_the_scatter_is_estimated_without_bias(size):
    """Over many draws of one covariance the mean of the estimates is the truth."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(3, 3, generator=generator)
    total, expected = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(400):
        labels = torch.tensor([0] * 37 + [1] * 24)
        features = torch.randn(61, 3, generator=generator) @ mix + 5 * labels[:, None]
        for into, found in (
            (total, to_moments(measure(features, labels, 2, size))),
            (expected, measure_moments(features, labels, 2)),
        ):
            own = found.sums / found.counts[:, None]
            into += found.gram - own.T @ found.sums
    torch.testing.assert_close(total, expected, rtol=0.12, atol=0.12 * float(expected.trace()) / 3)


def test_one_group_a_class_tells_nothing_of_the_scatter_and_is_refused():
    features, labels = drawn(12, 3)
    found = fault(measure(features, labels, 3, 99))
    assert found == "holds one group of each class, from which no scatter follows"


def test_the_draw_is_the_same_every_time_and_mixes():
    features = torch.arange(40.0)[:, None]
    first, again = (measure(features, torch.zeros(40, dtype=torch.long), 2, 5) for _ in range(2))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means.flatten(), features.reshape(8, 5).mean(dim=1))


def test_a_file_of_means_is_read_as_moments(tmp_path):
    features, labels = drawn(30, 4)
    found = measure(features, labels, 3, 5)
    write_tensors(tmp_path / "m", momentsfile.to_tensors(found))
    with TensorFile(tmp_path / "m") as file:
        momentsfile.check_specs(file.specs, 4, 3, "here")
        assert momentsfile.fault_of(file) is None
        again = momentsfile.read(file)
        assert dict(file.specs) == momentsfile.specs_like(file.specs, multi_label=False)
        with pytest.raises(VectorError, match=r"here: tensor 'means' is F32 .*, for this backbone"):
            momentsfile.check_specs(file.specs, 5, 3, "here")
    expected = to_moments(found)
    assert torch.equal(again.gram, expected.gram)
    assert torch.equal(again.sums, expected.sums)


SOUND = GroupMeans(
    torch.ones(3, 2), torch.tensor([0, 0, 2]), torch.tensor([5, 6, 7]), torch.tensor([11, 0, 7])
)
FAULTS = {
    "infinite": ({"means": torch.full((3, 2), torch.inf)}, "holds NaN or infinite values"),
    "class": ({"labels": torch.tensor([0, 0, 3])}, "holds a mean of none of the 3 classes"),
    "negative": ({"labels": torch.tensor([-1, 0, 2])}, "holds a mean of none of the 3 classes"),
    "order": ({"labels": torch.tensor([2, 0, 0])}, "holds classes that are not in ascending order"),
    "empty": ({"sizes": torch.tensor([11, 0, 7])}, "holds a mean of no image"),
    "counts": ({"counts": torch.tensor([10, 0, 7])}, "holds counts that do not fit its groups"),
    "none": (
        {"means": torch.ones(0, 2), "labels": torch.ones(0).long(), "sizes": torch.ones(0).long()},
        "is of no image",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), FAULTS.values(), ids=list(FAULTS))
def test_what_no_images_can_have_given_is_named(changes, sentence):
    parts = {n: getattr(SOUND, n) for n in ("means", "labels", "sizes", "counts")}
    assert fault(SOUND) is None
    assert fault(GroupMeans(**{**parts, **changes})) == sentence


def test_groups_are_as_large_as_the_policy_asks():
    classmeans.check_size(5, 5)
    with says(
        UsageError,
        "--means 4: the federation's policy asks for groups of at least 5 images, since the mean "
        "of few gives their features away: give a larger number.",
    ):
        classmeans.check_size(4, 5)
