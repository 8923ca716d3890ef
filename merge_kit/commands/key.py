"""merge-kit key."""

from __future__ import annotations

from pathlib import Path

import click

from merge_kit import signing
from merge_kit.commands.options import next_step, shown
from merge_kit.site import PUBLIC_KEY_FILE, open_site, rotate_key


@click.group()
def key() -> None:
    """The keys by which sites and coordinators sign."""


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Make a new private key in FILE, which must not be there."""
    click.echo(f"{file}: {signing.create_key(file)}")


@key.command()
@click.argument("place", type=click.Path(path_type=Path))
def show(place: Path) -> None:
    """Show the public key of the site in PLACE, or of a private key's file."""
    file = open_site(place).key_file if place.is_dir() else place
    click.echo(signing.public_key(file))


@key.command()
@click.argument("folder", type=click.Path(path_type=Path))
def rotate(folder: Path) -> None:
    """Give the site in FOLDER a new key.

    The old private key is kept beside it under another name. Until the coordinator has exchanged
    the keys, what is published is signed by a key that is not admitted.
    """
    site = open_site(folder)
    kept, public = rotate_key(site)
    click.echo(f"The new key of site '{site.name}': {public}")
    click.echo(f"  the old one is kept in {kept}")
    next_step(
        f"send {site.root / PUBLIC_KEY_FILE} to the coordinator, who runs\n"
        f"  merge-kit admit {shown(site.config.hub)} {site.name} {public} --rotate"
    )
