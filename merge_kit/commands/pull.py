"""merge-kit pull."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from merge_kit.commands.options import next_step, shown
from merge_kit.hub import open_hub
from merge_kit.pulling import pull


@click.command(name="pull")
@click.argument("hub")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--exclude", multiple=True, help="A site whose own hub is not asked (repeatable).")
def pull_command(hub: str, folder: Path, exclude: tuple[str, ...]) -> None:
    """Make a full copy of HUB in FOLDER, or bring it up to date; all commands work from the copy.

    Every signature and digest is checked; what is refused is named and not copied. Called again it
    fetches only what is missing. What sites have on hubs of their own is in the copy as well.
    """
    with Console(stderr=True).status("looking") as status:
        done = pull(open_hub(hub), folder, status.update, exclude=exclude)
    for sentence in done.left_out:
        click.echo(f"Left out: {sentence}", err=True)
    click.echo(f"Copy in {folder}: {done.new} new, {done.there} that were there")
    if done.withdrawn:
        click.echo(f"  {done.withdrawn} withdrawn: their tensors are not in the copy")
    next_step(f"see it with\n  merge-kit status {shown(folder)}")
