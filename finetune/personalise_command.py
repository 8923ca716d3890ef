"""merge-kit personalise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from finetune.cases import Case
from finetune.image_options import annotated_option, image_options, split_cases, split_options
from finetune.network import choose_device
from finetune.options import TrainingOptions, make_options
from finetune.personalising import SHARES, personalise, told
from finetune.progress import Progress
from finetune.teaching import teach
from merge_kit.commands.options import next_step, shown
from merge_kit.errors import UsageError
from merge_kit.site import Site, open_site
from merge_kit.yamlfile import read_yaml

_TAUGHT = TrainingOptions(select="balanced_accuracy")
"""How a private model trains; the weights that the validation images like best are kept."""


@click.command(name="personalise")
@click.argument("folder", type=click.Path(path_type=Path))
@image_options
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="The model that was merged from the hub.",
)
@split_options
@annotated_option
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(0, 1),
    multiple=True,
    help="How far to go from the merged weights (0) to the site's own (1) "
    f"(repeatable) [{', '.join(f'{share:g}' for share in SHARES)}].",
)
@click.option(
    "--into",
    metavar="MODEL",
    help="Teach it to a private model instead: a timm folder, or a pretrained name of timm's.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="YAML file of training options, for --into.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
def personalise_command(
    folder: Path,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    device: str,
    model: Path,
    annotated: str | None,
    shares: tuple[float, ...],
    into: str | None,
    config: Path | None,
    out: Path,
    **split: Any,
) -> None:
    """Make a merged model the own one of the site in FOLDER, by its own validation images.

    With --into the site's private model of any backbone learns instead, from the site's labels and
    from what the merged model says of the same images. Otherwise tried are models between the
    merged one and the site's own (of its latest run), classifier and all, or with a classifier
    solved from the site's images, and with norm statistics measured on them or not. Nothing of it
    leaves the site. The figures that are shown chose among several:
    evaluate the result on other images.

    \b
    merge-kit personalise north --data north.csv --model merged --out mine
    merge-kit personalise north --data north.csv --model merged --into private --out mine
    """
    if into and shares:
        raise UsageError("--share is between weights, which --into does not mix: leave it out.")
    if config and not into:
        raise UsageError("--config is of a training, which only --into does: leave it out.")
    site, chosen = open_site(folder), choose_device(device)
    space = site.federation.labels
    cases = split_cases(
        space.classes,
        data,
        images,
        mapping,
        where,
        **split,
        groups=tuple(space.groups),
        multi_label=site.federation.multi_label,
        annotated=annotated,
    )
    if into:
        _teach(site, cases, model, into, config, out, chosen, skip_unreadable)
        return
    wanted = tuple(sorted({0.0, *shares})) if shares else SHARES
    with Progress() as progress:
        made = personalise(
            site,
            cases,
            model,
            out,
            chosen,
            shares=wanted,
            skip_unreadable=skip_unreadable,
            stage=progress.stage,
        )
    for sentence in made.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    click.echo(f"On {made.validation_images} validation images of site '{site.name}':")
    for line in told(made.choices):
        click.echo(line)
    (best,) = told([made.best])
    click.echo(f"Model in {out}:{best[1:]}")
    if len({one.share for one in made.choices}) == 1:
        click.echo("The site has no finished run: only classifier and norm statistics were tried.")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(out)} --data <labels.csv>")


def _teach(
    site: Site,
    cases: Sequence[Case],
    model: Path,
    into: str,
    config: Path | None,
    out: Path,
    device: torch.device,
    skip_unreadable: bool,
) -> None:
    options = _TAUGHT
    if config:
        file = read_yaml(config, UsageError)
        make_options(file.data, file.place)
        options = make_options({**_TAUGHT.model_dump(mode="json"), **file.data}, file.place)
    with Progress() as progress:
        done = teach(
            site,
            cases,
            model,
            into,
            options,
            out,
            device,
            progress,
            skip_unreadable=skip_unreadable,
            stage=progress.stage,
        )
    for sentence in done.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    click.echo(f"On {done.validation_images} validation images of site '{site.name}':")
    rows = [("merged model", done.merged), ("private model before", done.before)]
    for name, figures in [*rows, ("private model after", done.after)]:
        if figures:
            click.echo(
                f"  {name:<22} balanced accuracy {figures.balanced_accuracy:.3f}  "
                f"loss {figures.loss:.3f}"
            )
    click.echo(f"Model in {out}: the weights after step {done.steps}")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(out)} --data <labels.csv>")
