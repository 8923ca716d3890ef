"""merge-kit personalise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune.image_options import annotated_option, image_options, split_cases, split_options
from finetune.network import choose_device
from finetune.personalising import SHARES, personalise, told
from finetune.progress import Progress
from merge_kit.commands.options import next_step, shown
from merge_kit.site import open_site


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
    out: Path,
    **split: Any,
) -> None:
    """Make a merged model the own one of the site in FOLDER, by its own validation images.

    Tried are models between the merged one and the site's own (of its latest run), classifier and
    all, or with a classifier solved from the site's images, and with norm statistics measured on
    them or not. Nothing of it leaves the site. The figures that are shown chose among several:
    evaluate the result on other images.

    \b
    merge-kit personalise north --data north.csv --model merged --out mine
    """
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
