"""TIES, MagMax, FedGMA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.interference import (
    disjoint_merge,
    elect,
    fedgma,
    magmax,
    ties,
    trim,
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


def threshold(values, density):
    """The (int(density d) + 1)-th largest magnitude, or 0."""
    ordered = values.abs().sort(descending=True).values.tolist()
    return [*ordered, 0.0][int(density * len(ordered))]


def ours(vectors, density, weights, reduction):
    thresholds = torch.tensor([threshold(tau, density) for tau in vectors])
    balance = elect(trim(vectors, thresholds), weights).sign().sum().sign().item()
    return ties(vectors, weights, thresholds, lambda weights: balance, reduction)


def signs_of(majority):
    signs = elect(TRIMMED, ONES).sign()
    return torch.where(signs == 0, majority, signs)


def test_values_below_the_threshold_are_dropped_and_equal_ones_kept():
    kept = trim(torch.tensor([[4.0, -1.0, 5.0, -3.0, 2.0]]), torch.tensor([3.0]))
    assert kept.tolist() == [[4.0, 0.0, 5.0, -3.0, 0.0]]


@pytest.mark.parametrize(
    ("vote", "elected"),
    [
        ("values", [9.0, 3.0, -3.0, 0.0, 0.0]),
        # weights 1, 2, 3: 1 + 4 + 18, 5 - 2 - 3, -9, 2 - 4
        ("weighted", [23.0, 0.0, -9.0, -2.0, 0.0]),
        # + + +, + - -, -, + -
        ("counts", [3.0, -1.0, -1.0, 0.0, 0.0]),
    ],
)
def test_signs_are_elected(vote, elected):
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert elect(TRIMMED, weights, vote).tolist() == elected


@pytest.mark.parametrize(
    ("reduction", "merged"),
    [
        ("mean", [3.0, 5.0, -3.0, 2.0, 0.0]),
        ("sum", [9.0, 5.0, -3.0, 2.0, 0.0]),
        ("max", [6.0, 5.0, -3.0, 2.0, 0.0]),
    ],
)
def test_worked_example(reduction, merged):
    assert disjoint_merge(TRIMMED, ONES, signs_of(1.0), reduction).tolist() == merged


def test_a_zero_sum_takes_the_majority():
    """Fourth coordinate: 2 and -2; with a negative majority the -2 speaks."""
    signs = signs_of(-1.0)
    assert disjoint_merge(TRIMMED, ONES, signs).tolist() == [3.0, 5.0, -3.0, -2.0, 0.0]


def test_weights_count_among_those_that_agree():
    """First coordinate: (1 * 1 + 2 * 2 + 6 * 5) / 8 = 4.375; the fight is won by its one value."""
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    merged = disjoint_merge(TRIMMED, weights, signs_of(1.0))
    assert merged.tolist() == [4.375, 5.0, -3.0, 2.0, 0.0]


def test_a_weight_of_zero_has_no_say_in_the_mean():
    weights = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    merged = disjoint_merge(TRIMMED, weights, signs_of(1.0))
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
    expected = trim(tau[None], torch.tensor([threshold(tau, 0.5)]))[0].double()
    torch.testing.assert_close(ours(vectors, 0.5, weights, "mean"), expected, rtol=1e-15, atol=0)


@quick
@given(st.integers(0, 999), st.sampled_from([0.25, 2.0, -1.0]))
def test_it_scales_with_the_vectors(seed, factor):
    """Powers of two are exact; with -1 every sign turns, the majority's too."""
    vectors = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    weights = torch.ones(4, dtype=torch.float64)
    left = ours(vectors * factor, 0.5, weights, "mean")
    assert torch.equal(left, ours(vectors, 0.5, weights, "mean") * factor)


def test_the_majority_is_asked_for_only_where_a_vote_is_tied():
    def never(weights):
        raise AssertionError("no vote is tied")

    vectors, even = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.ones(2, dtype=torch.float64)
    assert ties(vectors, even, torch.zeros(2), never).tolist() == [1.5, 0.0]
    tied = torch.tensor([[1.0, 3.0], [-1.0, 2.0]])
    assert ties(tied, even, torch.zeros(2), lambda weights: -1.0).tolist() == [-1.0, 2.5]


def test_magmax_takes_the_largest_magnitude_and_the_later_of_equals():
    """|1| < |-5|; |2| = |-2|: the later; |0.5| > 0."""
    vectors = torch.tensor([[1.0, 2.0, 0.5], [-5.0, -2.0, 0.0]])
    assert magmax(vectors).tolist() == [-5.0, -2.0, 0.5]


def test_fedgma_damps_what_is_disputed():
    """Signs ++- agree by 1/3, +++ by 1: means 1 * 1/3, 2; at threshold 1/4 both count in full."""
    vectors = torch.tensor([[2.0, 1.0], [3.0, 2.0], [-2.0, 3.0]])
    torch.testing.assert_close(
        fedgma(vectors, ONES, 0.8), torch.tensor([1 / 3, 2.0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        fedgma(vectors, ONES, 0.25), torch.tensor([1.0, 2.0], dtype=torch.float64)
    )


@quick
@given(st.integers(0, 999), st.integers(1, 6))
def test_element_by_element(seed, sites):
    vectors = torch.randn(sites, 12, generator=torch.Generator().manual_seed(seed))
    even = torch.ones(sites, dtype=torch.float64)
    tau = vectors.double().numpy()
    for p in range(12):
        column = [float(v) for v in tau[:, p]]
        assert magmax(vectors)[p] == max(column, key=abs)
        agreement = abs(sum(np.sign(column))) / sites
        mask = 1.0 if agreement >= 0.5 else agreement
        assert fedgma(vectors, even, 0.5)[p] == pytest.approx(mask * sum(column) / sites)
