"""Options of every command that reads labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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


def image_options(command: Any, *, several: bool = False) -> Any:
    """Add --data, --images, --map, --where, --skip-unreadable and --device to a command.

    With `several`, --data may be given more than once, as PATH or NAME=PATH: a tuple of texts.
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
    return click.option("--data", required=True, type=kind, help=f"{_DATA}.")(command)
