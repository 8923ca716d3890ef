"""Confusion counts under case weights, and the scores that are functions of them.

A stack of confusions has the shape (..., C, C): row = true class, column = predicted class. Scores
take a stack and give (...,) or, a class each, (..., C); nan where there is nothing to divide by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from finetune.ranking import Floats, Places, ratio

Labels: TypeAlias = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Cells:
    """Cases sorted by a number in [0, count), so that sums within each number are one pass.

    Attributes:
        order: (n,) the cases, by number; all of them as they stand where that is an order.
        starts: where each number that occurs begins in `order`.
        numbers: those numbers.
        count: how many numbers there could be.
    """

    order: Places | slice
    starts: Places
    numbers: Places
    count: int

    def sums(self, values: Floats) -> Floats:
        """Add up values (n, R) within each number, (count, R)."""
        sums = np.zeros((self.count, values.shape[1]))
        if len(self.starts):
            sums[self.numbers] = np.add.reduceat(values[self.order], self.starts, axis=0)
        return sums

    def products(self, factor: Floats, values: Floats) -> Floats:
        """Add up factor (n,) times values (n, R) within each number, (count, R)."""
        sums = np.zeros((self.count, values.shape[1]))
        if not len(self.starts):
            return sums
        factor, values = factor[self.order], values[self.order]
        ends = np.append(self.starts[1:], len(values))
        for number, start, end in zip(self.numbers, self.starts, ends, strict=True):
            sums[number] = factor[start:end] @ values[start:end]
        return sums


def cells(numbers: Labels, count: int) -> Cells:
    """Sort cases by their numbers (n,), each in [0, count)."""
    order: Places | slice = slice(None)
    if np.count_nonzero(np.diff(numbers)) >= max(1, len(np.unique(numbers))):
        order = np.argsort(numbers, kind="stable")
    ordered = numbers[order].astype(np.int64)
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    return Cells(order, starts, ordered[starts], count)


def confusion_cells(labels: Labels, predicted: Labels, classes: int) -> Cells:
    """Sort cases by the cell of the confusion (C, C) that each of them falls into."""
    return cells(labels.astype(np.int64) * classes + predicted, classes * classes)


def confusions(sorted_cells: Cells, weights: Floats) -> Floats:
    """Return the confusion of each column of weights (n, R), (R, C, C)."""
    classes = round(sorted_cells.count**0.5)
    sums: Floats = sorted_cells.sums(weights).T.reshape(-1, classes, classes)
    return sums


def accuracies(confusion: Floats) -> Floats:
    """Return the share of cases on the diagonal, (...,)."""
    return ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum(axis=(-2, -1)))


def recalls(confusion: Floats) -> Floats:
    """Return the share of each class's cases that are predicted as such, (..., C)."""
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1))
