"""What waits in pull requests: whether each adds one site's own files and does nothing else.

Whoever may open a pull request can put any change into it, also one to the federation file or to
other sites' files, under a harmless title. So nothing is believed of it but the files that it
touches and the signatures in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from merge_kit import contributions, withdrawals
from merge_kit.cards import CARD
from merge_kit.contributions import Trust, entry_at
from merge_kit.errors import UsageError
from merge_kit.federation import Federation
from merge_kit.hub import Hub
from merge_kit.schema import shown
from merge_kit.sitecards import contribution_card
from merge_kit.withdrawals import read_tombstones

_NAMES = {
    contributions.ROOT: {
        *(contributions.PAYLOAD, contributions.SIGNATURE, contributions.MANIFEST, CARD),
    },
    withdrawals.ROOT: {withdrawals.FILE, withdrawals.SIGNATURE},
}


@runtime_checkable
class Proposing(Protocol):
    """A hub at which changes can be proposed."""

    def proposals(self) -> list[tuple[str, str]]:
        """Revision and address of each that is open."""

    def touched_by(self, revision: str) -> Mapping[str, str]:
        """``added``, ``changed`` or ``removed`` by path."""

    def at(self, revision: str) -> Hub:
        """The hub as it would be."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A pull request that is open."""

    address: str
    places: tuple[str, ...]
    """Folders of entries that it adds."""
    problem: str | None
    """Why it must not be let in; None where it adds entries of one site, which has signed them."""


def proposals(hub: Hub, federation: Federation) -> Iterator[Proposal]:
    """Each open pull request of a hub, checked.

    Raises
    ------
    UsageError
        The hub has no pull requests.
    """
    if not isinstance(hub, Proposing):
        raise UsageError(
            f"--pull-requests is for repositories on the Hugging Face Hub, and {hub.uri} is none: "
            "leave it out."
        )
    for revision, address in hub.proposals():
        touched = hub.touched_by(revision)
        places = sorted({path.rpartition("/")[0] for path in touched})
        problem = _foreign(touched) or _unsigned(hub.at(revision), federation, places)
        yield Proposal(address, tuple(places), problem)


def _foreign(touched: Mapping[str, str]) -> str | None:
    """What a site's pull request never does."""
    sites = set()
    for path, what in touched.items():
        root, *rest = path.split("/")
        if what != "added" or len(rest) != 3 or rest[2] not in _NAMES.get(root, ()):
            return f"it has {what} {shown(path)}, which is nothing that a site adds"
        sites.add(rest[0])
    if len(sites) > 1:
        return f"it speaks for several sites: {', '.join(map(shown, sorted(sites)))}"
    return None if sites else "it touches nothing"


def _unsigned(there: Hub, federation: Federation, places: list[str]) -> str | None:
    """What is wrong with its entries, each by its manifest and signature."""
    notes = read_tombstones(there, federation.contract_hash)
    for place in places:
        root, site, name = place.split("/")
        note = notes.get((site, name)) if root == withdrawals.ROOT else None
        entry = entry_at(there, federation, site, name, note)
        if entry.problem:
            return entry.problem.rstrip(".")
        if entry.contribution and entry.contribution.trust is not Trust.ADMITTED:
            return f"{shown(place)} is {entry.contribution.trust.value}"
        if entry.contribution and there.has(f"{place}/{CARD}"):
            # People would look at it as at a page of the federation's.
            if there.read(f"{place}/{CARD}") != contribution_card(
                federation, entry.contribution.manifest
            ):
                return f"{shown(place)}/{CARD} is not the card that follows from its manifest"
    return None
