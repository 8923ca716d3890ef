"""merge-kit admit, revoke and sign: what a coordinator decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from merge_kit import homes, site, trust
from merge_kit.addresses import full_address
from merge_kit.commands.options import next_step, shown
from merge_kit.errors import FederationError, SiteUnreachableError, UsageError
from merge_kit.federation import Federation
from merge_kit.hub import Hub, open_hub

key_option = click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    help="The coordinator's private key [where 'init' has put it].",
)


@click.command()
@click.argument("hub")
@click.argument("name", metavar="SITE")
@click.argument("public_key", metavar="KEY")
@click.option("--rotate", is_flag=True, help="It takes the place of the key that SITE has.")
@click.option(
    "--hub",
    "own",
    metavar="ADDRESS",
    help="A hub of SITE's own, where it publishes from now on; 'none' for HUB again.",
)
@click.option(
    "--lost", is_flag=True, help="SITE's earlier hub is gone, and what it has withdrawn there, too."
)
@key_option
def admit(
    hub: str,
    name: str,
    public_key: str,
    rotate: bool,
    own: str | None,
    lost: bool,
    key_file: Path | None,
) -> None:
    """Let SITE contribute to the federation on HUB with the public KEY that it printed at join.

    KEY may be the file that holds it. Ask the site on another channel (a telephone) whether the key
    is theirs. With --rotate what the site had signed with its old key until now still counts. With
    --hub the site has a hub of its own, which is looked at beside HUB: a repository for instance.

    \b
    merge-kit admit hub north north/keys/site.pub --hub hf://north-hospital/cells
    """
    public_key = _key_in(public_key)
    opened, address = open_hub(hub), _own_address(own, hub)

    def decide(federation: Federation) -> Federation:
        if rotate:
            changed = trust.rotated(federation, name, public_key)
        else:
            changed = federation.admit(name, public_key)
        if own is None:
            return changed
        settled = changed.with_hub(name, address)
        if settled is not changed and changed.hub_of(name) and not lost:
            _leave(opened, federation, name)
        return settled

    changed = _change(opened, decide, key_file)
    if changed is None:
        click.echo(f"Site '{name}' is admitted already.")
    elif rotate:
        click.echo(f"Site '{name}' speaks with its new key from now on.")
    else:
        click.echo(f"Site '{name}' is admitted; {len(changed.sites)} in all.")
    if changed is not None and own is not None:
        click.echo(f"  its own hub  {address or 'none'}")
        _try(opened, changed, name)
    next_step(f"see what has arrived with\n  merge-kit status {shown(hub)}")


def _own_address(own: str | None, hub: str) -> str | None:
    """What is written of --hub; None for no hub of the site's own."""
    if own is None or own == "none":
        return None
    address = full_address(own)
    if address == full_address(hub):
        raise UsageError(f"--hub: {own} is the federation's hub: leave it out.")
    return address


def _leave(hub: Hub, federation: Federation, name: str) -> None:
    """Before a site's own hub is asked no more: keep its withdrawals, and say what is left there.

    Raises
    ------
    FederationError
        It cannot be asked.
    """
    try:
        shelf = homes.leave(hub, federation, name)
    except SiteUnreachableError as error:
        raise FederationError(
            f"{str(error).rstrip('.')}; what the site has withdrawn there would count again, so it "
            "stays its hub: if it is gone for good, and the site has told you so, pass --lost."
        ) from error
    if shelf is None:
        return
    click.echo(
        f"  its withdrawals on {shelf.hub.uri} are kept on {hub.uri}: {len(shelf.tombstones)}"
    )
    if shelf.names:
        click.echo(
            f"  its contributions there are not looked at any more: {len(shelf.names)}; let the "
            "site publish them again"
        )


def _try(hub: Hub, federation: Federation, name: str) -> None:
    """Say so where the hub that a site is to have cannot be asked (yet)."""
    try:
        homes.read_shelves(hub, federation, name, without=())
    except SiteUnreachableError as error:
        click.echo(f"Note: {error} Until it can, nobody merges without that option.", err=True)


@click.command()
@click.argument("hub")
@click.argument("name", metavar="SITE")
@click.option("--public-key", help="An earlier key of the site, or its file [the present one].")
@key_option
def revoke(hub: str, name: str, public_key: str | None, key_file: Path | None) -> None:
    """Let nothing count that SITE has signed with its key, whenever that was.

    For a key that may be in other hands, or a site that is out. With its present key gone the site
    is not admitted any more; after 'merge-kit key rotate' it can be admitted with a new one, and
    publishes again: a new run, or the same one once you have removed the refused folder from the
    hub. Models that were merged before are what they are: 'merge-kit remerge' makes them again.
    """
    opened, gone = open_hub(hub), _key_in(public_key) if public_key else None
    changed = _change(opened, lambda told: trust.revoked(told, name, gone), key_file)
    said = "was revoked before" if changed is None else "is revoked: what it has signed is refused"
    click.echo(f"The key of site '{name}' {said}.")
    next_step(f"see what is left with\n  merge-kit status {shown(hub)}")


@click.command()
@click.argument("hub")
@key_option
def sign(hub: str, key_file: Path | None) -> None:
    """Sign the federation file on HUB after you have changed it by hand, its policy for instance.

    Look at it first: whatever stands in it is what you sign.
    """
    opened = open_hub(hub)
    before, federation = trust.unchecked_on(opened)
    if federation.coordinator is None:
        click.echo(f"The federation '{federation.name}' has no coordinator: nobody signs it.")
        return
    trust.refuse_older(federation, opened.uri)  # what was decided since would be undone
    changed = trust.change(opened, before, federation, key_file)
    click.echo(f"Signed: '{changed.name}', serial number {changed.serial}.")


def _key_in(text: str) -> str:
    """A public key that a user has written, or the one in the file that the user named."""
    try:
        path = Path(text)
        return path.read_text(encoding="utf-8").strip() if path.is_file() else text
    except (OSError, UnicodeDecodeError) as error:
        raise FederationError(f"{text} cannot be read as a public key's file: check it.") from error


def _change(
    hub: Hub, decide: Callable[[Federation], Federation], key_file: Path | None
) -> Federation | None:
    """The federation as it is now; None where nothing was to be changed."""
    before, federation = site.federation_file_on(hub)
    changed = decide(federation)
    if changed is federation:
        return None
    return trust.change(hub, before, changed, key_file)
