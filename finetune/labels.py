"""What a table says of a row's class or classes: labels -> positions in the class list."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.tables import Row, Table
from merge_kit.errors import LabelError

SEPARATOR = "|"
_MARKS = {"1": 1, "0": 0, "": -1, "1.0": 1, "0.0": 0}  # pandas writes whole numbers as 1.0


@dataclass(frozen=True, slots=True)
class Labels:
    """How the labels of one table are read."""

    classes: Sequence[str]
    known: Mapping[str, int | None]
    """Every label that occurs, with the position of its class; None when it has none."""
    multi_label: bool = False
    columns: Mapping[str, int] = field(default_factory=dict)
    """Columns that stand for a class, where the table has them in place of `label`."""
    nothing: frozenset[str] = frozenset()
    """Labels that mean none of the classes."""
    numbers: int = 0
    """How many of `classes` a number may name: all but the groups at their end."""
    annotated: frozenset[int] | None = None
    """Of several labels a case: the classes that these speak of; None for all."""

    def of(self, row: Row) -> tuple[int, tuple[int, ...] | None]:
        """The label (-1 for none, or where there may be several) and the targets of a row."""
        if not self.multi_label:
            index = self.known.get(row.fields.get("label", ""))
            return (-1 if index is None else index), None
        targets = [-1] * len(self.classes)
        for column, index in self.columns.items():
            targets[index] = _mark(row, column)
        if named := named_labels(row, multi_label=True):
            here = {self.known[label] for label in named if label not in self.nothing}
            targets = [int(index in here) for index in range(len(self.classes))]
        if self.annotated is not None:
            targets = [t if i in self.annotated else -1 for i, t in enumerate(targets)]
        return -1, tuple(targets)


def find_labels(
    table: Table,
    classes: Sequence[str],
    label_map: Mapping[str, str],
    require_labels: bool,
    multi_label: bool,
    groups: Sequence[str] = (),
    annotated: Sequence[str] | None = None,
) -> Labels:
    """How to read the labels of a table, as `finetune.cases.load_cases` tells.

    Raises LabelError when the table has none and they are required, or when an entry of `label_map`
    or `annotated` names no class, or a label or column that is not there.
    """
    numbers, classes = len(classes), (*classes, *groups)
    exact = {name: index for index, name in enumerate(classes)}
    folded: dict[str, int | None] = {}
    for name, index in exact.items():  # two classes that differ only in case match only exactly
        folded[name.casefold()] = None if name.casefold() in folded else index
    positions = {str(index): index for index in range(numbers)}  # a number is never a group

    def by_name(name: str) -> int | None:
        return exact.get(name, folded.get(name.casefold()))

    def index_of(label: str) -> int | None:
        if label in label_map:
            return by_name(label_map[label])
        return positions.get(label) if table.numbered else by_name(label)

    present = labels_in(table, multi_label=multi_label)
    nothing = frozenset(s for s, target in label_map.items() if multi_label and not target)
    for source, target in label_map.items():
        if by_name(target) is None and source not in nothing:
            raise LabelError(
                f"--map {source}={target} names no class of this federation "
                f"({nearest(target, classes)}): correct the part after the equals sign."
            )
        if source not in present:
            raise LabelError(
                f"--map {source}={target} names a label that never occurs in {table.name} "
                f"({nearest(source, sorted(present))}): correct it or leave it out."
            )
    columns = {}
    if multi_label and "label" not in table.columns:
        columns = _class_columns(table, {c: index_of(c) for c in table.columns}, classes)
    if require_labels and "label" not in table.columns and not columns:
        named = [c for c in table.columns if not multi_label and by_name(c) is not None]
        if named:
            raise LabelError(
                f"{table.name} has no column 'label' but one for the class '{named[0]}': "
                "'merge-kit evaluate' and 'compare' read such columns with --multi-label; "
                "elsewhere give one class in a column 'label'."
            )
        also = "and none named after a class " if multi_label else ""
        raise LabelError(
            f"{table.name} has no labels {also}(columns found: {', '.join(table.columns)}): "
            "add a column 'label', or sort the images into folders of classes."
        )
    known = {label: index_of(label) for label in present}
    spoken_of = None
    if annotated is not None:
        spoken_of = frozenset(_annotated(table, name, by_name(name), columns, classes)
                              for name in annotated)  # fmt: skip
    return Labels(classes, known, multi_label, columns, nothing, numbers, spoken_of)


def _annotated(
    table: Table,
    name: str,
    index: int | None,
    columns: Mapping[str, int],
    classes: Sequence[str],
) -> int:
    if index is None:
        raise LabelError(
            f"--annotated {name} names no class of this federation ({nearest(name, classes)}): "
            "correct it."
        )
    if columns and index not in columns.values():
        raise LabelError(
            f"--annotated names the class '{classes[index]}', for which {table.name} has no "
            "column: add the column, or leave the class out."
        )
    return index


def labels_in(table: Table, *, multi_label: bool = False) -> set[str]:
    """Every label that occurs in a table; where it has no column `label`, its columns may be."""
    if multi_label and "label" not in table.columns:
        return set(table.columns)
    named = {label for row in table.rows for label in named_labels(row, multi_label=multi_label)}
    return named | table.folders.keys()


def named_labels(row: Row, *, multi_label: bool) -> list[str]:
    """The labels in the column `label` of a row."""
    text = row.fields.get("label", "")
    parts = [part.strip() for part in text.split(SEPARATOR)] if multi_label else [text]
    return [part for part in parts if part]


def _class_columns(
    table: Table, index_of: Mapping[str, int | None], classes: Sequence[str]
) -> dict[str, int]:
    marks = [c for c in table.columns if c.isdigit()] if table.numbered else []
    if marks and len(marks) != len(classes):
        raise LabelError(
            f"{table.name} has labels of {len(marks)} classes, the model has {len(classes)} "
            f"({', '.join(classes)}): give the data that it was made for."
        )
    found: dict[int, str] = {}
    for column, index in index_of.items():
        if index is None:
            continue
        if index in found:
            raise LabelError(
                f"{table.name} has two columns for the class '{classes[index]}', "
                f"'{found[index]}' and '{column}': rename one, or correct --map."
            )
        found[index] = column
    return {column: index for index, column in sorted(found.items())}


def _mark(row: Row, column: str) -> int:
    text = row.fields.get(column, "")
    if text not in _MARKS:
        raise LabelError(
            f"{row.place}: the column '{column}' holds '{text}': write 1 (present), 0 (absent) or "
            "nothing (not annotated)."
        )
    return _MARKS[text]


def refuse_unknown_labels(
    table: Table, rows: Sequence[Row], labels: Labels, require_labels: bool
) -> None:
    """Refuse a row without a label, and a label that is no class, with the place of the first."""
    if labels.columns:
        return
    places: dict[str, str] = {label: str(path) for label, path in table.folders.items()}
    for row in rows:
        for label in named_labels(row, multi_label=labels.multi_label) or [""]:
            places.setdefault(label, row.place)
    for label, place in places.items():
        if label == "":
            if require_labels:
                raise LabelError(f"{place} has no label: fill it in or remove the row.")
        elif labels.known[label] is None and label not in labels.nothing:
            if _names_several(label, labels):
                raise LabelError(
                    f"{place}: label {label!r} names several classes: 'merge-kit evaluate' and "
                    "'compare' read such labels with --multi-label; elsewhere give one class."
                )
            last = labels.numbers - 1
            known = f"0 to {last}" if table.numbered else nearest(label, labels.classes)
            raise LabelError(
                f"{place}: label {label!r} is no class of this federation ({known}): "
                f"correct it or pass --map {label}=CLASS."
            )
        elif labels.annotated is not None and label not in labels.nothing:
            if labels.known[label] not in labels.annotated:
                raise LabelError(
                    f"{place}: label {label!r} is a class that --annotated does not name: name it "
                    f"there, or pass --map {label}= where it means none of those."
                )


def _names_several(label: str, labels: Labels) -> bool:
    known = {name.casefold() for name in labels.classes}
    parts = [part.strip().casefold() for part in label.split(SEPARATOR)]
    return not labels.multi_label and len(parts) > 1 and known.issuperset(parts)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint in a message: the nearest of the known words, or else what words there are."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    if near:
        return f"nearest: {folded[near[0]]}"
    shown = ", ".join(known[:10])
    return f"known: {shown}, ..." if len(known) > 10 else f"known: {shown}"
