"""Scores of a classifier, and bootstrap intervals for them.

Pure functions of two arrays: labels (n,) of integers in [0, C), and probabilities (n, C). Only the
order of the probabilities matters, so logits give the same figures. A score that the data cannot
give (no case, no case of a class, nothing but one class) is nan, never an error.

In the place of labels `balanced_accuracy`, `macro_auroc` and their intervals take targets (n, C) of
cases that have any number of classes, with the probability of each class by itself: see
`finetune.finding_scores`.

Intervals are percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13). Whole patients
are drawn, with replacement, where the patients are known (the cluster bootstrap: Field and Welsh
2007, doi:10.1111/j.1467-9868.2007.00593.x), else single cases. The draw is not stratified by class:
with few cases of a class, which is the rule at a small site, stratified draws give intervals that
are clearly too narrow (with one case a class they have no width at all). A class that vanishes from
a resample is left out of that resample's mean, as it is left out of the mean of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune import finding_scores
from finetune.confusions import accuracies, confusion_cells, confusions, recalls
from finetune.ranking import auroc, count, rank
from merge_kit.errors import DataError

Labels: TypeAlias = NDArray[np.integer[Any]]
Probabilities: TypeAlias = NDArray[np.floating[Any]]
Floats: TypeAlias = NDArray[np.float64]
Score: TypeAlias = Callable[[Labels, Probabilities], float]

# A resample is a row of weights, one a case; a block of rows holds at most this many weights.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A score with its bootstrap interval; the bounds are nan where there is nothing to resample.

    Attributes:
        value: the score of the sample itself.
        low: lower bound.
        high: upper bound.
        n: number of cases.
    """

    value: float
    low: float
    high: float
    n: int


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Return the share of cases whose most probable class is the label; nan for no case."""
    labels, probabilities = _checked(labels, probabilities)
    return float(_weighted_accuracy(labels, probabilities, _ones(labels))[0])


def balanced_accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean recall over the classes present in `labels`; nan for no case.

    Brodersen et al. 2010, doi:10.1109/ICPR.2010.764; not adjusted for chance. Of targets the mean
    over the classes of the mean of sensitivity and specificity at probability 0.5.
    """
    labels, probabilities = _checked(labels, probabilities)
    return float(_weighted_balanced_accuracy(labels, probabilities, _ones(labels))[0])


def macro_auroc(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean one-vs-rest AUROC over the classes that have positives and negatives.

    nan when no class has both. Every class counts the same, whatever its prevalence.
    """
    labels, probabilities = _checked(labels, probabilities)
    return float(_weighted_macro_auroc(labels, probabilities, _ones(labels))[0])


def class_recalls(labels: Labels, probabilities: Probabilities) -> Floats:
    """Return the recall (sensitivity) of each class, (C,), nan for a class without cases."""
    labels, probabilities = _checked(labels, probabilities)
    recalls: Floats = _weighted_recalls(labels, probabilities, _ones(labels))[0]
    return recalls


def per_class_auroc(labels: Labels, probabilities: Probabilities) -> Floats:
    """Return the one-vs-rest AUROC of each class, (C,), nan without positives or negatives.

    The Mann-Whitney statistic: the chance that a case of the class gets a higher probability for
    it than a case of the rest; a tie counts one half (Hanley and McNeil 1982,
    doi:10.1148/radiology.143.1.7063747).
    """
    labels, probabilities = _checked(labels, probabilities)
    aurocs: Floats = _weighted_aurocs(labels, probabilities, _ones(labels))[0]
    return aurocs


def confusion(labels: Labels, probabilities: Probabilities) -> NDArray[np.int64]:
    """Return the counts (C, C), int64: row = true class, column = most probable class.

    Of several equally probable classes the first is taken, here and in every recall.
    """
    labels, probabilities = _checked(labels, probabilities)
    counts = _confusions(labels, probabilities, _ones(labels))[0]
    return np.asarray(counts, dtype=np.int64)


def bootstrap_intervals(
    labels: Labels,
    probabilities: Probabilities,
    scores: Mapping[str, Score],
    *,
    groups: Sequence[str | None] | None = None,
    resamples: int = 1000,
    seed: int | Sequence[int] = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return each score with its percentile bootstrap interval.

    Args:
        labels: (n,) integers in [0, C).
        probabilities: (n, C), finite.
        scores: name -> function of (labels, probabilities). Those of this module run vectorised;
            any other is called once a resample.
        groups: (n,) the patient of each case; cases of one patient are drawn together. None (for
            all, or for a case whose patient is unknown) draws the case by itself.
        resamples: number of resamples.
        seed: of the draw. The same seed, labels and groups give the same resamples, so that the
            replicates of two models are paired.
        level: coverage, in (0, 1).

    With fewer than two groups there is nothing to resample, and the bounds are nan. A resample
    without a defined score is left out. Where no resample differs (a perfect score) the bounds are
    nan, too: an interval without width would claim certainty.

    Raises:
        DataError: arrays that do not fit each other, or an impossible `level` or `resamples`.
    """
    replicates = bootstrap_replicates(
        labels, probabilities, scores, groups=groups, resamples=resamples, seed=seed
    )
    labels, probabilities = _checked(labels, probabilities)
    intervals = {}
    for name, score in scores.items():
        low, high = percentile_bounds(replicates[name], level)
        if low == high:
            low = high = float("nan")
        intervals[name] = Interval(float(score(labels, probabilities)), low, high, len(labels))
    return intervals


def bootstrap_replicates(
    labels: Labels,
    probabilities: Probabilities,
    scores: Mapping[str, Score],
    *,
    groups: Sequence[str | None] | None = None,
    resamples: int = 1000,
    seed: int | Sequence[int] = 0,
) -> dict[str, Floats]:
    """Return each score on every resample, (resamples,) float64; see `bootstrap_intervals`.

    nan where the score is undefined, and everywhere with fewer than two groups.
    """
    labels, probabilities = _checked(labels, probabilities)
    if resamples < 1:
        raise DataError(f"Expected resamples to be an integer larger than 0, but got {resamples}.")
    members = group_numbers(groups, len(labels))
    replicates = {name: np.full(resamples, np.nan) for name in scores}
    if members.max(initial=0) == 0:
        return replicates
    start, rng = 0, np.random.default_rng(seed)
    for times in draws(int(members.max()) + 1, resamples, rng, max(1, _BLOCK // len(members))):
        weights = times[:, members]
        stop = start + len(weights)
        for name, score in scores.items():
            weighted = _WEIGHTED.get(score)
            replicates[name][start:stop] = (
                weighted(labels, probabilities, weights)
                if weighted
                else _one_by_one(score, labels, probabilities, weights)
            )
        start = stop
    return replicates


def percentile_bounds(replicates: Floats, level: float = 0.95) -> tuple[float, float]:
    """Return the central `level` of the defined replicates as (low, high); nan for none."""
    if not 0 < level < 1:
        raise DataError(f"Expected level to lie between 0 and 1, but got {level}.")
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def group_numbers(groups: Sequence[str | None] | None, cases: int) -> NDArray[np.int64]:
    """Number the groups in order of appearance, (n,); a case without a group is one by itself."""
    if groups is None:
        return np.arange(cases)
    if len(groups) != cases:
        raise DataError(f"Expected one group a case, but got {len(groups)} for {cases} cases.")
    numbers: dict[str | tuple[int], int] = {}
    keys = [group or (index,) for index, group in enumerate(groups)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def draws(groups: int, resamples: int, rng: np.random.Generator, rows: int) -> Iterator[Floats]:
    """Yield blocks (at most `rows`, groups): how often each group is drawn in a resample.

    The size of the blocks does not change the draw.
    """
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(0, groups, size=(size, groups))
        cells = drawn + groups * np.arange(size)[:, None]
        times = np.bincount(cells.ravel(), minlength=size * groups).reshape(size, groups)
        yield times.astype(np.float64)


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the last axis without the nans; nan where all are nan."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fitting(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    """Return labels (n,) as int64 and probabilities (n, C) as float64, of any values.

    Raises:
        DataError: shapes that do not fit each other, or labels outside [0, C).
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise DataError(
            f"Expected labels of shape (n,) and probabilities of shape (n, classes), "
            f"but got {labels.shape} and {probabilities.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"Expected labels of an integer type, but got {labels.dtype}.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise DataError(
            f"Expected labels between 0 and {probabilities.shape[1] - 1}, "
            f"but they run from {labels.min()} to {labels.max()}."
        )
    return labels.astype(np.int64), probabilities.astype(np.float64)


def _checked(labels: Labels, probabilities: Probabilities) -> tuple[Labels, Floats]:
    several = np.ndim(labels) == 2
    numbers, values = (finding_scores.fitting if several else fitting)(labels, probabilities)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise DataError(f"Expected finite probabilities, but those of case {row} are not.")
    return numbers, values


def _ones(labels: Labels) -> Floats:
    return np.ones((1, len(labels)))


def _one_by_one(
    score: Score, labels: Labels, probabilities: Probabilities, weights: Floats
) -> Floats:
    cases = np.arange(len(labels))
    drawn = (np.repeat(cases, row.astype(np.int64)) for row in weights)
    return np.array([score(labels[rows], probabilities[rows]) for rows in drawn], dtype=np.float64)


# The scores under weights, (R, n) of non-negative whole numbers: row r gives (R,) or (R, C) at r.
# Sums of whole numbers are exact in float64, so nothing depends on the order of the cases.


def _confusions(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    cells = confusion_cells(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    return confusions(cells, weights.T)


def _weighted_accuracy(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    return accuracies(_confusions(labels, probabilities, weights))


def _weighted_recalls(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    return recalls(_confusions(labels, probabilities, weights))


def _weighted_balanced_accuracy(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    if labels.ndim == 2:
        found = finding_scores.balanced_accuracies(labels, probabilities, weights)
        return mean_of_defined(found)
    return mean_of_defined(_weighted_recalls(labels, probabilities, weights))


def _weighted_aurocs(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    rankings = [rank(labels == c, scores) for c, scores in enumerate(probabilities.T)]
    return np.stack([auroc(ranking, count(ranking, weights.T)) for ranking in rankings], axis=1)


def _weighted_macro_auroc(labels: Labels, probabilities: Floats, weights: Floats) -> Floats:
    if labels.ndim == 2:
        return mean_of_defined(finding_scores.aurocs(labels, probabilities, weights))
    return mean_of_defined(_weighted_aurocs(labels, probabilities, weights))


_WEIGHTED: dict[Score, Callable[[Labels, Floats, Floats], Floats]] = {
    accuracy: _weighted_accuracy,
    balanced_accuracy: _weighted_balanced_accuracy,
    macro_auroc: _weighted_macro_auroc,
}
