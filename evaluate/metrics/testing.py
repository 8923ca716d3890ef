"""Intervals of shares, p-values of differences, and their correction when there are many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluate.metrics import checks
from finetune.ranking import Floats
from merge_kit.errors import DataError


def wilson_interval(
    successes: NDArray[Any] | float, n: NDArray[Any] | float, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Return the lower and upper bound of shares successes / n; nan where n is 0.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n); Wilson 1927,
    doi:10.1080/01621459.1927.10502953. For independent cases.

    Args:
        successes: counts, of any shape.
        n: numbers of cases, of the same shape.
        level: coverage, in (0, 1).

    Raises:
        DataError: an impossible level.
    """
    z = NormalDist().inv_cdf((1 + checks.fraction("level", level)) / 2)
    whole = np.where(np.asarray(n) > 0, n, np.nan).astype(np.float64)
    share = np.asarray(successes) / whole
    middle = share + z**2 / (2 * whole)
    margin = z * np.sqrt(share * (1 - share) / whole + z**2 / (4 * whole**2))
    scale = 1 + z**2 / whole
    return np.maximum(0.0, (middle - margin) / scale), np.minimum(1.0, (middle + margin) / scale)


def holm(p_values: Sequence[float]) -> Floats:
    """Return Holm's adjusted p-values, (m,), in the order given.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_(j)); Holm 1979,
    https://www.jstor.org/stable/4615733. nan stays nan and is not counted among the m.

    Raises:
        DataError: a p-value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(values))
    if not ((values[known] >= 0) & (values[known] <= 1)).all():
        raise DataError(f"Expected p-values between 0 and 1, but got {list(p_values)}.")
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def bootstrap_p(differences: NDArray[np.floating[Any]]) -> float:
    """Return the two-sided p-value of paired bootstrap differences (R,).

    min(1, 2 (1 + min(#{d <= 0}, #{d >= 0})) / (R + 1)): how far 0 lies in the tail of the
    replicates (Davison and Hinkley 1997, chapter 4; never 0, for R resamples cannot prove less than
    2 / (R + 1)). Undefined replicates are left out; nan where all are.
    """
    defined = differences[~np.isnan(differences)]
    if not len(defined):
        return math.nan
    tail = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return float(min(1.0, 2 * (1 + tail) / (len(defined) + 1)))
