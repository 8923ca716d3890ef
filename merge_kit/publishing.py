"""From a finished run to a contribution on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_kit import signing
from merge_kit.contributions import (
    MANIFEST,
    PAYLOAD,
    Contribution,
    bundle,
    folder_of,
    list_entries,
    without_superseded,
)
from merge_kit.errors import ContributionError, VectorError
from merge_kit.files import sha256_file, write_atomic
from merge_kit.hub import Hub
from merge_kit.manifest import Draft, Manifest, parse_manifest, read_draft, suppress
from merge_kit.site import Site, check_pinned, federation_on

VECTOR = "vector.safetensors"
DRAFT = "manifest.draft.json"


@dataclass(frozen=True, slots=True)
class Parcel:
    """Exactly what leaves the site: the vector's file and the manifest; the signature follows."""

    manifest: Manifest
    vector: Path
    replaces: Contribution | None


def prepare(site: Site, run: Path, hub: Hub, *, alongside: bool = False) -> Parcel:
    """Check a run against the contract on the hub and make its final manifest.

    Once it has been published the manifest stays as it was: publishing again gives the same
    contribution. It replaces the site's latest contribution unless `alongside`.

    Raises
    ------
    MergeKitError
        The run is unfinished, was changed, or is another site's; or the hub's contract is not the
        one that was joined.
    """
    draft = read_draft(run / DRAFT)
    vector = run / VECTOR
    if not vector.is_file() or sha256_file(vector) != draft.payload.sha256:
        raise ContributionError(
            f"{vector} is not the vector that the run made: it is missing or was changed; "
            "run 'merge-kit finetune' again."
        )
    _check_origin(site, run, draft)
    federation = federation_on(hub)
    check_pinned(site.config, federation, hub.uri)
    bound = federation.policy.maximum_norm
    if bound is not None and draft.payload.norm > bound:
        raise VectorError(
            f"{vector} has the norm {draft.payload.norm:.4g}, above the policy's {bound:.4g}: "
            "train with fewer steps or a lower learning rate."
        )
    key = signing.public_key(site.key_file)
    own = [
        entry.contribution
        for entry in list_entries(hub, federation)
        if entry.contribution and entry.site == site.name and entry.contribution.key == key
    ]
    draft = draft.model_copy(
        update={"class_counts": suppress(draft.class_counts, federation.policy.minimum_class_count)}
    )
    manifest = _manifest(run, draft, hub, [] if alongside else own)
    replaces = next((c for c in own if f"sha256:{c.id}" == manifest.supersedes), None)
    return Parcel(manifest, vector, replaces)


def _check_origin(site: Site, run: Path, draft: Draft) -> None:
    if draft.site != site.name:
        raise ContributionError(
            f"{run} is a run of site '{draft.site}' and not of '{site.name}': "
            "publish it from its own site's folder."
        )
    if draft.federation != site.config.federation:
        raise ContributionError(
            f"{run} was trained for the contract {draft.federation}, site '{site.name}' joined "
            f"{site.config.federation}: run 'merge-kit finetune' again."
        )


def _manifest(run: Path, draft: Draft, hub: Hub, own: list[Contribution]) -> Manifest:
    path = run / MANIFEST
    if path.is_file():
        final = parse_manifest(path.read_bytes(), str(path))
        # One that never arrived is made anew: meanwhile another run may have been published.
        if final.payload == draft.payload and hub.has(f"{folder_of(final)}/{MANIFEST}"):
            return final
    latest = max(without_superseded(own), key=lambda c: (c.manifest.created_at, c.id), default=None)
    supersedes = f"sha256:{latest.id}" if latest else None
    return Manifest(**draft.model_dump(), supersedes=supersedes)


def publish(site: Site, run: Path, hub: Hub, parcel: Parcel) -> bool:
    """Sign and put the contribution on the hub; False when it is there already.

    Raises
    ------
    ContributionError
        What is there is damaged; nothing on a hub is ever overwritten.
    """
    data = parcel.manifest.to_bytes()
    write_atomic(run / MANIFEST, data)
    signature = signing.sign(site.key_file, signing.MANIFEST_CONTEXT, data)
    folder = folder_of(parcel.manifest)
    if hub.publish(folder, bundle(parcel.manifest, parcel.vector, signature)):
        return True
    there = hub.fetch(f"{folder}/{PAYLOAD}")
    if sha256_file(there) != parcel.manifest.payload.sha256:
        raise ContributionError(
            f"{hub.uri}/{folder} is there already, but damaged: ask the coordinator to remove this "
            "folder, then publish again."
        )
    return False
