"""merge-kit remerge."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from merge_kit.commands.options import next_step, opened_federation, shown
from merge_kit.errors import MergeKitError
from merge_kit.remerging import remerge


@click.command(name="remerge")
@click.argument("hub")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
def remerge_command(hub: str, models: tuple[Path, ...]) -> None:
    """Make MODELS merged from HUB again, without what has been withdrawn or revoked since.

    Each is replaced in its place, whole or not at all, by the same recipe on what is left; one that
    holds nothing of it stays as it is. A classifier that sites had solved for the old weights is
    gone with them: the sites calibrate the new model.
    """
    opened, federation = opened_federation(hub)
    failed, again = False, []
    for model in models:
        try:
            done = remerge(model, opened, federation)
        except MergeKitError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        if not done.gone:
            click.echo(f"{model}: holds nothing that was withdrawn")
            continue
        click.echo(f"{model}: made again")
        for part, why in done.gone:
            click.echo(f"  without {part.label}: {why}")
        click.echo(f"  of {', '.join(done.sites) or 'the base'}")
        click.echo(f"  fingerprint {done.after}, before {done.before}")
        if done.to_calibrate:
            again.append(model)
    if again:
        lines = "\n".join(
            f"  merge-kit calibrate <site> --data <labels.csv> --model {shown(model)} --publish"
            for model in again
        )
        next_step(f"let the sites calibrate what is new, then run 'merge-kit head':\n{lines}")
    if failed:
        sys.exit(1)
