"""merge-kit predict-proxy."""

from __future__ import annotations

from pathlib import Path

import click

from finetune import network
from finetune.answering import answer
from finetune.cases import load_unlabelled
from finetune.image_options import of_split, unlabelled_options
from finetune.network import choose_device
from finetune.progress import Progress
from finetune.teachers import other_teacher
from merge_kit.commands.options import create_pr_option, pairs, typed_pairs
from merge_kit.commands.publish import hub_option, send_or_show
from merge_kit.errors import UsageError
from merge_kit.remembered import cache_folder
from merge_kit.runs import latest_run
from merge_kit.site import SITE_FILE, open_site


@click.command(name="predict-proxy")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="The private model: a timm folder of any backbone, whose classes overlap by their names, "
    "or a site's folder, for its last run.",
)
@unlabelled_options
@click.option(
    "--top-k",
    "top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Tell the K most probable classes of each image; the others share what is left.",
)
@click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Standard deviation of normal noise on the logits, the same every time.",
)
@click.option(
    "--count",
    "counts",
    multiple=True,
    metavar="CLASS=N",
    help="Training images that the model has seen of a class, if you tell them (repeatable).",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--publish", is_flag=True, help="Send it to the hub at once.")
@create_pr_option
@hub_option
def predict_proxy(
    folder: Path,
    model: Path,
    data: Path,
    images: Path | None,
    where: tuple[str, ...],
    split_of: str,
    skip_unreadable: bool,
    top: int | None,
    noise: float,
    counts: tuple[str, ...],
    device: str,
    publish: bool,
    create_pr: bool,
    hub: str | None,
) -> None:
    """Say what the private model of the site in FOLDER makes of images that everybody has.

    For a site that may not publish weights: its model, of whatever backbone, stays where it is, and
    what it says of the federation's transfer images travels. 'merge-kit distill' teaches a student
    with it, beside the vectors of the other sites, on the same images.

    \b
    merge-kit predict-proxy north --model private --data transfer-images --publish
    """
    if create_pr and not publish:
        raise UsageError("--create-pr says how to publish: give --publish with it.")
    site, chosen = open_site(folder), choose_device(device)
    federation = site.federation
    if federation.multi_label:
        raise UsageError(
            "distillation is for images of one class each: a federation of findings has no use "
            "for predictions."
        )
    told = {name: _count(name, value) for name, value in typed_pairs(counts, "--count").items()}
    if odd := sorted(set(told) - set(federation.classes)):
        raise UsageError(
            f"--count {odd[0]}: the federation has no such class, it has "
            f"{', '.join(federation.classes)}."
        )
    if skip_unreadable:
        raise UsageError(
            "--skip-unreadable is not for predictions: they are of a whole set of images; take the "
            "unreadable ones out of it for everybody."
        )
    cases = of_split(
        load_unlabelled(data, images=images, where=pairs(where, "--where")), split_of, data
    )
    precision = network.resolved("auto", chosen)
    teacher = other_teacher(site.name, _folder_of(model), federation, precision, features=False)
    with Progress() as progress:
        made = answer(
            site,
            teacher,
            cases,
            chosen,
            cache_folder("outputs"),
            top=top,
            noise=noise,
            counts=told,
            progress=progress.stage,
        )
    known = [
        n for n, there in zip(federation.classes, teacher.known.tolist(), strict=True) if there
    ]
    click.echo(f"Site '{site.name}': what {model} says of {made.images} images")
    click.echo(f"  classes  {', '.join(known)}")
    click.echo(f"  images   {made.about}")
    click.echo(f"  size     {made.size / 2**20:.1f} MiB in {made.folder}")
    send_or_show(site, made.folder, hub, publish=publish, create_pr=create_pr)


def _folder_of(model: Path) -> Path:
    """The model itself, where a site's folder was given."""
    if not (model / SITE_FILE).is_file():
        return model
    run = latest_run(model)
    if run is None:
        raise UsageError(f"{model} has no finished run: run 'merge-kit finetune {model}'.")
    return run / "model"


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"--count {name}={value}: give a whole number of images.")
    return value
