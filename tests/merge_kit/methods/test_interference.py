"""TIES."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.interference import (
    disjoint_merge,
    elect_signs,
    sign_balance,
    ties,
    trim,
    trim_threshold,
)
from tests.merge_kit.helpers import quick

ONES = torch.ones(3, dtype=torch.float64)
# Three vectors, as they are after trimming: agreement, a fight, a lone value, a tie, nothing.
TRIMMED = torch.tensor(
    [
        [1.0, 5.0, 0.0, 2.0, 0.0],
        [2.0, -1.0, 0.0, -2.0, 0.0],
        [6.0, -1.0, -3.0, 0.0, 0.0],
    ]
)


def paper(vectors, density, weights, reduction):
    """Algorithm 1 of arXiv 2306.01708 and the authors' code, coordinate by coordinate."""
    tau = np.asarray(vectors, dtype=np.float64)
    sites, size = tau.shape
    drop = size - int(density * size)
    for i in range(sites):
        if drop:
            bound = np.sort(np.abs(tau[i]))[drop - 1]
            tau[i] = np.where(np.abs(tau[i]) >= bound, tau[i], 0.0)
    gamma = np.sign(tau.sum(axis=0))
    gamma[gamma == 0] = np.sign(gamma.sum())
    merged = np.zeros(size)
    for p in range(size):
        agree = [i for i in range(sites) if tau[i, p] != 0 and np.sign(tau[i, p]) == gamma[p]]
        if not agree:
            continue
        values, w = tau[agree, p], np.asarray(weights)[agree]
        if reduction == "mean":
            merged[p] = (w * values).sum() / w.sum()
        elif reduction == "sum":
            merged[p] = (w * values).sum()
        else:
            merged[p] = np.abs(values).max() * gamma[p]
    return merged


def ours(vectors, density, weights, reduction):
    thresholds = torch.tensor([trim_threshold(tau, density) for tau in vectors])
    majority = float(np.sign(sign_balance(trim(vectors, thresholds))))
    return ties(vectors, weights, thresholds, majority, reduction)


def test_the_threshold_is_the_smallest_value_that_is_kept():
    """d = 5 and density 0.4 keep 2 of 5: k = 5 - 2 = 3, the third smallest of 1 2 3 4 5."""
    values = torch.tensor([4.0, -1.0, 5.0, -3.0, 2.0])
    assert trim_threshold(values, 0.4) == 3.0
    # The authors' mask is |tau| >= kthvalue, so that the k-th value itself stays too.
    kept = trim(values[None], torch.tensor([3.0]))
    assert kept.tolist() == [[4.0, 0.0, 5.0, -3.0, 0.0]]


def test_values_equal_to_the_threshold_are_all_kept():
    values = torch.tensor([2.0, -2.0, 2.0, 1.0, 9.0])
    assert trim_threshold(values, 0.4) == 2.0
    assert trim(values[None], torch.tensor([2.0])).tolist() == [[2.0, -2.0, 2.0, 0.0, 9.0]]


def test_density_1_keeps_all():
    values = torch.tensor([0.0, -1e-30, 3.0])
    assert trim_threshold(values, 1.0) == 0.0
    assert torch.equal(trim(values[None], torch.tensor([0.0]))[0], values)


def test_a_density_below_one_value_keeps_the_largest():
    values = torch.tensor([1.0, -3.0, 2.0])
    assert trim(values[None], torch.tensor([trim_threshold(values, 0.01)])).tolist() == [
        [0.0, -3.0, 0.0]
    ]


def test_signs_are_elected_by_the_sum_of_the_values():
    """Sums 9, 3, -3, 0, 0: the fourth and fifth take the majority of +, +, -."""
    assert sign_balance(TRIMMED) == 1.0
    assert elect_signs(TRIMMED, 1.0).tolist() == [1, 1, -1, 1, 1]
    assert elect_signs(TRIMMED, -1.0).tolist() == [1, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("reduction", "merged"),
    [
        ("mean", [3.0, 5.0, -3.0, 2.0, 0.0]),
        ("sum", [9.0, 5.0, -3.0, 2.0, 0.0]),
        ("max", [6.0, 5.0, -3.0, 2.0, 0.0]),
    ],
)
def test_worked_example(reduction, merged):
    assert disjoint_merge(TRIMMED, ONES, elect_signs(TRIMMED, 1.0), reduction).tolist() == merged


def test_a_zero_sum_takes_the_majority():
    """Fourth coordinate: 2 and -2; with a negative majority the -2 speaks."""
    signs = elect_signs(TRIMMED, -1.0)
    assert disjoint_merge(TRIMMED, ONES, signs).tolist() == [3.0, 5.0, -3.0, -2.0, 0.0]


def test_weights_count_among_those_that_agree():
    """First coordinate: (1 * 1 + 2 * 2 + 6 * 5) / 8 = 4.375; the fight is won by its one value."""
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    merged = disjoint_merge(TRIMMED, weights, elect_signs(TRIMMED, 1.0))
    assert merged.tolist() == [4.375, 5.0, -3.0, 2.0, 0.0]


def test_a_weight_of_zero_has_no_say_in_the_mean():
    weights = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    merged = disjoint_merge(TRIMMED, weights, elect_signs(TRIMMED, 1.0))
    assert merged.tolist() == [4.0, 0.0, -3.0, 0.0, 0.0]


@quick
@given(
    st.integers(0, 999),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from(["mean", "sum", "max"]),
)
def test_the_algorithm_of_the_paper(seed, sites, size, density, reduction):
    """Values in steps of 1/4, so that thresholds tie and sums cancel."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-6, 7, (sites, size), generator=generator) / 4.0
    weights = torch.rand(sites, generator=generator, dtype=torch.float64) + 0.1
    expected = paper(vectors.numpy(), density, weights.numpy(), reduction)
    np.testing.assert_allclose(
        ours(vectors, density, weights, reduction), expected, rtol=1e-12, atol=1e-15
    )


@quick
@given(st.integers(0, 999), st.integers(1, 5))
def test_merging_equals_gives_the_trimmed_vector(seed, sites):
    tau = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    vectors, weights = tau.expand(sites, 20), torch.ones(sites, dtype=torch.float64)
    expected = trim(tau[None], torch.tensor([trim_threshold(tau, 0.5)]))[0].double()
    torch.testing.assert_close(ours(vectors, 0.5, weights, "mean"), expected, rtol=1e-15, atol=0)


@quick
@given(st.integers(0, 999), st.sampled_from([0.25, 2.0, -1.0]))
def test_it_scales_with_the_vectors(seed, factor):
    """Powers of two are exact; with -1 every sign turns, the majority's too."""
    vectors = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    weights = torch.ones(4, dtype=torch.float64)
    left = ours(vectors * factor, 0.5, weights, "mean")
    assert torch.equal(left, ours(vectors, 0.5, weights, "mean") * factor)
