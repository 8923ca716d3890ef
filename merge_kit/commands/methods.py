"""merge-kit methods."""

from __future__ import annotations

import click

from merge_kit.commands.options import next_step
from merge_kit.methods import METHODS


@click.command()
def methods() -> None:
    """List the merge methods with their defaults and papers."""
    for method in METHODS.values():
        click.echo(f"{method.name}: {method.summary}")
        options = {k: f.default for k, f in method.options.model_fields.items()}
        shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        click.echo(f"  options  {shown}")
        click.echo(f"  weights  {method.weights}")
        click.echo(f"  paper    {method.paper}\n")
    next_step("merge-kit merge <hub> --method <name> --out <folder>")
