"""merge-kit restore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from finetune import network
from finetune.cases import Case, contents_digest, load_unlabelled
from finetune.image_options import of_split
from finetune.network import choose_device
from finetune.normalizing import norm_sums
from finetune.pixels import decode
from finetune.progress import Progress
from merge_kit import restoring
from merge_kit.commands.merging_options import contribution_options
from merge_kit.commands.options import next_step, opened_federation, pairs, shown
from merge_kit.configuration import read_config
from merge_kit.errors import UsageError, VectorError
from merge_kit.federation import preprocessing_of
from merge_kit.normstats import NormSums
from merge_kit.provenance import NormRecord, PlainProvenance, Provenance
from merge_kit.reheading import find_measured, find_model
from merge_kit.writing import check_target


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Measure these images, which need no labels: a folder, or the root of --data.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="A CSV with file[,split,...]; labels are not read.",
)
@click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Only these rows of --data.")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    default="train",
    show_default=True,
    help="Which rows of --data, where they tell.",
)
@click.option("--skip-unreadable", is_flag=True, help="Leave unreadable images out, and say so.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--hub", help="Add up what the sites of this hub have measured.")
@contribution_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--replace", is_flag=True, help="Replace an existing model of merge-kit.")
def restore(
    model: Path,
    images: Path | None,
    data: Path | None,
    where: tuple[str, ...],
    split: str,
    skip_unreadable: bool,
    device: str,
    hub: str | None,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    out: Path,
    replace: bool,
) -> None:
    """Give the merged MODEL batch norm statistics that fit its weights.

    They come from images at the merger, or with --hub from the sums that sites have sent with
    'merge-kit calibrate --norms'. Worth it for sites that train with '--norm update'; where they
    keep the base's statistics, as is the default, so should the merge. A classifier that was solved
    has to be solved again.

    \b
    merge-kit restore merged --images some-images --out restored
    merge-kit restore merged --hub hub --out restored
    """
    check_target(out, replace=replace)
    if (hub is None) == (images is None and data is None):
        raise UsageError("give either --images (and --data), or --hub.")
    record = restoring.restorable(model)
    if hub is None:
        cases = _cases(images, data, where, split)
        sums, norms = _measured_here(model, record, cases, device, skip_unreadable)
    else:
        opened, federation = opened_federation(hub)
        with Console(stderr=True).status("checking what has arrived"):
            about = find_model(opened, federation, model).backbone
            found, refused = find_measured(
                opened,
                federation,
                about,
                "norms",
                allow_unsigned=allow_unsigned,
                skip_refused=skip_refused,
                sites=sites,
                exclude=exclude,
            )
        for entry in refused:
            click.echo(f"Left out: {entry.problem}", err=True)
        sums, norms = restoring.sums_of(found), restoring.from_sites(about, found)
    merged = restoring.restore(model, record, sums, norms, out, replace=replace)
    whose = f"{norms.images.count} images" if norms.images else f"{len(norms.sums)} site(s)"
    click.echo(f"Model in {out}: {len(sums)} batch norm layers, measured again on {whose}")
    click.echo(f"  fingerprint {merged}")
    next_step(
        f"let the sites calibrate it, or evaluate it with\n"
        f"  merge-kit evaluate {shown(out)} --data <labels.csv>"
    )


def _cases(
    images: Path | None, data: Path | None, where: tuple[str, ...], split: str
) -> list[Case]:
    table, root = (images, None) if data is None else (data, images)
    assert table is not None  # one of the two was given
    cases = load_unlabelled(table, images=root, where=pairs(where, "--where"))
    return of_split(cases, split if data else "all", table)


def _measured_here(
    model: Path,
    record: Provenance | PlainProvenance,
    cases: Sequence[Case],
    device: str,
    skip_unreadable: bool,
) -> tuple[dict[str, NormSums], NormRecord]:
    chosen, config = choose_device(device), read_config(model)
    if config is None:
        raise VectorError(f"{model} has no config.json: copy the whole folder again.")
    opened = network.load(model)
    with Progress() as progress:
        pictures, skipped = decode(
            sorted(cases, key=lambda case: case.file),
            preprocessing_of(config),
            skip_unreadable=skip_unreadable,
            progress=lambda done, of: progress.stage("decoding", done, of),
        )
        sums = norm_sums(
            opened.to(chosen),
            pictures,
            chosen,
            lambda done, of: progress.stage("measuring", done, of),
        )
    for sentence in skipped:
        click.echo(f"Left out: {sentence}", err=True)
    digest = contents_digest(pictures.cases)
    return sums, restoring.from_images(record.merged, len(pictures), digest)
