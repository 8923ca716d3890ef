"""What the arrays that a metric is given must look like."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.ranking import Floats
from finetune.scores import fitting
from merge_kit.errors import DataError

Flags: TypeAlias = NDArray[np.bool_]
# A sum of float32 probabilities may pass 1 by this much.
_ROUNDING = 1e-6


def binary(truth: ArrayLike, scores: ArrayLike) -> tuple[Flags, Floats]:
    """Return truth (n,) as bool and scores (n,) as float64.

    Raises:
        DataError: shapes that differ, truth other than 0 and 1, scores that are not finite.
    """
    truth, scores = np.asarray(truth), np.asarray(scores)
    if truth.ndim != 1 or scores.shape != truth.shape:
        raise DataError(
            f"Expected truth and scores of the same shape (n,), but got {truth.shape} and "
            f"{scores.shape}."
        )
    odd = ~np.isin(truth, (0, 1))
    if odd.any():
        raise DataError(
            f"Expected truth to be 0 or 1, but that of case {int(odd.argmax())} is "
            f"{truth[odd.argmax()]}."
        )
    finite = np.isfinite(scores)
    if not finite.all():
        raise DataError(f"Expected finite scores, but that of case {int(finite.argmin())} is not.")
    return truth.astype(np.bool_), scores.astype(np.float64)


def binary_probabilities(truth: ArrayLike, probabilities: ArrayLike) -> tuple[Flags, Floats]:
    """Return truth (n,) as bool and probabilities (n,) as float64, each in [0, 1].

    Raises:
        DataError: as `binary`, or probabilities outside [0, 1].
    """
    flags, floats = binary(truth, probabilities)
    return flags, unit_interval(floats)


def multiclass(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    """Return labels (n,) as int64 and probabilities (n, C) as float64, each in [0, 1].

    Raises:
        DataError: shapes that do not fit, labels outside [0, C), values outside [0, 1].
    """
    numbers, values = fitting(labels, probabilities)
    return numbers, unit_interval(values)


def unit_interval(probabilities: Floats) -> Floats:
    """Return probabilities (n, ...) cut to [0, 1].

    Raises:
        DataError: one lies outside by more than rounding, or is not finite.
    """
    fine = (probabilities >= -_ROUNDING) & (probabilities <= 1 + _ROUNDING)  # no to nan
    if not fine.all():
        rows = fine.reshape(len(fine), -1).all(axis=1)
        raise DataError(
            f"Expected probabilities between 0 and 1, but those of case {int(rows.argmin())} "
            f"are not: apply softmax or sigmoid to logits first."
        )
    return np.clip(probabilities, 0.0, 1.0)


def fraction(name: str, value: float) -> float:
    """Return a value strictly between 0 and 1.

    Raises:
        DataError: it is not.
    """
    if not 0 < value < 1:
        raise DataError(f"Expected {name} to lie between 0 and 1, but got {value}.")
    return value
