"""merge-kit verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from merge_kit import devices, verifying, verifying_plain
from merge_kit.checks import Report
from merge_kit.commands.merging_options import device_option
from merge_kit.commands.options import opened_federation
from merge_kit.contributions import read_local
from merge_kit.devices import Device
from merge_kit.errors import UsageError
from merge_kit.provenance import PlainProvenance, Provenance, read_provenance


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--hub", help="The hub that the model was merged from.")
@click.option(
    "--from",
    "copies",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A contribution in a local folder, in place of the hub's (repeatable).",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Without a federation: the base; the checkpoints come after FOLDER, in any order.",
)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program.")
def verify(
    folder: Path,
    inputs: tuple[Path, ...],
    hub: str | None,
    copies: tuple[Path, ...],
    base: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Make the merged model in FOLDER again from what it was merged from, and compare.

    Reads every file again, checks every signature, and writes nothing. Exits with 0 when all is as
    the model's provenance.json states, with 1 when anything differs. Files that no merge writes are
    named as unknown; they make no difference.

    \b
    merge-kit verify merged --hub hub
    merge-kit verify merged --base base a b=run/model.safetensors
    """
    record, on = read_provenance(folder), devices.choose(device)
    if isinstance(record, PlainProvenance):
        if hub or copies or base is None or not inputs:
            raise UsageError(
                f"{folder} was merged without a federation: give --base, and after the folder the "
                f"{len(record.inputs)} checkpoints or vectors that it was merged from."
            )
        with Console(stderr=True).status("reading everything again"):
            report = verifying_plain.verify(folder, record, base, inputs, on)
    else:
        if hub is None or base or inputs:
            raise UsageError(
                f"{folder} was merged from a hub: give it with --hub, and nothing after the folder."
            )
        report = _on_hub(folder, record, hub, copies, on)
    if as_json:
        facts = {"verified": report.verified, "verdict": report.verdict, **asdict(report)}
        click.echo(json.dumps(facts, indent=2))
    else:
        _show(report)
    if not report.verified:
        sys.exit(1)


def _on_hub(
    folder: Path, record: Provenance, hub: str, copies: Sequence[Path], device: Device
) -> Report:
    opened, federation = opened_federation(hub)
    local = [read_local(copy, federation) for copy in copies]
    with Console(stderr=True).status("reading everything again"):
        return verifying.verify(folder, record, opened, local, device)


def _show(report: Report) -> None:
    width = max(len(check.subject) for check in report.checks)
    for check in report.checks:
        mark = "DIFFERS" if check.state == "differs" else f"{check.state:<7}"
        click.echo(f"{mark}  {_printable(f'{check.subject:<{width}}  {check.text}')}")
    for note in report.notes:
        click.echo(f"note     {note}")
    click.echo(f"\n{_printable(report.verdict)}")


def _printable(text: str) -> str:
    """What a stranger may have written, made safe for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
