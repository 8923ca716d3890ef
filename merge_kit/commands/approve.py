"""merge-kit approve."""

from __future__ import annotations

from pathlib import Path

import click

from merge_kit import policies, publishing, signing
from merge_kit.commands.options import next_step, shown
from merge_kit.commands.publish import send
from merge_kit.compressing import parse_compression
from merge_kit.errors import UsageError
from merge_kit.hub import open_hub
from merge_kit.runs import latest_run
from merge_kit.site import open_site


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "key_file",
    required=True,
    type=click.Path(path_type=Path),
    help="The private key of the person who approves.",
)
@click.option("--run", type=click.Path(path_type=Path), help="Run folder [the latest finished].")
@click.option("--hub", help="Another place than the hub that was joined.")
@click.option("--alongside", is_flag=True, help="As for 'publish'.")
@click.option("--no-statistics", is_flag=True, help="As for 'publish'.")
@click.option("--compress", default="none", show_default=True, metavar="HOW", help="As 'publish'.")
def approve(
    folder: Path,
    key_file: Path,
    run: Path | None,
    hub: str | None,
    alongside: bool,
    no_statistics: bool,
    compress: str,
) -> None:
    """Approve, as a second person, what would leave the site in FOLDER.

    Shows what 'publish' would send with the same options, and signs it. Where the site's policy
    asks for a second signature nothing leaves without one of this very contribution.
    """
    site = open_site(folder)
    chosen = run or latest_run(site.root)
    if chosen is None:
        raise UsageError(f"{folder} has no finished run: run 'merge-kit finetune {folder}' first.")
    opened = open_hub(hub or site.config.hub)
    parcels = publishing.prepare_all(
        site,
        chosen,
        opened,
        alongside=alongside,
        statistics=not no_statistics,
        how=parse_compression(compress),
    )
    send(site, chosen, opened, parcels, dry_run=True)
    own = signing.public_key(site.key_file)
    for parcel in parcels:
        key = policies.approve(site.root, parcel.manifest, key_file, own)
        click.echo(f"Approved by {key}: {parcel.manifest.kind} {parcel.manifest.id[:12]}")
    options = [f"--run {shown(chosen)}"]
    options += [f"--hub {shown(hub)}"] if hub else []
    options += ["--alongside"] if alongside else []
    options += ["--no-statistics"] if no_statistics else []
    options += [f"--compress {compress}"] if compress != "none" else []
    next_step(f"send it with\n  merge-kit publish {shown(folder)} {' '.join(options)}")
