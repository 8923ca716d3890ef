"""What models say about the cases of a labelled set: the type, and the CSV files of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finetune.labels import nearest
from merge_kit.errors import DataError

PREFIX = "p_"
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one model says about the n cases of one `LabelledSet`, in its order.

    Attributes:
        model: the name that the report shows.
        role: base, merged, pooled, other or site:<site>.
        classes: the C class names, in the order of the columns.
        probabilities: (n, C) float64 in [0, 1]: softmax, or sigmoid where `multi_label`.
        fingerprint: of the weights; None for imported predictions.
        multi_label: the columns are independent of each other.

    Raises:
        DataError: a shape that does not fit, or a probability outside [0, 1] or NaN.
    """

    model: str
    role: str
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    fingerprint: str | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 2 or self.probabilities.shape[1] != len(self.classes):
            raise DataError(
                f"the predictions of model '{self.model}' have shape {self.probabilities.shape}, "
                f"which does not fit {len(self.classes)} classes: predict again."
            )
        likely = (self.probabilities >= 0) & (self.probabilities <= 1 + 1e-6)  # no to nan
        if not likely.all():
            row = int(np.flatnonzero(~likely.all(axis=1))[0])
            raise DataError(
                f"model '{self.model}' gives case {row + 1} a probability outside [0, 1]: check "
                "its weights for NaN, and that its outputs are probabilities."
            )

    def __len__(self) -> int:
        return len(self.probabilities)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Predictions:
        """The predictions of these rows, in their order."""
        return replace(self, probabilities=self.probabilities[np.asarray(indices, np.int64)])

    def restricted_to(self, classes: Sequence[str]) -> Predictions:
        """The predictions on some classes, whose names are matched without regard to case.

        Single-label rows are divided by their sum over these classes: what the model would say if
        it knew no others. A row that gives them nothing at all gives each the same.

        Raises:
            DataError: the model does not know one of them.
        """
        folded = [name.casefold() for name in self.classes]
        if unknown := [name for name in classes if name.casefold() not in folded]:
            raise DataError(
                f"model '{self.model}' does not know the class '{unknown[0]}' "
                f"({nearest(unknown[0], self.classes)}): compare models on the classes in common."
            )
        kept = self.probabilities[:, [folded.index(name.casefold()) for name in classes]]
        if not self.multi_label:
            total = kept.sum(axis=1, keepdims=True)
            uniform = np.full_like(kept, 1 / len(classes))
            kept = np.where(total > 0, kept / np.where(total > 0, total, 1), uniform)
        return replace(self, classes=tuple(classes), probabilities=kept)
