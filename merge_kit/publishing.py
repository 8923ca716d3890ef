"""From a finished run to contributions on the hub: the vector, then statistics that speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from merge_kit import auditlog, manifest, policies, signing, vector
from merge_kit.cards import CARD
from merge_kit.compressing import Compression, compress
from merge_kit.contributions import (
    MANIFEST,
    SIGNATURE,
    Contribution,
    Trust,
    bundle,
    entry_at,
    folder_of,
    without_superseded,
)
from merge_kit.errors import ContributionError, SignatureError, UsageError
from merge_kit.federation import Federation
from merge_kit.files import sha256_bytes, sha256_file, write_atomic
from merge_kit.hub import Hub, shows_cards
from merge_kit.manifest import (
    OF_A_MODEL,
    Draft,
    Kind,
    Manifest,
    Payload,
    parse_manifest,
    read_draft,
    suppressed_counts,
)
from merge_kit.methods.base import Statistics
from merge_kit.outlets import Outlet, check_target, outlet_of
from merge_kit.parameters import roles_of
from merge_kit.site import Site, federation_on
from merge_kit.sitecards import contribution_card
from merge_kit.withdrawals import ROOT as WITHDRAWALS

VECTOR = "vector.safetensors"
DRAFT = "manifest.draft.json"
_OWN: tuple[Kind, ...] = ("vector", *OF_A_MODEL)
"""What stands for itself; statistics go with a vector."""
_COMMANDS: dict[Kind, str] = {
    "vector": "finetune",
    "moments": "calibrate",
    "norms": "calibrate --norms",
    "predictions": "predict-proxy",
    "fisher": "statistics",
    "gram": "statistics",
}


def payload_file(kind: Kind) -> str:
    """Name of a contribution's tensors in a run folder."""
    return f"{kind}.safetensors"


def draft_file(kind: Kind) -> str:
    """Name of what a run folder holds of a contribution's manifest before it is published."""
    return DRAFT if kind == "vector" else f"{kind}.{DRAFT}"


def _manifest_file(kind: Kind) -> str:
    return MANIFEST if kind == "vector" else f"{kind}.{MANIFEST}"


@dataclass(frozen=True, slots=True)
class Parcel:
    """Exactly what leaves the site: the tensors' file and the manifest; the signature follows."""

    manifest: Manifest
    payload: Path
    replaces: Contribution | None
    outlet: Outlet
    """Where it goes: to the federation's hub, or to the one that the site has of its own."""

    @property
    def target(self) -> Hub:
        """What is written to."""
        return self.outlet.target


def prepare_all(
    site: Site,
    run: Path,
    hub: Hub,
    *,
    alongside: bool = False,
    statistics: bool = True,
    how: Compression | None = None,
    create_pr: bool = False,
) -> list[Parcel]:
    """What a folder holds: a run's vector, then with `statistics` those that have been made of it;
    or a calibration's moments. See `prepare`.
    """
    kinds: list[Kind] = [kind for kind in _OWN if (run / draft_file(kind)).is_file()]
    kinds += statistics_of(run) if statistics else ()
    if not kinds:  # an unfinished run, which `prepare` names
        kinds = ["vector"]
    if how and (beside := [kind for kind in kinds if kind != "vector"]):
        raise UsageError(
            f"{run} holds {' and '.join(beside)}, and only a vector can be compressed: hold "
            "statistics, which speak of the whole vector, back with --no-statistics, or publish "
            "without --compress."
        )
    return [
        prepare(site, run, hub, kind, alongside=alongside, how=how, create_pr=create_pr)
        for kind in kinds
    ]


def statistics_of(run: Path) -> list[Statistics]:
    """The kinds of statistics that have been made of a run."""
    return [kind for kind in get_args(Statistics) if (run / draft_file(kind)).is_file()]


def prepare(
    site: Site,
    run: Path,
    hub: Hub,
    kind: Kind = "vector",
    *,
    alongside: bool = False,
    how: Compression | None = None,
    create_pr: bool = False,
) -> Parcel:
    """Check a run against the contract on the federation's hub and make its final manifest.

    Once it has been published the manifest stays as it was: publishing again gives the same
    contribution, unless the key that had signed it was revoked: then it is dated by the revocation.
    With `how` a smaller file of the vector is made beside it, and that is what leaves the site. A
    vector replaces the site's latest one unless `alongside`; statistics replace those of the same
    kind about the same vector, moments and norm statistics those of the same backbone. It goes to
    the hub, or to the one that the federation names as the site's own; with `create_pr` as a pull
    request.

    Raises
    ------
    MergeKitError
        The run is unfinished, was changed, or is another site's; or the hub's contract is not the
        one that was joined.
    """
    command = _COMMANDS[kind]
    draft = read_draft(run / draft_file(kind), command)
    payload = run / payload_file(kind)
    if not payload.is_file() or sha256_file(payload) != draft.payload.sha256:
        verb = "were" if kind in OF_A_MODEL else "was"
        what = (
            "the vector that the run made" if kind == "vector" else f"the {kind} that {verb} made"
        )
        raise ContributionError(
            f"{payload} is not {what}: it is missing or was changed; "
            f"run 'merge-kit {command}' again."
        )
    check_origin(site, run, draft)
    if kind in get_args(Statistics) and draft.about != read_draft(run / DRAFT).payload.sha256:
        raise ContributionError(
            f"{payload} speaks of another vector than {run / VECTOR}: "
            f"run 'merge-kit statistics' again, or remove {run / draft_file(kind)}."
        )
    outlet = outlet_of(site, hub, create_pr=create_pr)
    federation = outlet.federation
    if how:
        payload, draft = _compressed(run, payload, draft, federation, how)
    key = signing.public_key(site.key_file)
    if gone := federation.revocation_of(key):
        raise ContributionError(
            f"the key of site '{site.name}' was revoked on {gone.since}, and nothing that it signs "
            f"counts: make a new one with 'merge-kit key rotate {site.root}', and let the "
            "coordinator admit it."
        )
    entries = outlet.entries(site.name)
    # A key that is still to be exchanged replaces nothing before, but what it publishes has to say
    # now what it will replace then.
    own = [
        entry.contribution
        for entry in entries
        if entry.contribution
        and (entry.contribution.key == key or entry.contribution.trust is Trust.ADMITTED)
    ]
    own = [c for c in own if (c.kind, c.manifest.about) == (kind, draft.about)]
    minimum = federation.policy.minimum_class_count
    draft = Draft(**suppressed_counts(draft.model_dump(), minimum))
    final = _manifest(run, draft, outlet, [] if alongside and kind == "vector" else own)
    if any(entry.withdrawn and entry.id == final.id for entry in entries):
        raise ContributionError(
            f"{payload} was published as {final.id[:12]} and has been withdrawn, which is for "
            f"good: run 'merge-kit {command}' again to contribute something new."
        )
    policies.check(final, federation.policy, "the federation's policy")
    policies.check_site(final, policies.site_policy(site.root), outlet.target.uri)
    replaces = next((c for c in own if f"sha256:{c.id}" == final.supersedes), None)
    return Parcel(final, payload, replaces, outlet)


def _compressed(
    run: Path, whole: Path, draft: Draft, federation: Federation, how: Compression
) -> tuple[Path, Draft]:
    """A smaller file of a run's vector, and the draft that speaks of it."""
    path = run / f"vector.{how.text.replace(':', '-').replace('+', '-')}.safetensors"
    if before := _sent(run, path, how):
        # Another machine's linear algebra could give other last digits: what was sent stays.
        return path, draft.model_copy(
            update={"payload": before.payload, "compression": before.compression}
        )
    with vector.opened(whole) as file:
        roles = roles_of(file.specs, federation.classifier)
    error = compress(whole, path, roles, how)
    with vector.opened(path) as file:
        found = vector.measure(file)
    assert found.norm is not None  # every value was read and found finite
    payload = Payload(sha256=found.sha256, size=path.stat().st_size, norm=found.norm)
    note = manifest.Compression(method=how.text, error=error)
    return path, draft.model_copy(update={"payload": payload, "compression": note})


def _sent(run: Path, path: Path, how: Compression) -> Manifest | None:
    """The manifest of what was sent before, if this very file was, compressed in this way."""
    stated = run / MANIFEST
    if not (stated.is_file() and path.is_file()):
        return None
    before = parse_manifest(stated.read_bytes(), str(stated))
    told = before.compression
    same = told is not None and told.method == how.text
    return before if same and sha256_file(path) == before.payload.sha256 else None


def check_origin(site: Site, run: Path, draft: Draft) -> None:
    """Refuse a run of another site or for another contract.

    Raises
    ------
    ContributionError
        Names both.
    """
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


def _manifest(run: Path, draft: Draft, outlet: Outlet, own: list[Contribution]) -> Manifest:
    path = run / _manifest_file(draft.kind)
    if path.is_file():
        final = parse_manifest(path.read_bytes(), str(path))
        # One that never arrived is made anew: meanwhile another run may have been published.
        place = f"{folder_of(final)}/{MANIFEST}"
        if final.payload == draft.payload and any(hub.has(place) for hub in outlet.there):
            since = _revoked_since(outlet, final)
            if since is None or since <= final.created_at:
                return final
            # What lies there counts no more and is never written over: the same tensors, dated by
            # the revocation, have a place of their own, and the same one however often it is tried.
            draft = draft.model_copy(update={"created_at": since})
    latest = max(without_superseded(own), key=lambda c: (c.manifest.created_at, c.id), default=None)
    supersedes = f"sha256:{latest.id}" if latest else None
    return Manifest(**draft.model_dump(), supersedes=supersedes)


def _revoked_since(outlet: Outlet, sent: Manifest) -> str | None:
    """Since when the key counts no more that has signed what lies on a hub; None where it counts,
    or where its site has withdrawn the contribution, which is for good."""
    if any(_withdrawn(hub, sent) for hub in outlet.there):
        return None
    where = f"{folder_of(sent)}/{SIGNATURE}"
    for hub in (hub for hub in outlet.there if hub.has(where)):
        try:
            signature = signing.parse_signature(hub.read(where), where, "it is no signature")
        except SignatureError:
            continue  # `publish` says what is wrong with it
        if gone := outlet.federation.revocation_of(signature.key):
            return gone.since
    return None


def _withdrawn(hub: Hub, sent: Manifest) -> bool:
    return next(hub.list(f"{WITHDRAWALS}/{sent.site}/{sent.id}"), None) is not None


def publish(site: Site, run: Path, hub: Hub, parcel: Parcel) -> bool:
    """Sign and put the contribution on the hub; False when it is there already.

    The site's policy is read again: what was allowed when the parcel was prepared may not be now.

    Raises
    ------
    ContributionError
        What is there is damaged, or signed with a key that does not count (any more); nothing on a
        hub is ever overwritten.
    PolicyError
        The site's policy does not let it leave, or nobody has approved it.
    AuditError
        The site's audit log was changed: nothing leaves the site.
    """
    target, policy = parcel.target, policies.site_policy(site.root)
    policies.check_site(parcel.manifest, policy, target.uri)
    key = signing.public_key(site.key_file)
    policies.check_approved(site.root, run, parcel.manifest, policy, key)
    check_target(site, hub, target)
    data = parcel.manifest.to_bytes()
    signature = signing.sign(site.key_file, signing.MANIFEST_CONTEXT, data)
    folder = folder_of(parcel.manifest)
    files = {**_card(parcel), **bundle(parcel.manifest, parcel.payload, signature)}
    told = {
        name: sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
        for name, content in files.items()
    }
    auditlog.append(site.root, "publishing", target.uri, folder, told)
    write_atomic(run / _manifest_file(parcel.manifest.kind), data)
    if target.publish(folder, files):
        auditlog.append(site.root, "published", target.uri, folder, told)
        return True
    if _withdrawn(target, parcel.manifest):
        note = f"{WITHDRAWALS}/{site.name}/{parcel.manifest.id}"
        raise ContributionError(
            f"{target.uri}/{folder} is there already, and {note} says that it has been withdrawn: "
            f"run 'merge-kit {_COMMANDS[parcel.manifest.kind]}' again to contribute something new, "
            "or, if nobody of your site has withdrawn it, ask the coordinator to remove that note."
        )
    if reason := _worthless(target, federation_on(hub), parcel.manifest, key):
        raise ContributionError(
            f"{target.uri}/{folder} is there already, but {reason}: ask the coordinator to remove "
            "this folder, then publish again."
        )
    return False


def _card(parcel: Parcel) -> dict[str, Path | bytes]:
    """The page beside a contribution on a federation's hub that shows pages: a repository of the
    site's own has one of its own, of all that lies there."""
    if parcel.outlet.is_own or not shows_cards(parcel.target):
        return {}
    return {CARD: contribution_card(parcel.outlet.federation, parcel.manifest)}


def _worthless(hub: Hub, federation: Federation, ours: Manifest, key: str) -> str | None:
    """Why what lies on the hub in the place of a contribution does not stand for it."""
    entry = entry_at(hub, federation, ours.site, ours.id)
    if entry.contribution is None:
        return f"does not count ({str(entry.problem).rstrip('.')})"
    if entry.contribution.trust is not Trust.ADMITTED and entry.contribution.key != key:
        return f"signed with {entry.contribution.key or 'nothing'} and not with the site's key"
    if sha256_file(entry.contribution.payload) != ours.payload.sha256:
        return "damaged"
    return None
