"""Options of every command that reads labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from finetune.cases import Case, load_cases
from finetune.splits import assign_splits
from merge_kit.commands.options import listed, pairs
from merge_kit.errors import DataError, UsageError

_DATA = "CSV with file,label[,site,patient,split]; folder of class folders; MedMNIST .npz"
_OPTIONS = (
    click.option(
        "--images", type=click.Path(path_type=Path), help="Image root [the CSV's folder]."
    ),
    click.option("--map", "mapping", multiple=True, metavar="LABEL=CLASS", help="Rename a label."),
    click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Only these rows."),
    click.option(
        "--skip-unreadable", is_flag=True, help="Leave unreadable images out, and say so."
    ),
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
    ),
)

_SPLIT = (
    click.option(
        "--val-fraction", default=0.15, show_default=True, help="If the table has no split."
    ),
    click.option(
        "--test-fraction", default=0.25, show_default=True, help="If the table has no split."
    ),
    click.option("--split-seed", default=0, show_default=True, help="Seed of the split."),
)


def image_options(command: Any, *, several: bool = False, optional: str | None = None) -> Any:
    """Add --data, --images, --map, --where, --skip-unreadable and --device to a command.

    With `several`, --data may be given more than once, as PATH or NAME=PATH: a tuple of texts. With
    `optional`, which says what for, it need not be given.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    if several:
        return click.option(
            "--data",
            required=True,
            multiple=True,
            metavar="[NAME=]PATH",
            help=f"{_DATA} (repeatable).",
        )(command)
    kind = click.Path(path_type=Path)
    help_text = optional or f"{_DATA}."
    return click.option("--data", required=not optional, type=kind, help=help_text)(command)


def split_options(command: Any) -> Any:
    """Add --val-fraction, --test-fraction and --split-seed to a command."""
    for option in reversed(_SPLIT):
        command = option(command)
    return command


def unlabelled_options(command: Any, *, required: bool = True) -> Any:
    """Add --data, --images, --where, --split and --skip-unreadable for images without labels."""
    options = (
        click.option(
            "--data",
            required=required,
            type=click.Path(path_type=Path),
            help="Images, whose labels are not read: a folder, or a table as for 'finetune'.",
        ),
        _OPTIONS[0],
        click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Only these rows."),
        click.option(
            "--split",
            "split_of",
            type=click.Choice(["train", "val", "test", "all"]),
            default="train",
            show_default=True,
            help="Which rows, where the table tells.",
        ),
        _OPTIONS[3],
    )
    for option in reversed(options):
        command = option(command)
    return command


def of_split(cases: Sequence[Case], split: str, data: Path) -> list[Case]:
    """The cases of a split, or all where the table does not tell, sorted by their names.

    Raises
    ------
    DataError
        There is none.
    """
    kept = list(cases)
    if split != "all" and any(case.split for case in cases):
        kept = [case for case in cases if case.split == split]
    if not kept:
        raise DataError(f"{data} has no row of the split '{split}': choose another --split.")
    return sorted(kept, key=lambda case: case.file)


def own_classes_option(command: Any) -> Any:
    """Add --own-classes to a command: None where it is not given."""
    return click.option(
        "--own-classes",
        metavar="A,B",
        help="Classes of a task of the site's own, which the federation does not have.",
    )(command)


def annotated_option(command: Any) -> Any:
    """Add --annotated to a command: None where it is not given."""
    return click.option(
        "--annotated",
        metavar="A,B",
        help="Where an image may have several classes: those that the labels speak of "
        "[all, or those with a column].",
    )(command)


def table_cases(
    classes: Sequence[str],
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    *,
    groups: Sequence[str] = (),
    multi_label: bool = False,
    annotated: str | None = None,
) -> list[Case]:
    """The cases of a table, as these options describe them, without those of which nothing is
    annotated.

    Raises
    ------
    UsageError
        Classes are said to be annotated where each image has one class.
    MergeKitError
        As `load_cases`.
    """
    if annotated is not None and not multi_label:
        raise UsageError(
            "--annotated is for federations in which an image may have several classes ('merge-kit "
            "init --multi-label'): leave it out."
        )
    cases = load_cases(
        data,
        classes=classes,
        images=images,
        label_map=pairs(mapping, "--map"),
        where=pairs(where, "--where"),
        groups=groups,
        multi_label=multi_label,
        annotated=None if annotated is None else listed(annotated),
    )
    if not multi_label:
        return cases
    known = [case for case in cases if any(target >= 0 for target in case.targets or ())]
    if not known:
        raise DataError(f"{data} annotates no class in any image: write 1 or 0 in its columns.")
    return known


def split_cases(
    classes: Sequence[str],
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    *,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    groups: Sequence[str] = (),
    multi_label: bool = False,
    annotated: str | None = None,
) -> list[Case]:
    """A site's cases with their splits, as these options describe them.

    Raises
    ------
    MergeKitError
        As `table_cases` and `assign_splits`.
    """
    cases = table_cases(
        classes,
        data,
        images,
        mapping,
        where,
        groups=groups,
        multi_label=multi_label,
        annotated=annotated,
    )
    return assign_splits(
        cases, seed=split_seed, val_fraction=val_fraction, test_fraction=test_fraction
    )
