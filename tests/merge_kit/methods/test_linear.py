"""Linear rules."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.linear import mean, task_arithmetic, weighted_sum
from tests.merge_kit.helpers import quick


def stack(seed, sites, size):
    return torch.randn(sites, size, generator=torch.Generator().manual_seed(seed))


def shares(seed, sites):
    return torch.rand(sites, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


cases = st.tuples(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))


def test_worked_example():
    """tau = (1, -4), (3, 8), weights 0.5, 1.5: sum (5, 10), mean (2.5, 5)."""
    vectors = torch.tensor([[1.0, -4.0], [3.0, 8.0]])
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    assert task_arithmetic(vectors, weights).tolist() == [5.0, 10.0]
    assert mean(vectors, weights).tolist() == [2.5, 5.0]
    assert weighted_sum(vectors, weights).dtype == torch.float64


@quick
@given(cases)
def test_the_formula_in_float64(case):
    seed, sites, size = case
    vectors, weights = stack(*case), shares(seed, sites)
    tau, w = vectors.double().numpy(), weights.numpy()
    total = np.array([sum(w[i] * tau[i, p] for i in range(sites)) for p in range(size)])
    np.testing.assert_allclose(task_arithmetic(vectors, weights), total, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(mean(vectors, weights), total / sites, rtol=1e-13, atol=1e-15)


@quick
@given(cases, st.floats(-4, 4))
def test_they_are_linear(case, factor):
    seed, sites, size = case
    a, b, weights = (
        stack(*case).double(),
        stack(seed + 1, sites, size).double(),
        shares(seed, sites),
    )
    for rule in (mean, task_arithmetic):
        torch.testing.assert_close(
            rule(a + factor * b, weights), rule(a, weights) + factor * rule(b, weights)
        )


@quick
@given(cases)
def test_the_mean_of_equals_is_the_same(case):
    tau = stack(case[0], 1, case[2])
    vectors, weights = tau.expand(case[1], -1), torch.ones(case[1], dtype=torch.float64)
    torch.testing.assert_close(mean(vectors, weights)[None], tau.double(), rtol=1e-15, atol=0)


def test_sums_do_not_lose_small_values_in_float32():
    """1e8 + 1 - 1e8 is 0 in float32 and 1 in float64."""
    vectors = torch.tensor([[1e8], [1.0], [-1e8]])
    assert task_arithmetic(vectors, torch.ones(3, dtype=torch.float64)).tolist() == [1.0]


def test_half_precision_vectors_are_summed_in_float64():
    vectors = torch.full((4096, 1), 1.0, dtype=torch.float16)
    assert task_arithmetic(vectors, torch.ones(4096, dtype=torch.float64)).tolist() == [4096.0]
