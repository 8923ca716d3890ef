"""From tables of labelled images to labelled sets: splits, sites, subgroups, content keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluate import data_notes
from evaluate.data_notes import UNKNOWN, Part
from evaluate.labelled import LabelledSet
from finetune.cases import Case, cases_of, content_key
from finetune.labels import labels_in, nearest
from finetune.splits import split_of
from finetune.tables import ArrayItem, Table, read_table
from merge_kit.errors import DataError, ImageError, LabelError, UsageError
from merge_kit.labelspace import LabelSpace


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` found."""

    chosen: LabelledSet
    """The cases to judge models on."""
    validation: LabelledSet | None
    """The cases of the split "val", for thresholds and temperature; None where there are none."""
    notes: tuple[str, ...]
    """What a reader of the figures has to know, a sentence each; none names a file."""
    left_out: tuple[str, ...]
    """A sentence for each image that cannot be read at all."""
    copies: tuple[tuple[str, ...], ...]
    """The files of each image that occurs more than once among the chosen, or also in training."""
    listed: frozenset[str]
    """Every file that the tables list, chosen or not."""
    external: tuple[str, ...] = ()
    """Sites that no model was trained on."""

    def fitted_without_external(self) -> Loaded:
        """Without validation cases of external sites: else they would not be external."""
        if self.validation is None or not self.external:
            return self
        outside = np.isin(self.validation.sites, self.external)
        kept = self.validation.take(np.flatnonzero(~outside))
        return replace(self, validation=kept if len(kept) else None)

    def restricted_to(self, classes: Sequence[str]) -> Loaded:
        """The cases of some of the classes; see `LabelledSet.restricted_to`.

        Raises:
            DataError: no case is of these classes.
        """
        chosen = self.chosen.restricted_to(classes)
        if not len(chosen):
            raise DataError(f"no case is of {', '.join(classes)}: there is nothing to compare on.")
        validation = self.validation and self.validation.restricted_to(classes)
        kept = validation if validation is not None and len(validation) else None
        return replace(self, chosen=chosen, validation=kept)


@dataclass(frozen=True, slots=True)
class _Source:
    """One data table, read."""

    name: str
    """How sentences call it; the site of its cases where it has no column for that."""
    named: bool
    table: Table

    @property
    def words(self) -> str:
        """How a sentence begins that speaks of it."""
        return f"The set '{self.name}'" if self.named else "The table"


def load(
    data: Sequence[str | Path],
    classes: Sequence[str],
    *,
    images: Path | None = None,
    label_map: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    split: str | None = None,
    site_column: str = "site",
    by: Sequence[str] = (),
    external: Sequence[str] = (),
    multi_label: bool = False,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    grouped: bool = False,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:
    """Read labelled cases from one or several tables, in their order.

    Parameters
    ----------
    data
        ``PATH`` or ``NAME=PATH``, each as in `finetune.cases.load_cases`. Where a table has no
        site column, its name is the site of its cases; a single table without a name has no site.
    label_map, where
        As in `load_cases`; a label may occur in any of the tables, a column must be in all.
    split
        "train", "val", "test" or "all"; by default, for each table, its test split where it has
        splits, else all of it.
    by
        Columns whose values make subgroups.
    external
        Sites that no model was trained on, several in one text between commas.
    groups, grouped
        Groups of the classes (see `labelspace.LabelSpace`), and whether every case is judged at
        their level: a label may then name one, and the classes of the outermost are one class.
    progress
        Called with the number of images read for their content key and of all.

    Raises
    ------
    UsageError
        Two tables of one name, a file in two tables, or ``NAME=`` without a path.
    DataError
        A table cannot be used, or no case is left; LabelError names the line or the column.
    """
    sources = _read(data, images, multi_label)
    tables = [source.table for source in sources]
    _check_columns(tables, site_column, by)
    space = LabelSpace(tuple(classes), groups or {})
    by_source = [
        cases_of(
            source.table,
            classes=classes,
            label_map=_entries_for(source.table, tables, label_map or {}, multi_label),
            where=where,
            multi_label=multi_label,
            groups=() if multi_label else tuple(space.groups),
        )
        for source in sources
    ]
    if grouped:
        classes = space.top
        by_source = [_at_groups(cases, space) for cases in by_source]
    _refuse_groups(by_source, [*classes], space)
    _refuse_file_twice(sources, by_source)
    pairs = list(zip(sources, by_source, strict=True))
    chosen = [_choose(source, cases, split) for source, cases in pairs]
    wanted = [[] if split in ("all", "val") else split_of(cases, "val") for cases in by_source]
    flat = [case for part in (*chosen, *wanted) for case in part]
    keys, unreadable = _content_keys(flat, skip_unreadable, progress)

    def gather(parts: Sequence[Sequence[Case]]) -> LabelledSet:
        placed = [
            (case, _site(source, case, site_column))
            for source, part in zip(sources, parts, strict=True)
            for case in part
            if case in keys
        ]
        found = _labelled_set(placed, keys, classes, by, multi_label)
        return replace(found, groups={n: space.members(n) for n in classes if n in space.groups})

    found, validation = gather(chosen), gather(wanted)
    if not len(found) or not (found.targets >= 0).any():
        raise DataError(
            f"no case of {', '.join(source.table.name for source in sources)} is labelled and can "
            "be read: there is nothing to judge a model on."
        )
    outside = _sites_named(external, found.sites)
    parts = [
        Part(
            source.words,
            cases,
            mine,
            source.table.columns,
            external=all(_site(source, case, site_column) in outside for case in mine),
        )
        for (source, cases), mine in zip(pairs, chosen, strict=True)
    ]
    copies = data_notes.copies_of(found.keys)
    trained = [case for cases in by_source for case in cases if case.split == "train"]
    leaked = _leaked(found, [case for case in trained if case not in keys])
    notes = [
        *data_notes.on_groups(found.groups),
        *data_notes.on_splits(parts, split, site_column),
        *data_notes.on_columns(parts, by),
        *data_notes.on_classes(parts, classes),
        *data_notes.on_copies(copies, found.targets),
        *data_notes.on_overlap(found.keys, validation.keys),
        *data_notes.on_leaks(len(leaked)),
    ]
    return Loaded(
        found,
        validation if len(validation) else None,
        tuple(notes),
        unreadable,
        (*(tuple(found.files[row] for row in rows) for rows in copies), *leaked),
        frozenset(row.fields["file"] for table in tables for row in table.rows),
        outside,
    )


def _at_groups(cases: Sequence[Case], space: LabelSpace) -> list[Case]:
    """Cases whose label is a place among `space.top`."""
    holder = {c: place for place, name in enumerate(space.top) for c in space.members(name)}
    places = [holder[space.members(name)[0]] for name in space.names]
    return [replace(case, label=places[case.label]) for case in cases]


def _refuse_groups(
    by_source: Sequence[Sequence[Case]], classes: Sequence[str], space: LabelSpace
) -> None:
    for case in (case for cases in by_source for case in cases):
        if case.label >= len(classes):
            raise LabelError(
                f"{case.file} has the label '{space.names[case.label]}', a group of classes: "
                "'merge-kit evaluate --groups' judges models at the level of groups."
            )


def _sites_named(texts: Sequence[str], sites: Sequence[str]) -> tuple[str, ...]:
    """The sites that are named; what is no site as a whole is several between commas."""
    known = set(sites)
    parts = [[text] if text in known else text.split(",") for text in texts]
    return tuple(dict.fromkeys(part.strip() for row in parts for part in row if part.strip()))


def _leaked(found: LabelledSet, trained: Sequence[Case]) -> list[tuple[str, str]]:
    """Files of chosen cases whose image is also among training cases, each with one of these.

    A file is read only if one of the chosen has its size.
    """
    sizes = {os.stat(case.source).st_size for case in found.cases if isinstance(case.source, Path)}
    names: dict[str, str] = {}
    for case in trained:
        with suppress(OSError, ImageError):
            if not isinstance(case.source, Path) or os.stat(case.source).st_size in sizes:
                names.setdefault(content_key(case), case.file)
    pairs = zip(found.files, found.keys, strict=True)
    return [(file, names[key]) for file, key in pairs if key in names]


def _read(data: Sequence[str | Path], images: Path | None, multi_label: bool) -> list[_Source]:
    sources: list[_Source] = []
    for text in data:
        name, equals, path = str(text).partition("=")
        if not equals or Path(text).exists():
            name, path = "", str(text)
        elif not name or not path:
            raise UsageError(f"--data {text}: write it as --data NAME=PATH.")
        table = read_table(Path(path), images, multi_label=multi_label)
        file = Path(table.name).absolute()
        stem = file.parent.name if file.name == "labels.csv" else file.stem
        sources.append(_Source(name or stem, bool(name) or len(data) > 1, table))
        if [source.name for source in sources].count(sources[-1].name) > 1:
            raise UsageError(
                f"two sets of data are called '{sources[-1].name}': tell them apart with "
                "--data NAME=PATH."
            )
    return sources


def _check_columns(tables: Sequence[Table], site_column: str, by: Sequence[str]) -> None:
    known = sorted({column for table in tables for column in table.columns})
    asked = [("--by", column) for column in by]
    asked += [("--site-column", site_column)] if site_column != "site" else []
    for option, column in asked:
        if column not in known:
            where = " and ".join(table.name for table in tables)
            raise LabelError(
                f"{option} {column}: {where} has no such column ({nearest(column, known)}): "
                "correct it."
            )


def _entries_for(
    table: Table, tables: Sequence[Table], label_map: Mapping[str, str], multi_label: bool
) -> dict[str, str]:
    """The entries whose label occurs in this table, or in none: these have to be refused."""
    here = labels_in(table, multi_label=multi_label)
    anywhere = {label for t in tables for label in labels_in(t, multi_label=multi_label)}
    return {s: t for s, t in label_map.items() if s in here or s not in anywhere}


def _refuse_file_twice(sources: Sequence[_Source], by_source: Sequence[Sequence[Case]]) -> None:
    if len(sources) < 2:
        return  # within one table it has been refused already
    first: dict[Path | ArrayItem, str] = {}
    for source, cases in zip(sources, by_source, strict=True):
        for case in cases:
            place = case.source
            if isinstance(place, Path):
                place = Path(os.path.realpath(place))
            other = first.setdefault(place, source.name)
            if other != source.name:
                raise UsageError(
                    f"{case.file} is in two sets of data, '{other}' and '{source.name}': every "
                    "case counts once; leave it out of one."
                )


def _choose(source: _Source, cases: Sequence[Case], split: str | None) -> list[Case]:
    if split is None:
        split = "test" if any(case.split for case in cases) else "all"
    chosen = list(cases) if split == "all" else split_of(cases, split)
    if not chosen:
        which = f" of the set '{source.name}'" if source.named else ""
        raise DataError(
            f"no case{which} is in the split '{split}': choose another with --split, or "
            "--split all."
        )
    return chosen


def _content_keys(
    cases: Sequence[Case], skip_unreadable: bool, progress: Callable[[int, int], None] | None
) -> tuple[dict[Case, str], tuple[str, ...]]:
    """The content key of each case that can be read, and a sentence for each of the others."""

    def key(case: Case) -> str | ImageError:
        try:
            return content_key(case)
        except ImageError as error:
            return error

    keys: dict[Case, str] = {}
    sentences = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (case, found) in enumerate(zip(cases, pool.map(key, cases), strict=True), 1):
            if isinstance(found, str):
                keys[case] = found
            elif skip_unreadable:
                sentences.append(str(found))
            else:
                raise found
            if progress:
                progress(done, len(cases))
    return keys, tuple(sentences)


def _site(source: _Source, case: Case, column: str) -> str:
    return case.columns.get(column, source.name if source.named else "")


def _labelled_set(
    placed: Sequence[tuple[Case, str]],
    keys: Mapping[Case, str],
    classes: Sequence[str],
    by: Sequence[str],
    multi_label: bool,
) -> LabelledSet:
    cases = [case for case, _ in placed]
    targets = np.zeros((len(cases), len(classes)), dtype=np.int8)
    for row, case in enumerate(cases):
        if case.targets is None:
            targets[row, case.label] = 1
        else:
            targets[row] = case.targets
    unit = "patient" if any(case.patient for case in cases) else "group"
    return LabelledSet(
        classes=tuple(classes),
        files=tuple(case.file for case in cases),
        targets=targets,
        sites=tuple(site for _, site in placed),
        multi_label=multi_label,
        patients=tuple(_patient(case, site) for case, site in placed),
        unit=unit if any(case.patient or case.group for case in cases) else "case",
        splits=tuple(case.split or "" for case in cases),
        columns={name: tuple(case.columns.get(name) or UNKNOWN for case in cases) for name in by},
        keys=tuple(keys[case] for case in cases),
        cases=tuple(cases),
    )


def _patient(case: Case, site: str) -> str | None:
    if case.patient:
        return f"{site}\0{case.patient}"
    return f"{site}\0\0{case.group}" if case.group else None
