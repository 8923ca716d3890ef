"""Linear rules."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods import METHODS
from merge_kit.methods.linear import InterpolateOptions, weighted_sum
from tests.merge_kit.helpers import quick


@quick
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))
def test_the_sum_in_float64(seed, sites, size):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sites, size, generator=generator)
    weights = torch.rand(sites, generator=generator, dtype=torch.float64)
    tau, w = vectors.double().numpy(), weights.numpy()
    total = np.array([sum(w[i] * tau[i, p] for i in range(sites)) for p in range(size)])
    np.testing.assert_allclose(weighted_sum(vectors, weights), total, rtol=1e-13, atol=1e-15)


def test_half_precision_vectors_are_summed_in_float64():
    vectors = torch.full((4096, 1), 1.0, dtype=torch.float16)
    assert weighted_sum(vectors, torch.ones(4096, dtype=torch.float64)).tolist() == [4096.0]


def test_interpolation_is_a_part_of_the_mean():
    """WiSE-FT: theta_0 + alpha (theta - theta_0); the default is half way."""
    rule = METHODS["interpolate"].rule
    assert rule.factor(InterpolateOptions()) == 0.5
    assert rule.factor(InterpolateOptions(alpha=0.25)) == 0.25
    assert rule.average
    assert METHODS["mean"].rule.factor(None) == METHODS["sum"].rule.factor(None) == 1.0
    assert METHODS["mean"].rule.average
    assert not METHODS["sum"].rule.average
