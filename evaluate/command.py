"""merge-kit evaluate and merge-kit compare."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from evaluate import loading, terminal
from evaluate.earlier import PAGE, REPORT
from evaluate.evaluation import Wishes, run
from evaluate.models import (
    AnyModel,
    classes_in_common,
    find_apart,
    find_models,
    labels_of,
    several_labels,
)
from evaluate.predictions import plain_number
from evaluate.scoring import Settings
from finetune.image_options import image_options
from merge_kit.commands.options import next_step, pairs, shown
from merge_kit.errors import UsageError
from merge_kit.labelspace import LabelSpace

_OPTIONS = (
    click.option(
        "--split",
        type=click.Choice(["train", "val", "test", "all"]),
        help="Which split [test where the table has splits, else all].",
    ),
    click.option("--site-column", default="site", show_default=True, help="Column with the site."),
    click.option("--classes", default="", help="Class names, if a model's own folder has none."),
    click.option("--pooled", multiple=True, metavar="NAME", help="Trained on all sites' images."),
    click.option("--federated", multiple=True, metavar="NAME", help="Trained in rounds."),
    click.option(
        "--external", multiple=True, metavar="SITES", help="No model was trained on these sites."
    ),
    click.option("--by", default="", metavar="COLUMNS", help="Subgroups, such as sex,scanner."),
    click.option(
        "--multi-label",
        is_flag=True,
        help="A case may be of several classes, or none [as the models' federation says].",
    ),
    click.option("--ordered", is_flag=True, help="The classes are grades, from low to high."),
    click.option("--calibrate", is_flag=True, help="Fit a temperature on the validation images."),
    click.option(
        "--prevalence",
        multiple=True,
        metavar="CLASS=SHARE",
        help="Where the model is to be used, for predictive values.",
    ),
    click.option(
        "--minimum",
        type=click.IntRange(1),
        default=5,
        show_default=True,
        help="Withhold figures of fewer cases.",
    ),
    click.option("--with-images", is_flag=True, help="Show the worst mistakes: patient data."),
    click.option("--cards", is_flag=True, help="Put the figures into merged models' README.md."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on a GPU that computes in it.",
    ),
    click.option("--replace", is_flag=True, help="Replace a report on other models or images."),
    click.option("--title", help="Heading of the report."),
    click.option(
        "--resamples",
        type=click.IntRange(1, 100_000),
        default=1000,
        show_default=True,
        help="Of the bootstrap.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap."
    ),
)


def _common(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return image_options(command, several=True)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_common
@click.option("--reference", metavar="NAME", help="Compare all other models with this one.")
@click.option("--groups", is_flag=True, help="Judge at the level of the federation's groups.")
@click.option("--out", type=click.Path(path_type=Path), default="evaluation", show_default=True)
def evaluate(models: tuple[str, ...], reference: str | None, groups: bool, **options: Any) -> None:
    """Evaluate one or more models on labelled images.

    A MODEL is a timm folder, a merged model, a site's folder or run, a federation (its base), or a
    CSV of predictions; NAME=FOLDER names it in the report. Give --data more than once for several
    sets; NAME=PATH makes NAME the site of a set that names none.
    """
    found = find_models(models, **_roles(options))
    space = labels_of(found)
    options["multi_label"] |= several_labels(found)
    if groups and not space.groups:
        raise UsageError("--groups: no model's config.json names groups of classes: leave it out.")
    if groups and options["multi_label"]:
        raise UsageError("--groups is for cases of one class: leave it or --multi-label out.")
    options |= {"groups": space.groups, "grouped": groups}
    _evaluate(found, space.classes, space.classes, reference, options)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_common
@click.option("--reference", metavar="NAME", help="Compare with this one [the first].")
@click.option("--out", type=click.Path(path_type=Path), default="comparison", show_default=True)
def compare(models: tuple[str, ...], reference: str | None, **options: Any) -> None:
    """Compare models with a reference, also when their classes differ.

    A MODEL is what 'merge-kit evaluate' takes. Models with different classes are compared on the
    classes that all of them know; cases of other classes are left out.
    """
    found = find_apart(models, **_roles(options))
    if len(found) < 2:
        raise UsageError("there is nothing to compare: name two models or more.")
    # The same name in other letters is the same class, as the first model writes it.
    every = {n.casefold(): n for model in reversed(found) for n in reversed(model.classes)}
    common = classes_in_common(found)
    options["multi_label"] |= several_labels(found)
    options |= {"groups": {}, "grouped": False}
    _evaluate(found, list(every.values())[::-1], common, reference or found[0].name, options)


def _roles(options: dict[str, Any]) -> dict[str, Any]:
    names = [part.strip() for part in options["classes"].split(",") if part.strip()]
    return {"classes": names, "pooled": options["pooled"], "federated": options["federated"]}


def _evaluate(
    models: Sequence[AnyModel],
    every: Sequence[str],
    common: Sequence[str],
    reference: str | None,
    options: dict[str, Any],
) -> None:
    out: Path = options["out"]
    _check_names(models, options["title"] or "")
    wishes = Wishes(
        out=out,
        title=options["title"] or "Evaluation",
        device=options["device"],
        precision=options["precision"],
        skip_unreadable=options["skip_unreadable"],
        calibrate=options["calibrate"],
        with_images=options["with_images"],
        cards=options["cards"],
        replace=options["replace"],
        settings=Settings(
            minimum=options["minimum"],
            resamples=options["resamples"],
            seed=options["seed"],
            ordered=options["ordered"],
            prevalences=_prevalences(
                options["prevalence"],
                LabelSpace(tuple(common), options["groups"]).top if options["grouped"] else common,
            ),
            reference=reference,
        ),
    )
    outcome = run(
        models,
        _loader(every, common, options),
        wishes,
        notes=_on_classes(models, common),
        announce=click.echo,
    )
    if outcome is None:
        return
    for sentence in outcome.left_out:
        click.echo(f"Left out: {sentence}", err=True)
    for sentence in outcome.remarks:
        click.echo(f"Note: {sentence}", err=True)
    Console().print(terminal.table(outcome.report))
    for sentence in outcome.report.verdict:
        click.echo(f"- {sentence}")
    next_step(f"open {shown(out / PAGE)}; figures for a program are in {shown(out / REPORT)}")


def _check_names(models: Sequence[AnyModel], title: str) -> None:
    """Names stand in tables, on the page and in the terminal: no line breaks, no control codes."""
    given = [*(("the name", model.name) for model in models), ("--title", title)]
    for what, text in given:
        if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
            raise UsageError(
                f"{what} {text!a} holds a control character or one that is not UTF-8: leave it out."
            )


def _loader(
    every: Sequence[str], common: Sequence[str], options: dict[str, Any]
) -> Callable[[], loading.Loaded]:
    read = partial(
        loading.load,
        options["data"],
        every,
        images=options["images"],
        label_map=pairs(options["mapping"], "--map"),
        where=pairs(options["where"], "--where"),
        split=options["split"],
        site_column=options["site_column"],
        by=[part.strip() for part in options["by"].split(",") if part.strip()],
        external=options["external"],
        multi_label=options["multi_label"],
        groups=options["groups"],
        grouped=options["grouped"],
        skip_unreadable=options["skip_unreadable"],
    )
    if list(every) == list(common):
        return read
    return lambda: read().restricted_to(common)


def _on_classes(models: Sequence[AnyModel], common: Sequence[str]) -> list[str]:
    different = [m.name for m in models if len(m.classes) != len(common)]
    if not different:
        return []
    return [
        "The models do not know the same classes. All figures are on those in common "
        f"({', '.join(common)}): cases of other classes are left out, and what a model gives to "
        "other classes is shared out among these in proportion."
    ]


def _prevalences(values: tuple[str, ...], classes: Sequence[str]) -> dict[str, float]:
    found = {}
    for name, text in pairs(values, "--prevalence").items():
        if name not in classes:
            raise UsageError(
                f"--prevalence {name}: there is no such class (known: {', '.join(classes)})."
            )
        share = plain_number(text)
        if not 0 < share < 1:
            raise UsageError(f"--prevalence {name}={text}: give a share between 0 and 1.")
        found[name] = share
    return found
