"""merge-kit rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from evaluate.experiments import rounds as strategies
from evaluate.experiments.config import Strategy
from finetune import run as runs
from finetune.command import options_of, training_options
from finetune.image_options import image_options, table_cases
from finetune.network import choose_device
from finetune.progress import Progress
from merge_kit.commands.options import next_step, shown
from merge_kit.errors import UsageError
from merge_kit.site import open_site


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@image_options
@click.option("--site-column", default="site", show_default=True, help="Column with the site.")
@click.option("--strategy", type=click.Choice(get_args(Strategy)), default="fedavg")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of training options.")
@training_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--replace", is_flag=True, help="Replace an earlier model in rounds.")
@click.pass_context
def rounds(
    context: click.Context,
    /,
    folders: tuple[Path, ...],
    data: Path,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    site_column: str,
    strategy: Strategy,
    rounds: int,
    config: Path | None,
    out: Path,
    replace: bool,
    device: str,
    **training: Any,
) -> None:
    """Train in synchronous rounds, on one machine: the yardstick of experiments.

    The sites in FOLDERS find their images in one table by its column of sites. --steps is what each
    site trains in all rounds together.
    """
    sites, options, on = (
        [open_site(f) for f in folders],
        options_of(context, config, training),
        (choose_device(device)),
    )
    if len({site.config.federation for site in sites}) != 1:
        raise UsageError("the sites in FOLDERS have joined different federations.")
    if sites[0].federation.multi_label:
        raise UsageError(
            "rounds are of images of one class each, and those of this federation may have "
            "several: merge what the sites have published with 'merge-kit merge'."
        )
    cases = table_cases(sites[0].federation.classes, data, images, mapping, where)
    with Progress() as progress:
        clients = []
        for site in sites:
            own = [case for case in cases if case.columns.get(site_column) == site.name]
            material = runs.prepare(site, own, skip_unreadable=skip_unreadable)
            clients.append(strategies.Client(site, material))
        strategies.run(
            clients,
            strategy,
            rounds,
            options,
            on,
            out,
            replace=replace,
            progress=lambda done, of: progress.stage("rounds", done, of),
        )
    click.echo(f"Model in {out}: {strategy} of {len(sites)} sites")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(out)} --data <labels.csv>")
