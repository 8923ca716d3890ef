"""What lies on a hub, checked: manifest, signature and payload, before anything is merged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from pathlib import Path

from merge_kit import homes, signing, vector
from merge_kit.blocks import in_order
from merge_kit.errors import (
    ContributionError,
    MergeKitError,
    SignatureError,
    SiteUnreachableError,
    UnreachableError,
)
from merge_kit.federation import Federation
from merge_kit.hub import READERS, FolderHub, Hub
from merge_kit.manifest import Kind, Manifest, parse_manifest
from merge_kit.policies import breach
from merge_kit.remembered import Checked
from merge_kit.withdrawals import ROOT as WITHDRAWALS
from merge_kit.withdrawals import Tombstone

PAYLOAD = "payload.safetensors"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
ROOT = homes.CONTRIBUTIONS


class Trust(Enum):
    """What a contribution's signature says."""

    ADMITTED = "admitted"
    """Signed with the key that the federation file lists for the site."""
    STRANGER = "not admitted"
    """Signed, by a site that the federation file does not list."""
    UNSIGNED = "unsigned"


@dataclass(frozen=True, slots=True)
class Contribution:
    """One contribution whose manifest and signature have been checked."""

    id: str
    manifest: Manifest
    hub: Hub = field(repr=False, compare=False)
    folder: str
    """Its place on the hub."""
    trust: Trust
    key: str | None
    signature: str | None = None
    checked: Checked | None = None
    """The payload's file, once it was found sound."""

    @property
    def payload(self) -> Path:
        """Its tensors: on a hub elsewhere they are copied when they are first asked for.

        Raises
        ------
        HubError
            They are not there, or damaged.
        """
        return self.hub.fetch(f"{self.folder}/{PAYLOAD}", self.manifest.payload.sha256)

    @property
    def site(self) -> str:
        """The site that speaks."""
        return self.manifest.site

    @property
    def kind(self) -> Kind:
        """A vector, or statistics that speak of one."""
        return self.manifest.kind

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"contribution {self.site}/{self.id[:12]}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What one place on the hub holds: a contribution, or the sentence that says what is wrong."""

    site: str
    id: str
    contribution: Contribution | None
    problem: str | None
    kind: Kind = "vector"
    """Where the manifest cannot be trusted, a vector: what may be one must not be overlooked."""
    withdrawn: Contribution | None = None
    """What its site has taken back: it counts no more, and what it had replaced stays replaced."""

    @property
    def stated(self) -> Contribution | None:
        """What its manifest states, whether it still counts or not."""
        return self.contribution or self.withdrawn


def bundle(
    manifest: Manifest, payload: Path, signature: signing.Signature
) -> dict[str, Path | bytes]:
    """The files of a contribution, by name; the manifest comes last."""
    return {
        PAYLOAD: payload,
        SIGNATURE: signature.to_bytes(),
        MANIFEST: manifest.to_bytes(),
    }


def folder_of(manifest: Manifest) -> str:
    """Where on a hub a contribution lies."""
    return f"{ROOT}/{manifest.site}/{manifest.id}"


def list_entries(
    hub: Hub,
    federation: Federation,
    site: str | None = None,
    *,
    without: Collection[str] | None = None,
    missing: MutableMapping[str, str] | None = None,
) -> list[Entry]:
    """Every contribution on the hub and on the sites' own hubs, or those of one site, with manifest
    and signature checked, sorted by id.

    Payloads are not read: `payloads.check_payload` does. What a site has withdrawn is
    `Entry.withdrawn`. For `without` and `missing` see `homes.read_shelves`.

    Raises
    ------
    UnreachableError
        The hub cannot be asked, or a site's own.
    """
    found = walk_entries(hub, federation, site, without=without, missing=missing)
    return sorted(found, key=lambda entry: entry.id)


def walk_entries(
    hub: Hub,
    federation: Federation,
    site: str | None = None,
    *,
    without: Collection[str] | None = None,
    missing: MutableMapping[str, str] | None = None,
) -> Iterator[Entry]:
    """The same one after the other, as the hubs name them; a few are read ahead."""
    shelves = homes.read_shelves(hub, federation, site, without=without, missing=missing)
    tombstones = homes.all_tombstones(hub, federation, shelves, site)

    def look(place: homes.Place) -> Entry | None:
        owner, name, hubs = place
        try:
            return entry_among(hubs, federation, owner, name, tombstones.get((owner, name)))
        except SiteUnreachableError as error:
            if missing is None:
                raise
            missing[owner] = str(error)
            return None

    there = in_order(look, homes.all_places(hub, shelves, site), READERS)
    refused = (
        Entry(shelf.site, place, None, problem)
        for shelf in shelves
        for place, problem in shelf.refusals()
    )
    return chain(filter(None, there), refused)


def entry_among(
    hubs: Sequence[Hub],
    federation: Federation,
    site: str,
    name: str,
    tombstone: Tombstone | None = None,
) -> Entry:
    """What lies at one place of several hubs: the first that an admitted key has signed, else the
    first that is sound, else the first."""
    found = []
    for hub in hubs:
        entry = entry_at(hub, federation, site, name, tombstone)
        if entry.stated and entry.stated.trust is Trust.ADMITTED:
            return entry
        found.append(entry)
    return next((entry for entry in found if entry.problem is None), found[0])


def entry_at(
    hub: Hub, federation: Federation, site: str, name: str, tombstone: Tombstone | None = None
) -> Entry:
    """What lies at one place of the hub, its manifest and signature checked."""
    try:
        found = _read(hub, federation, f"{ROOT}/{site}/{name}", whole=tombstone is None)
        if found.site != site or found.id != name:
            raise ContributionError(
                f"{ROOT}/{site}/{name} holds contribution {found.site}/{found.id}: it was moved "
                "or changed; it is refused."
            )
        if tombstone:
            _check_tombstone(tombstone, found, federation)
    except UnreachableError:
        raise
    except MergeKitError as error:
        return Entry(site, name, None, str(error))
    except OSError as error:
        return Entry(site, name, None, f"{ROOT}/{site}/{name} cannot be read: {error.strerror}.")
    if tombstone:
        return Entry(site, name, None, None, found.kind, found)
    return Entry(site, name, found, None, found.kind)


def _check_tombstone(tombstone: Tombstone, found: Contribution, federation: Federation) -> None:
    """Whoever may not withdraw a contribution makes it suspect all the same: nothing is merged that
    its site may have taken back."""
    if tombstone.problem:
        raise ContributionError(tombstone.problem)
    if tombstone.key not in (found.key, *federation.keys_of(found.site)):
        raise SignatureError(
            f"{found.label} is said to be withdrawn by {tombstone.key}, which is not its site's "
            f"key: ask site '{found.site}', and let the coordinator remove {WITHDRAWALS}/"
            f"{found.site}/{found.id} if it is not true."
        )


def read_local(folder: Path, federation: Federation) -> Contribution:
    """Check a contribution in a local folder, such as a copy of one on a hub.

    Raises
    ------
    ContributionError
        It may not be merged in this federation.
    """
    if not (folder / MANIFEST).is_file():
        raise ContributionError(
            f"{folder} is no contribution: it has no {MANIFEST}; give a folder as it lies on a hub."
        )
    return _read(FolderHub(folder.absolute().parent), federation, folder.absolute().name)


def _read(hub: Hub, federation: Federation, folder: str, *, whole: bool = True) -> Contribution:
    data = hub.read(f"{folder}/{MANIFEST}")
    manifest = parse_manifest(data, f"{folder}/{MANIFEST}")
    trust, signature = _check_signature(hub, federation, folder, manifest, data)
    _check_contract(manifest, federation, folder)
    check_policy(manifest, federation, folder)
    if whole:
        hub.size(f"{folder}/{PAYLOAD}")  # it must be there
    return Contribution(
        manifest.id,
        manifest,
        hub,
        folder,
        trust,
        signature.key if signature else None,
        signature.signature if signature else None,
    )


def _check_signature(
    hub: Hub, federation: Federation, folder: str, manifest: Manifest, data: bytes
) -> tuple[Trust, signing.Signature | None]:
    if not hub.has(f"{folder}/{SIGNATURE}"):
        return Trust.UNSIGNED, None
    where = f"{folder}/{SIGNATURE}"
    otherwise = f"{where} is no signature: publish again."
    signature = signing.parse_signature(hub.read(where), where, otherwise)
    signing.verify(signature, signing.MANIFEST_CONTEXT, data, f"{folder}/{MANIFEST}")
    if gone := federation.revocation_of(signature.key):
        raise SignatureError(
            f"{folder} is signed with {signature.key}, which was revoked on {gone.since}: it "
            f"is refused; site '{gone.name}' publishes again with a new key."
        )
    for old in federation.retired:
        if (old.name, old.public_key) == (manifest.site, signature.key):
            if manifest.created_at <= old.until:
                return Trust.ADMITTED, signature
            raise SignatureError(
                f"{folder} says to be of {manifest.created_at} and is signed with a key that site "
                f"'{old.name}' had replaced on {old.until}: it is refused."
            )
    admitted = federation.key_of(manifest.site)
    if admitted is None:
        return Trust.STRANGER, signature
    if admitted != signature.key:
        raise SignatureError(
            f"{folder} is signed with {signature.key}, but site '{manifest.site}' is admitted "
            f"with {admitted}: it is refused."
        )
    return Trust.ADMITTED, signature


def _check_contract(manifest: Manifest, federation: Federation, folder: str) -> None:
    origin = vector.Origin(base=manifest.base, federation=manifest.federation, site=manifest.site)
    vector.check_header(origin, federation.base_fingerprint, federation.contract_hash, folder)
    if manifest.preprocessing != federation.preprocessing.hash:
        raise ContributionError(
            f"{folder} was trained with other preprocessing than the federation's: "
            "its site must train again."
        )
    if odd := sorted(set(manifest.class_counts) ^ set(federation.classes)):
        raise ContributionError(
            f"{folder} counts the classes wrongly: '{odd[0]}' is missing or unknown."
        )
    absent = manifest.absent_counts
    if federation.multi_label and absent is None:
        raise ContributionError(
            f"{folder} does not say how many images lack each class: its site must train again "
            "with a version of merge-kit that knows images of several classes."
        )
    expected = set(federation.classes) if federation.multi_label else set()
    if odd := sorted(set(absent or ()) ^ expected):
        raise ContributionError(
            f"{folder} counts what images lack wrongly: '{odd[0]}' is missing or unknown."
        )
    coarse = manifest.group_counts
    if coarse is not None and (odd := sorted(set(coarse) ^ set(federation.groups))):
        raise ContributionError(
            f"{folder} counts the groups wrongly: '{odd[0]}' is missing or unknown."
        )


def check_policy(manifest: Manifest, federation: Federation, where: str) -> None:
    """Refuse what the federation's policy does not let in.

    Raises
    ------
    ContributionError
        It says which rule.
    """
    if reason := breach(manifest, federation.policy, "the federation's policy"):
        raise ContributionError(f"{where} {reason}: it is refused.")


def speaks_of(statistic: Contribution, vector: Contribution) -> bool:
    """Whether statistics are about this very vector, by the site and the key that published it."""
    about = (statistic.site, statistic.key, statistic.manifest.about)
    return about == (vector.site, vector.key, vector.manifest.payload.sha256)


def without_superseded(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Drop what a later contribution replaces; only the key that signed one can replace it, or
    another one by which the same site is admitted."""
    replaced = {
        (*_speaker(c), c.manifest.supersedes.removeprefix("sha256:"))
        for c in contributions
        if c.manifest.supersedes
    }
    return [c for c in contributions if (*_speaker(c), c.id) not in replaced]


def _speaker(found: Contribution) -> tuple[str, str | None]:
    return found.site, "" if found.trust is Trust.ADMITTED else found.key


def current(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries that count: refused ones, and contributions that nothing replaces."""
    alive = {c.id for c in without_superseded([e.stated for e in entries if e.stated])}
    return (e for e in entries if e.stated is None or (e.contribution and e.id in alive))


def live(entries: Sequence[Entry]) -> list[Contribution]:
    """Contributions that are sound, not withdrawn, and that nothing replaces."""
    return [entry.contribution for entry in current(entries) if entry.contribution]
