"""What models say about the cases of a labelled set: the type, and the CSV files of it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluate.labelled import LabelledSet
from finetune.labels import SEPARATOR, nearest
from finetune.tables import csv_records
from merge_kit.errors import DataError, LabelError

_FIXED = ["model", "file", "site", "label", "predicted"]
PREFIX = "p_"
SUM_TOLERANCE = 1e-3
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


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
        if not self.multi_label and len(classes) < len(self.classes):
            total = kept.sum(axis=1, keepdims=True)
            uniform = np.full_like(kept, 1 / len(classes))
            kept = np.where(total > 0, kept / np.where(total > 0, total, 1), uniform)
        return replace(self, classes=tuple(classes), probabilities=kept)

    def fitted_to(self, labelled: LabelledSet) -> Predictions:
        """The predictions on the classes of a set, those of its groups summed; `restricted_to`."""
        if self.classes == labelled.classes:
            return self
        own = self.restricted_to(labelled.model_classes)
        sizes = [len(labelled.groups.get(name, (name,))) for name in labelled.classes]
        starts = np.cumsum([0, *sizes[:-1]])
        sums = np.add.reduceat(own.probabilities, starts, axis=1)
        return replace(own, classes=labelled.classes, probabilities=sums)


def to_csv(predictions: Sequence[Predictions], labelled: LabelledSet) -> str:
    """predictions.csv: one row a model and case, one column a class.

    The classes of a multi-label case are joined by "|", and so are those predicted with 0.5 or
    more. Nine digits: read again, the figures are the same.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = labelled.classes
    writer.writerow([*_FIXED, *(f"{PREFIX}{name}" for name in classes)])
    truth = [_joined(classes, row == 1) for row in labelled.targets]
    for one in predictions:
        chosen = one.probabilities >= 0.5
        if not one.multi_label:
            chosen = np.eye(len(classes), dtype=bool)[np.argmax(one.probabilities, axis=1)]
        for row, file in enumerate(labelled.files):
            values = [f"{value:.9g}" for value in one.probabilities[row]]
            guess = _joined(classes, chosen[row])
            writer.writerow([one.model, file, labelled.sites[row], truth[row], guess, *values])
    return text.getvalue()


def _joined(classes: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return SEPARATOR.join(name for name, here in zip(classes, chosen, strict=True) if here)


def read_classes(path: Path) -> tuple[str, ...]:
    """The classes that a predictions file has columns for, in their order.

    Raises LabelError when it has none.
    """
    _, header = next(csv_records(path), (1, []))
    classes = tuple(n.removeprefix(PREFIX) for n in header if n.startswith(PREFIX) and n != PREFIX)
    if "file" not in header or not classes:
        raise LabelError(
            f"{path} line 1 must be a header with the column file and a column {PREFIX}<class> for "
            f"each class (found: {', '.join(header)}): add it or rename the columns."
        )
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise LabelError(f"{path} line 1 names the column {twice[0]!r} twice: rename one.")
    return classes


def speaks_of(path: Path, labelled: LabelledSet, model: str) -> bool:
    """Whether a predictions file has a row of this model for any file of a labelled set.

    Raises LabelError when it is no predictions file.
    """
    read_classes(path)
    records = csv_records(path)
    _, header = next(records)
    files = set(labelled.files)
    column = header.index("file")
    rows = _rows_of(path, header, list(records), model)
    return any(record[column].replace("\\", "/") in files for _, record in rows)


def read_imported(
    path: Path,
    labelled: LabelledSet,
    *,
    model: str,
    role: str = "other",
    listed: Collection[str] = (),
    restrict: bool = False,
) -> Predictions:
    """Read one model's predictions from a CSV, joined to a labelled set by file.

    The columns are `file`, ``p_<class>`` for each class of the set in any order, and optionally
    `site` (needed where two sites have a file of one name) and `model`: where that names several,
    the rows of `model` are read. Others, such as those of predictions.csv, are not looked at.

    `listed` are files that may occur although they are no case of the set. With `restrict` the file
    may have columns of other classes, too: see `Predictions.restricted_to`.

    Raises
    ------
    DataError
        LabelError with the line: a class column that is missing or unknown, a probability that is
        no number in [0, 1], a row of a single-label set that does not sum to 1, a file that is
        unknown or listed twice; or without one: a case that has no row.
    """
    classes = read_classes(path)
    _check_classes(path, classes, labelled, restrict)
    records = csv_records(path)
    _, header = next(records)
    rows = _rows_of(path, header, list(records), model)
    columns = [header.index(f"{PREFIX}{name}") for name in classes]
    by_file: dict[str, list[int]] = {}
    for row, file in enumerate(labelled.files):
        by_file.setdefault(file, []).append(row)
    found = np.full((len(labelled), len(classes)), np.nan)
    lines: dict[int, int] = {}
    for line, record in rows:
        place = f"{path} line {line}"
        file = record[header.index("file")].replace("\\", "/")
        site = record[header.index("site")] if "site" in header else None
        if file not in by_file:
            if file not in listed:
                raise LabelError(
                    f"{place}: {file} is no image of the data ({nearest(file, list(by_file))}): "
                    "correct the name or remove the line."
                )
            continue
        case = _case_of(place, file, site, by_file[file], labelled)
        if case is None:
            continue
        if case in lines:
            raise LabelError(
                f"{place} lists {file}, as does line {lines[case]}: remove one of the two."
            )
        lines[case] = line
        found[case] = _numbers(place, record, columns, header, labelled.multi_label)
    if missing := sorted(set(range(len(labelled))) - lines.keys()):
        raise DataError(
            f"{path} has no prediction for {labelled.files[missing[0]]} ({len(missing)} missing "
            "in all): every model answers for the same cases."
        )
    told = Predictions(model, role, classes, found, multi_label=labelled.multi_label)
    return told.fitted_to(labelled)


def _check_classes(
    path: Path, classes: Sequence[str], labelled: LabelledSet, restrict: bool
) -> None:
    here = [name.casefold() for name in classes]
    wanted = [name.casefold() for name in labelled.model_classes]
    for name in labelled.model_classes:
        if name.casefold() not in here:
            raise LabelError(
                f"{path} line 1 has no column {PREFIX}{name} ({nearest(name, classes)}): add it."
            )
    for name in classes:
        if here.count(name.casefold()) > 1:
            raise LabelError(f"{path} line 1 has two columns {PREFIX}{name}: rename one.")
        if name.casefold() not in wanted and not restrict:
            raise LabelError(
                f"{path} line 1: the column {PREFIX}{name} is of no class "
                f"({nearest(name, labelled.model_classes)}): rename or remove it."
            )


def _rows_of(
    path: Path, header: Sequence[str], records: Sequence[tuple[int, list[str]]], model: str
) -> list[tuple[int, list[str]]]:
    """The records of one model."""
    for line, record in records:
        if len(record) != len(header):
            raise LabelError(
                f"{path} line {line} has {len(record)} fields where the header has {len(header)}: "
                "correct it, and put quotes around a field that holds a comma."
            )
    if "model" not in header:
        return list(records)
    column = header.index("model")
    names = list(dict.fromkeys(record[column] for _, record in records))
    if len(names) < 2:
        return list(records)
    if model not in names:
        raise DataError(
            f"{path} has predictions of {', '.join(names)} and none of '{model}': name one of "
            "them with NAME=FILE."
        )
    return [(line, record) for line, record in records if record[column] == model]


def _case_of(
    place: str, file: str, site: str | None, rows: Sequence[int], labelled: LabelledSet
) -> int | None:
    """The row of the set that a line speaks of; None for one of a site that was not chosen."""
    if site is not None:
        rows = [row for row in rows if labelled.sites[row] in (site, "")]
        return rows[0] if len(rows) == 1 else None
    if len(rows) > 1:
        raise LabelError(
            f"{place}: {file} is a case of {' and of '.join(labelled.sites[r] for r in rows)}: "
            "add a column site."
        )
    return rows[0]


def plain_number(text: str) -> float:
    """A decimal number as programs write it; nan for all else that Python would read as one."""
    return float(text) if _NUMBER.fullmatch(text.strip(" ")) else math.nan


def _numbers(
    place: str, record: Sequence[str], columns: Sequence[int], header: Sequence[str], several: bool
) -> list[float]:
    values = []
    for column in columns:
        value = plain_number(record[column])
        if not 0 <= value <= 1:
            raise LabelError(
                f"{place}: the column {header[column]} holds '{record[column]}': give a "
                "probability between 0 and 1."
            )
        values.append(value)
    if not several and abs(sum(values) - 1) > SUM_TOLERANCE:
        raise LabelError(
            f"{place}: the probabilities sum to {sum(values):.4g}, not to 1: give softmax outputs; "
            "where a case may have several classes, say so with --multi-label."
        )
    return values
