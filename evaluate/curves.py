"""Curves of one model on all cases: ROC, precision and recall, net benefit, reliability."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluate.bands import THRESHOLDS, Band, curve_bands
from evaluate.document import ClassCurves, Curve, ReliabilityBin
from evaluate.labelled import LabelledSet
from evaluate.metrics import decision_curve, reliability_bins, top_label
from evaluate.predictions import Predictions
from evaluate.scoring import Settings, seed_of

Floats = NDArray[np.float64]
_DIGITS = 6


def curves(
    labelled: LabelledSet, predictions: Predictions, settings: Settings, *, banded: bool
) -> tuple[ClassCurves, ...]:
    """The curves of each class, with pointwise bands if asked for; None where cases are too few."""
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
        groups = [labelled.patients[row] for row in np.flatnonzero(known)]
        bands = curve_bands(
            truth,
            scores,
            groups,
            resamples=settings.resamples if banded else 0,
            seed=seed_of("union", settings.seed),
            level=settings.level,
        )
        treat_all = decision_curve(truth, scores, THRESHOLDS).treat_all
        found.append(
            ClassCurves(
                name=name,
                roc=_curve(bands.roc, banded=banded),
                precision_recall=_curve(bands.precision_recall, banded=banded),
                net_benefit=_curve(bands.net_benefit, banded=banded),
                treat_all=Curve(x=_axis(THRESHOLDS), y=_numbers(treat_all)),
            )
        )
    return tuple(found)


def _curve(band: Band, *, banded: bool) -> Curve:
    low, high = (_numbers(bound) if banded else None for bound in (band.low, band.high))
    return Curve(x=_axis(band.x), y=_numbers(band.value), low=low, high=high)


def _axis(values: Floats) -> tuple[float, ...]:
    return tuple(values.round(_DIGITS).tolist())


def _numbers(values: Floats) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(v) else round(v, _DIGITS) for v in values.tolist())


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
