"""Who speaks: signatures, keys, notes and statistics in the name of others."""

from __future__ import annotations

import shutil

import pytest

from merge_kit import publishing, signing, site, withdrawals
from merge_kit.contributions import (
    MANIFEST,
    PAYLOAD,
    SIGNATURE,
    folder_of,
    list_entries,
    live,
)
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.files import canonical_json
from merge_kit.payloads import check_payloads
from merge_kit.schema import now
from merge_kit.withdrawals import Withdrawal
from tests.conftest import write_run, write_statistics

INVALID = (
    "/manifest.json does not carry a valid signature: it was changed after it was signed, or "
    "signed by somebody else; ask the site to publish again."
)


def test_a_forged_signature(field):
    """Signed by the attacker, with the name of the victim's key."""
    field.before()
    manifest = field.altered(field.north, created_at="2026-11-24T12:00:00Z")
    field.mallory()
    forged = signing.sign(field.key("mallory"), signing.MANIFEST_CONTEXT, manifest.to_bytes())
    told = {"key": signing.public_key(field.key("north")), "signature": forged.signature}
    files = {
        PAYLOAD: field.north.payload,
        SIGNATURE: canonical_json(told),
        MANIFEST: manifest.to_bytes(),
    }
    field.hub.publish(folder_of(manifest), files)
    field.refused(folder_of(manifest) + INVALID, "north")


@pytest.mark.parametrize(
    "context", [signing.WITHDRAWAL_CONTEXT, signing.FEDERATION_CONTEXT, signing.APPROVAL_CONTEXT]
)
def test_a_signature_of_another_context(field, context):
    field.before()
    manifest = field.altered(field.north, created_at="2026-11-24T12:00:00Z")
    place = field.put(manifest, field.north.payload, "north", context=context)
    field.refused(place + INVALID, "north")


def test_a_contribution_replayed_from_another_federation(field):
    """Signed by its site, for others."""
    field.before()
    other = "sha256:" + "7" * 64
    manifest = field.altered(field.north, federation=other)
    place = field.put(manifest, field.north.payload, "north")
    here = field.federation().contract_hash
    field.refused(
        f"{place} was made for the federation {other}, this one is {here}: it cannot be merged "
        "here.", "north",
    )  # fmt: skip


def test_an_old_contribution_dated_anew(field):
    field.before()
    manifest = field.altered(field.north, created_at="2027-01-01T00:00:00Z")
    old = field.hub.read(f"{folder_of(field.north.manifest)}/{SIGNATURE}")
    files = {PAYLOAD: field.north.payload, SIGNATURE: old, MANIFEST: manifest.to_bytes()}
    field.hub.publish(folder_of(manifest), files)
    field.refused(folder_of(manifest) + INVALID, "north")


def test_the_manifests_of_two_vectors_swapped(field):
    field.before("--exclude", "north")
    place = field.hub.root / folder_of(field.north.manifest)
    other = field.hub.root / folder_of(field.south.manifest)
    for name in (MANIFEST, SIGNATURE):
        shutil.copyfile(other / name, place / name)
    field.refused(
        f"{folder_of(field.north.manifest)} holds contribution south/{field.south.manifest.id}: it "
        "was moved or changed; it is refused.", "north",
    )  # fmt: skip


def test_a_payload_swapped(field):
    field.before("--exclude", "north")
    payload = field.hub.root / folder_of(field.north.manifest) / PAYLOAD
    size = payload.stat().st_size
    shutil.copyfile(field.south.payload, payload)
    field.refused(
        f"contribution north/{field.north.manifest.id[:12]}: the payload is not what the site "
        f"signed ({size} bytes, {size} announced): it is damaged or replaced; remove its folder "
        "from the hub and let the site publish again.", "north",
    )  # fmt: skip


def test_a_contribution_in_another_sites_folder(field):
    field.before()
    parcel = field.mallory()
    place = f"contributions/north/{parcel.manifest.id}"
    field.put(parcel.manifest, parcel.payload, "mallory", folder=place)
    field.refused(
        f"{place} holds contribution mallory/{parcel.manifest.id}: it was moved or changed; it is "
        "refused.", "north",
    )  # fmt: skip


def test_a_revoked_key(field):
    field.before()
    parcel = field.contribute("mallory", seed=3)
    field.ok("revoke", field.hub.root, "mallory")
    (gone,) = field.federation().revoked
    field.refused(
        f"{folder_of(parcel.manifest)} is signed with {gone.public_key}, which was revoked on "
        f"{gone.since}: it is refused; site 'mallory' publishes again with a new key.", "mallory",
    )  # fmt: skip


def test_a_retired_key_after_its_rotation(field):
    """What it had signed by then still counts."""
    shutil.copytree(field.root / "north" / "keys", field.root / "thief" / "keys")
    _, fresh = site.rotate_key(site.open_site(field.root / "north"))
    field.ok("admit", field.hub.root, "north", fresh, "--rotate")
    field.before()
    manifest = field.altered(field.north, created_at="2099-01-01T00:00:00Z")
    place = field.put(manifest, field.north.payload, "thief")
    (old,) = field.federation().retired
    field.refused(
        f"{place} says to be of 2099-01-01T00:00:00Z and is signed with a key that site 'north' "
        f"had replaced on {old.until}: it is refused.", "north",
    )  # fmt: skip


def test_a_stolen_retired_key_can_date_back_until_it_is_revoked(field):
    """Times are told by whoever signs: a stolen key has to be revoked, not only replaced."""
    shutil.copytree(field.root / "north" / "keys", field.root / "thief" / "keys")
    stolen = signing.public_key(field.key("thief"))
    _, fresh = site.rotate_key(site.open_site(field.root / "north"))
    field.ok("admit", field.hub.root, "north", fresh, "--rotate")
    parcel = field.mallory()
    manifest = field.altered(field.north, created_at="2020-01-01T00:00:00Z")
    place = field.put(manifest, parcel.payload, "thief")
    field.before("--exclude", "north")
    field.ok("revoke", field.hub.root, "north", "--public-key", stolen)
    since = field.federation().revoked[0].since
    result = field.run_cli("merge", field.hub.root, "--out", field.root / "refused")
    assert result.exit_code == 1
    assert f"is signed with {stolen}, which was revoked on {since}" in result.stderr
    field.ignored("--skip-refused")
    shutil.rmtree(field.hub.root / place)


def test_the_key_of_one_site_used_for_another(field):
    field.before()
    field.mallory()
    manifest = field.altered(field.north, created_at="2026-11-24T12:00:00Z")
    place = field.put(manifest, field.north.payload, "mallory")
    own, theirs = (signing.public_key(field.key(name)) for name in ("north", "mallory"))
    field.refused(
        f"{place} is signed with {theirs}, but site 'north' is admitted with {own}: it is refused.",
        "north",
    )


def test_a_signature_removed(field, unsign):
    """Nothing unsigned is taken unless the merger says so."""
    field.before("--exclude", "north")
    unsign(field.north)
    field.refused(
        f"contribution north/{field.north.manifest.id[:12]} is not signed (--allow-unsigned takes "
        "it all the same).", "north",
    )  # fmt: skip


def test_a_stranger(field):
    field.before()
    parcel = field.contribute("mallory", seed=3, admit=False)
    key = signing.public_key(field.key("mallory"))
    field.refused(
        f"contribution mallory/{parcel.manifest.id[:12]} is signed by a key that is not admitted: "
        f"check it with the site and run 'merge-kit admit <hub> mallory {key}'.", "mallory",
    )  # fmt: skip


def note(field, parcel, key_file, **changes):
    """A withdrawal as an attacker writes it."""
    told = {
        "federation": parcel.manifest.federation, "site": parcel.manifest.site,
        "contribution": parcel.manifest.id, "created_at": now(), **changes,
    }  # fmt: skip
    data = Withdrawal.model_validate(told).to_bytes()
    signed = signing.sign(key_file, signing.WITHDRAWAL_CONTEXT, data)
    text = canonical_json({"key": signed.key, "signature": signed.signature})
    place = f"{withdrawals.ROOT}/{parcel.manifest.site}/{parcel.manifest.id}"
    field.hub.publish(place, {withdrawals.SIGNATURE: text, withdrawals.FILE: data})
    return place


def test_a_forged_withdrawal(field):
    """It makes the contribution suspect, by name; nothing is dropped in silence."""
    field.before("--exclude", "north")
    field.mallory()
    place = note(field, field.north, field.key("mallory"))
    key = signing.public_key(field.key("mallory"))
    field.refused(
        f"contribution north/{field.north.manifest.id[:12]} is said to be withdrawn by {key}, "
        "which is not its site's key: ask site 'north', and let the coordinator remove "
        f"{place} if it is not true.", "north",
    )  # fmt: skip


def test_a_withdrawal_replayed_from_another_federation(field):
    field.before("--exclude", "north")
    place = note(field, field.north, field.key("north"), federation="sha256:" + "7" * 64)
    field.refused(
        f"{place} withdraws north/{field.north.manifest.id[:12]} of another place or federation: "
        "it was moved or changed.", "north",
    )  # fmt: skip


def test_a_contribution_that_replaces_anothers(field):
    field.before()
    parcel = field.mallory()
    theirs = f"sha256:{field.north.manifest.id}"
    field.put(field.altered(parcel, supersedes=theirs), parcel.payload, "mallory")
    field.ignored("--exclude", "mallory")
    merged = field.ok("status", field.hub.root, "--json")
    assert merged.count('"state": "ready"') == 3


@pytest.mark.parametrize("unsigned", [False, True], ids=["its own name", "the victim's name"])
def test_statistics_that_speak_of_anothers_vector(field, unsigned):
    """Sound by themselves, and later than the victim's own: who speaks is all that is wrong."""
    for name, seed in (("north", 1), ("south", 2)):
        field.contribute(name, seed=seed, beside=["fisher"])
    options = ("--method", "fisher", *(["--allow-unsigned"] if unsigned else []))
    field.before(*options)
    (own,) = [c for c in there(field) if c.site == "north" and c.kind == "fisher"]
    about = own.manifest.about
    joined = site.open_site(field.root / "north") if unsigned else admitted(field)
    run = joined.root / "runs" / "forged"
    write_run(joined, run, seed=9)
    write_statistics(joined, run, "fisher", seed=9, header={"about": about})
    (parcel,) = [p for p in publishing.prepare_all(joined, run, field.hub) if p.manifest.about]
    manifest = field.altered(parcel, about=about, created_at="2027-01-01T00:00:00Z")
    place = field.put(manifest, parcel.payload, joined.name)
    if unsigned:
        (field.hub.root / place / SIGNATURE).unlink()
    assert manifest.created_at > own.manifest.created_at
    (forged,) = [c for c in there(field) if c.id == manifest.id]
    assert (forged.kind, forged.manifest.about) == ("fisher", about)
    field.ignored(*options)


def admitted(field):
    return site.open_site(field.mallory().payload.parents[2])


def there(field):
    """What is sound on the hub, payloads too."""
    federation = field.federation()
    entries = list_entries(field.hub, federation)
    return live(check_payloads(entries, federation, field.hub.fetch(BASE_WEIGHTS)))
