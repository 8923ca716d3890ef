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

from evaluate import labelled, processes, report
from evaluate import summary as summary_of
from evaluate.labelled import LabelledSet
from evaluate.models import find_models
from evaluate.predicting import predict
from evaluate.predictions import Predictions, to_csv
from evaluate.summary import summarise, verdict
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
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 on a GPU that computes in it.",
)
@click.option("--title", default="Evaluation", show_default=True, help="Heading of the report.")
@click.option("--resamples", default=1000, show_default=True, help="Of the bootstrap.")
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
    precision: str,
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
    with processes.joined() as group:
        chosen = group.device(choose_device(device))
        with group.together():
            loaded = labelled.load(
                [data],
                found[0].classes,
                images=images,
                label_map=pairs(mapping, "--map"),
                where=pairs(where, "--where"),
                split=split,
                site_column=site_column,
                skip_unreadable=skip_unreadable,
            )
        models_of = f"{len(found)} model{'s' * (len(found) > 1)}"
        if group.first:
            click.echo(f"{models_of} on {len(loaded.chosen)} images, on {chosen}")
        with Progress() as progress:
            predicted = predict(
                found,
                loaded.chosen,
                chosen,
                cache=out / "predictions",
                precision=precision,
                skip_unreadable=skip_unreadable,
                listed=loaded.listed,
                group=group,
                progress=progress.stage if group.first else None,
            )
    if predicted is None:
        return
    skipped = [*loaded.left_out, *predicted.left_out]
    for sentence in skipped:
        click.echo(f"Left out: {sentence}", err=True)
    predictions = [_as_summarised(one, predicted.labelled) for one in predicted.predictions]
    roles = {model.name: model.role for model in found}
    summary = summarise(predictions, roles=roles, resamples=resamples)
    notes = [f"{len(skipped)} unreadable images were left out."] if skipped else []
    for note in loaded.notes:
        click.echo(f"Note: {note}", err=True)
    for files in loaded.copies:
        click.echo(f"One image: {', '.join(files)}", err=True)
    notes += loaded.notes
    page = report.render(
        summary,
        title=title,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
    )
    write_atomic(out / "metrics.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write_atomic(out / "predictions.csv", to_csv(predicted.predictions, predicted.labelled))
    write_atomic(out / "report.html", page)
    Console().print(table(summary))
    for sentence in verdict(summary):
        click.echo(f"- {sentence}")
    next_step(f"open {out / 'report.html'}; figures for a program are in {out / 'metrics.json'}")


def _as_summarised(one: Predictions, cases: LabelledSet) -> summary_of.Predictions:
    """Predictions as `evaluate.summary` takes them: each with what is known of the cases."""
    return summary_of.Predictions(
        model=one.model,
        classes=one.classes,
        files=cases.files,
        labels=cases.labels,
        probabilities=one.probabilities,
        patients=cases.patients,
        sites=cases.sites,
        unit="group" if cases.unit == "group" else "patient",
    )


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
