"""merge-kit tune."""

from __future__ import annotations

from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from evaluate import tuning
from evaluate.candidates import base_network
from evaluate.selection import OPTIMISTIC, validation_cases
from evaluate.tuning import Goal, Settings, Tuned
from finetune.cases import Case, load_unlabelled
from finetune.image_options import image_options, table_cases
from finetune.network import choose_device
from finetune.pixels import decode
from finetune.progress import Progress
from merge_kit.commands.merging_options import (
    contribution_flags,
    contribution_options,
    gather,
    recipe_of,
    recipe_options,
    weights_of,
)
from merge_kit.commands.options import next_step, opened_federation, pairs, shown
from merge_kit.contributions import list_entries
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.files import write_atomic
from merge_kit.homes import unasked
from merge_kit.material import opened as opened_material

_STEPS = {"entropy": 500, "labels": 100}


@click.command()
@click.argument("hub")
@image_options
@click.option(
    "--by",
    "goal",
    type=click.Choice(["entropy", "labels"]),
    default="entropy",
    show_default=True,
    help="How sure the model is of images without labels, or a small labelled set.",
)
@click.option(
    "--split",
    type=click.Choice(["val", "all"]),
    default="val",
    show_default=True,
    help="Which split, where the table has any; all is refused where one is for testing.",
)
@click.option("--steps", type=click.IntRange(min=1), help="[500; 100 by labels]")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Of the coefficients.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of images.")
@recipe_options
@click.option("--scale", type=float, help="Factor of the merged vector at the start.")
@contribution_options
@click.option(
    "--out-recipe",
    type=click.Path(path_type=Path),
    default="tuned.yaml",
    show_default=True,
    help="The recipe with the coefficients.",
)
@click.option("--replace", is_flag=True, help="Replace an earlier recipe.")
def tune(
    hub: str,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    device: str,
    goal: Goal,
    split: str,
    steps: int | None,
    batch_size: int,
    learning_rate: float,
    seed: int,
    method: str | None,
    recipe: Path | None,
    weights: str | None,
    option: tuple[str, ...],
    norm: str | None,
    head: str | None,
    scale: float | None,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    out_recipe: Path,
    replace: bool,
) -> None:
    """Learn how much each site on HUB counts in each block of the network, on images that lie here.

    By entropy (AdaMerging) no label is read. The result is a recipe: merging by it needs no image.
    All vectors are held in memory.

    \b
    merge-kit tune hub --data some-images --out-recipe tuned.yaml
    merge-kit tune hub --data few.csv --by labels --method sum --weights examples
    """
    settings = {"scale": scale, "weights": weights_of(weights), "norm": norm, "head": head}
    start = recipe_of(method, recipe, option, settings)
    tuning.check_start(start)
    if out_recipe.is_dir() or (out_recipe.exists() and not replace):
        raise UsageError(
            f"{out_recipe} exists already: choose another --out-recipe, or pass --replace."
        )
    (opened, federation), chosen = opened_federation(hub), choose_device(device)
    if federation.multi_label:
        raise UsageError(
            "tune is for images of one class each, and those of this federation may have several: "
            "choose scale and sites with 'merge-kit select'."
        )
    cases = _cases(federation, goal, split, data, images, mapping, where)
    base = opened.fetch(BASE_WEIGHTS)
    arrived = gather(
        list_entries(opened, federation, without=unasked(federation, sites, exclude)),
        federation,
        base,
        start,
        sites=sites,
        exclude=exclude,
        skip_refused=skip_refused,
        allow_unsigned=allow_unsigned,
    )
    how = Settings(goal, steps or _STEPS[goal], batch_size, learning_rate, seed)
    with opened_material(federation, base, arrived.chosen) as material, Progress() as progress:
        pictures, skipped = decode(
            cases,
            federation.preprocessing,
            skip_unreadable=skip_unreadable,
            progress=lambda done, of: progress.stage("decoding", done, of),
        )
        for sentence in skipped:
            click.echo(f"Left out: {sentence}", err=True)
        found = tuning.tune(
            material,
            start,
            base_network(federation, base),
            pictures,
            how,
            chosen,
            lambda done, of: progress.stage("learning", done, of),
        )
        material.check_unchanged()
    what = "entropy" if goal == "entropy" else "loss"
    head_lines = (
        f"# Learnt by 'merge-kit tune --by {goal}' on {len(pictures)} images, {how.steps} steps:\n"
        f"# {what} {found.before:.4f} before, {found.after:.4f} after.\n"
    )
    write_atomic(out_recipe, head_lines + found.recipe.to_yaml())
    Console().print(_table(found))
    click.echo(f"{what.capitalize()} on {len(pictures)} images: {found.before:.4f} before, "
               f"{found.after:.4f} after")  # fmt: skip
    if goal == "labels":
        click.echo(OPTIMISTIC)
    click.echo(f"Recipe in {out_recipe}")
    flags = contribution_flags(sites, exclude, skip_refused, allow_unsigned)
    command = ["merge-kit merge", shown(hub), f"--recipe {shown(out_recipe)}", *flags]
    next_step(f"merge by it with\n  {' '.join(command)} --out merged")


def _cases(
    federation: Federation,
    goal: Goal,
    split: str,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
) -> list[Case]:
    if goal == "entropy":
        cases = load_unlabelled(data, images=images, where=pairs(where, "--where"))
    else:
        cases = table_cases(federation.classes, data, images, mapping, where)
    if not any(case.split for case in cases):
        return cases
    return validation_cases(cases, "all" if split == "all" else "val", str(data))


def _table(found: Tuned) -> Table:
    table = Table(title="coefficients", title_justify="left", box=box.SIMPLE)
    table.add_column("block")
    for site in found.sites:
        table.add_column(site, justify="right")
    last = sum(block is not None for block in found.blocks) - 1
    for depth, row in zip(found.blocks, found.coefficients.tolist(), strict=True):
        name = "outside" if depth is None else f"{round(depth * max(last, 1)) + 1}"
        table.add_row(name, *[f"{value:.3f}" for value in row])
    return table
