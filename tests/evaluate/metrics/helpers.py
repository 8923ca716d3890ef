"""Samples that the tests of several figures share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Binary = tuple[NDArray[np.int64], Floats]


def binary_sample(n: int, seed: int, *, decimals: int = 15, signal: float = 1.0) -> Binary:
    """Truth, with both classes for n > 1, and probabilities in (0, 1); few decimals give ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n)
    truth[:2] = [0, 1][:n]
    logits = rng.normal(size=n) + signal * (truth - 0.5)
    return truth, np.clip((1 / (1 + np.exp(-logits))).round(decimals), 0.01, 0.99)


def multiclass_sample(n: int, classes: int, seed: int, *, signal: float = 1.0) -> Binary:
    """Labels, and probabilities (n, classes) that sum to 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += signal
    powers = np.exp(logits)
    return labels, powers / powers.sum(axis=1, keepdims=True)


def one_hot(labels: Sequence[int] | NDArray[np.int64], classes: int) -> NDArray[np.int8]:
    return np.eye(classes, dtype=np.int8)[labels]


@st.composite
def binary_samples(draw: st.DrawFn) -> Binary:
    n, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**32 - 1))
    return binary_sample(n, seed, decimals=draw(st.sampled_from([1, 15])))
