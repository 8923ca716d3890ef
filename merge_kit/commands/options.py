"""Options that several commands share."""

from __future__ import annotations

import shlex
from typing import Any

import click

from merge_kit import copies
from merge_kit.errors import UsageError
from merge_kit.federation import Federation
from merge_kit.hub import Hub, open_hub
from merge_kit.site import federation_on
from merge_kit.yamlfile import yaml_value


def pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    """``NAME=VALUE`` options as a mapping.

    Raises
    ------
    UsageError
        One of them has no equals sign, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in values:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise UsageError(f"{option} {text}: write it as {option} NAME=VALUE.")
        if name.strip() in found:
            raise UsageError(f"{option} {name.strip()} is given twice: give it once.")
        found[name.strip()] = value.strip()
    return found


def typed_pairs(values: tuple[str, ...], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` options whose values are read as YAML: numbers, true and false, lists.

    Raises
    ------
    UsageError
        As `pairs`, or a value is not YAML.
    """
    try:
        return {k: yaml_value(v) for k, v in pairs(values, option).items()}
    except ValueError as error:
        raise UsageError(f"{option}: a value is not a plain number, word or list.") from error


def listed(text: str) -> list[str]:
    """Names that stand in one text with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def shown(path: object) -> str:
    """A path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def next_step(text: str) -> None:
    """Say what to do next, the way every command ends."""
    click.echo(f"\nNext: {text}")


create_pr_option = click.option(
    "--create-pr",
    is_flag=True,
    help="On the Hugging Face Hub: propose it as a pull request, which needs no right to write.",
)


def opened_federation(uri: str) -> tuple[Hub, Federation]:
    """A hub that is read, with its contract; says on stderr where it is a copy that stands for hubs
    which are not asked.

    Raises
    ------
    MergeKitError
        As `open_hub` and `federation_on`.
    """
    hub = open_hub(uri)
    federation = federation_on(hub)
    for sentence in copies.notes(hub, federation):
        click.echo(f"Note: {sentence}", err=True)
    return hub, federation
