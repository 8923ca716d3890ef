"""merge-kit evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from evaluate import report
from evaluate.earlier import METRICS, PREDICTIONS, REPORT, check_place, inputs_of
from evaluate.metrics import summarise, verdict
from evaluate.models import find_models
from evaluate.predictions import choose_cases, predict, to_csv
from finetune.cases import load_cases
from finetune.image_options import image_options
from finetune.network import choose_device
from finetune.progress import Progress
from merge_kit.commands.options import next_step, pairs
from merge_kit.files import write_atomic


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@image_options
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    help="Which split [test where the table has splits, else all].",
)
@click.option("--site-column", default="site", show_default=True, help="Column with the site.")
@click.option("--classes", default="", help="Class names, if a model's own folder has none.")
@click.option("--pooled", multiple=True, metavar="NAME", help="Trained on all sites' images.")
@click.option("--out", type=click.Path(path_type=Path), default="evaluation", show_default=True)
@click.option("--replace", is_flag=True, help="Replace a report on other models or images.")
@click.option("--title", default="Evaluation", show_default=True, help="Heading of the report.")
@click.option(
    "--resamples",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Of the bootstrap.",
)
def evaluate(
    models: tuple[str, ...],
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    split: str | None,
    site_column: str,
    skip_unreadable: bool,
    classes: str,
    pooled: tuple[str, ...],
    out: Path,
    replace: bool,
    title: str,
    device: str,
    resamples: int,
) -> None:
    """Evaluate one or more models on labelled images.

    A MODEL is a timm folder, a merged model, a site's folder or run, or a federation (its base);
    NAME=FOLDER names it in the report.
    """
    names = [part.strip() for part in classes.split(",") if part.strip()]
    found = find_models(models, classes=names, pooled=pooled)
    chosen = choose_device(device)
    cases = load_cases(
        data,
        classes=found[0].classes,
        images=images,
        label_map=pairs(mapping, "--map"),
        where=pairs(where, "--where"),
    )
    unsplit = split is None and not any(case.split for case in cases)
    cases = choose_cases(cases, split)
    inputs = inputs_of(found, cases)
    check_place(out, inputs, replace=replace)
    models_of = f"{len(found)} model{'s' * (len(found) > 1)}"
    click.echo(f"{models_of} on {len(cases)} images, on {chosen}")
    with Progress() as progress:
        predictions, skipped = predict(
            found,
            cases,
            chosen,
            site_column=site_column,
            skip_unreadable=skip_unreadable,
            progress=progress.stage,
        )
    for sentence in skipped:
        click.echo(f"Left out: {sentence}", err=True)
    roles = {model.name: model.role for model in found}
    summary = summarise(predictions, roles=roles, resamples=resamples)
    notes = [f"{len(skipped)} unreadable images were left out."] if skipped else []
    if unsplit:
        notes.append(
            "The table names no splits: all its images were used, also any that a model was "
            "trained on. Its figures are then too good."
        )
        click.echo(f"Note: {notes[-1]}", err=True)
    page = report.render(
        summary,
        title=title,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
    )
    # First what says of which inputs the files are: a run that was killed here can be repeated.
    record = {**summary, "inputs": inputs}
    write_atomic(out / METRICS, json.dumps(record, indent=2, ensure_ascii=False))
    write_atomic(out / PREDICTIONS, to_csv(predictions))
    write_atomic(out / REPORT, page)
    Console().print(table(summary))
    for sentence in verdict(summary):
        click.echo(f"- {sentence}")
    next_step(f"open {out / REPORT}; figures for a program are in {out / METRICS}")


def table(summary: Mapping[str, Any]) -> Table:
    """The main figures of each model, for a terminal."""
    shown = Table(title="balanced accuracy (95 % interval)", title_justify="left")
    shown.add_column("model", no_wrap=True)
    for column in ("union", "mean of sites", "worst site", "union AUROC"):
        shown.add_column(column, justify="right")
    for model in summary["models"]:
        union, worst = model["union"], model["worst_site"]
        shown.add_row(
            model["model"],
            _interval(union["balanced_accuracy"]),
            _figure(model["mean_over_sites"]["balanced_accuracy"]["value"]),
            f"{_figure(worst['value'])} {worst['site']}" if worst else "-",
            _figure(union["macro_auroc"]["value"]),
        )
    return shown


def _interval(figure: Mapping[str, Any]) -> str:
    if figure["low"] is None:
        return _figure(figure["value"])
    return f"{_figure(figure['value'])} ({figure['low']:.2f}-{figure['high']:.2f})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
