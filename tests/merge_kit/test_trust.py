"""Keys, and who decides about them: admitted, replaced, revoked; and a signed federation file."""

from __future__ import annotations

import shutil
import threading

import pytest

from merge_kit import signing, site, trust
from merge_kit.contributions import list_entries, live
from merge_kit.creation import create
from merge_kit.errors import FederationError, HubError, SignatureError
from merge_kit.federation import FEDERATION_FILE, Policy, parse_federation
from merge_kit.hub import FolderHub
from merge_kit.keys import RetiredKey
from merge_kit.yamlfile import parse_yaml
from tests.conftest import CLASSES, write_run
from tests.merge_kit.helpers import says


@pytest.fixture
def place(tmp_path):
    """A federation with a coordinator, in a folder of its own."""
    folder = tmp_path / "clinic" / "hub"
    create(
        folder, name="cells", architecture="test_resnet", classes=CLASSES, weights="none",
        model_args={}, preprocessing={"input_size": (3, 32, 32), "crop_pct": 1.0},
        policy=Policy(), seed=1, key_file=trust.default_key(folder),
    )  # fmt: skip
    return FolderHub(folder)


@pytest.fixture
def north(place, ok, tmp_path):
    """An admitted site of it, with a published vector."""
    ok("join", place.root, "--site", "north", "--folder", tmp_path / "north")
    ok("admit", place.root, "north", tmp_path / "north" / "keys" / "site.pub")
    publish(ok, tmp_path / "north", 1)
    return tmp_path / "north"


def publish(ok, root, seed):
    joined = site.open_site(root)
    write_run(joined, root / "runs" / f"seed{seed}", seed=seed)
    ok("publish", root, "--run", root / "runs" / f"seed{seed}")


def entries_of(place):
    return list_entries(place, site.federation_on(place))


def test_init_makes_the_coordinators_key_beside_the_hub_and_signs(tmp_path, ok):
    said = ok(
        "init", tmp_path / "hub", "--backbone", "test_resnet", "--weights", "none",
        "--input-size", 32, "--classes", "a,b",
    )  # fmt: skip
    key = tmp_path / "hub-coordinator.pem"
    assert key.is_file()
    assert f"key       {key}: keep it safe" in said
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.suffix == ".pem"]
    federation = site.federation_on(FolderHub(tmp_path / "hub"))
    assert federation.coordinator == signing.public_key(key)
    assert federation.serial == 1


def test_every_change_is_signed_with_the_next_serial_number(place, north, ok):
    federation = site.federation_on(place)
    assert (federation.serial, [one.name for one in federation.sites]) == (2, ["north"])
    ok("admit", place.root, "north", federation.sites[0].public_key)
    assert site.federation_on(place).serial == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("minimum_class_count: 5", "minimum_class_count: 1"),
        lambda t: t.replace("serial: 2", "serial: 3"),
        lambda t: t.replace("name: north", "name: south"),
        lambda t: t[: t.index("signature:")],
    ],
    ids=["policy", "serial", "site", "no signature"],
)
def test_a_file_that_was_changed_by_somebody_else_is_refused_everywhere(
    place, north, run_cli, tmp_path, change
):
    path = place.root / FEDERATION_FILE
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    for command in (
        ("status", place.root),
        ("merge", place.root, "--out", tmp_path / "m"),
        ("join", place.root, "--site", "east", "--folder", tmp_path / "east"),
        ("publish", north, "--run", north / "runs" / "seed1"),
        ("admit", place.root, "east", "ed25519:" + "A" * 43 + "="),
    ):
        found = run_cli(*command)
        assert found.exit_code == 1
        assert f"{path} is not as its coordinator has signed it" in found.stderr


def test_a_file_without_its_coordinator_is_another_contract(place, north, run_cli):
    path = place.root / FEDERATION_FILE
    lines = path.read_text().splitlines()
    kept = [x for x in lines if not x.startswith(("coordinator:", "signature:", "serial:"))]
    path.write_text("\n".join(kept) + "\n")
    found = run_cli("publish", north, "--run", north / "runs" / "seed1")
    assert found.exit_code == 1
    assert "was seen there from this machine" in found.stderr
    assert all(e.problem for e in list_entries(place, trust.unchecked_on(place)[1]))


def test_the_coordinator_signs_what_was_changed_by_hand(place, north, ok, run_cli, tmp_path):
    path = place.root / FEDERATION_FILE
    path.write_text(path.read_text().replace("minimum_class_count: 5", "minimum_class_count: 7"))
    assert "Signed: 'cells', serial number 3." in ok("sign", place.root)
    assert site.federation_on(place).policy.minimum_class_count == 7
    signing.create_key(tmp_path / "other.pem")
    found = run_cli("sign", place.root, "--key", tmp_path / "other.pem")
    assert found.exit_code == 1
    assert "give the coordinator's with --key" in found.stderr
    assert site.federation_on(place).serial == 3


def test_without_the_coordinators_key_nothing_is_changed(place, north, run_cli):
    before = place.read(FEDERATION_FILE)
    trust.default_key(place.root).unlink()
    found = run_cli("revoke", place.root, "north")
    assert found.exit_code == 1
    key = trust.default_key(place.root)
    assert f"{key} is not there, with which the coordinator" in found.stderr
    assert place.read(FEDERATION_FILE) == before


def test_an_older_file_is_not_taken_for_the_present_one(place, north, ok, run_cli):
    """It would bring a revoked site back."""
    old = place.read(FEDERATION_FILE)
    ok("revoke", place.root, "north")
    (place.root / FEDERATION_FILE).write_bytes(old)
    found = run_cli("status", place.root)
    assert found.exit_code == 1
    assert "has the serial number 2, and 3 was seen from this machine" in found.stderr


def test_an_older_file_is_not_signed_as_the_next_one(place, north, ok, run_cli):
    """Its coordinator would undo a revocation without knowing."""
    old = place.read(FEDERATION_FILE)
    ok("revoke", place.root, "north")
    changed = old.replace(b"minimum_class_count: 5", b"minimum_class_count: 7")
    for text in (changed, old.replace(b"serial: 2", b"serial: 1")):
        (place.root / FEDERATION_FILE).write_bytes(text)
        found = run_cli("sign", place.root)
        assert found.exit_code == 1
        assert "and 3 was seen from this machine" in found.stderr
        assert place.read(FEDERATION_FILE) == text


def test_a_copy_may_lag_behind(place, north, ok, tmp_path):
    ok("pull", place.root, tmp_path / "copy")
    ok("revoke", place.root, "north")
    ok("status", place.root)
    assert "ready" in ok("status", tmp_path / "copy")
    ok("pull", place.root, tmp_path / "copy")
    assert site.federation_on(FolderHub(tmp_path / "copy")).revoked


def test_a_changed_key_is_replaced_and_what_was_signed_before_counts(place, north, ok, run_cli):
    (before,) = live(entries_of(place))
    said = ok("key", "rotate", north)
    new = ok("key", "show", north).strip()
    assert f"merge-kit admit {place.root} north {new} --rotate" in said
    refused = run_cli("admit", place.root, "north", new)
    assert "replace the old one with --rotate" in refused.stderr
    assert "speaks with its new key" in ok("admit", place.root, "north", new, "--rotate")
    assert [c.id for c in live(entries_of(place))] == [before.id]
    # What the new key publishes replaces what the old one did.
    publish(ok, north, 2)
    (after,) = live(entries_of(place))
    assert after.key == new
    assert after.manifest.supersedes == f"sha256:{before.id}"


def test_a_replaced_key_signs_nothing_new(place, north, ok):
    old = (north / "keys" / "site.pem").read_bytes()
    ok("key", "rotate", north)
    ok("admit", place.root, "north", ok("key", "show", north).strip(), "--rotate")
    new = (north / "keys" / "site.pem").read_bytes()
    joined = site.open_site(north)
    write_run(joined, north / "runs" / "late", seed=9)
    path = north / "runs" / "late" / "manifest.draft.json"
    path.write_text(path.read_text().replace("2026-11-23T12:00:00Z", "2099-01-01T00:00:00Z"))
    (north / "keys" / "site.pem").write_bytes(old)
    ok("publish", north, "--run", north / "runs" / "late")
    (north / "keys" / "site.pem").write_bytes(new)
    problems = [e.problem for e in entries_of(place) if e.problem]
    assert len(problems) == 1
    assert "is signed with a key that site 'north' had replaced on" in problems[0]


def test_nothing_of_a_revoked_key_counts_whatever_its_date(place, north, ok, run_cli, tmp_path):
    ok("revoke", place.root, "north")
    (entry,) = entries_of(place)
    assert "which was revoked on" in entry.problem
    found = run_cli("merge", place.root, "--out", tmp_path / "m")
    assert found.exit_code == 1
    assert "site 'north' publishes again with a new key" in found.stderr
    assert "was revoked before" not in ok("status", place.root)
    # The site comes back with a new key; the old one stays out.
    refused = run_cli("admit", place.root, "north", north / "keys" / "site.pub")
    assert "is known as one of the site 'north': a key is used once" in refused.stderr
    ok("key", "rotate", north)
    ok("admit", place.root, "north", ok("key", "show", north).strip())
    publish(ok, north, 4)
    assert [c.site for c in live(entries_of(place))] == ["north"]


def test_an_earlier_key_is_revoked_by_name(place, north, ok):
    first = ok("key", "show", north).strip()
    ok("key", "rotate", north)
    ok("admit", place.root, "north", ok("key", "show", north).strip(), "--rotate")
    ok("revoke", place.root, "north", "--public-key", first)
    federation = site.federation_on(place)
    assert [one.name for one in federation.sites] == ["north"]
    assert (federation.retired, [one.public_key for one in federation.revoked]) == ((), [first])
    assert "was revoked on" in entries_of(place)[0].problem


def test_revoking_twice_changes_nothing_and_strangers_have_no_key(place, north, ok, run_cli):
    key = ok("key", "show", north).strip()
    ok("revoke", place.root, "north")
    said = ok("revoke", place.root, "north", "--public-key", key)
    assert "was revoked before" in said
    assert site.federation_on(place).serial == 3
    found = run_cli("revoke", place.root, "east")
    assert found.exit_code == 1
    assert "site 'east' has no key in this federation; known are none." in found.stderr


def test_rotate_is_for_sites_that_are_there(place, run_cli, ok, tmp_path):
    ok("join", place.root, "--site", "east", "--folder", tmp_path / "east")
    key = tmp_path / "east" / "keys" / "site.pub"
    found = run_cli("admit", place.root, "east", key, "--rotate")
    assert found.exit_code == 1
    assert "site 'east' is not admitted: leave --rotate out." in found.stderr


def test_two_coordinators_at_once_do_not_undo_each_other(place, north):
    before, federation = trust.unchecked_on(place)
    key = trust.default_key(place.root)
    trust.change(place, before, trust.revoked(federation, "north"), key)
    with pytest.raises(HubError, match="changed by somebody else meanwhile"):
        trust.change(place, before, federation, key)
    assert site.federation_on(place).sites == ()


def test_an_unsigned_federation_is_as_it_was(hub, federation):
    """Contracts of before there were coordinators keep their hash and their text."""
    assert "coordinator" not in federation.to_yaml()
    assert "serial" not in federation.to_yaml()
    trust.check_signed(federation, "here")
    trust.check_latest(federation, "here")
    assert trust.revoked(federation.admit("a", KEY), "a").contract_hash == federation.contract_hash


KEY = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="


def test_a_key_stands_once(federation):
    once = federation.admit("north", KEY)
    gone = trust.revoked(once, "north")
    text = gone.to_yaml().replace("sites: []", f"sites:\n- name: south\n  public_key: {KEY}")
    with pytest.raises(FederationError, match="is named twice"):
        parse_federation(parse_yaml(text.encode(), "here", FederationError).data, "here")


def test_new_keys_are_the_owners_alone_and_never_written_over(tmp_path, ok, run_cli):
    ok("key", "new", tmp_path / "k.pem")
    assert (tmp_path / "k.pem").stat().st_mode & 0o077 == 0
    before = (tmp_path / "k.pem").read_bytes()
    assert run_cli("key", "new", tmp_path / "k.pem").exit_code == 1
    assert (tmp_path / "k.pem").read_bytes() == before
    assert ok("key", "show", tmp_path / "k.pem").startswith("ed25519:")


def test_a_signature_of_something_else_is_none_of_a_federation(place):
    _, federation = trust.unchecked_on(place)
    key = trust.default_key(place.root)
    other = signing.sign(key, signing.MANIFEST_CONTEXT, federation.to_sign())
    forged = federation.model_copy(update={"signature": other.signature})
    sentence = (
        "here is not as its coordinator has signed it: if you are the coordinator and have changed "
        "it, sign it with 'merge-kit sign'; else ask the coordinator."
    )
    with says(SignatureError, sentence):
        trust.check_signed(forged, "here")


def test_commands_side_by_side_see_the_same_file(place):
    """As many processes of an experiment do: none trips over another that keeps its number too."""
    federation, faults = site.federation_on(place), []
    together = threading.Barrier(8)

    def look(round_number):
        together.wait()
        try:
            trust.check_latest(federation, f"hub {round_number}")
        except Exception as error:
            faults.append(error)

    for number in range(20):
        threads = [threading.Thread(target=look, args=(number,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []


def test_revoking_the_present_key_twice_changes_nothing(place, north, ok):
    ok("revoke", place.root, "north")
    assert "was revoked before" in ok("revoke", place.root, "north")
    assert site.federation_on(place).serial == 3


def test_a_key_is_replaced_twice_within_a_second(north, ok):
    before = ok("key", "show", north).strip()
    for _ in range(3):
        ok("key", "rotate", north)
    kept = sorted((north / "keys").glob("site-until-*.pem"))
    assert len(kept) == 3
    keys = {signing.public_key(path) for path in kept}
    assert before in keys
    assert ok("key", "show", north).strip() not in keys
    assert not list((north / "keys").glob("site-new-*"))


def test_after_a_revocation_the_same_run_is_published_again(place, north, ok, run_cli, tmp_path):
    """In a place of its own: what lies on a hub is never written over."""
    run = north / "runs" / "seed1"
    (before,) = entries_of(place)
    ok("revoke", place.root, "north")
    gone = site.federation_on(place).revoked[0]
    refused = run_cli("publish", north, "--run", run)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: the key of site 'north' was revoked on {gone.since}, and nothing that it signs "
        f"counts: make a new one with 'merge-kit key rotate {north}', and let the coordinator "
        "admit it.\n"
    )
    ok("key", "rotate", north)
    ok("admit", place.root, "north", north / "keys" / "site.pub")
    there = {p: p.read_bytes() for p in place.root.rglob("*") if p.is_file()}
    assert "Published: " in ok("publish", north, "--run", run)
    assert "Already published: " in ok("publish", north, "--run", run)
    del there[place.root / FEDERATION_FILE]
    assert {p: p.read_bytes() for p in there} == there
    (found,) = live(entries_of(place))
    assert found.id != before.id
    assert found.key == ok("key", "show", north).strip()
    assert found.manifest == before.contribution.manifest.model_copy(
        update={"created_at": gone.since}
    )
    assert ok("merge", place.root, "--skip-refused", "--out", tmp_path / "m")
    # Once more: the key is lost again.
    key = site.federation_on(place)
    trust.change(
        place, place.read(FEDERATION_FILE),
        key.model_copy(update={
            "sites": (),
            "revoked": (*key.revoked, key.revoked[0].model_copy(update={
                "public_key": found.key, "since": "2099-01-01T00:00:00Z",
            })),
        }),
        trust.default_key(place.root),
    )  # fmt: skip
    ok("key", "rotate", north)
    ok("admit", place.root, "north", north / "keys" / "site.pub")
    ok("publish", north, "--run", run)
    assert [c.manifest.created_at for c in live(entries_of(place))] == ["2099-01-01T00:00:00Z"]


def test_what_was_withdrawn_stays_so_under_a_new_key(place, north, ok, run_cli):
    ok("withdraw", north, "--all")
    ok("revoke", place.root, "north")
    ok("key", "rotate", north)
    ok("admit", place.root, "north", north / "keys" / "site.pub")
    found = run_cli("publish", north, "--run", north / "runs" / "seed1")
    assert found.exit_code == 1
    assert "says that it has been withdrawn: run 'merge-kit finetune' again" in found.stderr
    assert not live(entries_of(place))


@pytest.mark.parametrize("how", ["replaced", "never admitted"])
def test_what_lies_there_under_a_key_that_does_not_count_is_not_taken_for_published(
    place, ok, run_cli, tmp_path, how
):
    root = tmp_path / "north"
    ok("join", place.root, "--site", "north", "--folder", root)
    if how != "never admitted":
        ok("admit", place.root, "north", root / "keys" / "site.pub")
    if how == "replaced":
        ok("key", "rotate", root)  # signs before the keys are exchanged, and gives way again
    publish(ok, root, 1)
    ok("key", "rotate", root)
    if how != "never admitted":
        rotate = ("--rotate",) if how == "replaced" else ()
        ok("admit", place.root, "north", root / "keys" / "site.pub", *rotate)
    found = run_cli("publish", root, "--run", root / "runs" / "seed1")
    assert found.exit_code == 1
    (entry,) = entries_of(place)
    assert f"{place.root}/contributions/north/{entry.id} is there already, but " in found.stderr
    assert "ask the coordinator to remove this folder, then publish again." in found.stderr
    shutil.rmtree(place.root / "contributions" / "north" / entry.id)
    ok("publish", root, "--run", root / "runs" / "seed1")
    (entry,) = entries_of(place)
    assert entry.contribution.key == ok("key", "show", root).strip()


def test_a_file_that_changes_between_two_looks_is_not_signed(place, north, monkeypatch):
    """What is decided upon, checked and replaced is one and the same reading of the file."""
    reads = []
    read = FolderHub.read
    monkeypatch.setattr(FolderHub, "read", lambda hub, name: reads.append(name) or read(hub, name))
    data, federation = site.federation_file_on(place)
    assert reads == [FEDERATION_FILE]
    assert parse_federation(parse_yaml(data, "here", FederationError).data, "here") == federation


@pytest.mark.parametrize("name", ["north", "south"])
def test_a_key_that_was_replaced_is_nobodys_again(place, north, ok, run_cli, name):
    old = ok("key", "show", north).strip()
    ok("key", "rotate", north)
    ok("admit", place.root, "north", north / "keys" / "site.pub", "--rotate")
    before = place.read(FEDERATION_FILE)
    rotate = ("--rotate",) if name == "north" else ()
    found = run_cli("admit", place.root, name, old, *rotate)
    assert found.exit_code == 1
    assert "is known as one of the site 'north': a key is used once" in found.stderr
    assert place.read(FEDERATION_FILE) == before


def test_another_federation_in_the_same_place_has_serial_numbers_of_its_own(place, north, ok):
    shutil.rmtree(place.root)
    ok(
        "init", place.root, "--name", "others", "--backbone", "test_resnet", "--weights", "none",
        "--input-size", 32, "--classes", "a,b",
    )  # fmt: skip
    assert site.federation_on(place).serial == 1


def test_a_key_to_revoke_may_be_given_as_its_file(place, north, ok, run_cli):
    pub = north / "keys" / "site.pub"
    first = pub.read_text().strip()
    pub.rename(north / "old.pub")
    ok("key", "rotate", north)
    ok("admit", place.root, "north", pub, "--rotate")
    ok("revoke", place.root, "north", "--public-key", north / "old.pub")
    assert [one.public_key for one in site.federation_on(place).revoked] == [first]
    (north / "old.pub").write_bytes(b"\xff\xfe")
    found = run_cli("revoke", place.root, "north", "--public-key", north / "old.pub")
    assert found.exit_code == 1
    assert f"{north / 'old.pub'} cannot be read as a public key's file" in found.stderr


def test_a_replaced_key_never_speaks_for_another_site(place, north, ok, tmp_path):
    old = (north / "keys" / "site.pem").read_bytes()
    ok("key", "rotate", north)
    ok("admit", place.root, "north", north / "keys" / "site.pub", "--rotate")
    south = tmp_path / "south"
    ok("join", place.root, "--site", "south", "--folder", south)
    ok("admit", place.root, "south", south / "keys" / "site.pub")
    (south / "keys" / "site.pem").write_bytes(old)
    publish(ok, south, 2)
    (entry,) = [entry for entry in entries_of(place) if entry.site == "south"]
    assert "but site 'south' is admitted with" in entry.problem


def test_what_is_of_the_very_second_in_which_a_key_was_replaced_counts(place, north):
    before, federation = trust.unchecked_on(place)
    (entry,) = entries_of(place)
    second = entry.contribution.manifest.created_at
    retired = RetiredKey(name="north", public_key=entry.contribution.key, until=second)
    told = federation.model_copy(update={"sites": (), "retired": (retired,)})
    trust.change(place, before, told, None)
    assert [c.id for c in live(entries_of(place))] == [entry.id]


def test_what_a_new_key_publishes_before_it_is_admitted_replaces_what_the_old_one_did(
    place, north, ok
):
    (before,) = live(entries_of(place))
    ok("key", "rotate", north)
    publish(ok, north, 2)
    assert [c.id for c in live(entries_of(place))] == [before.id]  # it does not count yet
    ok("admit", place.root, "north", north / "keys" / "site.pub", "--rotate")
    (after,) = live(entries_of(place))  # and not both
    assert after.manifest.supersedes == f"sha256:{before.id}"
