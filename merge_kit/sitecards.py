"""Model cards of what sites publish, for people and the search of a hub that shows such pages.

All figures are those of manifests that have been published. Nothing reads a card: what counts are
the manifests and their signatures.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit import auditlog
from merge_kit.cards import CARD, render
from merge_kit.contributions import list_entries, live
from merge_kit.federation import Federation
from merge_kit.files import sha256_bytes
from merge_kit.homes import SiteHub
from merge_kit.hub import shows_cards
from merge_kit.manifest import Manifest
from merge_kit.outlets import Outlet
from merge_kit.site import Site


def contribution_card(federation: Federation, manifest: Manifest) -> bytes:
    """The card beside one contribution: the same bytes for the same manifest."""
    title = f"{manifest.site}: {manifest.kind} {manifest.id[:12]}"
    return _card(federation, manifest.site, title, [manifest])


def site_card(federation: Federation, site: str, manifests: Sequence[Manifest]) -> bytes:
    """The card of a site's own repository, of what lies there."""
    ordered = sorted(manifests, key=lambda m: (m.created_at, m.id), reverse=True)
    return _card(federation, site, f"{site}: what it gives to {federation.name}", ordered)


def _card(federation: Federation, site: str, title: str, manifests: Sequence[Manifest]) -> bytes:
    vectors = [one for one in manifests if one.kind == "vector"]
    text = render(
        "site_card.md.j2",
        federation=federation,
        site=site,
        title=title,
        manifests=manifests,
        vectors=vectors,
    )
    return text.encode()


def update(site: Site, outlet: Outlet) -> bool:
    """Write the card of a site's own repository anew, where its hub is one; whether it was changed.

    Raises
    ------
    HubError
        The repository cannot be asked, or written to.
    AuditError
        The site's audit log was changed: nothing leaves the site.
    """
    target = outlet.target
    if not outlet.is_own or not shows_cards(target):
        return False
    there = live(list_entries(outlet.hub, outlet.federation, site.name))
    own = [c.manifest for c in there if isinstance(c.hub, SiteHub) and c.signature]
    card = site_card(outlet.federation, site.name, own)
    if target.is_described(card):
        return False
    told = {CARD: sha256_bytes(card)}
    auditlog.append(site.root, "publishing", target.uri, CARD, told)
    target.describe(card)
    auditlog.append(site.root, "published", target.uri, CARD, told)
    return True
