"""Hubs that sites have of their own, beside the federation's: which are asked, and what counts.

The federation's file names them. A site speaks for itself alone: in its own hub only what lies in
the site's own folders is read. What it has published on the federation's hub counts as well; what
lies in both counts once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merge_kit.blocks import in_order
from merge_kit.copies import copied_hubs
from merge_kit.errors import HubError, MissingExtraError, SiteUnreachableError, UnreachableError
from merge_kit.federation import Federation
from merge_kit.hub import READERS, Hub, open_hub, places
from merge_kit.withdrawals import ROOT as WITHDRAWALS
from merge_kit.withdrawals import Tombstone, read_tombstones

CONTRIBUTIONS = "contributions"


class SiteHub:
    """A hub of one site; where it cannot be asked, the sentence names both and the way out."""

    def __init__(self, site: str, hub: Hub, remedy: str) -> None:
        self.site, self.hub, self._remedy = site, hub, remedy

    @property
    def uri(self) -> str:
        """How a user writes this hub."""
        return self.hub.uri

    def list(self, folder: str) -> Iterator[str]:
        """See `Hub`."""
        with self._heard():
            try:
                found = [*self.hub.list(folder)]
            except UnreachableError:
                raise
            except HubError as error:  # of a folder that is not there nothing is listed
                raise UnreachableError(str(error)) from error
        yield from found

    def has(self, name: str) -> bool:
        """See `Hub`."""
        with self._heard():
            return self.hub.has(name)

    def size(self, name: str) -> int:
        """See `Hub`."""
        with self._heard():
            return self.hub.size(name)

    def read(self, name: str) -> bytes:
        """See `Hub`."""
        with self._heard():
            return self.hub.read(name)

    def fetch(self, name: str, digest: str | None = None) -> Path:
        """See `Hub`."""
        with self._heard():
            return self.hub.fetch(name, digest)

    def forget(self, name: str) -> None:
        """See `Hub`."""
        self.hub.forget(name)

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """See `Hub`."""
        return self.hub.publish(folder, files)

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """See `Hub`."""
        self.hub.replace(name, data, expected)

    def remove(self, name: str) -> bool:
        """See `Hub`."""
        return self.hub.remove(name)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except UnreachableError as error:
            raise _unreachable(self.site, self.uri, error, self._remedy) from error


def _unreachable(site: str, uri: str, error: Exception, remedy: str) -> SiteUnreachableError:
    reason = str(error).rstrip(".")
    return SiteUnreachableError(
        site, f"the hub of site '{site}', {uri}, cannot be asked ({reason}): {remedy}."
    )


@dataclass(frozen=True, slots=True)
class Shelf:
    """What a site's own hub holds."""

    hub: SiteHub
    names: frozenset[str]
    """Contributions of the site."""
    tombstones: Mapping[tuple[str, str], Tombstone]
    """By site, which is always this one, and contribution."""
    foreign: tuple[str, ...]
    """Entries in the name of other sites, which count for nobody."""

    @property
    def site(self) -> str:
        """Whose it is."""
        return self.hub.site

    def refusals(self) -> Iterator[tuple[str, str]]:
        """What is foreign, and the sentence that refuses it."""
        for place in self.foreign:
            yield (
                place,
                f"{self.hub.uri}/{place} lies in the hub of site '{self.site}', which speaks for "
                f"itself alone: it is refused; ask site '{self.site}' to remove it.",
            )


def own_hubs(hub: Hub, federation: Federation, site: str | None = None) -> dict[str, str]:
    """Addresses of the sites' own hubs, or of one site's, that are asked beside a federation's: all
    but those that it is a copy of."""
    named = federation.own_hubs
    if site is not None:
        named = {name: address for name, address in named.items() if name == site}
    copied = copied_hubs(hub, federation) if named else {}
    return {name: address for name, address in named.items() if name not in copied}


def unasked(
    federation: Federation, sites: Collection[str], exclude: Collection[str]
) -> frozenset[str]:
    """Sites with a hub of their own that are left out of a merge: it need not be asked.

    `sites` are those that are merged, all if there are none.
    """
    left_out = {name for name in federation.own_hubs if sites and name not in sites}
    return frozenset(left_out | {name for name in federation.own_hubs if name in exclude})


def open_own(site: str, address: str, remedy: str = "try again") -> SiteHub:
    """Open the hub that a site has of its own.

    Raises
    ------
    SiteUnreachableError
        It cannot be asked from here; `remedy` says what to do.
    """
    try:
        return SiteHub(site, open_hub(address), remedy)
    except (HubError, MissingExtraError) as error:
        raise _unreachable(site, address, error, remedy) from error


def leave(hub: Hub, federation: Federation, site: str) -> Shelf | None:
    """Bring to the federation's hub what a site's own hub says is withdrawn, before it is asked no
    more: else what was taken back would count again. Gives what lies there; None without one.

    Raises
    ------
    SiteUnreachableError
        The site's own hub cannot be asked.
    """
    for shelf in read_shelves(hub, federation, site):
        for (owner, name), note in shelf.tombstones.items():
            if note.problem is None:
                hub.publish(f"{WITHDRAWALS}/{owner}/{name}", note.files)
        return shelf
    return None


def hub_of(hub: Hub, federation: Federation, site: str) -> SiteHub | None:
    """The hub that a site has of its own, opened; None where it has none.

    Raises
    ------
    SiteUnreachableError
        It cannot be opened.
    """
    own = own_hubs(hub, federation, site)
    return open_own(site, own[site]) if own else None


def hubs_of(hub: Hub, federation: Federation, site: str) -> list[Hub]:
    """Where the contributions of a site lie: on its own hub, if it has one, and the federation's;
    raises as `hub_of`."""
    own = hub_of(hub, federation, site)
    return [own, hub] if own else [hub]


def read_shelves(
    hub: Hub,
    federation: Federation,
    site: str | None = None,
    *,
    without: Collection[str] | None = None,
    missing: MutableMapping[str, str] | None = None,
) -> list[Shelf]:
    """What the sites' own hubs hold, or that of one site; a few are asked at a time.

    Parameters
    ----------
    without
        Sites whose own hub is not asked; not None where the user can leave out more of them.
    missing
        Takes, by site, the sentence on each hub that cannot be asked; None to raise it.

    Raises
    ------
    SiteUnreachableError
        The first hub that cannot be asked, with its site, the reason and the way out.
    """
    asked = own_hubs(hub, federation, site)
    if not asked:
        return []

    def ask(name: str) -> Shelf | None:
        remedy = "try again"
        if without is not None:
            remedy = f"try again, or leave the site out with --exclude {name}"
        try:
            return _read_shelf(open_own(name, asked[name], remedy), federation)
        except SiteUnreachableError as error:
            if missing is None:
                raise
            missing[name] = str(error)
            return None

    chosen = [name for name in sorted(asked) if name not in (without or ())]
    return [shelf for shelf in in_order(ask, chosen, READERS) if shelf]


def _read_shelf(own: SiteHub, federation: Federation) -> Shelf:
    tombstones: Mapping[tuple[str, str], Tombstone] = {}
    names: frozenset[str] = frozenset()
    foreign: list[str] = []
    for root in (CONTRIBUTIONS, WITHDRAWALS):
        sites = [*own.list(root)]
        foreign += [
            f"{root}/{site}/{name}"
            for site in sites
            if site != own.site
            for name in own.list(f"{root}/{site}")
        ]
        if own.site in sites and root == CONTRIBUTIONS:
            names = frozenset(own.list(f"{root}/{own.site}"))
        elif own.site in sites:
            tombstones = read_tombstones(own, federation.contract_hash, own.site)
    return Shelf(own, names, tombstones, tuple(foreign))


def all_tombstones(
    hub: Hub, federation: Federation, shelves: Sequence[Shelf], site: str | None = None
) -> dict[tuple[str, str], Tombstone]:
    """What was withdrawn, by site and contribution, wherever the note lies: one that a key of its
    site has signed stands before any other of the same contribution."""
    found = read_tombstones(hub, federation.contract_hash, site)
    for shelf in shelves:
        keys = federation.keys_of(shelf.site)
        for place, note in shelf.tombstones.items():
            if place not in found or found[place].key not in keys:
                found[place] = note
    return found


Place = tuple[str, str, tuple[Hub, ...]]
"""A site, the name of its contribution, and the hubs that hold it, the site's own first."""


def all_places(hub: Hub, shelves: Sequence[Shelf], site: str | None = None) -> Iterator[Place]:
    """Every contribution once, or those of one site, with the hubs that hold it."""
    left = {shelf.site: (shelf, set(shelf.names)) for shelf in shelves}
    for owner, name in places(hub, CONTRIBUTIONS, site):
        shelf, names = left.get(owner, (None, set[str]()))
        if shelf and name in names:
            names.remove(name)
            yield owner, name, (shelf.hub, hub)
        else:
            yield owner, name, (hub,)
    for shelf, names in left.values():
        for name in sorted(names):
            yield shelf.site, name, (shelf.hub,)
