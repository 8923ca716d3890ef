"""What a model is worth to a decision: net benefit and the decision curve.

Vickers and Elkin 2006, doi:10.1177/0272989X06295361. A threshold probability p says how many cases
a clinician would treat in vain for one that needs it: (1 - p) / p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics import checks
from evaluate.metrics.counts import Counts
from evaluate.metrics.discrimination import counts_above
from finetune import ranking
from finetune.ranking import Counted, Floats, Ranking
from merge_kit.errors import DataError


@dataclass(frozen=True, slots=True)
class DecisionCurve:
    """Net benefit over threshold probabilities, all (K,).

    Attributes:
        thresholds: the threshold probabilities.
        model: of treating the cases whose probability reaches the threshold.
        treat_all: of treating every case.
        treat_none: 0.
    """

    thresholds: Floats
    model: Floats
    treat_all: Floats
    treat_none: Floats


def net_benefit(truth: ArrayLike, probabilities: ArrayLike, threshold: float) -> float:
    """Return TP / n - FP / n · p / (1 - p) at the threshold probability p; nan for no case.

    Args:
        truth: (n,) of 0 and 1.
        probabilities: (n,) in [0, 1]; a case is treated when its own reaches the threshold.
        threshold: in (0, 1).

    Raises:
        DataError: arrays that do not fit, or an impossible threshold.
    """
    return float(decision_curve(truth, probabilities, [threshold]).model[0])


def decision_curve(
    truth: ArrayLike, probabilities: ArrayLike, thresholds: ArrayLike
) -> DecisionCurve:
    """Return the net benefit of the model, of treating all and of treating none.

    Args:
        truth: (n,) of 0 and 1.
        probabilities: (n,) in [0, 1].
        thresholds: (K,), each in (0, 1).

    Raises:
        DataError: arrays that do not fit, or an impossible threshold.
    """
    levels = threshold_probabilities(thresholds)
    flags, values = checks.binary_probabilities(truth, probabilities)
    ranked = ranking.rank(flags, values)
    counted = ranking.count(ranked, np.ones((len(flags), 1)))
    model, treat_all = net_benefits(ranked, counted, levels)
    return DecisionCurve(levels, model[:, 0], treat_all[:, 0], np.zeros(len(levels)))


def net_benefits(ranked: Ranking, counted: Counted, thresholds: Floats) -> tuple[Floats, Floats]:
    """Return the net benefit of the model and of treating all under weights, (K, R) both."""
    levels = thresholds[:, None]
    positives = counted.hits[-1:]
    negatives, nobody = counted.drawn[-1:] - positives, np.zeros_like(positives)
    treat_all = Counts(positives, negatives, nobody, nobody).net_benefit(levels)
    return counts_above(ranked, counted, ranked.above(thresholds)).net_benefit(levels), treat_all


def threshold_probabilities(thresholds: ArrayLike) -> Floats:
    """Return threshold probabilities (K,) as float64.

    Raises:
        DataError: one lies outside (0, 1), or they are no list.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
        raise DataError(
            f"Expected a list of threshold probabilities between 0 and 1, but got {thresholds!r}."
        )
    return levels
