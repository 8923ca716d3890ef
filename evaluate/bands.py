"""ROC, precision-recall and decision curves of one class against the rest, with bootstrap bands.

A band is pointwise: at each false positive rate (or recall, or threshold probability) of a grid,
the percentile interval of the true positive rate (or precision, or net benefit) over the resamples.
It says how far the curve may lie at a point, not that the whole curve lies within.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics import checks
from evaluate.metrics.discrimination import counts_above, distinct
from evaluate.metrics.utility import net_benefits
from evaluate.resampling import Figures, resampled
from finetune import ranking
from finetune.ranking import Floats
from finetune.scores import percentile_bounds

GRID = np.linspace(0, 1, 51)
THRESHOLDS = np.arange(1, 100, 2) / 100
"""Threshold probabilities of the decision curve."""
# So that a corner on the grid is met whichever way its coordinate was rounded.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Band:
    """A curve on a grid.

    Attributes:
        x: (K,) false positive rates, recalls, or threshold probabilities.
        value: (K,) true positive rate, precision, or net benefit of the sample; nan where
            undefined.
        low: (K,) lower bound; nan where there is nothing to resample.
        high: (K,) upper bound.
    """

    x: Floats
    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, slots=True)
class Bands:
    """The curves of one class."""

    roc: Band
    precision_recall: Band
    net_benefit: Band


def curve_bands(
    truth: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str | None] | None = None,
    *,
    resamples: int = 2000,
    seed: int | Sequence[int] = 0,
    level: float = 0.95,
    grid: Floats = GRID,
    thresholds: Floats = THRESHOLDS,
) -> Bands:
    """Return the ROC curve, the precision-recall curve and the decision curve with their bands.

    Between two corners the ROC curve is a straight line (Fawcett 2006,
    doi:10.1016/j.patrec.2005.10.010), on a vertical stretch its upper end counts; the precision at
    a recall is that of the highest threshold that reaches it, as the average precision has it. Net
    benefit is that of `metrics.decision_curve`.

    Args:
        truth: (n,) of 0 and 1.
        scores: (n,), probabilities.
        groups: (n,) the patient of each case, as in `resampling.replicates`.
        resamples: number of resamples; with 0 there is no band, its bounds are nan.
        seed: of the draw.
        level: coverage at each point, in (0, 1).
        grid: (K,) rising from 0 to 1.
        thresholds: (K,) threshold probabilities of the decision curve, each in (0, 1).

    Raises:
        DataError: arrays that do not fit, or an impossible option.
    """
    checks.fraction("level", level)
    flags, values = checks.binary(truth, scores)
    ranked = ranking.rank(flags, values)
    ends = np.append(0, distinct(ranked))

    def under(weights: Floats) -> Figures:
        counted = ranking.count(ranked, np.ascontiguousarray(weights.T))
        counts = counts_above(ranked, counted, ends)
        tpr, fpr, precision = counts.sensitivity.T, counts.false_positive_rate.T, counts.ppv.T
        rows = list(zip(tpr, fpr, precision, strict=True))
        return {
            "roc": np.stack([_tpr_at(grid, tpr, fpr) for tpr, fpr, _ in rows]),
            "pr": np.stack([_precision_at(grid, tpr, precision) for tpr, _, precision in rows]),
            "benefit": net_benefits(ranked, counted, thresholds)[0].T,
        }

    value = under(np.ones((1, len(flags))))
    drawn = {name: np.full_like(curve, np.nan) for name, curve in value.items()}
    if resamples:
        drawn = resampled(under, len(flags), groups, resamples=resamples, seed=seed)

    def band(name: str, x: Floats) -> Band:
        bounds = np.array([percentile_bounds(column, level) for column in drawn[name].T])
        return Band(x, value[name][0], bounds[:, 0], bounds[:, 1])

    return Bands(band("roc", grid), band("pr", grid), band("benefit", thresholds))


def _tpr_at(grid: Floats, tpr: Floats, fpr: Floats) -> Floats:
    if np.isnan(tpr).any() or np.isnan(fpr).any():
        return np.full(len(grid), np.nan)
    heights: Floats = np.interp(grid + _ROUNDING, fpr, tpr)
    return heights


def _precision_at(grid: Floats, recall: Floats, precision: Floats) -> Floats:
    if np.isnan(recall).any():
        return np.full(len(grid), np.nan)
    # At recall 0 the precision is that of the first positive found.
    wanted = np.maximum(grid - _ROUNDING, np.finfo(np.float64).tiny)
    heights: Floats = precision[np.searchsorted(recall, wanted, side="left")]
    return heights
