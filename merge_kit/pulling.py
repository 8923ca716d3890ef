"""A full copy of a hub in a folder, which is a hub itself: checked, and only what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from merge_kit import signing, withdrawals
from merge_kit.blocks import in_order
from merge_kit.contributions import (
    MANIFEST,
    PAYLOAD,
    ROOT,
    SIGNATURE,
    Contribution,
    Entry,
    Trust,
    entry_at,
)
from merge_kit.errors import HubError, MergeKitError, UsageError
from merge_kit.federation import BASE_CONFIG, BASE_WEIGHTS, FEDERATION_FILE, Federation, check_base
from merge_kit.files import sha256_file, storage_errors
from merge_kit.hub import READERS, FolderHub, Hub, places
from merge_kit.remembered import look_at_content
from merge_kit.site import federation_file_on, federation_on


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


def pull(hub: Hub, folder: Path, progress: Callable[[str], None] = lambda label: None) -> Pulled:
    """Copy a hub's federation, base, sound contributions and withdrawals into a folder.

    What lies there whole is not fetched again, so that a copy which was broken off goes on; the
    tensors of what has been withdrawn since are removed. The federation file comes last.

    Raises
    ------
    UsageError
        The folder holds something else.
    HubError
        A file arrives damaged, or the hub cannot be read.
    """
    data, federation = federation_file_on(hub)
    copy = _opened(hub, folder, federation)
    _copy_base(hub, copy, federation)
    done, notes = Pulled(), withdrawals.read_tombstones(hub, federation.contract_hash)

    def look(at: tuple[str, str]) -> tuple[Entry, bool]:
        """What lies in a place, and whether it is in the copy. Of what is there, signed by a site
        that is admitted, the hub is not asked."""
        mine = None if at in notes else _whole(copy, federation, *at)
        if mine and mine.trust is Trust.ADMITTED:
            return Entry(*at, mine, None, mine.kind), True
        entry = entry_at(hub, federation, *at, notes.get(at))
        theirs = entry.contribution
        return entry, bool(mine and theirs and mine.signature == theirs.signature)

    for entry, there in in_order(look, places(hub, ROOT), READERS):
        progress(f"{entry.site}/{entry.id[:12]}")
        if there:
            done.there += 1
        elif entry.withdrawn:
            _withdraw(hub, copy, entry, f"{ROOT}/{entry.site}/{entry.id}")
            done.withdrawn += 1
        elif entry.contribution is None:
            done.left_out.append(str(entry.problem))
        elif why := _copied(hub, copy, entry.contribution):
            done.left_out.append(why)
        else:
            done.new += 1
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


def _copied(hub: Hub, copy: FolderHub, found: Contribution) -> str | None:
    """Copy a contribution; a sentence where that is refused."""
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
    elif folder.is_dir() and any(p.name not in ("base", ROOT, withdrawals.ROOT)
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


def _withdraw(hub: Hub, copy: FolderHub, entry: Entry, place: str) -> None:
    """The note, and of what it takes back the manifest alone."""
    if not copy.has(f"{place}/{MANIFEST}"):
        if entry.withdrawn:
            copy.publish(place, _small(entry.withdrawn))
    note = f"{withdrawals.ROOT}/{entry.site}/{entry.id}"
    names = (withdrawals.SIGNATURE, withdrawals.FILE)
    copy.publish(note, {name: hub.read(f"{note}/{name}") for name in names})
    copy.remove(f"{place}/{PAYLOAD}")
