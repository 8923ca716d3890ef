"""Curves of one model on all cases: ROC, precision and recall, net benefit, reliability."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evaluate.document import ClassCurves, Curve, ReliabilityBin
from evaluate.labelled import LabelledSet
from evaluate.metrics import (
    decision_curve,
    precision_recall_curve,
    reliability_bins,
    roc_curve,
    top_label,
)
from evaluate.predictions import Predictions
from evaluate.resampling import Bands, bands
from evaluate.scoring import Settings, seed_of

Floats = NDArray[np.float64]
GRID = np.linspace(0, 1, 51)
"""Where ROC and precision-recall curves are drawn."""
THRESHOLDS = np.arange(1, 100, 2) / 100
"""Threshold probabilities of the decision curve."""
_DIGITS = 6


def curves(
    labelled: LabelledSet, predictions: Predictions, settings: Settings, *, banded: bool
) -> tuple[ClassCurves, ...]:
    """The curves of each class, with pointwise bands if asked for; None where cases are too few."""
    drawn = _bands(labelled, predictions, settings) if banded else {}
    found = []
    for column, name in enumerate(labelled.classes):
        known = labelled.targets[:, column] >= 0
        truth = labelled.targets[known, column]
        scores = predictions.probabilities[known, column]
        positives = int(truth.sum())
        if min(positives, len(truth) - positives) < max(settings.minimum, 1):
            none = ClassCurves(
                name=name, roc=None, precision_recall=None, net_benefit=None, treat_all=None
            )
            found.append(none)
            continue
        roc, precise = roc_curve(truth, scores), precision_recall_curve(truth, scores)
        benefit = decision_curve(truth, scores, THRESHOLDS)
        found.append(
            ClassCurves(
                name=name,
                roc=_curve(GRID, np.interp(GRID, roc.fpr, roc.tpr), drawn.get("roc"), column),
                precision_recall=_curve(
                    GRID,
                    _precision_at(precise.recall, precise.precision),
                    drawn.get("precision_recall"),
                    column,
                ),
                net_benefit=_curve(THRESHOLDS, benefit.model, drawn.get("net_benefit"), column),
                treat_all=_curve(THRESHOLDS, benefit.treat_all, None, column),
            )
        )
    return tuple(found)


def _precision_at(recall: Floats, precision: Floats) -> Floats:
    """Precision where each recall of the grid is first reached."""
    result: Floats = precision[np.searchsorted(recall, GRID - 1e-12)]
    return result


def _curve(x: Floats, y: Floats, band: Bands | None, column: int) -> Curve:
    low = None if band is None else _numbers(band.low[column])
    high = None if band is None else _numbers(band.high[column])
    return Curve(x=tuple(x.round(_DIGITS).tolist()), y=_numbers(y), low=low, high=high)


def _numbers(values: Floats) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(v) else round(v, _DIGITS) for v in values.tolist())


def _bands(
    labelled: LabelledSet, predictions: Predictions, settings: Settings
) -> Mapping[str, Bands]:
    return bands(
        labelled.targets,
        predictions.probabilities,
        grid=GRID,
        thresholds=THRESHOLDS,
        groups=labelled.patients,
        resamples=settings.resamples,
        seed=seed_of("union", settings.seed),
        level=settings.level,
    )


def reliability(
    labelled: LabelledSet, predictions: Predictions, settings: Settings
) -> tuple[ReliabilityBin, ...]:
    """How often the most probable class is right, by its probability.

    Of several labels a case, every annotated pair of case and class counts as one prediction.
    """
    if labelled.multi_label:
        known = labelled.targets >= 0
        truth, values = labelled.targets[known], predictions.probabilities[known]
    else:
        truth, values = top_label(labelled.labels, predictions.probabilities)  # type: ignore[assignment]
    found = reliability_bins(truth, values, bins=settings.bins, level=settings.level)
    rows = zip(
        found.edges[:-1].tolist(),
        found.edges[1:].tolist(),
        _numbers(found.predicted),
        _numbers(found.observed),
        _numbers(found.low),
        _numbers(found.high),
        found.counts.tolist(),
        strict=True,
    )
    bins = []
    for lower, upper, confidence, observed, low, high, n in rows:
        if 0 < n < settings.minimum:
            confidence = observed = low = high = n = None
        bins.append(
            ReliabilityBin(
                lower=lower,
                upper=upper,
                confidence=confidence,
                observed=observed,
                low=low,
                high=high,
                n=n,
            )
        )
    return tuple(bins)
