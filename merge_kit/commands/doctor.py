"""merge-kit doctor."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from merge_kit.commands.options import next_step
from merge_kit.doctor import Level, examine

_MARKS = {Level.GOOD: "  ok ", Level.NOTE: "note ", Level.PROBLEM: "FAIL "}


@click.command()
def doctor() -> None:
    """Check this machine: versions, devices, memory, disk, extras, and what to do."""
    findings = examine(Path.cwd())
    for finding in findings:
        click.echo(f"{_MARKS[finding.level]} {finding.subject:<18} {finding.text}")
        if finding.remedy:
            click.echo(f"      {'':<18} -> {finding.remedy}")
    if any(finding.level is Level.PROBLEM for finding in findings):
        click.echo("Something is wrong: see the lines that begin with FAIL.", err=True)
        sys.exit(1)
    next_step("try it all with\n  merge-kit demo")
