"""merge-kit methods."""

from __future__ import annotations

import click

from merge_kit.commands.options import next_step
from merge_kit.errors import UsageError
from merge_kit.methods import METHODS, Method
from merge_kit.schema import suggestion


@click.command()
@click.argument("names", nargs=-1, metavar="[METHOD]...")
def methods(names: tuple[str, ...]) -> None:
    """List the merge methods with what they need, their defaults and papers."""
    for name in names:
        if name not in METHODS:
            raise UsageError(f"unknown method '{name}'{suggestion(name, list(METHODS))}")
    family = ""
    for method in METHODS.values():
        if names and method.name not in names:
            continue
        if method.family != family:
            family = method.family
            click.echo(f"== {family} ==\n")
        click.echo(f"{method.name}: {method.summary}")
        click.echo(f"  needs    {_needs(method)}")
        options = {
            key: field.get_default(call_default_factory=True)
            for key, field in method.options.model_fields.items()
        }
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in options.items()) or "none"
        click.echo(f"  options  {shown}")
        click.echo(f"  weights  {method.weights}")
        click.echo(f"  paper    {method.paper}\n")
    next_step("merge-kit merge <hub> --method <name> --out <folder>")


def _needs(method: Method) -> str:
    needs = ["the vectors"]
    if method.minimum == method.maximum:
        needs = [f"exactly {method.minimum} vectors"]
    elif method.minimum > 1:
        needs = [f"at least {method.minimum} vectors"]
    if method.statistics:
        needs.append(f"{method.statistics} statistics that the sites have published")
    if method.random:
        needs.append("the recipe's seed")
    return ", ".join(needs)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
