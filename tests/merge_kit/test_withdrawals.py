"""What a site takes back: signed, at once, for good, and by nobody else."""

from __future__ import annotations

import json
import shutil

import pytest

from merge_kit import signing, site, withdrawals
from merge_kit.contributions import PAYLOAD, current, folder_of, list_entries, live
from merge_kit.federation import FEDERATION_FILE, read_federation
from merge_kit.files import canonical_json
from merge_kit.schema import now
from merge_kit.status import survey
from merge_kit.withdrawals import Withdrawal
from tests.conftest import write_run
from tests.merge_kit.helpers import load

OTHER = "ed25519:" + "A" * 43 + "="


@pytest.fixture
def entries(hub):
    """What lies on the hub now."""
    return lambda: list_entries(hub, read_federation(hub.root))


@pytest.fixture
def withdraw(run_cli, tmp_path):
    def go(name, *arguments, code=0):
        result = run_cli("withdraw", tmp_path / name, *arguments)
        assert result.exit_code == code, result.output
        return result.output if not code else result.stderr

    return go


def note_of(hub, parcel, key_file, **changes):
    """A tombstone as an attacker would write it."""
    told = {
        "federation": parcel.manifest.federation, "site": parcel.manifest.site,
        "contribution": parcel.manifest.id, "created_at": now(), **changes,
    }  # fmt: skip
    place = f"{withdrawals.ROOT}/{parcel.manifest.site}/{parcel.manifest.id}"
    data = Withdrawal.model_validate(told).to_bytes()
    signed = signing.sign(key_file, signing.WITHDRAWAL_CONTEXT, data)
    text = canonical_json({"key": signed.key, "signature": signed.signature})
    hub.publish(place, {withdrawals.SIGNATURE: text, withdrawals.FILE: data})


def test_what_is_withdrawn_is_in_no_merge_from_then_on(hub, contribute, withdraw, ok, tmp_path):
    contribute("north", seed=1)
    gone = contribute("south", seed=2)
    ok("merge", hub.root, "--out", tmp_path / "both")
    said = withdraw("south", "--all")
    assert f"Withdrawn: vector {gone.manifest.id[:12]}" in said
    assert f"its tensors are removed from {hub.uri}" in said
    assert not hub.has(f"{folder_of(gone.manifest)}/{PAYLOAD}")
    ok("merge", hub.root, "--out", tmp_path / "left")
    ok("merge", hub.root, "--site", "north", "--out", tmp_path / "north-alone")
    left, alone = (load(tmp_path / n / "model.safetensors") for n in ("left", "north-alone"))
    assert all((left[name] == tensor).all() for name, tensor in alone.items())
    told = json.loads((tmp_path / "left" / "provenance.json").read_text())
    assert [c["site"] for c in told["contributions"]] == ["north"]


def test_status_shows_what_was_withdrawn(hub, contribute, withdraw, ok):
    contribute("north", seed=1)
    gone = contribute("south", seed=2)
    withdraw("south", gone.manifest.id[:10])
    assert "withdrawn" in ok("status", hub.root)
    rows = json.loads(ok("status", hub.root, "--json"))["contributions"]
    assert {row["site"]: (row["state"], row["compatible"]) for row in rows} == {
        "north": ("ready", True), "south": ("withdrawn", False)
    }  # fmt: skip
    assert survey(hub, read_federation(hub.root))[-1]["problem"] is None


def test_what_the_withdrawn_one_had_replaced_stays_replaced(hub, contribute, withdraw, entries):
    contribute("north", seed=1)
    second = contribute("north", seed=2)
    assert second.manifest.supersedes
    withdraw("north", second.manifest.id[:10])
    assert live(entries()) == []
    assert list(current(entries())) == []


def test_only_the_one_that_was_named_is_withdrawn(hub, contribute, withdraw, entries):
    first = contribute("north", seed=1)
    contribute("south", seed=2)
    withdraw("north", first.manifest.id[:6])
    assert [c.site for c in live(entries())] == ["south"]


def test_withdrawing_twice_changes_nothing(contribute, withdraw, hub):
    parcel = contribute("north", seed=1)
    withdraw("north", "--all")
    place = f"{withdrawals.ROOT}/north/{parcel.manifest.id}/{withdrawals.FILE}"
    before = hub.read(place)
    assert "Withdrawn before: vector" in withdraw("north", "--all")
    assert hub.read(place) == before


def test_the_same_run_is_not_published_again(hub, contribute, withdraw, run_cli, tmp_path, entries):
    contribute("north", seed=1)
    withdraw("north", "--all")
    again = run_cli("publish", tmp_path / "north", "--run", tmp_path / "north" / "runs" / "seed1")
    assert again.exit_code == 1
    assert "has been withdrawn, which is for good: run 'merge-kit finetune' again" in again.stderr
    joined = site.open_site(tmp_path / "north")
    write_run(joined, tmp_path / "north" / "runs" / "new", seed=5)
    new = run_cli("publish", tmp_path / "north", "--run", tmp_path / "north" / "runs" / "new")
    assert new.exit_code == 0, new.output
    assert [c.site for c in live(entries())] == ["north"]


def test_nobody_withdraws_for_another_site(hub, contribute, entries, run_cli, tmp_path):
    """Whoever tries makes the contribution suspect: it is refused by name, not dropped silently."""
    parcel = contribute("north", seed=1)
    contribute("south", seed=2)
    note_of(hub, parcel, tmp_path / "south" / "keys" / "site.pem")
    (entry,) = [entry for entry in entries() if entry.site == "north"]
    assert "is said to be withdrawn by ed25519:" in entry.problem
    assert "which is not its site's key" in entry.problem
    refused = run_cli("merge", hub.root, "--out", tmp_path / "merged")
    assert refused.exit_code == 1
    assert "is said to be withdrawn by" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"contribution": "0" * 64}, "of another place or federation: it was moved or changed."),
        ({"site": "south"}, "of another place or federation: it was moved or changed."),
        (
            {"federation": "sha256:" + "0" * 64},
            "of another place or federation: it was moved or changed.",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_note_from_elsewhere_is_refused(
    hub, contribute, entries, tmp_path, monkeypatch, changes, sentence
):
    parcel = contribute("north", seed=1)
    note_of(hub, parcel, tmp_path / "north" / "keys" / "site.pem", **changes)
    (entry,) = entries()
    assert entry.problem.endswith(sentence)
    assert entry.contribution is None


@pytest.mark.parametrize("file", [withdrawals.FILE, withdrawals.SIGNATURE])
def test_a_changed_or_broken_note_is_refused(hub, contribute, entries, withdraw, file):
    parcel = contribute("north", seed=1)
    withdraw("north", "--all")
    path = hub.root / withdrawals.ROOT / "north" / parcel.manifest.id / file
    text = path.read_bytes()
    for broken in (b"", b"[1]", b"{}", text.replace(b"2026", b"2025"), text[:-9]):
        path.write_bytes(broken)
        if broken == text:
            continue
        (entry,) = entries()
        assert entry.problem is not None
        assert entry.withdrawn is None
    path.write_bytes(text)
    assert entries()[0].withdrawn is not None


def test_a_signature_of_a_manifest_is_none_of_a_withdrawal(hub, contribute, entries, tmp_path):
    parcel = contribute("north", seed=1)
    note = Withdrawal(
        federation=parcel.manifest.federation, site="north",
        contribution=parcel.manifest.id, created_at=now(),
    )  # fmt: skip
    signed = signing.sign(
        tmp_path / "north" / "keys" / "site.pem", signing.MANIFEST_CONTEXT, note.to_bytes()
    )
    text = canonical_json({"key": signed.key, "signature": signed.signature})
    place = f"{withdrawals.ROOT}/north/{parcel.manifest.id}"
    hub.publish(place, {withdrawals.SIGNATURE: text, withdrawals.FILE: note.to_bytes()})
    (entry,) = entries()
    assert "does not carry a valid signature" in entry.problem


def test_the_admitted_key_may_withdraw_what_an_older_one_signed(
    hub, contribute, withdraw, entries, tmp_path
):
    parcel = contribute("north", seed=1)
    key = tmp_path / "new.pem"
    public = signing.create_key(key)
    text = hub.read(FEDERATION_FILE).decode()
    old = signing.public_key(tmp_path / "north" / "keys" / "site.pem")
    hub.replace(FEDERATION_FILE, text.replace(old, public).encode(), text.encode())
    (entry,) = entries()
    assert "signed with" in entry.problem  # by a key that is admitted no more
    note_of(hub, parcel, key)
    # Its own signature is still no admitted one; what matters is that nobody merges it.
    (entry,) = entries()
    assert entry.contribution is None


def test_what_is_asked_for_must_be_there(contribute, withdraw):
    contribute("north", seed=1)
    assert "give the ids to withdraw" in withdraw("north", code=2)
    assert "give the ids to withdraw" in withdraw("north", "--all", "abc", code=2)
    said = withdraw("north", "zzz", code=2)
    assert "'zzz' names no contribution of site 'north'; there are vector " in said


def test_statistics_and_the_vector_are_withdrawn_together(hub, contribute, withdraw, entries):
    contribute("north", seed=1, beside=("fisher",))
    contribute("south", seed=2)
    said = withdraw("north", "--all")
    assert "Withdrawn: fisher" in said
    assert "Withdrawn: vector" in said
    assert [c.site for c in live(entries())] == ["south"]


def test_what_a_key_has_withdrawn_stays_withdrawn_when_the_key_is_replaced(
    hub, contribute, withdraw, entries, ok, tmp_path
):
    contribute("north", seed=1)
    second = contribute("north", seed=2)
    rotate = ("admit", hub.root, "north", tmp_path / "north" / "keys" / "site.pub", "--rotate")
    for _ in range(2):
        ok("key", "rotate", tmp_path / "north")
        ok(*rotate)
        if not any(entry.withdrawn for entry in entries()):
            withdraw("north", second.manifest.id[:10])
    (gone,) = [entry for entry in entries() if entry.id == second.manifest.id]
    assert gone.withdrawn is not None
    assert live(entries()) == []  # and what it had replaced does not come back


def test_what_a_revoked_key_has_signed_is_withdrawn_too(hub, contribute, withdraw, ok, tmp_path):
    """Its tensors lie on the hub all the same."""
    parcel = contribute("north", seed=1)
    ok("revoke", hub.root, "north")
    ok("key", "rotate", tmp_path / "north")
    said = withdraw("north", "--all")
    assert f"Withdrawn: vector {parcel.manifest.id[:12]}" in said
    assert not hub.has(f"{folder_of(parcel.manifest)}/{PAYLOAD}")


@pytest.mark.parametrize("whose", ["nobody's", "another site's"])
def test_a_false_note_in_its_place_is_not_taken_for_a_withdrawal(
    hub, contribute, withdraw, tmp_path, whose
):
    parcel = contribute("north", seed=1)
    other = contribute("north", seed=2)
    contribute("south", seed=3)
    place = f"{withdrawals.ROOT}/north/{parcel.manifest.id}"
    if whose == "nobody's":
        hub.publish(place, {withdrawals.FILE: b"{}"})
    else:
        note_of(hub, parcel, tmp_path / "south" / "keys" / "site.pem")
    said = withdraw("north", parcel.manifest.id[:10], code=1)
    assert f"{hub.uri}/{place} is there already and withdraws nothing (" in said
    assert "ask the coordinator to remove this folder, then withdraw again." in said
    withdraw("north", "--all", code=1)
    assert not hub.has(f"{folder_of(other.manifest)}/{PAYLOAD}")  # the others are taken back


def test_what_a_note_speaks_of_is_not_said_to_be_published(hub, contribute, run_cli, tmp_path):
    parcel = contribute("north", seed=1)
    contribute("south", seed=2)
    note_of(hub, parcel, tmp_path / "south" / "keys" / "site.pem")
    found = run_cli("publish", tmp_path / "north", "--run", tmp_path / "north" / "runs" / "seed1")
    assert found.exit_code == 1
    note = f"{withdrawals.ROOT}/north/{parcel.manifest.id}"
    assert f"is there already, and {note} says that it has been withdrawn" in found.stderr


def test_an_attempt_that_was_broken_off_goes_on_with_the_same_note(
    hub, contribute, withdraw, tmp_path, monkeypatch
):
    """A hub that takes the files one by one would refuse other bytes."""
    parcel = contribute("north", seed=1)
    place = f"{withdrawals.ROOT}/north/{parcel.manifest.id}"
    monkeypatch.setattr(withdrawals, "now", lambda: "2026-01-01T00:00:00Z")
    withdraw("north", "--all")
    first = hub.read(f"{place}/{withdrawals.FILE}")
    shutil.rmtree(hub.root / withdrawals.ROOT)
    monkeypatch.setattr(withdrawals, "now", lambda: "2026-01-02T00:00:00Z")
    withdraw("north", "--all")
    assert hub.read(f"{place}/{withdrawals.FILE}") == first
    # A note of another federation in the site's folder is not sent.
    kept = tmp_path / "north" / withdrawals.ROOT / f"{parcel.manifest.id}.json"
    kept.write_bytes(kept.read_bytes().replace(b'"federation":"sha256:', b'"federation":"sha256:0')
                     [:-1] + b" }")  # fmt: skip
    shutil.rmtree(hub.root / withdrawals.ROOT)
    withdraw("north", "--all")
    assert b"2026-01-02" in hub.read(f"{place}/{withdrawals.FILE}")


def test_what_is_no_contributions_name_is_passed_over(hub, contribute, withdraw):
    parcel = contribute("north", seed=1)
    (hub.root / "contributions" / "north" / "notes").mkdir()
    said = withdraw("north", "--all")
    assert said.count("Withdrawn: ") == 1
    assert not (hub.root / withdrawals.ROOT / "north" / "notes").exists()
    assert parcel.manifest.id[:12] in said


def test_a_hub_of_another_federation_is_not_written_to(hub, contribute, withdraw, ok, tmp_path):
    contribute("north", seed=1)
    ok("init", tmp_path / "other", "--backbone", "test_resnet", "--weights", "none",
       "--input-size", 32, "--classes", "a,b")  # fmt: skip
    said = withdraw("north", "--all", "--hub", tmp_path / "other", code=1)
    assert "holds the contract" in said
    assert not (tmp_path / "other" / withdrawals.ROOT).exists()
