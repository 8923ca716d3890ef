"""merge-kit select."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import torch
from rich.console import Console
from rich.table import Table

from evaluate import selection
from evaluate.candidates import Judge, base_network
from evaluate.selection import METRICS, OPTIMISTIC, SCALES, Candidate, Plan, Selection
from finetune.cases import Case
from finetune.image_options import image_options, table_cases
from finetune.network import choose_device
from finetune.objectives import seen_findings
from finetune.pixels import Images, decode
from finetune.progress import Progress
from merge_kit import devices, engine, merging, writing
from merge_kit.commands.merging_options import (
    Gathered,
    contribution_flags,
    contribution_options,
    gather,
    recipe_of,
    recipe_options,
    weights_of,
)
from merge_kit.commands.options import next_step, opened_federation, pairs, shown
from merge_kit.contributions import list_entries
from merge_kit.devices import CPU, Device
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.files import write_atomic
from merge_kit.homes import unasked
from merge_kit.material import opened as opened_material
from merge_kit.recipe import Recipe
from merge_kit.yamlfile import yaml_value

TABLE = "selection.json"


@click.command()
@click.argument("hub")
@image_options
@click.option(
    "--split",
    type=click.Choice(["val", "all"]),
    default="val",
    show_default=True,
    help="Which split; all is refused where one is for testing.",
)
@click.option("--site-column", default="site", show_default=True, help="Column with the site.")
@click.option(
    "--search",
    type=click.Choice(["scale", "greedy-soup"]),
    default="scale",
    show_default=True,
    help="Scale and options of a method, or which sites to take the mean of.",
)
@click.option(
    "--metric",
    type=click.Choice(list(METRICS)),
    default="balanced_accuracy",
    show_default=True,
    help="What to choose by.",
)
@click.option(
    "--scales", help=f"Factors of the scale, such as 0.25,0.5,1 [{len(SCALES)} from 0.1 to 3]."
)
@click.option(
    "--grid", multiple=True, metavar="NAME=A,B", help="Values of an option to try (repeatable)."
)
@click.option(
    "--accept",
    type=click.Choice(["not-worse", "better"]),
    help="When a soup takes a site in [not-worse, as in the paper].",
)
@recipe_options
@contribution_options
@click.option(
    "--out-recipe",
    type=click.Path(path_type=Path),
    default="selection/recipe.yaml",
    show_default=True,
    help=f"The chosen recipe; {TABLE} is put beside it.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also merge by it, into this folder.")
@click.option("--replace", is_flag=True, help="Replace an earlier recipe, table and merged model.")
def select(
    hub: str,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    device: str,
    split: Literal["val", "all"],
    site_column: str,
    search: selection.Search,
    metric: str,
    scales: str | None,
    grid: tuple[str, ...],
    accept: selection.Accept | None,
    method: str | None,
    recipe: Path | None,
    weights: str | None,
    option: tuple[str, ...],
    norm: str | None,
    head: str | None,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    out_recipe: Path,
    out: Path | None,
    replace: bool,
) -> None:
    """Choose a merge of what has arrived on HUB, by its figure on validation images.

    Images of the split 'test' are never looked at: they are for 'merge-kit evaluate'.

    \b
    merge-kit select hub --data labels.csv --method ties --grid density=0.1,0.2,0.4
    merge-kit select hub --data labels.csv --search greedy-soup --out soup
    """
    settings = {"weights": weights_of(weights), "norm": norm, "head": head}
    defaults = {"weights": "uniform"} if search == "greedy-soup" else {}
    start = recipe_of(method, recipe, option, settings, defaults)
    plan = _plan(search, start, metric, scales, grid, option, accept)
    _check_recipe(out_recipe, replace=replace)
    if out:
        writing.check_target(out, replace=replace)
    opened, federation = opened_federation(hub)
    chosen_device = choose_device(device)
    # A GPU that was found, not named, must not change what is merged.
    merging_device = devices.choose(device) if device.startswith("cuda") else CPU
    if federation.multi_label and metric == "log_loss":
        raise UsageError(
            "--metric log_loss is for images of one class each: take balanced_accuracy or "
            "macro_auroc."
        )
    cases = table_cases(
        federation.classes, data, images, mapping, where, multi_label=federation.multi_label
    )
    cases = selection.validation_cases(cases, split, str(data))
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
    found = _search(
        plan,
        federation,
        base,
        arrived,
        cases,
        chosen_device,
        merging_device,
        site_column=site_column,
        skip_unreadable=skip_unreadable,
    )
    left_out = sorted({c.site for c in arrived.chosen} - set(found.chosen.sites))
    Console().print(_table(found))
    click.echo(f"Chosen: {_name(found)}. {OPTIMISTIC}")
    write_atomic(out_recipe, _comment(found, left_out) + found.chosen.recipe.to_yaml())
    write_atomic(
        out_recipe.parent / TABLE,
        json.dumps(selection.record(found), indent=2, ensure_ascii=False),
    )
    click.echo(f"Recipe in {out_recipe}, every candidate in {out_recipe.parent / TABLE}")
    if out is None:
        # A soup is made of these sites alone; a scale is for whatever will have arrived.
        chosen, excluded = (found.chosen.sites, ()) if left_out else (sites, exclude)
        flags = contribution_flags(chosen, excluded, skip_refused, allow_unsigned)
        command = ["merge-kit merge", shown(hub), f"--recipe {shown(out_recipe)}", *flags]
        next_step(f"merge by it with\n  {' '.join(command)} --out merged")
        return
    merged = merging.merge(
        federation,
        base,
        [c for c in arrived.chosen if c.site in found.chosen.sites],
        found.chosen.recipe,
        out,
        statistics=arrived.statistics,
        refused=arrived.refused,
        replace=replace,
        device=merging_device,
    )
    click.echo(f"Merged model in {out}, fingerprint {merged.fingerprint}")
    next_step(
        "evaluate it on images that had no part in this with\n"
        f"  merge-kit evaluate {shown(out)} --data <labels.csv>"
    )


def _check_recipe(path: Path, *, replace: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder: --out-recipe takes the name of a file.")
    for place in (path, path.parent / TABLE):
        if place.exists() and not replace:
            raise UsageError(
                f"{place} is of an earlier choice: give this one a folder of its own with "
                "--out-recipe, or pass --replace to lose the earlier one."
            )


def _search(
    plan: Plan,
    federation: Federation,
    base: Path,
    arrived: Gathered,
    cases: Sequence[Case],
    device: torch.device,
    merging_device: Device,
    *,
    site_column: str,
    skip_unreadable: bool,
) -> Selection:
    beside = merging.beside_of(arrived.chosen, plan.recipes[0], arrived.statistics)
    reading = opened_material(federation, base, arrived.chosen, beside=beside)
    with reading as material, Progress() as progress:
        for recipe in plan.recipes:
            engine.check_sites(material.sources, recipe)
            engine.groups_of(material.roles, recipe)
        images, skipped = decode(
            cases,
            federation.preprocessing,
            skip_unreadable=skip_unreadable,
            progress=lambda done, of: progress.stage("decoding", done, of),
        )
        for sentence in skipped:
            click.echo(f"Left out: {sentence}", err=True)
        size = plan.size(len({source.site for source in material.sources}))
        click.echo(f"{size} candidates on {len(images)} images, on {device}")
        if absent := _absent(images, federation.classes):
            told = "no image is of the class"
            if federation.multi_label:
                told = "no images tell with and without apart for the class"
            click.echo(f"Note: {told} {absent}: it has no say.", err=True)
        judge = Judge(
            base_network(federation, base).to(device),
            images,
            device,
            METRICS[plan.metric].score,
            groups=_patients(images, site_column),
            candidates=size,
            progress=lambda done, of: progress.stage("merging and judging", done, of),
        )
        return selection.select(plan, material, judge, merging_device)


def _plan(
    search: selection.Search,
    start: Recipe,
    metric: str,
    scales: str | None,
    grid: tuple[str, ...],
    option: tuple[str, ...],
    accept: selection.Accept | None,
) -> Plan:
    if search == "greedy-soup":
        if scales or grid:
            raise UsageError("--scales and --grid go with --search scale: leave them out.")
        return selection.plan_soup(start, accept or "not-worse", metric)
    if accept:
        raise UsageError("--accept goes with --search greedy-soup: leave it out.")
    values = _values(grid)
    if twice := sorted(set(values) & set(pairs(option, "--option"))):
        raise UsageError(f"--grid and --option both set '{twice[0]}': give one of them.")
    return selection.plan_scales(start, _scales(scales), values, metric)


def _scales(text: str | None) -> Sequence[float]:
    if text is None:
        return SCALES
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--scales {text}: write numbers with commas between them, such as 0.25,0.5,1."
        ) from None


def _values(grid: tuple[str, ...]) -> dict[str, list[Any]]:
    """``NAME=A,B`` as the values of each option, each once."""
    try:
        return {
            name: list(dict.fromkeys(yaml_value(value) for value in text.split(",")))
            for name, text in pairs(grid, "--grid").items()
        }
    except (ValueError, TypeError) as error:
        raise UsageError("--grid: a value is not a plain number or word.") from error


def _patients(images: Images, site_column: str) -> list[str | None]:
    """One number at two hospitals is two people."""
    named = [
        (case.columns.get(site_column, ""), case.patient or case.group) for case in images.cases
    ]
    return [f"{site}\0{patient}" if patient else None for site, patient in named]


def _absent(images: Images, classes: Sequence[str]) -> str:
    if any(case.targets is not None for case in images.cases):
        present = set(seen_findings(images.targets()).nonzero().flatten().tolist())
    else:
        present = set(images.labels().tolist())
    return ", ".join(name for index, name in enumerate(classes) if index not in present)


def _table(found: Selection) -> Table:
    plan = found.plan
    title = METRICS[plan.metric].title
    shown_table = Table(title=f"{title} (95 % interval)", title_justify="left")
    names = ["sites"] if plan.search == "greedy-soup" else [*plan.options, "scale"]
    for name in names:
        shown_table.add_column(name, justify="left" if name == "sites" else "right")
    shown_table.add_column(title, justify="right", no_wrap=True)
    shown_table.add_column("")
    for candidate in found.candidates:
        mark = {True: "added", False: "not added", None: ""}[candidate.added]
        mark = "chosen" if candidate is found.chosen else mark
        shown_table.add_row(*_cells(candidate, plan), _figure(candidate), mark)
    return shown_table


def _cells(candidate: Candidate, plan: Plan) -> list[str]:
    if plan.search == "greedy-soup":
        alone = candidate.added is None
        return [candidate.sites[0] if alone else f"soup + {candidate.sites[-1]}"]
    options = [str(candidate.recipe.options[name]) for name in plan.options]
    return [*options, f"{candidate.recipe.scale:g}"]


def _figure(candidate: Candidate) -> str:
    figure = candidate.figure
    if math.isnan(figure.value):
        return "-"
    if math.isnan(figure.low):
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _name(found: Selection) -> str:
    recipe = found.chosen.recipe
    if found.plan.search == "greedy-soup":
        first, *more = found.chosen.sites
        return f"the mean of {', '.join([first, *more])}" if more else f"{first} alone"
    options = [f", {name} {recipe.options[name]}" for name in found.plan.options]
    return f"{recipe.method}, scale {recipe.scale:g}{''.join(options)}"


def _comment(found: Selection, left_out: Sequence[str]) -> str:
    """The head of the recipe file, which names no sites otherwise."""
    title, figure = METRICS[found.plan.metric].title, found.chosen.figure
    lines = [
        f"# Chosen by 'merge-kit select' among {len(found.candidates)} candidates:",
        f"# {title} {figure.value:.3f} on {figure.n} validation images.",
        f"# Sites: {', '.join(found.chosen.sites)}",
        *([f"# Left out: {', '.join(left_out)}"] if left_out else []),
    ]
    return "".join(f"{line}\n" for line in lines)
