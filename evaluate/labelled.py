"""What is known of the cases that models are judged on: one set of arrays for all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from finetune.cases import Case
from merge_kit.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSet:
    """What is known of n labelled cases, in the order in which all models answer for them.

    Attributes:
        classes: the C class names, in the order of the columns.
        files: (n,) the image of each case, as its table names it.
        targets: (n, C) int8: 1 present, 0 absent, -1 not annotated; one-hot rows unless
            `multi_label`.
        sites: (n,) site of each case, "" when unknown.
        multi_label: a case may be of several classes, or of none.
        patients: (n,) who belongs together, None when unknown; a name holds within its site and
            is told apart from the same name at another.
        unit: what `patients` names: "patient", "group" (near duplicates), or "case" (nothing).
        splits: (n,) "train", "val", "test", or "" when the table says none.
        columns: name -> (n,) values of a subgroup column, "unknown" where the cell is empty.
        keys: (n,) SHA-256 of each image's content, 64 hexadecimal digits.
        cases: (n,) where the images are; empty when nothing can be predicted, only judged.
        groups: the classes that stand for several of a model's, whose probabilities are summed.

    Raises:
        DataError: lengths or targets that do not fit.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    targets: NDArray[np.int8]
    sites: tuple[str, ...]
    multi_label: bool = False
    patients: tuple[str | None, ...] = ()
    unit: str = "case"
    splits: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.files)
        object.__setattr__(self, "patients", self.patients or (None,) * n)
        object.__setattr__(self, "splits", self.splits or ("",) * n)
        lengths = {len(self.sites), len(self.patients), len(self.splits)}
        lengths |= {len(self.keys) or n, len(self.cases) or n}
        lengths |= {len(column) for column in self.columns.values()}
        if lengths != {n} or self.targets.shape != (n, len(self.classes)):
            raise DataError(
                f"a labelled set of {n} files and {len(self.classes)} classes has targets of shape "
                f"{self.targets.shape} or columns of another length: give a row for each file."
            )
        if not np.isin(self.targets, (-1, 0, 1)).all():
            raise DataError("the targets of a labelled set are 1, 0 or -1: correct them.")
        one_hot = (self.targets >= 0).all() and (self.targets.sum(axis=1) == 1).all()
        if not self.multi_label and not one_hot:
            raise DataError(
                "a case has no class or several: give one for each, or make the set multi-label."
            )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def model_classes(self) -> tuple[str, ...]:
        """The classes that a model has to know: those in groups in the place of the groups."""
        return tuple(m for name in self.classes for m in self.groups.get(name, (name,)))

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) int64 position of each case's class.

        Raises:
            DataError: the set is multi-label.
        """
        if self.multi_label:
            raise DataError("a multi-label set has no single label for a case: use its targets.")
        labels: NDArray[np.int64] = np.argmax(self.targets, axis=1).astype(np.int64)
        return labels

    def rows(self, scope: str = "union") -> NDArray[np.int64]:
        """The rows of a scope: "union", "site:<site>" or "group:<column>=<value>".

        Raises:
            DataError: another scope, or a column that is not there.
        """
        kind, _, rest = scope.partition(":")
        if scope == "union":
            return np.arange(len(self), dtype=np.int64)
        column, equals, value = rest.partition("=")
        if kind == "site":
            values, value = self.sites, rest
        elif kind == "group" and equals and column in self.columns:
            values = self.columns[column]
        else:
            raise DataError(f"'{scope}' names no part of this labelled set.")
        return np.array([row for row, found in enumerate(values) if found == value], np.int64)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> LabelledSet:
        """The set of these rows, in their order."""
        rows = [int(index) for index in indices]

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[row] for row in rows)

        return replace(
            self,
            files=pick(self.files),
            targets=self.targets[rows],
            sites=pick(self.sites),
            patients=tuple(self.patients[row] for row in rows),
            splits=pick(self.splits),
            columns={name: pick(values) for name, values in self.columns.items()},
            keys=pick(self.keys) if self.keys else (),
            cases=tuple(self.cases[row] for row in rows) if self.cases else (),
        )

    def restricted_to(self, classes: Sequence[str]) -> LabelledSet:
        """The set on some of its classes; single-label cases of the others are left out."""
        columns = [self.classes.index(name) for name in classes]
        targets = self.targets[:, columns]
        kept = replace(self, classes=tuple(classes), targets=targets, multi_label=True)
        if self.multi_label:
            return kept
        return replace(kept.take(np.flatnonzero(targets.sum(axis=1))), multi_label=False)
