"""Pooling of the statistics of normalisation layers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.statistics import largest, pool_moments
from tests.merge_kit.helpers import quick


def test_worked_example():
    """n = 1, 3; mu = 0, 4; s = 2, 2: mu = 3; s = 2 + (1 * 9 + 3 * 1) / 4 = 5."""
    mean, variance = pool_moments(
        torch.tensor([[0.0], [4.0]]),
        torch.tensor([[2.0], [2.0]]),
        torch.tensor([1.0, 3.0], dtype=torch.float64),
    )
    assert (mean.tolist(), variance.tolist()) == ([3.0], [5.0])


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 999))
def test_pooled_moments_are_the_moments_of_the_pooled_samples(sizes, seed):
    rng = np.random.default_rng(seed)
    samples = [rng.normal(rng.normal(), 1 + rng.random(), (n, 3)) for n in sizes]
    mean, variance = pool_moments(
        torch.tensor(np.stack([s.mean(axis=0) for s in samples])),
        torch.tensor(np.stack([s.var(axis=0) for s in samples])),
        torch.tensor(sizes, dtype=torch.float64),
    )
    union = np.concatenate(samples)
    np.testing.assert_allclose(mean, union.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(variance, union.var(axis=0), rtol=1e-10)


def test_a_small_variance_around_a_large_mean_survives():
    """sum n (s + mu^2) / n - mu^2 would lose 1e-6 beside 1e12, and could turn negative."""
    means = torch.full((2, 1), 1e6)
    _, variance = pool_moments(means, torch.full((2, 1), 1e-6), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(variance, torch.tensor([1e-6]).double(), rtol=1e-6, atol=0)


def test_results_are_float64():
    found = pool_moments(torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, dtype=torch.float64))
    assert [tensor.dtype for tensor in found] == [torch.float64] * 2


def test_the_largest_counter_wins_and_stays_an_integer():
    counters = torch.tensor([3, 9, 4])
    assert largest(counters).item() == 9
    assert largest(counters).dtype == torch.int64
    assert largest(torch.tensor([[1, 5], [2, 3]])).tolist() == [2, 5]
