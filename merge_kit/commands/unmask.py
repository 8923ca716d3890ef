"""merge-kit unmask."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from merge_kit.commands.options import next_step, shown
from merge_kit.federation import BASE_WEIGHTS, FEDERATION_FILE
from merge_kit.hub import open_hub
from merge_kit.unmasking import unmask as unmask_site


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="A hub, or the base as a folder or a file.")
@click.option("--site", required=True, help="The site whose model is wanted.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the site's model.")
def unmask(merged: Path, base: str, site: str, out: Path | None) -> None:
    """Give back a model close to a site's own, from the folder MERGED that keeps masks.

    The method 'emr' keeps them: one bit for each value and site. Heads and norm statistics stay
    those of the merged model.

    \b
    merge-kit merge hub --method emr --out merged
    merge-kit unmask merged --base hub --site north --out north-model
    """
    target = out or Path(f"unmasked-{site}")
    with Console(stderr=True).status(f"unmasking {site}"):
        found = unmask_site(merged, _base_path(base), site, target)
    click.echo(
        f"Model close to that of the site '{found.header.site}' in {target}, out of {merged}"
    )
    click.echo(f"  contribution {found.header.contribution[:12]}")
    click.echo(f"  fingerprint  {found.fingerprint}")
    next_step(
        "compare it with the merged model\n"
        f"  merge-kit evaluate {shown(merged)} {shown(target)} --data <labels.csv>"
    )


def _base_path(base: str) -> Path:
    path = Path(base)
    if path.exists() and not (path / FEDERATION_FILE).is_file():
        return path
    return open_hub(base).fetch(BASE_WEIGHTS)
