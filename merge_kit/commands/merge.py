"""merge-kit merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console

from merge_kit import merging
from merge_kit.commands.options import next_step, shown, typed_pairs
from merge_kit.contributions import Entry, check_payloads, list_entries, read_local
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.hub import open_hub
from merge_kit.recipe import Recipe, make_recipe, read_recipe
from merge_kit.site import federation_on


@click.command()
@click.argument("hub")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--method", help="One of 'merge-kit methods'.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="A YAML recipe instead, or the name of a shipped one.",
)
@click.option("--scale", type=float, help="Factor of the merged vector.")
@click.option("--weights", help="uniform, examples, sqrt-examples, steps, or site=2,other=1.")
@click.option("--option", multiple=True, metavar="NAME=VALUE", help="Option of the method.")
@click.option("--norm", type=click.Choice(["pooled", "average", "base"]), help="Norm statistics.")
@click.option("--head", type=click.Choice(["seen", "method"]), help="Rule for the head's rows.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the merged model.")
@click.option("--site", "sites", multiple=True, help="Merge only this site (repeatable).")
@click.option("--exclude", multiple=True, help="Leave this site out (repeatable).")
@click.option("--skip-refused", is_flag=True, help="Leave out whatever may not be merged.")
@click.option("--allow-unsigned", is_flag=True, help="Take unsigned and not admitted ones too.")
@click.option("--replace", is_flag=True, help="Replace an existing merged model.")
@click.option("--print-recipe", is_flag=True, help="Show the recipe with all defaults, and stop.")
def merge(
    hub: str,
    folders: tuple[Path, ...],
    method: str | None,
    recipe: Path | None,
    scale: float | None,
    weights: str | None,
    option: tuple[str, ...],
    norm: str | None,
    head: str | None,
    out: Path | None,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    replace: bool,
    print_recipe: bool,
) -> None:
    """Merge what has arrived on HUB into one model; or only the contributions in FOLDERS.

    \b
    merge-kit merge hub --out merged
    merge-kit merge hub --method ties --option density=0.3 --out merged-ties
    """
    overrides = {"scale": scale, "weights": _weights(weights), "norm": norm, "head": head}
    given = {key: value for key, value in overrides.items() if value is not None}
    options = typed_pairs(option, "--option")
    chosen = _recipe(method, recipe, given, options)
    if print_recipe:
        click.echo(chosen.to_yaml(), nl=False)
        return
    opened = open_hub(hub)
    federation = federation_on(opened)
    if folders:
        local = [read_local(folder, federation) for folder in folders]
        entries = [Entry(c.site, c.id, c, None) for c in local]
    else:
        entries = list_entries(opened, federation)
    base = opened.fetch(BASE_WEIGHTS)
    with Console(stderr=True).status("checking what has arrived"):
        entries = check_payloads(entries, federation, base)
    contributions, refused = merging.choose(
        entries,
        allow_unsigned=allow_unsigned,
        skip_refused=skip_refused,
        sites=sites,
        exclude=exclude,
    )
    for entry in refused:
        click.echo(f"Left out: {entry.problem}", err=True)
    target = out or Path(f"merged-{chosen.method}")
    with Console(stderr=True).status(f"merging {len(contributions)} contributions"):
        merged = merging.merge(
            federation, base, contributions, chosen, target, refused=refused, replace=replace
        )
    click.echo(f"Merged model in {target}: {chosen.method} of {len(contributions)} contributions")
    for contribution, weight in zip(merged.contributions, merged.weights, strict=True):
        click.echo(
            f"  {contribution.site:<20} {contribution.id[:12]}  weight {weight:.3f}  "
            f"{contribution.trust.value}"
        )
    click.echo(f"  fingerprint {merged.fingerprint}")
    again = f"merge-kit verify {shown(target)} --hub {shown(hub)}"
    click.echo(f"  {_relied(merged)} ({again} checks all again)")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


def _relied(merged: merging.Merged) -> str:
    size = len(merged.contributions)
    old = sum(1 for c in merged.contributions if c.checked and c.checked.remembered)
    base = " and the base"
    new, earlier = (base, "") if not merged.base.remembered else ("", base)
    relied = f"{old or 'none'}{earlier}"
    return f"{size - old} of {size} payloads{new} checked now, {relied} relied on earlier checks"


def _weights(text: str | None) -> str | dict[str, object] | None:
    if text is None or "=" not in text:
        return text
    return dict(typed_pairs(tuple(text.split(",")), "--weights"))


def _recipe(
    method: str | None,
    path: Path | None,
    given: Mapping[str, object],
    options: Mapping[str, object],
) -> Recipe:
    if path is None:
        data = {"method": method or "mean", "options": options, **given}
        return make_recipe(data, "the command line")
    if method or given or options:
        raise UsageError("--recipe says it all: leave the other merge options out, or edit it.")
    return read_recipe(path)
