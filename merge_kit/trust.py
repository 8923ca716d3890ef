"""What a coordinator decides: who is admitted, whose key gives way, who is out; and that it was the
coordinator who decided."""

from __future__ import annotations

import os
from pathlib import Path

from merge_kit import signing
from merge_kit.errors import FederationError, SignatureError
from merge_kit.federation import FEDERATION_FILE, Federation, parse_federation
from merge_kit.files import canonical_json, sha256_bytes, write_atomic
from merge_kit.hub import Hub
from merge_kit.keys import RetiredKey, RevokedKey
from merge_kit.remembered import cache_folder
from merge_kit.schema import now
from merge_kit.yamlfile import parse_yaml

KEY_SUFFIX = "-coordinator.pem"


def rotated(federation: Federation, site: str, key: str) -> Federation:
    """The federation in which a site speaks with a new key from now on.

    Raises
    ------
    FederationError
        The site is not admitted, or the key is malformed or known otherwise.
    """
    known = federation.key_of(site)
    if known == key:
        return federation
    if known is None:
        raise FederationError(f"site '{site}' is not admitted: leave --rotate out.")
    retired = RetiredKey(name=site, public_key=known, until=now())
    rest = tuple(one for one in federation.sites if one.name != site)
    changed = federation.model_copy(
        update={"sites": rest, "retired": (*federation.retired, retired)}
    )
    return changed.admit(site, key).with_hub(site, federation.hub_of(site))


def revoked(federation: Federation, site: str, key: str | None = None) -> Federation:
    """The federation in which nothing counts that a site's key has signed: its present one, and the
    site is admitted no more; or an earlier `key`.

    Raises
    ------
    FederationError
        The site has no such key.
    """
    chosen = key or federation.key_of(site)
    gone_before = {one.public_key for one in federation.revoked if one.name == site}
    if chosen in gone_before or (chosen is None and gone_before):
        return federation
    known = federation.keys_of(site)
    if chosen not in known:
        raise FederationError(
            f"site '{site}' has {'no such key' if key else 'no key'} in this federation; known are "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    assert chosen is not None  # it is known
    hub = federation.hub_of(site) if chosen == federation.key_of(site) else None
    gone = RevokedKey(name=site, public_key=chosen, since=now(), hub=hub)
    return federation.model_copy(
        update={
            "sites": tuple(one for one in federation.sites if one.public_key != chosen),
            "retired": tuple(one for one in federation.retired if one.public_key != chosen),
            "revoked": (*federation.revoked, gone),
        }
    )


def signed(federation: Federation, key_file: Path) -> Federation:
    """The federation with the coordinator's signature, one serial number later.

    Raises
    ------
    FederationError
        It is another key than the contract names.
    """
    next_one = federation.model_copy(update={"serial": federation.serial + 1, "signature": None})
    signature = signing.sign(key_file, signing.FEDERATION_CONTEXT, next_one.to_sign())
    if signature.key != federation.coordinator:
        raise FederationError(
            f"{key_file} is the key {signature.key}, and the coordinator of '{federation.name}' "
            f"has {federation.coordinator}: give the coordinator's with --key."
        )
    return next_one.model_copy(update={"signature": signature.signature})


def check_signed(federation: Federation, where: str) -> None:
    """Refuse a federation file that its coordinator has not signed as it stands.

    Raises
    ------
    SignatureError
        It was changed since, or not signed.
    """
    if federation.coordinator is None:
        return
    signature = signing.Signature(federation.coordinator, federation.signature or "")
    try:
        signing.verify(signature, signing.FEDERATION_CONTEXT, federation.to_sign(), where)
    except SignatureError as error:
        raise SignatureError(
            f"{where} is not as its coordinator has signed it: if you are the coordinator and have "
            "changed it, sign it with 'merge-kit sign'; else ask the coordinator."
        ) from error


def check_latest(federation: Federation, uri: str, *, created: bool = False) -> None:
    """Refuse a signed federation file that is older than one that was seen on the same hub from
    this machine: it may lack a revocation. Copies of a hub may lag behind it. Refuse another
    contract too in the place of one that was signed, unless it was `created` just now: whoever may
    write could put an unsigned one there, or one with a key of their own.

    Raises
    ------
    SignatureError
        Names both serial numbers, or contracts.
    """
    _check_pinned(federation, uri, created)
    path = refuse_older(federation, uri)
    if path:
        write_atomic(path, str(federation.serial))


def _check_pinned(federation: Federation, uri: str, created: bool) -> None:
    folder = cache_folder("federations")
    if folder is None:
        return
    pin = folder / f"{sha256_bytes(uri.encode()).removeprefix('sha256:')}.contract"
    try:
        pinned = "" if created else pin.read_text().strip()
    except (OSError, ValueError):
        pinned = ""
    if pinned and pinned != federation.contract_hash:
        raise SignatureError(
            f"{uri}/{FEDERATION_FILE} is the contract {federation.contract_hash}, and {pinned} "
            "with its coordinator's signature was seen there from this machine: somebody has put "
            f"another federation in its place; ask the coordinator, and remove {pin} if that is as "
            "it should be."
        )
    if federation.coordinator is None:
        if created:
            pin.unlink(missing_ok=True)
        return
    if not pinned:
        write_atomic(pin, federation.contract_hash)


def refuse_older(federation: Federation, uri: str) -> Path | None:
    """As `check_latest`, without keeping the serial number, which nobody may have signed; gives the
    file where a later one than was seen is to be kept, or None.
    """
    folder = cache_folder("federations")
    if federation.coordinator is None or folder is None:
        return None
    told = canonical_json([federation.contract_hash, uri])
    path = folder / sha256_bytes(told).removeprefix("sha256:")
    try:
        seen = int(path.read_text())
    except (OSError, ValueError):
        seen = 0
    if federation.serial < seen:
        raise SignatureError(
            f"{uri}/{FEDERATION_FILE} has the serial number {federation.serial}, and {seen} was "
            "seen from this machine: somebody has put an older file in its place; ask the "
            "coordinator."
        )
    return path if federation.serial > seen else None


def change(hub: Hub, before: bytes, federation: Federation, key_file: Path | None) -> Federation:
    """Put a changed federation file on the hub, signed where it has a coordinator.

    Parameters
    ----------
    before
        What lies there now.
    key_file
        The coordinator's; None for the place where `init` has put it.

    Raises
    ------
    FederationError
        The key is not there, or is another one.
    HubError
        Somebody else was faster.
    """
    final = federation
    if federation.coordinator is not None:
        final = signed(federation, key_file or _key_of(hub.uri, federation))
    hub.replace(FEDERATION_FILE, final.to_yaml().encode(), before)
    check_latest(final, hub.uri)  # from now on older ones are refused here
    return final


def default_key(hub: str | Path, name: str = "") -> Path:
    """Where `init` puts the coordinator's key: beside a federation's folder, never in it; of a hub
    that is no folder, by the federation's name where the command is run."""
    if "://" in str(hub) and not str(hub).startswith("file://"):
        return Path(f"{name}{KEY_SUFFIX}")
    folder = Path(os.path.abspath(str(hub).removeprefix("file://")))
    return folder.with_name(f"{folder.name}{KEY_SUFFIX}")


def _key_of(uri: str, federation: Federation) -> Path:
    path = default_key(uri, federation.name)
    if not path.is_file():
        raise FederationError(
            f"{path} is not there, with which the coordinator of '{federation.name}' signs: give "
            "the place of the key with --key; without it nobody can change this federation."
        )
    return path


def unchecked_on(hub: Hub) -> tuple[bytes, Federation]:
    """The federation file on a hub and what it says, whoever has written it."""
    data = hub.read(FEDERATION_FILE)
    file = parse_yaml(data, f"{hub.uri}/{FEDERATION_FILE}", FederationError)
    return data, parse_federation(file.data, file.place)
