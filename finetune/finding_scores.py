"""Scores of a classifier of findings, of which a case has any number, under case weights.

Pure functions of targets (n, C), 1 present, 0 absent and -1 not annotated, and probabilities (n, C)
of each finding by itself. What was not annotated counts nowhere. Weights (R, n) give (R, C), nan
where a finding has no case with it or none without; see `finetune.scores`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.ranking import Floats, auroc, count, rank, ratio
from merge_kit.errors import DataError

Targets = NDArray[np.integer[Any]]
THRESHOLD = 0.5
"""A finding is said to be there from this probability on."""


def fitting(targets: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    """Targets (n, C) as int64 and probabilities (n, C) as float64.

    Raises:
        DataError: shapes that do not fit each other, or targets other than 1, 0 and -1.
    """
    told, values = np.asarray(targets), np.asarray(probabilities)
    if told.ndim != 2 or told.shape != values.shape:
        raise DataError(
            f"Expected targets and probabilities of one shape (n, classes), but got {told.shape} "
            f"and {values.shape}."
        )
    if not np.isin(told, (-1, 0, 1)).all():
        raise DataError("Expected targets of 1, 0 or -1, but some are others.")
    return told.astype(np.int64), values.astype(np.float64)


def aurocs(targets: Targets, probabilities: Floats, weights: Floats) -> Floats:
    """The AUROC of each finding over the cases in which it was annotated, (R, C)."""
    found = []
    for truth, scores in zip(targets.T, probabilities.T, strict=True):
        rows = np.flatnonzero(truth >= 0)
        ranking = rank(truth[rows] == 1, scores[rows])
        found.append(auroc(ranking, count(ranking, weights.T[rows])))
    return np.stack(found, axis=1)


def balanced_accuracies(targets: Targets, probabilities: Floats, weights: Floats) -> Floats:
    """The mean of sensitivity and specificity of each finding at probability 0.5, (R, C)."""
    said = probabilities >= THRESHOLD
    present, absent = targets == 1, targets == 0
    sensitivity = ratio(weights @ (present & said), weights @ present.astype(np.float64))
    specificity = ratio(weights @ (absent & ~said), weights @ absent.astype(np.float64))
    found: Floats = (sensitivity + specificity) / 2
    return found
