"""merge-kit calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from finetune import calibrating
from finetune.cases import Case
from finetune.image_options import (
    annotated_option,
    image_options,
    own_classes_option,
    split_cases,
    split_options,
)
from finetune.labelling import Labelling, own_labelling
from finetune.network import choose_device
from finetune.own_head import own_head
from finetune.progress import Progress
from merge_kit.commands.options import create_pr_option, listed, next_step, shown
from merge_kit.commands.publish import hub_option, send_or_show
from merge_kit.errors import LabelError, UsageError
from merge_kit.site import Site, open_site


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@image_options
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A model that was merged from the hub [the federation's base].",
)
@split_options
@click.option(
    "--norms",
    is_flag=True,
    help="Measure its batch norm statistics instead, for 'merge-kit restore'.",
)
@click.option(
    "--means",
    type=click.IntRange(min=1),
    metavar="N",
    help="Send means of groups of N images of a class: far fewer bytes than sums of squares.",
)
@click.option(
    "--assign-groups",
    is_flag=True,
    help="Count an image of a group for the class of it that the model finds most probable.",
)
@annotated_option
@own_classes_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="With --own-classes: folder of the model."
)
@click.option("--publish", is_flag=True, help="Send it to the hub at once.")
@create_pr_option
@hub_option
def calibrate(
    folder: Path,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    model: Path | None,
    norms: bool,
    means: int | None,
    assign_groups: bool,
    annotated: str | None,
    own_classes: str | None,
    out: Path | None,
    publish: bool,
    create_pr: bool,
    hub: str | None,
    device: str,
    **split: Any,
) -> None:
    """Measure the training images of the site in FOLDER for a classifier of all sites.

    One pass forward, no training. Whoever merges adds the sums of all sites up and solves the
    classifier with 'merge-kit head'. Split the images as for 'finetune'.

    With --own-classes, for a site that has a task of its own, nothing is measured for others: the
    model gets a classifier of these classes, and is written to --out.

    \b
    merge-kit calibrate north --data north.csv
    merge-kit calibrate north --data north.csv --model hub/models/merged --publish
    merge-kit calibrate north --data north.csv --means 5 --publish
    merge-kit calibrate west --data west.csv --model merged --own-classes cyst,abscess --out mine
    """
    if create_pr and not publish:
        raise UsageError("--create-pr says how to publish: give --publish with it.")
    site, chosen = open_site(folder), choose_device(device)
    if own_classes is not None:
        if out is None or publish:
            raise UsageError(
                "--own-classes writes a model for this site alone: give its folder with --out, and "
                "no --publish."
            )
        labelling = own_labelling(site.federation, listed(own_classes))
        classes = labelling.space.classes
        own = split_cases(classes, data, images, mapping, where, **split, annotated=annotated)
        _own_head(site, own, model, labelling, out, chosen, skip_unreadable)
        return
    several = site.federation.multi_label
    if assign_groups and several:
        raise UsageError(
            "--assign-groups is for images of one class each: leave it out, what is not annotated "
            "counts nowhere."
        )
    if means is not None and (several or norms):
        raise UsageError(
            "--means is for the classifier of images of one class each: leave it out "
            f"{'in a federation of findings' if several else 'with --norms'}."
        )
    if norms and assign_groups:
        raise UsageError("--assign-groups is for the classifier: norm statistics need no labels.")
    if out is not None:
        raise UsageError("--out is for --own-classes: moments lie in the site's folder.")
    space = site.federation.labels
    try:
        cases = split_cases(
            space.classes,
            data,
            images,
            mapping,
            where,
            **split,
            groups=tuple(space.groups),
            multi_label=several,
            annotated=annotated,
        )
    except LabelError as error:
        raise calibrating.explained(error, site) from error
    with Progress() as progress:
        made = calibrating.calibrate(
            site,
            cases,
            model,
            chosen,
            "norms" if norms else "moments",
            means=means,
            assign_groups=assign_groups,
            skip_unreadable=skip_unreadable,
            stage=progress.stage,
        )
    for sentence in made.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    if made.was_there:
        click.echo("This has been measured before; nothing was done again.")
    of = "the base" if model is None else str(model)
    click.echo(f"Site '{site.name}': {made.images} training images measured with {of}")
    for place, (name, count) in enumerate(zip(site.federation.classes, made.counts, strict=True)):
        without = f", {made.absent[place]} without" if several else ""
        click.echo(f"  {name:<20} {count:>8} images{without}")
    for name, count in () if several and norms else made.held_back:
        if several:
            click.echo(
                f"Held back: '{name}' in {count} image(s): fewer than "
                f"{site.federation.policy.minimum_class_count} have it or lack it, or differ in it "
                "from another class, and sums would give them away."
            )
            continue
        click.echo(
            f"Held back: '{name}' has {count} image(s), the federation's policy asks for "
            f"{site.federation.policy.minimum_class_count}: the sum of fewer would give them away."
        )
    if made.coarse:
        click.echo(
            f"Held back: {made.coarse} image(s) whose label names a group of classes: the "
            "classifier is made of sums over single classes."
        )
    if made.assigned:
        click.echo(
            f"Guessed: {made.assigned} image(s) of a group count for the class of it that the "
            "model finds most probable."
        )
    what = "norm statistics" if norms else "means" if means else "moments"
    click.echo(f"  {what:<20} {made.size / 2**20:.1f} MiB in {made.folder}")
    send_or_show(site, made.folder, hub, publish=publish, create_pr=create_pr)


def _own_head(
    site: Site,
    cases: Sequence[Case],
    model: Path | None,
    labelling: Labelling,
    out: Path,
    device: torch.device,
    skip_unreadable: bool,
) -> None:
    with Progress() as progress:
        made = own_head(
            site,
            cases,
            model,
            labelling,
            out,
            device,
            skip_unreadable=skip_unreadable,
            stage=progress.stage,
        )
    for sentence in made.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    of = "the base" if model is None else str(model)
    click.echo(
        f"Model in {out}: a classifier of {len(labelling.own_classes)} own classes on {of}, from "
        f"{made.train_images} training images"
    )
    click.echo(
        f"  balanced accuracy    {made.balanced_accuracy:.3f} on {made.validation_images} own "
        "validation images"
    )
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(out)} --data <labels.csv>")
