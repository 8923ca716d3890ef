"""merge-kit calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from finetune import calibrating
from finetune.image_options import image_options, split_cases, split_options
from finetune.network import choose_device
from finetune.progress import Progress
from merge_kit.commands.options import next_step, shown
from merge_kit.commands.publish import send
from merge_kit.hub import open_hub
from merge_kit.publishing import prepare_all
from merge_kit.site import open_site


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
@click.option("--publish", is_flag=True, help="Send it to the hub at once.")
def calibrate(
    folder: Path,
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    model: Path | None,
    norms: bool,
    publish: bool,
    device: str,
    **split: Any,
) -> None:
    """Measure the training images of the site in FOLDER for a classifier of all sites.

    One pass forward, no training. Whoever merges adds the sums of all sites up and solves the
    classifier with 'merge-kit head'. Split the images as for 'finetune'.

    \b
    merge-kit calibrate north --data north.csv
    merge-kit calibrate north --data north.csv --model hub/models/merged --publish
    """
    site, chosen = open_site(folder), choose_device(device)
    cases = split_cases(site.federation.classes, data, images, mapping, where, **split)
    with Progress() as progress:
        made = calibrating.calibrate(
            site,
            cases,
            model,
            chosen,
            "norms" if norms else "moments",
            skip_unreadable=skip_unreadable,
            stage=progress.stage,
        )
    for sentence in made.skipped:
        click.echo(f"Left out: {sentence}", err=True)
    if made.was_there:
        click.echo("This has been measured before; nothing was done again.")
    of = "the base" if model is None else str(model)
    click.echo(f"Site '{site.name}': {sum(made.counts)} training images measured with {of}")
    for name, count in zip(site.federation.classes, made.counts, strict=True):
        click.echo(f"  {name:<20} {count:>8} images")
    for name, count in made.held_back:
        click.echo(
            f"Held back: '{name}' has {count} image(s), the federation's policy asks for "
            f"{site.federation.policy.minimum_class_count}: the sum of fewer would give them away."
        )
    what = "norm statistics" if norms else "moments"
    click.echo(f"  {what:<20} {made.size / 2**20:.1f} MiB in {made.folder}")
    if publish:
        hub = open_hub(site.config.hub)
        send(site, made.folder, hub, prepare_all(site, made.folder, hub))
        next_step(f"see it with\n  merge-kit status {shown(site.config.hub)}")
        return
    next_step(
        f"see what would leave the site with\n"
        f"  merge-kit publish {shown(site.root)} --run {shown(made.folder)} --dry-run"
    )
