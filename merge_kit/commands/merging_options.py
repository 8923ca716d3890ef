"""Options that say what is merged and how, for every command that merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from merge_kit import devices, merging
from merge_kit.commands.options import typed_pairs
from merge_kit.contributions import Contribution, Entry, live
from merge_kit.errors import UsageError
from merge_kit.federation import Federation
from merge_kit.homes import unasked
from merge_kit.payloads import check_payloads
from merge_kit.recipe import Recipe, make_recipe, read_recipe

_RECIPE = (
    click.option("--method", help="One of 'merge-kit methods', or auto."),
    click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        help="A YAML recipe instead, or the name of a shipped one.",
    ),
    click.option(
        "--weights",
        help="uniform, examples, sqrt-examples, steps, validation, agreement, or site=2,other=1.",
    ),
    click.option("--option", multiple=True, metavar="NAME=VALUE", help="Option of the method."),
    click.option(
        "--norm", type=click.Choice(["pooled", "average", "base"]), help="Norm statistics."
    ),
    click.option("--head", type=click.Choice(["seen", "method"]), help="Rule for the head's rows."),
)
_CONTRIBUTIONS = (
    click.option("--site", "sites", multiple=True, help="Merge only this site (repeatable)."),
    click.option("--exclude", multiple=True, help="Leave this site out (repeatable)."),
    click.option("--skip-refused", is_flag=True, help="Leave out whatever may not be merged."),
    click.option("--allow-unsigned", is_flag=True, help="Take unsigned and not admitted ones too."),
)


def recipe_options(command: Any) -> Any:
    """Add --method, --recipe, --weights, --option, --norm and --head to a command."""
    for option in reversed(_RECIPE):
        command = option(command)
    return command


def contribution_options(command: Any) -> Any:
    """Add --site, --exclude, --skip-refused and --allow-unsigned to a command."""
    for option in reversed(_CONTRIBUTIONS):
        command = option(command)
    return command


def contribution_flags(
    sites: Sequence[str], exclude: Sequence[str], skip_refused: bool, allow_unsigned: bool
) -> list[str]:
    """These options as they stand on a command line."""
    flags = [f"--site {site}" for site in sites] + [f"--exclude {site}" for site in exclude]
    flags += ["--skip-refused"] * skip_refused + ["--allow-unsigned"] * allow_unsigned
    return flags


def device_option(command: Any) -> Any:
    """Add --device to a command."""
    return click.option(
        "--device",
        default=devices.CPU.name,
        show_default=True,
        help="Where merges are computed: cpu, cuda, cuda:1.",
    )(command)


def recipe_of(
    method: str | None,
    path: Path | None,
    options: tuple[str, ...],
    settings: Mapping[str, object],
    defaults: Mapping[str, object] | None = None,
) -> Recipe:
    """The recipe that the options of a command line describe.

    `settings` are the recipe's other keys, None where they are not given; `defaults` stand in for
    those of the method.

    Raises
    ------
    UsageError
        A file and options are given both.
    RecipeError
        A wrong key or value.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    chosen = typed_pairs(options, "--option")
    if path is None:
        data = {"method": method or "mean", "options": chosen, **given}
        return make_recipe(data, "the command line", defaults or {})
    if method or given or chosen:
        raise UsageError("--recipe says it all: leave the other merge options out, or edit it.")
    return read_recipe(path, defaults or {})


def weights_of(text: str | None) -> str | dict[str, object] | None:
    """--weights: the name of a rule, or a number for each site."""
    if text is None or "=" not in text:
        return text
    return dict(typed_pairs(tuple(text.split(",")), "--weights"))


@dataclass(frozen=True, slots=True)
class Gathered:
    """What has arrived, checked."""

    chosen: list[Contribution]
    """What is merged."""
    statistics: list[Contribution]
    """What the methods may ask for beside the vectors."""
    refused: list[Entry]
    others: list[Contribution]
    """Whole vectors that are not merged."""


def gather(
    entries: Sequence[Entry],
    federation: Federation,
    base_weights: Path,
    recipe: Recipe,
    *,
    sites: Sequence[str],
    exclude: Sequence[str],
    skip_refused: bool,
    allow_unsigned: bool,
) -> Gathered:
    """Check what has arrived and choose of it; says on stderr what was left out."""
    # Statistics are larger than vectors: those that no method asks for are not read.
    asked = {"vector", *merging.asked_of(recipe)}
    with Console(stderr=True).status("checking what has arrived"):
        wanted = [entry for entry in entries if entry.kind in asked]
        checked = check_payloads(wanted, federation, base_weights)
    chosen, refused = merging.choose(
        checked,
        allow_unsigned=allow_unsigned,
        skip_refused=skip_refused,
        sites=sites,
        exclude=exclude,
        unasked=unasked(federation, sites, exclude),
    )
    for entry in refused:
        click.echo(f"Left out: {entry.problem}", err=True)
    alive = live(checked)
    taken = {contribution.id for contribution in chosen}
    whole = [entry.contribution for entry in checked if entry.contribution]
    return Gathered(
        chosen,
        [c for c in alive if c.kind != "vector"],
        refused,
        [c for c in whole if c.kind == "vector" and c.id not in taken],
    )
