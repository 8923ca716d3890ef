"""Tombstones: what a site takes back counts no more, from the moment that the tombstone is there.

``withdrawals/<site>/<id>/`` holds ``withdrawal.json``, canonical JSON, and ``withdrawal.sig``,
signed as a manifest is, under a context of its own. The contribution's manifest stays where it is,
so that what it had replaced stays replaced.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints, ValidationError

from merge_kit import auditlog, signing
from merge_kit.blocks import in_order
from merge_kit.errors import ContributionError, MergeKitError, SignatureError, UnreachableError
from merge_kit.files import canonical_json, sha256_bytes, write_atomic
from merge_kit.hub import READERS, Hub, places
from merge_kit.schema import Digest, Document, SiteName, Timestamp, now, parse
from merge_kit.site import Site
from merge_kit.strictjson import read_json

ROOT = "withdrawals"
FILE = "withdrawal.json"
SIGNATURE = "withdrawal.sig"


_ID = r"^[0-9a-f]{64}$"


def is_id(name: str) -> bool:
    """Whether a contribution can have such a name."""
    return re.fullmatch(_ID, name) is not None


class Withdrawal(Document):
    """withdrawal.json."""

    format: Literal[1] = 1
    federation: Digest
    site: SiteName
    contribution: Annotated[str, StringConstraints(pattern=_ID)]
    created_at: Timestamp

    def to_bytes(self) -> bytes:
        """What is signed and stored."""
        return canonical_json(self.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A withdrawal, and who has signed it; or the sentence that says what is wrong with it."""

    withdrawal: Withdrawal | None
    key: str | None
    problem: str | None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The very bytes that were checked, by name."""


def read_tombstones(
    hub: Hub, contract: str, site: str | None = None
) -> dict[tuple[str, str], Tombstone]:
    """What lies on a hub, by site and contribution; each is signed by the key that it names."""
    found = list(places(hub, ROOT, site))
    read = in_order(lambda place: _read(hub, contract, *place), found, READERS)
    return dict(zip(found, read, strict=True))


def _read(hub: Hub, contract: str, site: str, name: str) -> Tombstone:
    where = f"{ROOT}/{site}/{name}"
    try:
        data = hub.read(f"{where}/{FILE}")
        otherwise = f"{where} is no withdrawal: ask site '{site}'."
        content = read_json(data, f"{where}/{FILE}", SignatureError, otherwise)
        signed = hub.read(f"{where}/{SIGNATURE}")
        signature = signing.parse_signature(signed, f"{where}/{SIGNATURE}", otherwise)
        found = parse(Withdrawal, content, where, ContributionError)
        signing.verify(signature, signing.WITHDRAWAL_CONTEXT, data, where)
        if (found.site, found.contribution, found.federation) != (site, name, contract):
            raise ContributionError(
                f"{where} withdraws {found.site}/{found.contribution[:12]} of another place or "
                "federation: it was moved or changed."
            )
    except UnreachableError:
        raise
    except MergeKitError as error:
        return Tombstone(None, None, str(error))
    return Tombstone(found, signature.key, None, {SIGNATURE: signed, FILE: data})


def _note(site: Site, contribution: str) -> Withdrawal:
    """What is said, as it was said first: where a hub takes the files of an entry one by one, an
    attempt that was broken off must go on with the very same bytes."""
    path = _note_file(site, contribution)
    fresh = Withdrawal(
        federation=site.config.federation,
        site=site.name,
        contribution=contribution,
        created_at=now(),
    )
    try:
        raw = path.read_bytes()
        kept = Withdrawal.model_validate_json(raw)
    except (OSError, ValidationError):
        kept = None
    if kept and kept.to_bytes() == raw:
        if kept.model_copy(update={"created_at": fresh.created_at}) == fresh:
            return kept
    return fresh


def _note_file(site: Site, contribution: str) -> Path:
    return site.root / ROOT / f"{contribution}.json"


def withdraw(hub: Hub, site: Site, contribution: str, keys: Collection[str]) -> bool:
    """Sign a tombstone and put it on the hub; False when there is one already.

    Parameters
    ----------
    keys
        By which the site speaks in this federation, or has spoken: a tombstone that is there must
        be signed with one of them, or with the site's own.

    Raises
    ------
    ContributionError
        Something else lies in the tombstone's place, and nothing on a hub is ever overwritten.
    """
    note = _note(site, contribution)
    data = note.to_bytes()
    signed = signing.sign(site.key_file, signing.WITHDRAWAL_CONTEXT, data)
    files: dict[str, Path | bytes] = {
        SIGNATURE: signed.to_bytes(),
        FILE: data,
    }
    place = f"{ROOT}/{site.name}/{contribution}"
    told = {FILE: sha256_bytes(data)}
    auditlog.append(site.root, "withdrawing", hub.uri, place, told)
    write_atomic(_note_file(site, contribution), data)
    fresh = hub.publish(place, files)
    if fresh:
        auditlog.append(site.root, "withdrawn", hub.uri, place, told)
        return True
    there = _read(hub, site.config.federation, site.name, contribution)
    if there.problem or there.key not in {*keys, signed.key}:
        reason = there.problem or f"it is signed with {there.key}, which is no key of this site."
        raise ContributionError(
            f"{hub.uri}/{place} is there already and withdraws nothing ({reason.rstrip('.')}): ask "
            "the coordinator to remove this folder, then withdraw again."
        )
    return False
