"""What a reader of the figures has to know of the data, in sentences without a file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.cases import Case

UNKNOWN = "unknown"
"""Value of a subgroup column where the table says nothing."""


@dataclass(frozen=True, slots=True)
class Part:
    """The cases of one table."""

    words: str
    """How a sentence begins that speaks of the table."""
    cases: Sequence[Case]
    chosen: Sequence[Case]
    """Those that models are judged on."""
    columns: Sequence[str]
    """All columns of the table."""
    external: bool = False
    """Whether no model was trained on the sites of its chosen cases."""


def on_splits(parts: Sequence[Part], split: str | None, site_column: str) -> list[str]:
    """Which sets are used whole, which images have no split, and who is in two of them."""
    notes = []
    for part in parts:
        name, cases, mine = part.words, part.cases, part.chosen
        parted = any(case.split for case in cases)
        if not parted and split is None and not part.external:
            notes.append(
                f"{name} names no splits: all its images were used, also any that a model was "
                "trained on. Its figures are then too good."
            )
        if parted and split != "all" and (n := sum(not case.split for case in cases)):
            notes.append(f"{name} says no split for {_count(n, 'image')}, left out.")
        used = {case.split for case in mine}
        for kind in ("patient", "group"):
            here = {_who(case, kind, site_column) for case in mine} - {None}
            others = [case for case in cases if case.split and case.split not in used]
            elsewhere = here & {_who(case, kind, site_column) for case in others}
            if elsewhere:
                notes.append(
                    f"{name} has {_count(len(elsewhere), kind)} in these cases and in another "
                    "split: figures are too good where a model was trained on them."
                )
    return notes


def _who(case: Case, kind: str, site_column: str) -> tuple[str, str] | None:
    name = getattr(case, kind)
    return (case.columns.get(site_column, ""), name) if name else None


def on_columns(parts: Sequence[Part], by: Sequence[str]) -> list[str]:
    """Which tables lack a subgroup column that another one has."""
    return [
        f"{part.words} has no column '{column}': its cases are '{UNKNOWN}' there."
        for column in by
        for part in parts
        if column not in part.columns
    ]


def on_classes(parts: Sequence[Part], classes: Sequence[str]) -> list[str]:
    """Which classes no chosen case of a set is of."""
    notes = []
    for part in parts:
        absent = [
            word
            for index, word in enumerate(classes)
            if not any(_is_of(case, index) for case in part.chosen)
        ]
        if absent:
            notes.append(f"{part.words} has no case of the class {', '.join(absent)}.")
    return notes


def _is_of(case: Case, index: int) -> bool:
    return case.label == index if case.targets is None else case.targets[index] == 1


def on_groups(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Which classes are judged as one."""
    if not groups:
        return []
    told = "; ".join(f"{name}: {', '.join(members)}" for name, members in groups.items())
    return [
        f"All cases are judged at the level of groups ({told}): the probabilities of a group's "
        "classes are summed."
    ]


def on_copies(copies: Sequence[Sequence[int]], targets: NDArray[np.int8]) -> list[str]:
    """How many images occur twice among the chosen cases, and how many of them with other labels.

    `copies` has the rows of each such image.
    """
    notes = []
    if copies:
        notes.append(
            f"{_count(len(copies), 'image')} {'occurs' if len(copies) == 1 else 'occur'} more than "
            "once: each counts as a case of its own."
        )
    if odd := sum(len(np.unique(targets[list(rows)], axis=0)) > 1 for rows in copies):
        notes.append(
            f"{_count(odd, 'image')} {'has' if odd == 1 else 'have'} two different labels: one of "
            "them is wrong."
        )
    return notes


def copies_of(keys: Sequence[str]) -> list[list[int]]:
    """The rows of each key that occurs more than once."""
    places: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    return [rows for rows in places.values() if len(rows) > 1]


def on_overlap(keys: Sequence[str], validation: Sequence[str]) -> list[str]:
    """How many chosen images are also validation images."""
    both = len(set(keys) & set(validation))
    if not both:
        return []
    return [
        f"{_count(both, 'image')} {'is' if both == 1 else 'are'} in the validation split, too: "
        "thresholds and temperature have seen them."
    ]


def on_leaks(count: int) -> list[str]:
    """How many chosen images are also training images."""
    if not count:
        return []
    return [
        f"{_count(count, 'image')} {'is' if count == 1 else 'are'} in the train split, too: "
        "figures are too good where a model was trained on them."
    ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
