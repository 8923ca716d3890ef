"""What a merged model says it was made of, looked for on its hub and checked again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_kit import homes
from merge_kit.checks import Check
from merge_kit.contributions import MANIFEST, ROOT, Contribution, Trust, entry_among
from merge_kit.errors import MergeKitError
from merge_kit.federation import BASE_WEIGHTS, Federation, check_base
from merge_kit.hub import Hub
from merge_kit.manifest import Kind
from merge_kit.methods.base import Statistics
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.payloads import check_payload
from merge_kit.provenance import (
    PROVENANCE,
    Provenance,
    Stated,
)
from merge_kit.remembered import Checked
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec


@dataclass(frozen=True, slots=True)
class FoundBase:
    """The base's file, once it was found to be the one that was stated."""

    path: Path
    checked: Checked
    specs: Mapping[str, TensorSpec]
    roles: Mapping[str, Role]


def find_base(
    record: Provenance, federation: Federation, hub: Hub
) -> tuple[Check, FoundBase | None]:
    """The base on the hub, if it is the one that was stated."""
    if record.base != federation.base_fingerprint:
        text = (
            f"{PROVENANCE} states {record.base}, the contract on the hub "
            f"{federation.base_fingerprint}."
        )
        return Check("base", "differs", text), None
    try:
        path = hub.fetch(BASE_WEIGHTS)
        checked = check_base(federation, path, str(path), again=True)
        with TensorFile(path) as file:
            roles = roles_of(file.specs, federation.classifier)
            base = FoundBase(path, checked, file.specs, roles)
    except MergeKitError as error:
        return Check("base", "differs", str(error)), None
    return Check("base", "ok", f"has the stated fingerprint {record.base}"), base


def find_contribution(
    part: Stated,
    federation: Federation,
    hub: Hub,
    local: Mapping[tuple[str, str], Contribution],
    base: FoundBase | None,
) -> tuple[Check, Contribution | None]:
    """A contribution that was merged: among the `local` copies, then on the hub."""

    def differs(text: str) -> tuple[Check, None]:
        return Check(part.label, "differs", text), None

    found = local.get((part.site, part.id))
    if found is None:
        hubs = homes.hubs_of(hub, federation, part.site)
        hubs = [one for one in hubs if one.has(f"{ROOT}/{part.site}/{part.id}/{MANIFEST}")]
        if not hubs:
            return differs(
                "is not on the hub: its site withdrew it, or somebody removed it; the model still "
                "holds what it gave: merge again without it, or give a copy of it with --from."
            )
        entry = entry_among(hubs, federation, part.site, part.id)
        if entry.contribution is None:
            return differs(str(entry.problem))
        found = entry.contribution
    if text := _misstated(part, found):
        return differs(text)
    if base is None:
        return differs("its payload was not compared: that takes the base.")
    try:
        expected = vector_specs(base.specs, base.roles)
        checked = check_payload(found, federation, expected, base.roles, again=True)
    except MergeKitError as error:
        return differs(str(error))
    trust = {
        Trust.ADMITTED: "signed with the admitted key",
        Trust.STRANGER: "signed, by a key that the federation does not admit",
        Trust.UNSIGNED: "not signed: nobody vouches for it",
    }
    text = f"{trust[found.trust]}; payload as stated"
    return Check(part.label, "ok", text), replace(found, checked=checked)


def find_statistics(
    record: Provenance,
    federation: Federation,
    hub: Hub,
    local: Mapping[tuple[str, str], Contribution],
    base: FoundBase | None,
) -> Iterator[tuple[Check, Statistics, Contribution | None]]:
    """The statistics that were used beside the vectors, in the order of the vectors' ids."""
    for part in sorted(record.contributions, key=lambda part: part.id):
        for kind, name in sorted(part.statistics.items()):
            subject = f"{part.site}/{name[:12]}"
            found = local.get((part.site, name))
            if found is None:
                hubs = homes.hubs_of(hub, federation, part.site)
                entry = entry_among(hubs, federation, part.site, name)
                found = entry.contribution
                if found is None:
                    yield Check(subject, "differs", str(entry.problem)), kind, None
                    continue
            if found.kind != kind or found.manifest.about != part.payload or base is None:
                text = f"is not the {kind} of {part.label}, or the base is missing."
                yield Check(subject, "differs", text), kind, None
                continue
            try:
                expected = vector_specs(base.specs, base.roles)
                checked = check_payload(found, federation, expected, base.roles, again=True)
            except MergeKitError as error:
                yield Check(subject, "differs", str(error)), kind, None
                continue
            text = f"{kind} of {part.label}, as signed"
            yield Check(subject, "ok", text), kind, replace(found, checked=checked)


def find_measured(
    parts: Sequence[Stated],
    kind: Kind,
    about: str,
    federation: Federation,
    hub: Hub,
    local: Mapping[tuple[str, str], Contribution],
    base: FoundBase | None,
) -> Iterator[tuple[Check, Contribution | None]]:
    """What sites measured of a backbone, in the order of the ids."""
    for part in sorted(parts, key=lambda part: part.id):
        check, found = find_contribution(part, federation, hub, local, base)
        if found and (found.kind, found.manifest.about) != (kind, about):
            of = "images" if kind == "predictions" else "backbone"
            text = f"is no {kind} of the {of} {about}."
            check, found = Check(part.label, "differs", text), None
        yield check, found


def _misstated(part: Stated, found: Contribution) -> str | None:
    """What the provenance says of a contribution that is not so."""
    if part.payload != found.manifest.payload.sha256:
        return (
            f"{PROVENANCE} states the payload {part.payload}, its manifest "
            f"{found.manifest.payload.sha256}."
        )
    if part.public_key != found.key:
        return (
            f"{PROVENANCE} states the key {part.public_key or 'none'}, its signature on the hub is "
            f"of {found.key or 'none'}."
        )
    if part.signature != found.signature:
        return f"{PROVENANCE} states another signature than lies on the hub."
    admitted_since = part.trust is Trust.STRANGER and found.trust is Trust.ADMITTED
    if part.trust is not found.trust and not admitted_since:
        return (
            f"{PROVENANCE} calls it '{part.trust.value}', by the federation file on the hub it is "
            f"'{found.trust.value}': the list of sites was changed, or the statement."
        )
    return None
