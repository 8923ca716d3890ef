"""Temperature scaling, fitted on validation cases (Guo et al. 2017, arXiv:1706.04599).

One number T > 0 for all classes: p_c becomes softmax(log p / T), or, for several labels at once,
sigmoid(logit(p) / T). The order of a case's classes stays, so no decision by the most probable
class changes. Probabilities stand for logits: softmax(log p) is p. All functions raise `DataError`
for arrays that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from evaluate.metrics import checks
from evaluate.metrics.calibration import LOG_EPSILON
from finetune.ranking import Floats
from merge_kit.errors import DataError

# T is looked for between these; where the loss falls all the way, the bound is the answer.
LOWEST, HIGHEST = 0.01, 100.0
_HALVINGS = 60


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the T that minimises the log loss of softmax(log p / T), nan for no case.

    The loss is convex in 1/T, and its slope is found to be 0 by bisection. Where no case is wrong
    the loss falls as T does, and T is `LOWEST`.

    Args:
        labels: (n,) integers in [0, C), of validation cases.
        probabilities: (n, C) in [0, 1].
    """
    numbers, values = checks.multiclass(labels, probabilities)
    logits = _logarithms(values)
    chosen = logits[np.arange(len(numbers)), numbers]

    def slope(inverse: float) -> float:
        return float(((_softmax(logits * inverse) * logits).sum(axis=1) - chosen).mean())

    return _minimum(slope) if len(numbers) else float("nan")


def apply_temperature(probabilities: ArrayLike, temperature: float) -> Floats:
    """Return softmax(log p / T) for probabilities (n, C), (n, C) float64."""
    values = _checked(probabilities, temperature)
    return _softmax(_logarithms(values) / temperature)


def fit_multilabel_temperature(targets: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the T that minimises the binary log loss of sigmoid(logit(p) / T).

    Args:
        targets: (n, C) of 1, 0 and -1 for what is not annotated, which takes no part; of
            validation cases.
        probabilities: (n, C) in [0, 1].

    nan where nothing is annotated.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    if targets.shape != probabilities.shape:
        raise DataError(
            f"Expected targets and probabilities of the same shape (n, classes), but got "
            f"{targets.shape} and {probabilities.shape}."
        )
    known = targets != -1
    truth, values = checks.binary_probabilities(targets[known], probabilities[known])
    logits = logit(values, LOG_EPSILON)

    def slope(inverse: float) -> float:
        return float(((sigmoid(logits * inverse) - truth) * logits).mean())

    return _minimum(slope) if len(truth) else float("nan")


def apply_multilabel_temperature(probabilities: ArrayLike, temperature: float) -> Floats:
    """Return sigmoid(logit(p) / T) for probabilities of any shape, float64."""
    values = _checked(probabilities, temperature)
    return sigmoid(logit(values, LOG_EPSILON) / temperature)


def logit(probabilities: Floats, epsilon: float) -> Floats:
    """Return log(p / (1 - p)), with p kept between epsilon and 1 - epsilon."""
    kept = np.clip(probabilities, epsilon, 1 - epsilon)
    logits: Floats = np.log(kept) - np.log1p(-kept)
    return logits


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), exact in both tails."""
    values: Floats = np.exp(-np.logaddexp(0, -logits))
    return values


def _minimum(slope: Callable[[float], float]) -> float:
    """Return the T at which a rising slope in 1/T is 0, by bisection of log T; 1 if all are."""
    if slope(1.0) == 0:
        return 1.0
    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if slope(float(np.exp(-middle))) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def _checked(probabilities: ArrayLike, temperature: float) -> Floats:
    if not (temperature > 0 and np.isfinite(temperature)):
        raise DataError(f"Expected temperature to be larger than 0, but got {temperature}.")
    return checks.unit_interval(np.asarray(probabilities, dtype=np.float64))


def _logarithms(probabilities: Floats) -> Floats:
    logarithms: Floats = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return logarithms


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares
