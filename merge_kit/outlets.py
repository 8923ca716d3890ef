"""Where a site publishes: the federation's hub, or the one that it has of its own."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit import homes
from merge_kit.contributions import Entry, list_entries
from merge_kit.errors import ContributionError
from merge_kit.federation import Federation
from merge_kit.hub import Hub, by_pull_request, create_missing, is_there
from merge_kit.site import Site, check_pinned, federation_on


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where a site's contributions lie, and where the next one goes."""

    federation: Federation
    hub: Hub
    """The federation's."""
    target: Hub
    """What is written to: the same, or the site's own hub."""
    there: tuple[Hub, ...]
    """What is read, the site's own hub first; one that is not made yet is left out."""

    def entries(self, site: str) -> list[Entry]:
        """What the site has published; see `list_entries`."""
        made = self.is_own == (len(self.there) > 1)
        return list_entries(self.hub, self.federation, site, without=None if made else [site])

    @property
    def is_own(self) -> bool:
        """Whether the site has a hub of its own."""
        return self.target.uri != self.hub.uri


def outlet_of(site: Site, hub: Hub, *, create_pr: bool = False) -> Outlet:
    """Where a site publishes in the federation on a hub; with `create_pr` by pull requests.

    Raises
    ------
    FederationError
        The hub's contract is not the one that was joined.
    SiteUnreachableError
        The site's own hub cannot be asked.
    """
    federation = federation_on(hub)
    check_pinned(site.config, federation, hub.uri)
    own = homes.hub_of(hub, federation, site.name)
    target = own.hub if own else hub
    there = (own, hub) if own and is_there(own.hub) else (hub,)
    return Outlet(federation, hub, by_pull_request(target) if create_pr else target, there)


def check_target(site: Site, hub: Hub, target: Hub) -> None:
    """Make a site's own hub where it is not there; refuse one that it has no more.

    Raises
    ------
    ContributionError
        The coordinator has named another one meanwhile: nobody would look for it here.
    """
    if target.uri == hub.uri:
        return
    own = homes.hub_of(hub, federation_on(hub), site.name)
    if own is None or own.uri != target.uri:
        raise ContributionError(
            f"{target.uri} is not the hub of site '{site.name}' any more, by the federation's file "
            f"on {hub.uri}: nothing was sent; run the same command again."
        )
    create_missing(target)
