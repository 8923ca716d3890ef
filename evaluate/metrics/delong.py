"""DeLong's variance of an AUROC, and the paired test of two models on the same cases.

DeLong, DeLong and Clarke-Pearson 1988, doi:10.2307/2531595, by ranks in O(n log n) as in Sun and Xu
2014, doi:10.1109/LSP.2014.2337313. For independent cases only: where a patient has several images,
use the bootstrap over patients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics import checks, discrimination
from evaluate.metrics.checks import Flags
from finetune.ranking import Floats

# Below this a variance is the rounding of constant differences.
_NOTHING = 1e-30


@dataclass(frozen=True, slots=True)
class DeLongInterval:
    """An AUROC with its interval.

    Attributes:
        value: the AUROC.
        low: lower bound, nan with fewer than two positives or negatives.
        high: upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DeLongTest:
    """The difference of two AUROCs on the same cases.

    Attributes:
        difference: the first less the second.
        low: lower bound of the difference.
        high: upper bound.
        z: difference over its standard error.
        p: two-sided.
    """

    difference: float
    low: float
    high: float
    z: float
    p: float


def delong_interval(truth: ArrayLike, scores: ArrayLike, level: float = 0.95) -> DeLongInterval:
    """Return the AUROC with the interval AUROC ± z · SE, cut to [0, 1] (Wald, no transform).

    Args:
        truth: (n,) of 0 and 1.
        scores: (n,), finite.
        level: coverage, in (0, 1).

    At an AUROC of 0 or 1 the variance is 0 and the interval has no width: it is no proof of
    perfection. With few cases near 1 the interval is too short for the same reason.

    Raises:
        DataError: arrays that do not fit, or an impossible level.
    """
    quantile = _quantile(level)
    flags, values = checks.binary(truth, scores)
    auroc = discrimination.auroc(flags, values)
    margin = quantile * math.sqrt(_variance(*_placements(flags, values)))
    if math.isnan(margin):
        return DeLongInterval(auroc, math.nan, math.nan)
    return DeLongInterval(auroc, max(0.0, auroc - margin), min(1.0, auroc + margin))


def delong_test(
    truth: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, level: float = 0.95
) -> DeLongTest:
    """Compare the AUROCs of two models on the same cases.

    Args:
        truth: (n,) of 0 and 1.
        scores_a: (n,), finite, of the first model.
        scores_b: (n,), finite, of the second.
        level: coverage of the interval, in (0, 1).

    Models that put the cases in the same order have difference 0 and p = 1. Where the variance is 0
    and the difference is not (both models are perfect or perfectly wrong), z, p and the interval
    are nan, as they are with fewer than two positives or negatives: the method has no answer there.

    Raises:
        DataError: arrays that do not fit, or an impossible level.
    """
    quantile = _quantile(level)
    flags, first = checks.binary(truth, scores_a)
    _, second = checks.binary(truth, scores_b)
    difference = discrimination.auroc(flags, first) - discrimination.auroc(flags, second)
    pairs = zip(_placements(flags, first), _placements(flags, second), strict=True)
    variance = _variance(*(one - other for one, other in pairs))
    if difference == 0 and variance == 0:
        return DeLongTest(0.0, 0.0, 0.0, 0.0, 1.0)
    if not variance > _NOTHING:
        return DeLongTest(difference, *[math.nan] * 4)
    error = math.sqrt(variance)
    z = difference / error
    p = math.erfc(abs(z) / math.sqrt(2))
    margin = quantile * error
    return DeLongTest(difference, difference - margin, difference + margin, z, p)


def _placements(truth: Flags, scores: Floats) -> tuple[Floats, Floats]:
    """Return each positive's share of beaten negatives, and each negative's of beaten positives."""
    positives, negatives = scores[truth], scores[~truth]
    return _below(positives, negatives), _below(negatives, positives)


def _variance(of_positives: Floats, of_negatives: Floats) -> float:
    """Return S10 / m + S01 / n, with S the sample variance of the m, or n, placements."""
    parts = (of_positives, of_negatives)
    if min(map(len, parts)) < 2:
        return math.nan
    return float(sum(part.var(ddof=1) / len(part) for part in parts))


def _below(values: Floats, others: Floats) -> Floats:
    """Return the share of the others that lie below each value, ties one half."""
    if not len(others):
        return np.full(len(values), np.nan)
    others = np.sort(others)
    places = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
    shares: Floats = places / (2 * len(others))
    return shares


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + checks.fraction("level", level)) / 2)
