"""Keys that stand twice in JSON: of two readers each could take another value."""

from __future__ import annotations

import pytest

from merge_kit import signing, vector, withdrawals
from merge_kit.contributions import MANIFEST, PAYLOAD, SIGNATURE, folder_of
from merge_kit.files import canonical_json
from merge_kit.policies import APPROVALS, POLICY_FILE
from merge_kit.provenance import PROVENANCE
from merge_kit.site import open_site
from merge_kit.tensorfile import write_tensors
from tests.conftest import write_run
from tests.merge_kit.helpers import load


def twice(data, key, other):
    """The same object; of `key` Python's reader still takes the value that it had."""
    assert data.startswith(b"{")
    return b"{" + canonical_json(key) + b":" + canonical_json(other) + b"," + data[1:]


def test_a_key_twice_in_a_manifest(field):
    field.before()
    parcel = field.mallory()
    data = twice(parcel.manifest.to_bytes(), "site", "north")
    signed = signing.sign(field.key("mallory"), signing.MANIFEST_CONTEXT, data)
    place = folder_of(parcel.manifest)
    field.hub.publish(
        place, {PAYLOAD: parcel.payload, SIGNATURE: signed.to_bytes(), MANIFEST: data}
    )
    field.refused(f"{place}/{MANIFEST} names the key 'site' twice: it is refused.", "mallory")


@pytest.mark.parametrize("key", ["key", "signature"])
def test_a_key_twice_in_a_signature(field, key):
    field.before("--exclude", "north")
    path = field.hub.root / folder_of(field.north.manifest) / SIGNATURE
    path.write_bytes(twice(path.read_bytes(), key, "other"))
    place = f"{folder_of(field.north.manifest)}/{SIGNATURE}"
    field.refused(f"{place} names the key '{key}' twice: it is refused.", "north")


@pytest.mark.parametrize("file", [withdrawals.FILE, withdrawals.SIGNATURE])
def test_a_key_twice_in_a_withdrawal(field, file):
    """Signed as it stands; the contribution becomes suspect, and is not dropped in silence."""
    field.before("--exclude", "north")
    told = {
        "contribution": field.north.manifest.id, "created_at": "2026-11-24T12:00:00Z",
        "federation": field.north.manifest.federation, "format": 1, "site": "north",
    }  # fmt: skip
    data = canonical_json(told)
    key = "contribution" if file == withdrawals.FILE else "key"
    if file == withdrawals.FILE:
        data = twice(data, key, field.south.manifest.id)
    signature = signing.sign(field.key("north"), signing.WITHDRAWAL_CONTEXT, data).to_bytes()
    if file == withdrawals.SIGNATURE:
        signature = twice(signature, key, "other")
    place = f"{withdrawals.ROOT}/north/{field.north.manifest.id}"
    field.hub.publish(place, {withdrawals.SIGNATURE: signature, withdrawals.FILE: data})
    field.refused(f"{place}/{file} names the key '{key}' twice: it is refused.", "north")


def test_a_key_twice_in_the_metadata_of_a_vector(field):
    field.before()

    def change(path):
        header = {
            "format": 1, "site": "mallory", "base": field.federation().base_fingerprint,
            "federation": field.federation().contract_hash,
        }  # fmt: skip
        text = twice(canonical_json(header), "site", "north").decode()
        write_tensors(path, load(path), (vector.METADATA_KEY, text))
        return path.read_bytes()

    field.signed_payload(change)
    where = f"{field.payload}: the metadata '{vector.METADATA_KEY}'"
    field.refused(f"{where} names the key 'site' twice: it is refused.", "mallory")


def test_a_key_twice_in_a_provenance(field):
    field.model()
    path = field.root / "merged1" / PROVENANCE
    path.write_bytes(twice(path.read_bytes(), "merged", "sha256:" + "0" * 64))
    for command in ("verify", "remerge"):
        arguments = (path.parent, "--hub", field.hub.root)
        arguments = arguments if command == "verify" else (field.hub.root, path.parent)
        found = field.run_cli(command, *arguments)
        assert found.exit_code == 1
        assert found.stderr == f"Error: {path} names the key 'merged' twice: it is refused.\n"


def test_a_key_twice_in_an_approval(field):
    """It counts as none: nothing leaves the site."""
    north, second = field.root / "north", field.root / "second.pem"
    key = signing.create_key(second)
    (north / POLICY_FILE).write_text(f"format: 1\nsecond_signature: [{key}]\n")
    run = north / "runs" / "another"
    write_run(open_site(north), run, seed=5)
    field.ok("approve", north, "--run", run, "--key", second)
    (path,) = (north / APPROVALS).iterdir()
    sound = path.read_bytes()
    path.write_bytes(twice(sound, "key", signing.public_key(field.key("north"))))
    found = field.run_cli("publish", north, "--run", run)
    assert found.exit_code == 1
    assert "has to be approved by a second person before it leaves the site" in found.stderr
    path.write_bytes(sound)
    field.ok("publish", north, "--run", run)
