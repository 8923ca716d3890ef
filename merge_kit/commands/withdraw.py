"""merge-kit withdraw."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import click

from merge_kit.cards import CARD
from merge_kit.commands.options import create_pr_option, next_step, shown
from merge_kit.commands.publish import update_card
from merge_kit.contributions import MANIFEST, PAYLOAD, Entry
from merge_kit.contributions import ROOT as CONTRIBUTIONS
from merge_kit.errors import ContributionError, HubError, UsageError
from merge_kit.hub import Hub, create_missing, open_hub, pull_request_of, shows_cards
from merge_kit.outlets import Outlet, outlet_of
from merge_kit.site import Site, open_site
from merge_kit.withdrawals import ROOT, is_id, withdraw


@click.command(name="withdraw")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Whatever the site has published.")
@click.option("--hub", help="Another place than the hub that was joined.")
@create_pr_option
def withdraw_command(
    folder: Path, ids: tuple[str, ...], everything: bool, hub: str | None, create_pr: bool
) -> None:
    """Take back what the site in FOLDER has published.

    From then on nobody who looks at the hub merges it, and the tensors are removed from it where
    the storage allows that. A signed note stays, so that whoever has merged it can see it: models
    that hold it stay what they are until they are made again. It is for good.
    """
    if bool(ids) == everything:
        raise UsageError("give the ids to withdraw, as 'merge-kit status' shows them, or --all.")
    site = open_site(folder)
    outlet = outlet_of(site, open_hub(hub or site.config.hub), create_pr=create_pr)
    chosen, target = _chosen(site, outlet, ids), outlet.target
    keys = outlet.federation.keys_of(site.name)
    if outlet.is_own:
        create_missing(target)
    failed: list[Entry] = []
    for found in chosen:
        told = f"{found.kind} {found.id[:12]}"
        try:
            fresh = withdraw(target, site, found.id, keys)
        except ContributionError as error:  # the others are withdrawn all the same
            click.echo(f"Error: {error}", err=True)
            failed.append(found)
            continue
        if request := pull_request_of(target, f"{ROOT}/{site.name}/{found.id}"):
            click.echo(f"Proposed: to withdraw {told} by {request}")
            click.echo("  it counts until the coordinator has merged that: ask for it at once")
            continue
        click.echo(f"Withdrawn: {told}" if fresh else f"Withdrawn before: {told}")
        _remove(target, site, found)
        if outlet.is_own:
            _also(outlet.hub, site, found, keys)
    update_card(site, outlet)
    if len(failed) < len(chosen):
        click.echo(
            "Copies that others have made, and models that hold it, are not reached by this."
        )
        next_step(
            f"let whoever merges make their models again with\n"
            f"  merge-kit remerge {shown(hub or site.config.hub)} <merged models>"
        )
    if failed:
        sys.exit(1)


def _remove(hub: Hub, site: Site, found: Entry) -> None:
    """Take the tensors from a hub, and the card; say what has become of them."""
    folder = f"{CONTRIBUTIONS}/{site.name}/{found.id}"
    place, card = f"{folder}/{PAYLOAD}", f"{folder}/{CARD}"
    if shows_cards(hub) and hub.has(card):
        hub.remove(card)
    if not hub.has(place):
        return
    if hub.remove(place):
        click.echo(f"  its tensors are removed from {hub.uri}")
    else:
        click.echo(
            f"  its tensors cannot be removed for good: {hub.uri} keeps what was deleted in "
            "its history; ask who runs it"
        )


def _also(hub: Hub, site: Site, found: Entry, keys: Collection[str]) -> None:
    """Withdraw on the federation's hub, too, what was published there before the site had its own:
    the note on the site's own hub counts for both, and the site need not have the right to write
    there."""
    if not hub.has(f"{CONTRIBUTIONS}/{site.name}/{found.id}/{MANIFEST}"):
        return
    try:
        withdraw(hub, site, found.id, keys)
        _remove(hub, site, found)
    except (ContributionError, HubError) as error:
        click.echo(
            f"  it lies on {hub.uri}, too, where it counts no more either, and its tensors are "
            f"still there ({str(error).rstrip('.')}): ask the coordinator to remove them"
        )


def _chosen(site: Site, outlet: Outlet, ids: Sequence[str]) -> list[Entry]:
    """What lies in the site's place and begins with one of the ids; all without any.

    Also what is refused, because a key was revoked for instance: its tensors lie there as well.
    """
    own = [entry for entry in outlet.entries(site.name) if is_id(entry.id)]
    if not own:
        raise UsageError(f"site '{site.name}' has published nothing on {outlet.target.uri}.")
    for part in ids:
        found = [one for one in own if one.id.startswith(part)]
        if len(found) != 1:
            there = ", ".join(f"{one.kind} {one.id[:12]}" for one in own)
            many = "several contributions" if found else "no contribution"
            raise UsageError(f"'{part}' names {many} of site '{site.name}'; there are {there}.")
    return [one for one in own if not ids or one.id.startswith(tuple(ids))]
