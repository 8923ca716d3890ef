"""Figures that are functions of counts: of true and false positives and negatives, or a confusion.

All work element by element on arrays of any shape, so that one case set and thousands of resamples
take the same path. nan where there is nothing to divide by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.confusions import accuracies, recalls
from finetune.ranking import Floats, ratio
from finetune.scores import mean_of_defined

__all__ = ["Counts", "accuracies", "balanced_accuracies", "kappas", "one_against_rest", "recalls"]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many cases of the class, and of the rest, are flagged; arrays of one shape.

    Attributes:
        tp: true positives.
        fp: false positives.
        fn: false negatives.
        tn: true negatives.
    """

    tp: Floats
    fp: Floats
    fn: Floats
    tn: Floats

    @property
    def prevalence(self) -> Floats:
        """(TP + FN) / n."""
        return ratio(self.tp + self.fn, self.n)

    @property
    def n(self) -> Floats:
        """All cases."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def accuracy(self) -> Floats:
        """(TP + TN) / n."""
        return ratio(self.tp + self.tn, self.n)

    @property
    def sensitivity(self) -> Floats:
        """TP / (TP + FN), also called recall."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Floats:
        """TN / (TN + FP)."""
        return ratio(self.tn, self.tn + self.fp)

    @property
    def false_positive_rate(self) -> Floats:
        """FP / (FP + TN), 1 - specificity."""
        return ratio(self.fp, self.fp + self.tn)

    @property
    def ppv(self) -> Floats:
        """TP / (TP + FP), also called precision."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def npv(self) -> Floats:
        """TN / (TN + FN)."""
        return ratio(self.tn, self.tn + self.fn)

    @property
    def f1(self) -> Floats:
        """2 TP / (2 TP + FP + FN); nan where the class neither occurs nor is predicted."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def ppv_at(self, prevalence: NDArray[np.floating[Any]] | float) -> Floats:
        """PPV where the class has another prevalence π than here, by Bayes' rule.

        π Se / (π Se + (1 - π)(1 - Sp)); Altman and Bland 1994, doi:10.1136/bmj.309.6947.102.
        """
        hit = prevalence * self.sensitivity
        return ratio(hit, hit + (1 - prevalence) * (1 - self.specificity))

    def npv_at(self, prevalence: NDArray[np.floating[Any]] | float) -> Floats:
        """NPV where the class has another prevalence π than here, by Bayes' rule.

        (1 - π) Sp / ((1 - π) Sp + π (1 - Se)).
        """
        clear = (1 - prevalence) * self.specificity
        return ratio(clear, clear + prevalence * (1 - self.sensitivity))

    def net_benefit(self, threshold: NDArray[np.floating[Any]] | float) -> Floats:
        """TP / n - FP / n · p / (1 - p) at threshold probability p; Vickers and Elkin 2006."""
        return ratio(self.tp - self.fp * (threshold / (1 - threshold)), self.n)


def one_against_rest(confusion: Floats) -> Counts:
    """Return the counts of each class, (..., C), from confusions (..., C, C)."""
    tp = np.diagonal(confusion, axis1=-2, axis2=-1)
    fn, fp = confusion.sum(axis=-1) - tp, confusion.sum(axis=-2) - tp
    return Counts(tp, fp, fn, confusion.sum(axis=(-2, -1))[..., None] - tp - fn - fp)


def balanced_accuracies(confusion: Floats) -> Floats:
    """Return the mean recall over the classes that occur, (...,)."""
    return mean_of_defined(recalls(confusion))


def kappas(confusion: Floats, *, quadratic: bool = False) -> Floats:
    """Return Cohen's kappa of confusions (..., C, C), (...,).

    1 - Σ w_ij O_ij / Σ w_ij E_ij, with O the shares of the cells, E those expected from the margins
    alone, and w_ij = 1 off the diagonal (Cohen 1960, doi:10.1177/001316446002000104) or (i - j)²
    (Cohen 1968, doi:10.1037/h0026256). nan where chance alone would agree in full.
    """
    places = np.arange(confusion.shape[-1])
    gap = places[:, None] - places
    cost = (gap**2 if quadratic else gap != 0).astype(np.float64)
    n = confusion.sum(axis=(-2, -1))
    rows, columns = confusion.sum(axis=-1), confusion.sum(axis=-2)
    expected = np.einsum("...i,ij,...j->...", rows, cost, columns)
    return 1 - ratio(np.einsum("...ij,ij->...", confusion, cost) * n, expected)
