"""merge-kit finetune and merge-kit statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from finetune import run as runs
from finetune import run_statistics
from finetune.image_options import (
    annotated_option,
    image_options,
    own_classes_option,
    split_cases,
    split_options,
)
from finetune.labelling import Labelling, own_labelling
from finetune.network import choose_device
from finetune.options import TrainingOptions, make_options
from finetune.progress import Progress
from merge_kit.commands.options import listed, next_step, shown
from merge_kit.errors import UsageError
from merge_kit.methods.base import Statistics
from merge_kit.publishing import payload_file
from merge_kit.runs import latest_run
from merge_kit.site import open_site
from merge_kit.yamlfile import read_yaml

_TRAINING = TrainingOptions()


def training_options(command: Any) -> Any:
    """One command-line option for each field of TrainingOptions."""
    kinds: dict[str, Any] = {
        "norm": click.Choice(["frozen", "update", "fixed"]),
        "optimizer": click.Choice(["adamw", "sgd"]),
        "head": click.Choice(["auto", "federation", "own"]),
        "balance": click.Choice(["none", "weights", "sampling"]),
        "augment": click.Choice(["none", "light", "strong"]),
        "flip": click.Choice(["none", "horizontal", "both"]),
        "select": click.Choice(["balanced_accuracy", "macro_auroc", "last"]),
        "precision": click.Choice(["auto", "float32", "bfloat16"]),
        "epochs": float,
        "mutual": str,
        "clip_norm": float,
    }
    for name, field in reversed(TrainingOptions.model_fields.items()):
        default = getattr(_TRAINING, name)
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kinds.get(name, type(default)),
            default=default,
            show_default=default is not None,
            help=field.description,
        )(command)
    return command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@image_options
@split_options
@annotated_option
@own_classes_option
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of training options.")
@training_options
@click.pass_context
def finetune(
    context: click.Context,
    /,
    folder: Path,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    annotated: str | None,
    own_classes: str | None,
    config: Path | None,
    device: str,
    **training: Any,
) -> None:
    """Fine-tune the federation's base on the images of the site in FOLDER.

    The head is trained first, then the whole network at a low learning rate. A run that was killed
    goes on when the same command is given again. Nothing leaves the site.

    A label may name a class of the federation or one of its groups. Where an image may have several
    classes, the table has a column for each that the site has annotated. With --own-classes the
    site has a task of its own: it shares the backbone, and its classifier never leaves it.
    """
    site = open_site(folder)
    labelling = Labelling(site.federation)
    if own_classes is not None:
        labelling = own_labelling(site.federation, listed(own_classes))
    space = labelling.space
    if data.suffix == ".npz" and not mapping:
        places = ", ".join(f"{i}={name}" for i, name in enumerate(space.classes))
        click.echo(f"The labels of {data.name} are taken as {places}; --map 0=<class> changes it.")
    options = options_of(context, config, training)
    if labelling.own_classes and options.head == "federation":
        raise UsageError(
            "--head federation is of the federation's classes: leave it out with --own-classes."
        )
    chosen = choose_device(device)
    cases = split_cases(
        space.classes,
        data,
        images,
        mapping,
        where,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        split_seed=split_seed,
        groups=tuple(space.groups),
        multi_label=labelling.multi_label,
        annotated=annotated,
    )
    target = runs.run_folder(site, cases, options, chosen, labelling.own_classes)
    click.echo(f"Site '{site.name}': {len(cases)} images, on {chosen}; run {target}")
    with Progress() as progress:
        material = runs.prepare(
            site,
            cases,
            skip_unreadable=skip_unreadable,
            progress=lambda done, of: progress.stage("decoding", done, of),
        )
        for sentence in material.skipped:
            click.echo(f"Left out: {sentence}", err=True)
        finished = runs.finetune(
            site,
            material,
            options,
            target,
            chosen,
            progress,
            data=data,
            images=images,
            labelling=labelling,
        )
    _close(finished)
    if any(case.split == "test" for case in cases):
        click.echo(
            f"The images kept for testing are listed in {finished.folder / runs.CASES}; they were "
            "not looked at."
        )
    next_step(
        f"see what would leave the site with\n"
        f"  merge-kit publish {shown(site.root)} --run {shown(target)} --dry-run"
    )


def options_of(
    context: click.Context, config: Path | None, given: Mapping[str, Any]
) -> TrainingOptions:
    """Training options of a command line, over those of a YAML file.

    Raises
    ------
    UsageError
        A key or value is wrong, or --steps and --epochs are given both.
    """
    typed = {
        name: value
        for name, value in given.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if "steps" in typed and "epochs" in typed:
        raise UsageError("--steps and --epochs both set the length: give one of them.")
    from_file: Mapping[str, Any] = {}
    if config:
        file = read_yaml(config, UsageError)
        make_options(file.data, file.place)
        from_file = file.data
    return make_options({**from_file, **typed}, "the command line")


def _close(finished: runs.Run) -> None:
    summary = finished.summary
    if finished.was_finished:
        click.echo("This run has finished before; nothing was done again.")
    click.echo(
        f"Own validation images ({summary['validation_images']}); kept: the weights after step "
        f"{summary['steps']}"
    )
    for name, title in (("balanced_accuracy", "balanced accuracy"), ("macro_auroc", "macro AUROC")):
        click.echo(f"  {title:<18} {_interval(summary[name])}")
    if summary["skipped"]:
        click.echo(f"  left out           {len(summary['skipped'])} unreadable images")
    if teacher := summary.get("teacher"):
        click.echo(f"  private teacher    {_interval(teacher['balanced_accuracy'])}, stays here")
    size = summary["vector_bytes"] / 2**20
    click.echo(f"  vector             {size:.1f} MiB, norm {summary['vector_norm']:.3g}")
    click.echo(f"  run folder         {finished.folder}")


def _interval(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "not defined on these images"
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} (95 % {estimate['low']:.3f} to {estimate['high']:.3f})"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    "kinds",
    required=True,
    multiple=True,
    type=click.Choice(["fisher", "gram"]),
    help="What the merge method asks for (repeatable).",
)
@click.option("--run", type=click.Path(path_type=Path), help="Run folder [the latest finished].")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Where the run's images are [where they were]."
)
@click.option("--images", type=click.Path(path_type=Path), help="Image root [the CSV's folder].")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=run_statistics.EXAMPLES,
    show_default=True,
    help="Most training images to look at.",
)
@click.option(
    "--max-width",
    type=click.IntRange(min=1),
    default=run_statistics.MAX_WIDTH,
    show_default=True,
    help="Leave layers with more input columns out of gram.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
def statistics(
    folder: Path,
    kinds: tuple[Statistics, ...],
    run: Path | None,
    data: Path | None,
    images: Path | None,
    examples: int,
    max_width: int,
    device: str,
) -> None:
    """Make what some merge methods ask for beside the vector of the site in FOLDER.

    fisher: how much each weight matters to the site's own model. gram: how the inputs of each layer
    go together. Both are measured on training images of the latest finished run and published
    together with its vector. They give away more of the images than a vector does.
    """
    site = open_site(folder)
    if site.federation.multi_label and "fisher" in kinds:
        raise UsageError(
            "--kind fisher is for images of one class each, and those of this federation may have "
            "several: take gram, or a merge method that needs no statistics."
        )
    chosen = run or latest_run(site.root)
    if chosen is None:
        raise UsageError(f"{folder} has no finished run: run 'merge-kit finetune {folder}' first.")
    if images and not data:
        raise UsageError("--images says where the paths of --data start: give --data, too.")
    missing = []
    for kind in dict.fromkeys(kinds):
        if run_statistics.is_made(chosen, kind):
            place = chosen / payload_file(kind)
            click.echo(f"{place} is there already; remove it to make it again.")
        else:
            missing.append(kind)
    if missing:
        target = choose_device(device)
        with Progress() as progress:
            found, skipped = run_statistics.find_images(
                site,
                chosen,
                examples,
                data=data,
                images=images,
                progress=partial(progress.stage, "decoding"),
            )
            for sentence in skipped:
                click.echo(f"Left out: {sentence}", err=True)
            click.echo(f"Site '{site.name}': {len(found)} training images, on {target}")
            for kind in missing:
                made = run_statistics.make(
                    site,
                    chosen,
                    kind,
                    found,
                    target,
                    partial(progress.stage, kind),
                    max_width=max_width,
                )
                for sentence in made.left_out:
                    click.echo(f"Left out: {sentence}", err=True)
                if made.few_rows:
                    click.echo(_singular(made.few_rows, len(found)), err=True)
                click.echo(f"  {kind:<8} {made.path} ({made.size / 2**20:.1f} MiB)")
    next_step(
        f"see what would leave the site with\n"
        f"  merge-kit publish {shown(site.root)} --run {shown(chosen)} --dry-run"
    )


def _singular(layers: Sequence[str], images: int) -> str:
    """What RegMean does where a Gram matrix had fewer rows than columns."""
    return (
        f"Few rows: {images} images give {len(layers)} layer(s) fewer rows than input columns, "
        f"such as {layers[0]}: their Gram matrices are singular and give away the space of the "
        "inputs. RegMean then leans on its 'alpha', which shrinks entries off the diagonal, and "
        "its 'ridge', and takes the mean where nothing is known; more --examples help."
    )
