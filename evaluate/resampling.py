"""The bootstrap of every figure of the report at once, vectorised over resamples.

Each figure is written once, under case weights: `Scored.under(weights)` takes how often each case
is drawn, (R, n), and gives each figure on every resample. The figure of the sample itself is the
one at weights 1. What hangs on the order of the cases is worked out once, in `Scored.prepare`; a
resample is then a few sums. Resamples are drawn as `finetune.scores` draws them (whole patients
where they are known), so the same seed and groups give the same resamples, and models are paired.

Names of figures and their shapes under R resamples of C classes:

(R,): accuracy, balanced_accuracy, macro_auroc, macro_auprc, macro_f1, brier, ece, log_loss; for
one label a case also kappa, and quadratic_kappa where the classes are ordered. For several labels
a case, each is the mean over the classes of the binary figure, with 0.5 as the threshold.

(R, C), one class against the rest: auroc, auprc, prevalence (the baseline of auprc), sensitivity,
specificity, ppv, npv, f1, class_brier, class_ece, class_log_loss, calibration_slope and
calibration_intercept; at the operating points given by name, "sensitivity@<name>" and
"specificity@<name>"; at prevalences that are given, ppv_at_prevalence and npv_at_prevalence, and
the same "@<name>".

(R, C, K), at K threshold probabilities that are given: net_benefit, net_benefit_treat_all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from evaluate.metrics import calibration, checks, counts, recalibration, utility
from evaluate.metrics.counts import Counts
from evaluate.metrics.discrimination import counts_above
from evaluate.metrics.recalibration import Logits
from finetune import ranking
from finetune.confusions import Cells, confusion_cells, confusions
from finetune.ranking import Floats, Ranking
from finetune.scores import draws, group_numbers, mean_of_defined
from merge_kit.errors import DataError

Figures: TypeAlias = dict[str, Floats]

# Of several labels a case, each is said to be present at this probability.
PRESENT = 0.5
# A block of resamples holds about this many weights: a few MB, and enough columns to share a pass.
_BLOCK = 1 << 19


@dataclass(frozen=True, slots=True)
class _Class:
    """One class against the rest, on the cases that are annotated for it."""

    ranking: Ranking
    logits: Logits
    bins: Cells
    excess: Floats  # (m,) probability less truth
    losses: Floats  # (2, m) squared error, log loss


@dataclass(frozen=True, slots=True)
class _Single:
    """The most probable class, where a case has one label."""

    confusion: Cells
    bins: Cells
    excess: Floats  # (n,) confidence less being right
    losses: Floats  # (2, n) squared error over the classes, log loss


@dataclass(frozen=True, slots=True)
class Scored:
    """One model on n cases, ready to be scored under any weights; see `prepare`."""

    cases: int
    classes: tuple[_Class, ...]
    single: _Single | None
    operating_points: Mapping[str, Floats]
    prevalences: Floats | None
    thresholds: Floats
    ordered: bool

    @staticmethod
    def prepare(
        targets: ArrayLike,
        probabilities: ArrayLike,
        *,
        multi_label: bool = False,
        ordered: bool = False,
        operating_points: Mapping[str, ArrayLike] | None = None,
        prevalences: ArrayLike | None = None,
        thresholds: ArrayLike = (),
        bins: int = calibration.BINS,
    ) -> Scored:
        """Sort the cases of one model.

        Args:
            targets: (n, C) of 1, 0 and -1 for what is not annotated; one 1 a row, and else 0,
                where a case has one label.
            probabilities: (n, C) in [0, 1].
            multi_label: whether a case may have several labels, or none.
            ordered: whether the order of the classes means something (grades).
            operating_points: name -> (C,) thresholds of the scores, fitted on validation cases; nan
                for a class that has none.
            prevalences: (C,) stated prevalence of each class where the model is to be used, nan
                where it is not stated.
            thresholds: (K,) threshold probabilities of the decision curve.
            bins: number of bins of equal width of the calibration errors.

        Raises:
            DataError: arrays that do not fit each other.
        """
        truth, values = _checked(targets, probabilities, multi_label)
        points = {name: _each_class(p, values) for name, p in (operating_points or {}).items()}
        edges = calibration.bin_edges(values, bins, "width")
        return Scored(
            cases=len(values),
            classes=tuple(
                _one_class(*column, edges) for column in zip(truth.T, values.T, strict=True)
            ),
            single=None if multi_label else _one_label(truth.argmax(axis=1), values, edges),
            operating_points=points,
            prevalences=None if prevalences is None else _each_class(prevalences, values),
            thresholds=utility.threshold_probabilities(thresholds),
            ordered=ordered,
        )

    def names(self) -> tuple[str, ...]:
        """Return the names of the figures."""
        return tuple(self.values())

    def values(self) -> Figures:
        """Return the figures of the sample itself, shapes () and (C,) and (C, K)."""
        return {name: figure[0] for name, figure in self.under(np.ones((1, self.cases))).items()}

    def under(self, weights: NDArray[np.floating[Any]]) -> Figures:
        """Return every figure under weights (R, n): how often each case is drawn.

        nan where a figure is undefined.
        """
        columns = np.ascontiguousarray(np.asarray(weights, dtype=np.float64).T)
        by_class = [self._of_class(number, columns) for number in range(len(self.classes))]
        figures = {
            name: np.stack([of[name] for of, _ in by_class], axis=1) for name in by_class[0][0]
        }
        if self.single:
            confusion = confusions(self.single.confusion, columns)
            decided = counts.one_against_rest(confusion)
            figures |= _of_one_label(self.single, confusion, columns, ordered=self.ordered)
        else:
            decided = _stacked([flagged for _, flagged in by_class])
            figures |= _of_several_labels(figures, decided)
        figures |= {name: getattr(decided, name) for name in _RATES}
        figures |= _at_prevalences(decided, self.prevalences, "")
        return figures | {
            name: mean_of_defined(figures[of_class]) for name, of_class in _MACRO.items()
        }

    def _of_class(self, number: int, columns: Floats) -> tuple[Figures, Counts]:
        """Return the figures (R,) or (R, K) of a class, and its counts (R,) where p >= 0.5."""
        one = self.classes[number]
        counted = ranking.count(one.ranking, columns)
        whole = counted.drawn[-1]
        squared, log = one.losses @ counted.weights
        benefit, treat_all = utility.net_benefits(one.ranking, counted, self.thresholds)
        figures = {
            "auroc": ranking.auroc(one.ranking, counted),
            "auprc": ranking.average_precision(one.ranking, counted),
            "class_brier": ranking.ratio(squared, whole),
            "class_log_loss": ranking.ratio(log, whole),
            "class_ece": calibration.calibration_errors(one.bins, one.excess, counted.weights),
            "calibration_slope": recalibration.slopes(one.logits, counted),
            "calibration_intercept": recalibration.intercepts(one.logits, counted),
            "net_benefit": benefit.T,
            "net_benefit_treat_all": treat_all.T,
        }
        points = np.array([PRESENT, *(p[number] for p in self.operating_points.values())])
        places = one.ranking.above(points)
        flagged = [
            Counts(*cells)
            for cells in zip(*_cells(counts_above(one.ranking, counted, places)), strict=True)
        ]
        prevalence = None if self.prevalences is None else self.prevalences[number]
        for name, at, point in zip(self.operating_points, flagged[1:], points[1:], strict=True):
            known = at if not np.isnan(point) else Counts(*[np.full(len(whole), np.nan)] * 4)
            figures |= {
                f"sensitivity@{name}": known.sensitivity,
                f"specificity@{name}": known.specificity,
                **_at_prevalences(known, prevalence, f"@{name}"),
            }
        return figures, flagged[0]


def replicates(
    scored: Scored,
    groups: Sequence[str | None] | None = None,
    *,
    resamples: int = 2000,
    seed: int | Sequence[int] = 0,
    threads: int | None = None,
) -> Figures:
    """Return every figure on every resample: what `Scored.under` gives, R = resamples.

    Args:
        scored: a model on n cases.
        groups: (n,) the patient of each case, drawn whole; None for a case that is drawn by itself.
        resamples: number of resamples.
        seed: of the draw, which hangs on nothing else but groups: models are paired.
        threads: at most so many at once; None for all cores. It does not change the figures.

    All nan with fewer than two groups: there is nothing to resample.

    Raises:
        DataError: groups of another number than cases, or an impossible `resamples`.
    """
    return resampled(
        scored.under, scored.cases, groups, resamples=resamples, seed=seed, threads=threads
    )


def resampled(
    under: Callable[[Floats], Figures],
    cases: int,
    groups: Sequence[str | None] | None,
    *,
    resamples: int,
    seed: int | Sequence[int],
    threads: int | None = None,
) -> Figures:
    """Return what `under`, a function of weights (rows, n), gives on every resample of n cases.

    Arguments, result and errors as `replicates`.
    """
    if resamples < 1:
        raise DataError(f"Expected resamples to be an integer larger than 0, but got {resamples}.")
    members = group_numbers(groups, cases)
    values = under(np.ones((1, cases)))
    found = {name: np.full((resamples, *value.shape[1:]), np.nan) for name, value in values.items()}
    if members.max(initial=0) == 0:
        return found
    rows = max(1, _BLOCK // len(members))
    times = draws(int(members.max()) + 1, resamples, np.random.default_rng(seed), rows)

    def score(block: Floats) -> Figures:
        return under(block[:, members])

    start = 0
    with threadpool_limits(
        1, user_api="blas"
    ):  # blocks run at once, and are too small to share out
        for figures in _in_order(score, times, threads or _cores()):
            stop = start + len(next(iter(figures.values())))
            for name, figure in figures.items():
                found[name][start:stop] = figure
            start = stop
    return found


_RATES = ("prevalence", "sensitivity", "specificity", "ppv", "npv", "f1")
_MACRO = {"macro_auroc": "auroc", "macro_auprc": "auprc", "macro_f1": "f1"}


def _of_one_label(single: _Single, confusion: Floats, columns: Floats, *, ordered: bool) -> Figures:
    whole = columns.sum(axis=0)
    squared, log = single.losses @ columns
    figures = {
        "accuracy": counts.accuracies(confusion),
        "balanced_accuracy": counts.balanced_accuracies(confusion),
        "kappa": counts.kappas(confusion),
        "brier": ranking.ratio(squared, whole),
        "ece": calibration.calibration_errors(single.bins, single.excess, columns),
        "log_loss": ranking.ratio(log, whole),
    }
    if ordered:
        figures["quadratic_kappa"] = counts.kappas(confusion, quadratic=True)
    return figures


def _of_several_labels(figures: Figures, decided: Counts) -> Figures:
    return {
        "accuracy": mean_of_defined(decided.accuracy),
        "balanced_accuracy": mean_of_defined((decided.sensitivity + decided.specificity) / 2),
        "brier": mean_of_defined(figures["class_brier"]),
        "ece": mean_of_defined(figures["class_ece"]),
        "log_loss": mean_of_defined(figures["class_log_loss"]),
    }


def _at_prevalences(decided: Counts, prevalence: Floats | None, suffix: str) -> Figures:
    if prevalence is None:
        return {}
    return {
        f"ppv_at_prevalence{suffix}": decided.ppv_at(prevalence),
        f"npv_at_prevalence{suffix}": decided.npv_at(prevalence),
    }


def _cells(of: Counts) -> tuple[Floats, Floats, Floats, Floats]:
    return of.tp, of.fp, of.fn, of.tn


def _stacked(by_class: Sequence[Counts]) -> Counts:
    return Counts(*(np.stack(cell, axis=1) for cell in zip(*map(_cells, by_class), strict=True)))


def _one_class(truth: NDArray[np.int8], values: Floats, edges: Floats) -> _Class:
    known = np.flatnonzero(truth >= 0)
    ranked = ranking.rank(truth[known], values[known])
    # All that follows stands in the order of the ranking.
    scores, flags = ranked.scores, ranked.truth
    losses = np.stack([(scores - flags) ** 2, calibration.binary_log_losses(flags, scores)])
    bins = calibration.bin_cells(scores, edges)
    excess = scores - flags
    fitted = recalibration.logits(ranked)
    placed = replace(ranked, order=known[ranked.order])
    return _Class(placed, fitted, bins, excess, losses)


def _one_label(labels: NDArray[np.int64], values: Floats, edges: Floats) -> _Single:
    right, confidence = calibration.top_label(labels, values)
    losses = [
        calibration.squared_errors(labels, values),
        calibration.log_losses(labels, values),
    ]
    return _Single(
        confusion_cells(labels, values.argmax(axis=1), values.shape[1]),
        calibration.bin_cells(confidence, edges),
        confidence - right,
        np.stack(losses),
    )


def _checked(
    targets: ArrayLike, probabilities: ArrayLike, multi_label: bool
) -> tuple[NDArray[np.int8], Floats]:
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    if targets.ndim != 2 or not targets.shape[1] or targets.shape != probabilities.shape:
        raise DataError(
            f"Expected targets and probabilities of the same shape (n, classes), but got "
            f"{targets.shape} and {probabilities.shape}."
        )
    if not np.isin(targets, (-1, 0, 1)).all():
        raise DataError("Expected targets of 1, 0 or -1 (not annotated), but there are others.")
    one = ((targets == 1).sum(axis=1) == 1) & (targets >= 0).all(axis=1)
    if not multi_label and not one.all():
        raise DataError(
            f"Expected one label a case, but case {int(one.argmin())} has none, several, or a "
            f"class that is not annotated: say that the set is multi-label."
        )
    return targets.astype(np.int8), checks.unit_interval(probabilities.astype(np.float64))


def _each_class(given: ArrayLike, values: Floats) -> Floats:
    numbers = np.asarray(given, dtype=np.float64)
    if numbers.shape != values.shape[1:]:
        raise DataError(
            f"Expected one number for each of the {values.shape[1]} classes, but got an array of "
            f"shape {numbers.shape}."
        )
    return numbers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    work: Callable[[Floats], Figures], blocks: Iterator[Floats], threads: int
) -> Iterator[Figures]:
    """Yield what `work` makes of each block, in order, with few blocks in memory at a time."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Figures]] = deque()
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
