"""merge-kit head."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
from rich.console import Console

from finetune.image_options import annotated_option, image_options, table_cases
from finetune.network import choose_device
from finetune.standing_in import labelled_images, own_moments
from merge_kit import reheading
from merge_kit.commands.merging_options import contribution_options
from merge_kit.commands.options import next_step, opened_federation, shown, typed_pairs
from merge_kit.errors import UsageError
from merge_kit.schema import parse
from merge_kit.site import base_folder
from merge_kit.solving import HeadOptions
from merge_kit.writing import check_target


@click.command()
@click.argument("hub")
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--option",
    multiple=True,
    metavar="NAME=VALUE",
    help="solver=discriminant or ridge, shrinkage, priors=uniform or counts, penalty.",
)
@contribution_options
@partial(
    image_options,
    optional="Labelled images at the merger, which count like a site's: as for 'calibrate'.",
)
@annotated_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--replace", is_flag=True, help="Replace an existing model of merge-kit.")
def head(
    hub: str,
    models: tuple[Path, ...],
    option: tuple[str, ...],
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    data: Path | None,
    images: Path | None,
    mapping: tuple[str, ...],
    where: tuple[str, ...],
    skip_unreadable: bool,
    annotated: str | None,
    device: str,
    out: Path,
    replace: bool,
) -> None:
    """Solve the classifier of a model merged from HUB, from what sites measured of it.

    Without MODELS it is that of the federation's base. The sites that have measured it with
    'merge-kit calibrate' make one classifier: that of all their images, whoever came first. Of
    several MODELS the one is taken that loses least at sites which it has not been made of. A small
    labelled set may stand in for sites that have not come, or for all of them: --data takes its
    rows of the split 'train', or all where it has none.

    \b
    merge-kit head hub --out first
    merge-kit head hub merged --out calibrated
    merge-kit head hub merged-mean merged-sum merged-ties --out calibrated
    merge-kit head hub merged --data few.csv --out calibrated
    """
    check_target(out, replace=replace)
    options = parse(HeadOptions, typed_pairs(option, "--option"), "--option", UsageError)
    opened, federation = opened_federation(hub)
    labelled = None
    if data is not None:
        cases = table_cases(
            federation.classes,
            data,
            images,
            mapping,
            where,
            multi_label=federation.multi_label,
            annotated=annotated,
        )
        labelled, skipped = labelled_images(federation, cases, skip_unreadable=skip_unreadable)
        for sentence in skipped:
            click.echo(f"Left out: {sentence}", err=True)
    gathered = []
    with Console(stderr=True).status("checking what has arrived"):
        for folder in models or (None,):
            model = reheading.find_model(opened, federation, folder)
            found, refused = reheading.find_measured(
                opened,
                federation,
                model.backbone,
                allow_unsigned=allow_unsigned,
                skip_refused=skip_refused,
                sites=sites,
                exclude=exclude,
            )
            own = None
            if labelled:
                seen = folder or base_folder(opened)
                own = own_moments(federation, seen, labelled, choose_device(device))
            gathered.append(reheading.Candidate(folder, model, tuple(found), own))
            for entry in refused:
                click.echo(f"Left out: {entry.problem}", err=True)
    with Console(stderr=True).status("solving"):
        best, *others = reheading.compare(gathered)
        solved, merged = reheading.rehead(federation, best, options, out, replace=replace)
    of = f"{len(best.moments)} site(s)"
    if best.own:
        of += f" and {best.own.moments.size:.0f} images at the merger"
    click.echo(f"Model in {out}: classifier of {of} on {_name(best)}")
    for candidate in (best, *others):
        if candidate.error is not None:
            click.echo(f"  error at an unseen site {candidate.error:.3f}  {_name(candidate)}")
    wanted = {"shrinkage", "priors"} if solved.options.solver == "discriminant" else {"penalty"}
    told = solved.options.model_dump(include=wanted)
    click.echo(f"  {solved.options.solver}, {', '.join(f'{k} {v}' for k, v in told.items())}")
    for place, (name, count) in enumerate(
        zip(federation.classes, solved.counts.tolist(), strict=True)
    ):
        without = "" if solved.absent is None else f", {solved.absent[place]:.0f} without"
        nobody = "" if count else ": nobody knows it yet"
        click.echo(f"  {name:<20} {count:>8.0f} images{without}{nobody}")
    click.echo(f"  fingerprint {merged}")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(out)} --data <labels.csv>")


def _name(candidate: reheading.Candidate) -> str:
    return "the base" if candidate.folder is None else str(candidate.folder)
