"""A full copy of a hub in a folder, which is a hub itself: checked, and only what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from merge_kit import copies, homes, signing, withdrawals
from merge_kit.blocks import in_order
from merge_kit.contributions import (
    MANIFEST,
    PAYLOAD,
    ROOT,
    SIGNATURE,
    Contribution,
    Entry,
    Trust,
    entry_among,
    entry_at,
)
from merge_kit.errors import HubError, MergeKitError, UsageError
from merge_kit.federation import BASE_CONFIG, BASE_WEIGHTS, FEDERATION_FILE, Federation, check_base
from merge_kit.files import sha256_file, storage_errors
from merge_kit.hub import READERS, FolderHub, Hub
from merge_kit.remembered import look_at_content
from merge_kit.schema import now
from merge_kit.site import federation_file_on, federation_on
from merge_kit.withdrawals import Tombstone


@dataclass(slots=True)
class Pulled:
    """What a copy has gained."""

    new: int = 0
    """Contributions that were copied."""
    there: int = 0
    """Contributions that were there already, whole."""
    withdrawn: int = 0
    left_out: list[str] = field(default_factory=list)
    """A sentence for each entry that is refused, and was not copied."""


def pull(
    hub: Hub,
    folder: Path,
    progress: Callable[[str], None] = lambda label: None,
    *,
    exclude: Collection[str] = (),
) -> Pulled:
    """Copy a hub's federation, base, sound contributions and withdrawals into a folder, with what
    lies on the sites' own hubs, but for those of the sites in `exclude`.

    What lies there whole is not fetched again, so that a copy which was broken off goes on; the
    tensors of what has been withdrawn since are removed. The federation file comes last.

    Raises
    ------
    UsageError
        The folder holds something else, or a site to `exclude` has no hub of its own.
    HubError
        A file arrives damaged, or the hub cannot be read.
    """
    data, federation = federation_file_on(hub)
    _check_excluded(federation, exclude)
    copy, begun = _opened(hub, folder, federation), now()
    _copy_base(hub, copy, federation)
    shelves = homes.read_shelves(hub, federation, without=exclude)
    done, notes = Pulled(), homes.all_tombstones(hub, federation, shelves)

    def look(place: homes.Place) -> tuple[Entry, bool]:
        """What lies in a place, and whether it is in the copy. Of what is there, signed by a site
        that is admitted, the hub is not asked."""
        *_, hubs = place
        at = place[:2]
        mine = None if at in notes else _whole(copy, federation, *at)
        if mine and mine.trust is Trust.ADMITTED:
            return Entry(*at, mine, None, mine.kind), True
        entry = entry_among(hubs, federation, *at, notes.get(at))
        theirs = entry.contribution
        return entry, bool(mine and theirs and mine.signature == theirs.signature)

    for entry, there in in_order(look, homes.all_places(hub, shelves), READERS):
        progress(f"{entry.site}/{entry.id[:12]}")
        if there:
            done.there += 1
        elif entry.withdrawn:
            _withdraw(copy, entry, notes[entry.site, entry.id])
            done.withdrawn += 1
        elif entry.contribution is None:
            done.left_out.append(str(entry.problem))
        elif why := _copied(copy, entry.contribution):
            done.left_out.append(why)
        else:
            done.new += 1
    done.left_out += [problem for shelf in shelves for _, problem in shelf.refusals()]
    copies.write(copy, federation, _hubs_in(hub, copy, federation, shelves, begun))
    before = copy.read(FEDERATION_FILE) if copy.has(FEDERATION_FILE) else None
    if before != data:
        copy.replace(FEDERATION_FILE, data, before)
    return done


def _whole(copy: FolderHub, federation: Federation, site: str, name: str) -> Contribution | None:
    """A contribution that is in the copy and still counts, with the very bytes that its manifest
    names; a file that was read before is not read again."""
    if not copy.has(f"{ROOT}/{site}/{name}/{MANIFEST}"):
        return None
    found = entry_at(copy, federation, site, name).contribution
    if found is None or look_at_content(found.payload).sha256 != found.manifest.payload.sha256:
        return None
    return found


def _copied(copy: FolderHub, found: Contribution) -> str | None:
    """Copy a contribution; a sentence where that is refused."""
    hub = found.hub
    place, digest = f"{ROOT}/{found.site}/{found.id}", found.manifest.payload.sha256
    if copy.has(f"{withdrawals.ROOT}/{found.site}/{found.id}/{withdrawals.FILE}"):
        return (
            f"{found.label} is withdrawn in {copy.uri}, and {hub.uri} lacks the note that says so: "
            f"it stays withdrawn here; ask site '{found.site}'."
        )
    if copy.has(f"{place}/{MANIFEST}"):
        raise HubError(
            f"{copy.uri}/{place} was damaged since it was copied: remove this folder, and pull "
            "again."
        )
    try:
        payload = hub.fetch(f"{place}/{PAYLOAD}", digest)
        if sha256_file(payload) != digest:  # a folder's file is not copied before
            raise HubError(f"{hub.uri}/{place}/{PAYLOAD} is not what its manifest names.")
    except MergeKitError as error:
        return str(error)
    copy.publish(place, {PAYLOAD: payload, **_small(found)})
    hub.forget(f"{place}/{PAYLOAD}")
    there = copy.fetch(f"{place}/{PAYLOAD}")
    if sha256_file(there) != digest:  # a folder's file may be exchanged while it is copied
        shutil.rmtree(there.parent)
        return f"{hub.uri}/{place}/{PAYLOAD} changed while it was copied."
    return None


def _small(found: Contribution) -> dict[str, Path | bytes]:
    """The signature, if there is one, and the manifest, which comes last: as they were checked, for
    a hub may give other bytes when it is asked again."""
    files: dict[str, Path | bytes] = {}
    if found.key and found.signature:
        files[SIGNATURE] = signing.Signature(found.key, found.signature).to_bytes()
    files[MANIFEST] = found.manifest.to_bytes()
    return files


def _opened(hub: Hub, folder: Path, federation: Federation) -> FolderHub:
    copy = FolderHub(folder.absolute())
    if copy.has(FEDERATION_FILE):
        theirs = federation_on(copy)
        if theirs.contract_hash != federation.contract_hash:
            raise UsageError(
                f"{folder} is a copy of the federation '{theirs.name}' and not of this one: choose "
                "another folder."
            )
        if theirs.serial > federation.serial:
            raise UsageError(
                f"{folder} holds the federation file with the serial number {theirs.serial}, and "
                f"{hub.uri} an older one with {federation.serial}, which may lack a revocation: "
                "nothing was copied; pull from a hub that is up to date (was it the other way "
                "round, from the folder into the hub?)."
            )
    elif folder.is_dir() and any(p.name not in ("base", ROOT, withdrawals.ROOT, copies.FILE)
                                 for p in folder.iterdir()):  # fmt: skip
        raise UsageError(f"{folder} holds something else: choose another folder.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return copy


def _copy_base(hub: Hub, copy: FolderHub, federation: Federation) -> None:
    if not copy.has(BASE_WEIGHTS):
        weights = hub.fetch(BASE_WEIGHTS)
        check_base(federation, weights, f"{hub.uri}/{BASE_WEIGHTS}")
        folder, _, name = BASE_WEIGHTS.rpartition("/")
        config = BASE_CONFIG.rpartition("/")[2]
        copy.publish(folder, {config: federation.model_config_json.encode(), name: weights})
    check_base(federation, copy.fetch(BASE_WEIGHTS), f"{copy.uri}/{BASE_WEIGHTS}")


def _withdraw(copy: FolderHub, entry: Entry, note: Tombstone) -> None:
    """The note, and of what it takes back the manifest alone."""
    place = f"{ROOT}/{entry.site}/{entry.id}"
    if not copy.has(f"{place}/{MANIFEST}"):
        if entry.withdrawn:
            copy.publish(place, _small(entry.withdrawn))
    copy.publish(f"{withdrawals.ROOT}/{entry.site}/{entry.id}", note.files)
    copy.remove(f"{place}/{PAYLOAD}")


def _check_excluded(federation: Federation, exclude: Collection[str]) -> None:
    if unknown := sorted(set(exclude) - federation.own_hubs.keys()):
        known = ", ".join(sorted(federation.own_hubs)) or "none has"
        raise UsageError(
            f"--exclude {unknown[0]}: it is for sites with a hub of their own ({known}), which is "
            "then not asked; merge without other sites with the --exclude of 'merge'."
        )


def _hubs_in(
    hub: Hub,
    copy: FolderHub,
    federation: Federation,
    shelves: Collection[homes.Shelf],
    begun: str,
) -> dict[str, copies.CopiedHub]:
    """The sites' own hubs that are in the copy now: those that were asked, those that `hub` is a
    copy of itself, and of those that were not asked what was there before."""
    asked = {
        shelf.site: copies.CopiedHub(
            site=shelf.site, hub=federation.own_hubs[shelf.site], asked=begun
        )
        for shelf in shelves
    }
    before = copies.copied_hubs(copy, federation)
    return {**before, **copies.copied_hubs(hub, federation), **asked}
