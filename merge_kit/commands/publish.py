"""merge-kit publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from merge_kit import publishing, signing, sitecards
from merge_kit.commands.options import create_pr_option, next_step, shown
from merge_kit.compressing import parse_compression
from merge_kit.contributions import folder_of
from merge_kit.errors import HubError, UsageError
from merge_kit.hub import Hub, open_hub, pull_request_of, shows_cards
from merge_kit.outlets import Outlet
from merge_kit.runs import latest_run
from merge_kit.site import Site, open_site

hub_option = click.option(
    "--hub", help="Another address of the hub than the one that was joined, or a copy of it."
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", type=click.Path(path_type=Path), help="Run folder [the latest finished].")
@hub_option
@click.option("--alongside", is_flag=True, help="Keep the site's earlier contribution as well.")
@click.option("--no-statistics", is_flag=True, help="Hold the run's statistics back.")
@click.option(
    "--compress",
    default="none",
    show_default=True,
    metavar="HOW",
    help="Send a smaller vector: svd:0.95 (energy), topk:0.1 (share), bf16, int8; joined by '+'.",
)
@create_pr_option
@click.option("--dry-run", is_flag=True, help="Show what would leave the site, and stop.")
def publish(
    folder: Path,
    run: Path | None,
    hub: str | None,
    alongside: bool,
    no_statistics: bool,
    compress: str,
    create_pr: bool,
    dry_run: bool,
) -> None:
    """Publish the vector of a finished run of the site in FOLDER, and its statistics if it has any.

    Shows exactly what leaves the site: the tensors, the manifests below, and their signatures.
    """
    how = parse_compression(compress)
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
        how=how,
        create_pr=create_pr,
    )
    held = publishing.statistics_of(chosen) if no_statistics else []
    send(site, chosen, opened, parcels, held=held, dry_run=dry_run)
    if not dry_run:
        _after(hub or site.config.hub, create_pr=create_pr)


def send(
    site: Site,
    run: Path,
    hub: Hub,
    parcels: Sequence[publishing.Parcel],
    *,
    held: Sequence[str] = (),
    dry_run: bool = False,
) -> None:
    """Show all that leaves the site and, unless it is a dry run, publish it."""
    click.echo("What leaves the site:")
    for parcel in parcels:
        what, size = f"the {parcel.manifest.kind}", parcel.manifest.payload.size
        click.echo(f"  {what:<12} {parcel.payload} ({size / 2**20:.1f} MiB)")
        if lost := parcel.manifest.compression:
            click.echo(f"  compressed   {lost.method}, which leaves an error of {lost.error:.1%}")
    if held:
        click.echo(f"  held back    {', '.join(held)}")
    click.echo(f"  signed with  {signing.public_key(site.key_file)}")
    for parcel in parcels:
        click.echo(f"  the manifest of the {parcel.manifest.kind}")
        text = json.dumps(parcel.manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
        click.echo("\n".join(f"    {line}" for line in text.splitlines()))
        if parcel.replaces:
            click.echo(f"It replaces the site's contribution {parcel.replaces.id[:12]}.")
    if any(shows_cards(parcel.target) for parcel in parcels):
        click.echo("  a card       README.md, made of the manifests for people; nothing reads it")
    for parcel in parcels:
        folder = folder_of(parcel.manifest)
        target = f"{parcel.target.uri}/{folder}"
        if dry_run:
            click.echo(f"Dry run: nothing was sent to {target}.")
        elif publishing.publish(site, run, hub, parcel):
            request = pull_request_of(parcel.target, folder)
            click.echo(f"Proposed: {target} by {request}" if request else f"Published: {target}")
        else:
            click.echo(f"Already published: {target}")
    if parcels and not dry_run:
        update_card(site, parcels[0].outlet)


def update_card(site: Site, outlet: Outlet) -> None:
    """Let the card of a site's own repository say what lies there now; where that cannot be done it
    stays as it was."""
    try:
        if sitecards.update(site, outlet):
            click.echo(f"Described: {outlet.target.uri}/README.md")
    except HubError as error:
        click.echo(f"Note: the card on {outlet.target.uri} is not up to date: {error}", err=True)


def _after(uri: str, *, create_pr: bool) -> None:
    if create_pr:
        next_step("ask the coordinator to look at it and to merge it; until then nobody sees it.")
    else:
        next_step(f"see it with\n  merge-kit status {shown(uri)}")


def send_or_show(
    site: Site, folder: Path, hub: str | None, *, publish: bool, create_pr: bool = False
) -> None:
    """Publish at once what has been made in a folder, or say how to look at it first."""
    if publish:
        opened = open_hub(hub or site.config.hub)
        parcels = publishing.prepare_all(site, folder, opened, create_pr=create_pr)
        send(site, folder, opened, parcels)
        _after(hub or site.config.hub, create_pr=create_pr)
        return
    next_step(
        f"see what would leave the site with\n"
        f"  merge-kit publish {shown(site.root)} --run {shown(folder)} --dry-run"
    )
