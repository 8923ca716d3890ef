"""merge-kit merge."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from merge_kit import merging, plain
from merge_kit.checkpoints import WEIGHTS
from merge_kit.commands.options import next_step, shown, typed_pairs
from merge_kit.contributions import Entry, check_payloads, list_entries, read_local
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS, FEDERATION_FILE
from merge_kit.hub import open_hub
from merge_kit.recipe import Recipe, make_recipe, read_recipe
from merge_kit.site import federation_on


@click.command()
@click.argument("hub", metavar="HUB_OR_BASE")
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
    """Merge what has arrived on a hub into one model; or only the contributions in FOLDERS.

    Without a federation: merge the checkpoints or task vectors in FOLDERS, made from a base.

    \b
    merge-kit merge hub --out merged
    merge-kit merge hub --method ties --option density=0.3 --out merged-ties
    merge-kit merge base a b=run/model.safetensors --weights a=2,b=1 --out merged
    """
    overrides = {"scale": scale, "weights": _weights(weights), "norm": norm, "head": head}
    given = {key: value for key, value in overrides.items() if value is not None}
    options = typed_pairs(option, "--option")
    alone = _is_plain(hub, folders)
    chosen = _recipe(method, recipe, given, options, plain.DEFAULTS if alone else {})
    if print_recipe:
        click.echo(chosen.to_yaml(), nl=False)
        return
    target = out or Path(f"merged-{chosen.method}")
    if alone:
        if skip_refused or allow_unsigned:
            raise UsageError(
                "--skip-refused and --allow-unsigned are for contributions on a hub: leave them "
                "out, a checkpoint carries no signature."
            )
        _merge_plain(Path(hub), folders, chosen, target, sites, exclude, replace)
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
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


def _is_plain(first: str, folders: tuple[Path, ...]) -> bool:
    """Whether the first argument is a base with checkpoints after it, and no hub."""
    if "://" in first or (not Path(first).exists() and not folders):
        return False
    if (Path(first) / FEDERATION_FILE).is_file():
        return False
    if not folders:
        raise UsageError(
            f"{first} is no hub, it has no {FEDERATION_FILE}: merge a hub with 'merge-kit merge "
            "HUB', or checkpoints with 'merge-kit merge BASE CHECKPOINT...'."
        )
    return True


def _merge_plain(
    base: Path,
    folders: tuple[Path, ...],
    recipe: Recipe,
    target: Path,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    replace: bool,
) -> None:
    merging.check_target(target, replace=replace)
    with ExitStack() as stack:
        with Console(stderr=True).status(f"checking {len(folders)} checkpoints"):
            job = stack.enter_context(
                plain.gather(base, folders, recipe, sites=sites, exclude=exclude)
            )
        for note in job.notes:
            click.echo(note)
        with Console(stderr=True).status(f"merging {len(job.inputs)} checkpoints"):
            merged = plain.merge(job, target, give_way=replace)
    click.echo(f"Merged model in {target}: {recipe.method} of {len(job.inputs)} checkpoints")
    for one, weight in zip(job.inputs, merged.weights, strict=True):
        click.echo(f"  {one.name:<20} {one.id[:12]}  weight {weight:.3f}  {one.path}")
    click.echo(f"  fingerprint {merged.fingerprint}")
    if job.config:
        next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")
    else:
        next_step(f"load {shown(target / WEIGHTS)} into your model.")


def _weights(text: str | None) -> str | dict[str, object] | None:
    if text is None or "=" not in text:
        return text
    return dict(typed_pairs(tuple(text.split(",")), "--weights"))


def _recipe(
    method: str | None,
    path: Path | None,
    given: Mapping[str, object],
    options: Mapping[str, object],
    defaults: Mapping[str, object],
) -> Recipe:
    if path is None:
        data = {"method": method or "mean", "options": options, **given}
        return make_recipe(data, "the command line", defaults)
    if method or given or options:
        raise UsageError("--recipe says it all: leave the other merge options out, or edit it.")
    return read_recipe(path, defaults)
