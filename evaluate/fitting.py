"""What is fitted on validation cases: the temperature of a model, and thresholds of its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluate.document import Operating
from evaluate.labelled import LabelledSet
from evaluate.metrics import (
    apply_multilabel_temperature,
    apply_temperature,
    fit_multilabel_temperature,
    fit_temperature,
    threshold_at_specificity,
)
from evaluate.predictions import Predictions

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Validation:
    """Cases that thresholds and temperatures are fitted on, never those that figures are of."""

    labelled: LabelledSet
    predictions: Sequence[Predictions]
    """Of the report's models, by name; one that is missing gets no thresholds, no temperature."""
    calibrate: bool = False
    """Divide every model's logits by a temperature of its own."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """One model's predictions, calibrated if asked for, and its operating points."""

    predictions: Predictions
    temperature: float | None = None
    points: tuple[Operating, ...] = ()

    def thresholds(self, classes: Sequence[str]) -> Mapping[str, Floats]:
        """Wanted specificity as text -> (C,) threshold of each class, nan where there is none."""
        found: dict[str, Floats] = {}
        for point in self.points:
            row = found.setdefault(f"{point.specificity:g}", np.full(len(classes), np.nan))
            if point.threshold is not None:
                row[list(classes).index(point.name)] = point.threshold
        return found


def fit(
    predictions: Predictions,
    own: Predictions,
    validation: Validation,
    specificities: Sequence[float],
    minimum: int,
) -> Fitted:
    """Fit one model on the validation cases; `own` are its predictions of those.

    A class with fewer than `minimum` validation cases of the rest gets no threshold: its
    specificity would be a guess.
    """
    labelled, temperature = validation.labelled, None
    if validation.calibrate:
        temperature = _temperature(labelled, own)
    if temperature is not None:
        own, predictions = (_divided(p, temperature) for p in (own, predictions))
    points = []
    for column, name in enumerate(labelled.classes):
        known = labelled.targets[:, column] >= 0
        truth, scores = labelled.targets[known, column], own.probabilities[known, column]
        enough = int((truth == 0).sum()) >= max(minimum, 1)
        for wanted in specificities:
            threshold = threshold_at_specificity(truth, scores, wanted) if enough else None
            points.append(Operating(name=name, specificity=wanted, threshold=threshold))
    return Fitted(predictions, temperature, tuple(points))


def _temperature(labelled: LabelledSet, own: Predictions) -> float | None:
    """None where no validation case is annotated."""
    if labelled.multi_label:
        found = fit_multilabel_temperature(labelled.targets, own.probabilities)
    else:
        found = fit_temperature(labelled.labels, own.probabilities)
    return None if np.isnan(found) else found


def _divided(predictions: Predictions, temperature: float) -> Predictions:
    apply = apply_multilabel_temperature if predictions.multi_label else apply_temperature
    return replace(predictions, probabilities=apply(predictions.probabilities, temperature))
