"""Figures of decisions: of the most probable class, or of scores above a threshold.

Binary functions take truth (n,) of 0 and 1, scores (n,) and a threshold: a case is flagged when its
score reaches the threshold. Multi-class functions take labels (n,) in [0, C) and probabilities
(n, C); the decision is the most probable class, the first of equals. A figure that the cases cannot
give is nan. All raise `DataError` for arrays that do not fit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.metrics import checks
from evaluate.metrics.counts import Counts, kappas, one_against_rest
from finetune.ranking import Floats
from finetune.scores import confusion, mean_of_defined
from merge_kit.errors import DataError


def binary_counts(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> Counts:
    """Count true and false positives and negatives at a threshold; arrays of shape ()."""
    flags, values = checks.binary(truth, scores)
    flagged = values >= threshold
    cells = (flags & flagged, ~flags & flagged, flags & ~flagged, ~flags & ~flagged)
    return Counts(*(np.asarray(cell.sum(), dtype=np.float64) for cell in cells))


def sensitivity(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """Return the share of the positives that are flagged, TP / (TP + FN)."""
    return float(binary_counts(truth, scores, threshold).sensitivity)


def specificity(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """Return the share of the negatives that are not flagged, TN / (TN + FP)."""
    return float(binary_counts(truth, scores, threshold).specificity)


def positive_predictive_value(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """Return the share of the flagged that are positive, TP / (TP + FP)."""
    return float(binary_counts(truth, scores, threshold).ppv)


def negative_predictive_value(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """Return the share of the not flagged that are negative, TN / (TN + FN)."""
    return float(binary_counts(truth, scores, threshold).npv)


def f1_score(truth: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> float:
    """Return 2 TP / (2 TP + FP + FN); nan without positives and without a case that is flagged."""
    return float(binary_counts(truth, scores, threshold).f1)


def predictive_values_at_prevalence(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """Return PPV and NPV where the class has the stated prevalence π, by Bayes' rule.

    PPV = π Se / (π Se + (1 - π)(1 - Sp)), NPV = (1 - π) Sp / ((1 - π) Sp + π (1 - Se)); Altman and
    Bland 1994, doi:10.1136/bmj.309.6947.102. The prevalence of a test set is seldom that of the
    clinic, and predictive values hang on it.

    Raises:
        DataError: a prevalence outside (0, 1), or a rate outside [0, 1].
    """
    checks.fraction("prevalence", prevalence)
    for name, rate in (("sensitivity", sensitivity), ("specificity", specificity)):
        if not (0 <= rate <= 1 or np.isnan(rate)):
            raise DataError(f"Expected {name} to lie between 0 and 1, but got {rate}.")
    cells = (sensitivity, 1 - specificity, 1 - sensitivity, specificity)
    counts = Counts(*(np.asarray(cell, dtype=np.float64) for cell in cells))
    return float(counts.ppv_at(prevalence)), float(counts.npv_at(prevalence))


def macro_f1(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean F1 over the classes that occur or are predicted."""
    return float(mean_of_defined(one_against_rest(_confusion(labels, probabilities)).f1))


def cohen_kappa(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return agreement beyond chance, 1 - (1 - p_o) / (1 - p_e); nan where p_e is 1.

    Cohen 1960, doi:10.1177/001316446002000104.
    """
    return float(kappas(_confusion(labels, probabilities)))


def quadratic_kappa(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return kappa with squared distances between ordered classes as the cost of an error.

    Cohen 1968, doi:10.1037/h0026256. For classes whose order means something (grades) only.
    """
    return float(kappas(_confusion(labels, probabilities), quadratic=True))


def _confusion(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    numbers: NDArray[np.int64]
    numbers, values = checks.multiclass(labels, probabilities)
    return confusion(numbers, values).astype(np.float64)
