"""How well scores tell one class from the rest, whatever the threshold; and thresholds.

Functions take truth (n,) of 0 and 1 and scores (n,), finite; only their order matters. A figure
that the cases cannot give (one class only) is nan. All raise `DataError` for arrays that do not
fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics import checks
from evaluate.metrics.counts import Counts
from finetune import ranking
from finetune.ranking import Counted, Floats, Places, Ranking


@dataclass(frozen=True, slots=True)
class RocCurve:
    """Corners of a ROC curve, from nobody flagged to all flagged.

    Attributes:
        fpr: (K,) 1 - specificity, rising from 0 to 1; nan without negatives.
        tpr: (K,) sensitivity, rising from 0 to 1; nan without positives.
        thresholds: (K,) falling; a case is flagged at its score or above. The first is inf.
    """

    fpr: Floats
    tpr: Floats
    thresholds: Floats


@dataclass(frozen=True, slots=True)
class PrecisionRecallCurve:
    """Corners of a precision-recall curve, from few flagged to all flagged.

    Attributes:
        recall: (K,) sensitivity, rising to 1; nan without positives.
        precision: (K,) PPV.
        thresholds: (K,) the distinct scores, falling.
    """

    recall: Floats
    precision: Floats
    thresholds: Floats


def auroc(truth: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve: the Mann-Whitney statistic, a tie counts one half.

    Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747.
    """
    ranked, counted = _counted(truth, scores)
    return float(ranking.auroc(ranked, counted)[0])


def average_precision(truth: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the precision-recall curve as a sum of steps, without interpolation.

    Σ_t (recall_t - recall_{t-1}) precision_t (Davis and Goadrich 2006,
    doi:10.1145/1143844.1143874). Its baseline, what random scores get, is the `prevalence`.
    """
    ranked, counted = _counted(truth, scores)
    return float(ranking.average_precision(ranked, counted)[0])


def prevalence(truth: ArrayLike) -> float:
    """Return the share of positives, the baseline of the average precision; nan for no case."""
    flags, _ = checks.binary(truth, np.zeros(np.shape(truth)))
    return float(flags.mean()) if len(flags) else float("nan")


def roc_curve(truth: ArrayLike, scores: ArrayLike) -> RocCurve:
    """Return the corners of the ROC curve, one at each distinct score and one at (0, 0)."""
    ranked, counted = _counted(truth, scores)
    ends = np.append(0, distinct(ranked))
    counts = counts_above(ranked, counted, ends)
    thresholds = np.append(np.inf, ranked.scores[ends[1:] - 1])
    return RocCurve(counts.false_positive_rate[:, 0], counts.sensitivity[:, 0], thresholds)


def precision_recall_curve(truth: ArrayLike, scores: ArrayLike) -> PrecisionRecallCurve:
    """Return the corners of the precision-recall curve, one at each distinct score."""
    ranked, counted = _counted(truth, scores)
    ends = distinct(ranked)
    counts = counts_above(ranked, counted, ends)
    thresholds = ranked.scores[ends - 1]
    return PrecisionRecallCurve(counts.sensitivity[:, 0], counts.ppv[:, 0], thresholds)


def threshold_at_specificity(truth: ArrayLike, scores: ArrayLike, specificity: float) -> float:
    """Return the smallest score t such that `score >= t` has at least the wanted specificity.

    For validation cases: a threshold that is chosen on test cases flatters the model. Where no
    score is high enough (the highest is a negative's) it is the next number above all scores, which
    flags nobody. nan without negatives.

    Raises:
        DataError: a specificity outside (0, 1), or arrays that do not fit.
    """
    checks.fraction("specificity", specificity)
    ranked, counted = _counted(truth, scores)
    if len(ranked.positives) == len(ranked.order):
        return float("nan")
    ends = distinct(ranked)
    reached = counts_above(ranked, counted, ends).specificity[:, 0] >= specificity
    if not reached[0]:
        return float(np.nextafter(ranked.scores[0], np.inf))
    return float(ranked.scores[ends[np.flatnonzero(reached)[-1]] - 1])


def distinct(ranked: Ranking) -> Places:
    """Return how many cases have at least each of the distinct scores, rising, (K,)."""
    ends: Places = np.append(np.flatnonzero(np.diff(ranked.scores)) + 1, len(ranked.scores))
    return ends[ends > 0]


def counts_above(ranked: Ranking, counted: Counted, places: Places) -> Counts:
    """Count with the first `places` (K,) cases of a ranking flagged; arrays (K, R)."""
    tp = counted.hits[ranked.hits(places)]
    fp = counted.drawn[places] - tp
    positives, negatives = counted.hits[-1], counted.drawn[-1] - counted.hits[-1]
    return Counts(tp, fp, positives - tp, negatives - fp)


def _counted(truth: ArrayLike, scores: ArrayLike) -> tuple[Ranking, Counted]:
    flags, values = checks.binary(truth, scores)
    ranked = ranking.rank(flags, values)
    return ranked, ranking.count(ranked, np.ones((len(flags), 1)))
