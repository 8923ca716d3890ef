"""A copy of a federation in a folder: which hubs of sites it holds, so that they need not be asked.

``copy.yaml`` at the top of the folder is written by `pull`, and read in folders alone. Whoever may
write to a folder could put one there and so keep what is newer from being seen: every command that
goes by it says so, with the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from merge_kit.errors import HubError
from merge_kit.federation import Federation
from merge_kit.hub import FolderHub, Hub
from merge_kit.schema import Digest, Document, SiteName, Timestamp, parse
from merge_kit.yamlfile import dump_yaml, parse_yaml

FILE = "copy.yaml"


class CopiedHub(Document):
    """A site's own hub, all of which is in the copy as it was then."""

    site: SiteName
    hub: str
    asked: Timestamp


class Copy(Document):
    """copy.yaml."""

    format: Literal[1] = 1
    federation: Digest
    """Contract hash."""
    hubs: tuple[CopiedHub, ...] = ()


def copied_hubs(hub: Hub, federation: Federation) -> dict[str, CopiedHub]:
    """The sites' own hubs that a copy holds, by site; none of a hub that is no copy, and none that
    the federation's file does not name in the same way.

    Raises
    ------
    HubError
        The file that says so cannot be read, or is of another federation.
    """
    if not isinstance(hub, FolderHub) or not hub.has(FILE):
        return {}
    where = f"{hub.uri}/{FILE}"
    file = parse_yaml(hub.read(FILE), where, HubError)
    told = parse(Copy, file.data, file.place, HubError)
    if told.federation != federation.contract_hash:
        raise HubError(
            f"{where} is of another federation: remove it, and the sites' own hubs are asked."
        )
    return {one.site: one for one in told.hubs if federation.hub_of(one.site) == one.hub}


def write(copy: FolderHub, federation: Federation, hubs: Mapping[str, CopiedHub]) -> None:
    """Say which hubs are in the copy; nothing where there are none."""
    if not hubs:
        copy.remove(FILE)
        return
    listed = tuple(hubs[name] for name in sorted(hubs))
    told = Copy(federation=federation.contract_hash, hubs=listed)
    before = copy.read(FILE) if copy.has(FILE) else None
    copy.replace(FILE, dump_yaml(told).encode(), before)


def notes(hub: Hub, federation: Federation) -> Sequence[str]:
    """What whoever reads a copy has to be told, in one sentence; nothing of other hubs."""
    if not federation.own_hubs or not (found := copied_hubs(hub, federation)):
        return ()
    since = min(one.asked for one in found.values())
    return (
        f"{hub.uri} is a copy, and the own hubs of {', '.join(sorted(found))} are not asked: what "
        f"is newer than {since} may be missing; 'merge-kit pull' asks them again.",
    )
