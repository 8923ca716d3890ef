"""What the order of the scores says of one class against the rest, under case weights.

Cases are put in order once; a resample is a column of weights (how often each case is drawn), and
all columns are counted in one pass. Of m cases in falling order of the score, `Counted.drawn[j]` is
the weight of the first j, `Counted.hits[j]` the weight of the first j positives. Sums of whole
numbers are exact in float64, so nothing depends on the order of the cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The order of m cases with k positives.

    Attributes:
        order: (m,) the cases in falling order of the score.
        scores: (m,) their scores.
        truth: (m,) bool, which of them are positive.
        positives: (k,) the places of the positives in `order`.
        first: (k,) for each positive, the number of cases with a higher score.
        last: (k,) for each positive, the number of cases with its score or a higher one.
    """

    order: Places
    scores: Floats
    truth: NDArray[np.bool_]
    positives: Places
    first: Places
    last: Places

    def above(self, thresholds: NDArray[np.floating[Any]]) -> Places:
        """Count the cases with a score of at least each threshold, (K,)."""
        places: Places = np.searchsorted(-self.scores, -np.asarray(thresholds), side="right")
        return places

    def hits(self, places: Places) -> Places:
        """Count the positives among the first `places` cases."""
        counts: Places = np.searchsorted(self.positives, places, side="left")
        return counts


@dataclass(frozen=True, slots=True)
class Counted:
    """A ranking under weights.

    Attributes:
        weights: (m, R) in the order of the ranking.
        drawn: (m + 1, R) weight of the first j cases.
        hits: (k + 1, R) weight of the first j positives.
    """

    weights: Floats
    drawn: Floats
    hits: Floats


def rank(truth: NDArray[Any], scores: NDArray[np.floating[Any]]) -> Ranking:
    """Put cases in order: truth (m,) of 0 and 1 or bool, scores (m,) finite."""
    order = np.argsort(-scores, kind="stable")
    falling: Floats = scores[order].astype(np.float64)
    flags = truth[order].astype(np.bool_)
    positives = np.flatnonzero(flags)
    first = np.searchsorted(-falling, -falling[positives], side="left")
    last = np.searchsorted(-falling, -falling[positives], side="right")
    return Ranking(order, falling, flags, positives, first, last)


def count(ranking: Ranking, weights: Floats) -> Counted:
    """Count a ranking under weights (n, R) of all n cases that `ranking.order` points into."""
    ordered = np.take(weights, ranking.order, axis=0)
    drawn = np.zeros((len(ordered) + 1, weights.shape[1]))
    np.cumsum(ordered, axis=0, out=drawn[1:])
    hits = np.zeros((len(ranking.positives) + 1, weights.shape[1]))
    np.cumsum(ordered[ranking.positives], axis=0, out=hits[1:])
    return Counted(ordered, drawn, hits)


def auroc(ranking: Ranking, counted: Counted) -> Floats:
    """Return the AUROC of each column, (R,); nan without positives or negatives.

    Mann-Whitney: the share of pairs in which the positive has the higher score, ties one half
    (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747).
    """
    higher, among = _negatives(ranking, counted)
    positive, negative = counted.hits[-1], counted.drawn[-1] - counted.hits[-1]
    lost = np.einsum("kr,kr->r", counted.weights[ranking.positives], higher + among) / 2
    pairs = positive * negative
    return ratio(pairs - lost, pairs)


def average_precision(ranking: Ranking, counted: Counted) -> Floats:
    """Return the average precision of each column, (R,); nan without positives.

    AP = Σ_t (recall_t - recall_{t-1}) precision_t over the distinct scores t in falling order,
    without interpolation (Davis and Goadrich 2006, doi:10.1145/1143844.1143874).
    """
    hits, drawn = counted.hits[ranking.hits(ranking.last)], counted.drawn[ranking.last]
    precision = np.divide(hits, drawn, out=np.zeros_like(hits), where=drawn > 0)
    gained = np.einsum("kr,kr->r", counted.weights[ranking.positives], precision)
    return ratio(gained, counted.hits[-1])


def overlap(ranking: Ranking, counted: Counted) -> NDArray[np.bool_]:
    """Say for each column whether no threshold separates the classes, (R,).

    True when some drawn positive is above some drawn negative, and some is below one.
    """
    drawn = counted.weights[ranking.positives] > 0
    higher, among = _negatives(ranking, counted)
    negative = counted.drawn[-1] - counted.hits[-1]
    above: NDArray[np.bool_] = np.any(drawn & (among < negative), axis=0)
    below: NDArray[np.bool_] = np.any(drawn & (higher > 0), axis=0)
    return above & below


def ratio(part: Floats, whole: Floats) -> Floats:
    """Divide, nan where the whole is not positive."""
    part, whole = np.broadcast_arrays(part, whole)
    result: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return result


def _negatives(ranking: Ranking, counted: Counted) -> tuple[Floats, Floats]:
    """Weigh, for each positive, the negatives above it and those not below it, (k, R) both."""
    first, last = ranking.first, ranking.last
    higher = counted.drawn[first] - counted.hits[ranking.hits(first)]
    among = counted.drawn[last] - counted.hits[ranking.hits(last)]
    return higher, among
