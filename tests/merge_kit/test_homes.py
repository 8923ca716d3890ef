"""Hubs that sites have of their own: who has one, what counts there, and what is read."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from merge_kit import copies, publishing, signing, site
from merge_kit.contributions import PAYLOAD, folder_of
from merge_kit.errors import ContributionError
from merge_kit.federation import FEDERATION_FILE, read_federation
from merge_kit.hub import FolderHub
from tests.conftest import write_run
from tests.merge_kit.helpers import says


@pytest.fixture
def own(tmp_path):
    """A folder for a site's own hub."""

    def make(name):
        place = tmp_path / f"hub-of-{name}"
        place.mkdir()
        return place

    return make


@pytest.fixture
def key_of(hub, tmp_path):
    """Join as a site; gives its public key."""

    def join(name):
        return signing.public_key(site.join(hub, name, tmp_path / name).key_file)

    return join


def hubs(hub):
    return read_federation(hub.root).own_hubs


# Who has one.


def test_admitting_a_site_with_a_hub_of_its_own(hub, key_of, own, ok):
    place, key = own("north"), key_of("north")
    said = ok("admit", hub.root, "north", key, "--hub", place)
    assert f"  its own hub  {place}\n" in said
    (told,) = yaml.safe_load((hub.root / FEDERATION_FILE).read_text())["sites"]
    assert told == {"name": "north", "public_key": key, "hub": str(place)}
    assert "is admitted already" in ok("admit", hub.root, "north", key)
    assert hubs(hub) == {"north": str(place)}


def test_a_federation_without_such_hubs_keeps_its_bytes(hub, key_of, ok):
    ok("admit", hub.root, "north", key_of("north"))
    assert "hub" not in yaml.safe_load((hub.root / FEDERATION_FILE).read_text())["sites"][0]
    assert b'"hub"' not in read_federation(hub.root).to_sign()


def test_the_hub_of_a_site_changes_and_goes(hub, key_of, own, ok):
    first, second, key = own("first"), own("second"), key_of("north")
    ok("admit", hub.root, "north", key)
    ok("admit", hub.root, "north", key, "--hub", first)
    ok("admit", hub.root, "north", key, "--hub", second)
    assert hubs(hub) == {"north": str(second)}
    assert "its own hub  none" in ok("admit", hub.root, "north", key, "--hub", "none")
    assert hubs(hub) == {}
    assert "is admitted already" in ok("admit", hub.root, "north", key, "--hub", "none")


def test_rotation_revocation_and_admission_anew_leave_the_hub(hub, key_of, own, ok, tmp_path):
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    _, fresh = site.rotate_key(site.open_site(tmp_path / "north"))
    ok("admit", hub.root, "north", fresh, "--rotate")
    assert hubs(hub) == {"north": str(place)}
    ok("revoke", hub.root, "north")
    assert hubs(hub) == {"north": str(place)}
    _, fresh = site.rotate_key(site.open_site(tmp_path / "north"))
    ok("admit", hub.root, "north", fresh)
    assert hubs(hub) == {"north": str(place)}


def test_two_sites_have_no_hub_in_common(hub, key_of, own, ok, run_cli):
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    ok("revoke", hub.root, "north")
    refused = run_cli("admit", hub.root, "south", key_of("south"), "--hub", place)
    assert refused.exit_code == 1
    assert f"{place} is the hub of the site 'north'" in refused.stderr
    text = (hub.root / FEDERATION_FILE).read_text()
    key = key_of("south")
    added = f"sites:\n- name: south\n  public_key: {key}\n  hub: {place}\n"
    (hub.root / FEDERATION_FILE).write_text(text.replace("sites: []\n", added))
    refused = run_cli("status", hub.root)
    assert f"the hub {place} is named for two sites" in refused.stderr


def test_the_federations_own_hub_is_no_sites(hub, key_of, run_cli):
    refused = run_cli("admit", hub.root, "north", key_of("north"), "--hub", f"{hub.root}/")
    assert refused.exit_code == 2
    assert "is the federation's hub: leave it out." in refused.stderr


def test_an_address_in_the_file_is_checked_with_its_line(hub, key_of, ok, run_cli):
    ok("admit", hub.root, "north", key_of("north"))
    path = hub.root / FEDERATION_FILE
    lines = path.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("  public_key:")) + 1
    path.write_text("\n".join([*lines[:at], "  hub: ../elsewhere", *lines[at:], ""]))
    refused = run_cli("status", hub.root)
    assert f"{path}, line {at + 1}: 'sites.0.hub': a hub in a folder is" in refused.stderr


def test_a_hub_that_cannot_be_asked_yet_is_named_at_once(hub, key_of, run_cli, tmp_path):
    place = tmp_path / "gone"
    said = run_cli("admit", hub.root, "north", key_of("north"), "--hub", place)
    assert said.exit_code == 0
    assert said.stderr == (
        f"Note: the hub of site 'north', {place}, cannot be asked (the hub {place} is not there: "
        "check the path, or mount the share): try again, or leave the site out with --exclude "
        "north. Until it can, nobody merges without that option.\n"
    )
    assert hubs(hub) == {"north": str(place)}


# What a site does that has one.


@pytest.fixture
def home(hub, key_of, own, ok, contribute):
    """`south` publishes on the federation's hub, `north` on its own; gives that and its vector."""
    contribute("south", seed=2)
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    return place, contribute("north", seed=1)


@pytest.fixture
def states(run_cli):
    """What `status` says of each contribution."""

    def look(place):
        told = json.loads(run_cli("status", place, "--json").stdout)["contributions"]
        return {(row["site"], row["state"]) for row in told}

    return look


def model(ok, place, out, *options):
    ok("merge", place, "--out", out, *options)
    return (out / "model.safetensors").read_bytes()


def notes_of(place, name):
    return [path.name for path in place.glob(f"withdrawals/{name}/*")]


def test_it_publishes_there_and_everybody_reads_both(hub, home, ok, states, tmp_path):
    place, parcel = home
    assert (place / folder_of(parcel.manifest) / PAYLOAD).is_file()
    assert not (hub.root / "contributions" / "north").exists()
    assert states(hub.root) == {("north", "ready"), ("south", "ready")}
    both = model(ok, hub.root, tmp_path / "both")
    shutil.copytree(place / "contributions" / "north", hub.root / "contributions" / "north")
    assert model(ok, hub.root, tmp_path / "again") == both  # what lies in both counts once
    assert len(states(hub.root)) == 2
    shutil.rmtree(hub.root / "contributions" / "north")
    assert "\nVerified: " in ok("verify", tmp_path / "both", "--hub", hub.root)


def test_the_commands_say_where_it_goes(hub, home, ok, tmp_path):
    place, _ = home
    run = tmp_path / "north" / "runs" / "second"
    write_run(site.open_site(tmp_path / "north"), run, seed=5)
    said = ok("publish", tmp_path / "north", "--run", run, "--dry-run")
    assert f"Dry run: nothing was sent to {place}/contributions/north/" in said
    said = ok("publish", tmp_path / "north", "--run", run)
    assert f"Published: {place}/contributions/north/" in said
    assert "It replaces the site's contribution" in said
    assert "Already published" in ok("publish", tmp_path / "north", "--run", run)
    log = ok("audit-log", "show", tmp_path / "north")
    assert f"published    {place}/contributions/north/" in log
    assert f"{hub.root}/" not in log


def test_its_policy_is_asked_about_the_hub_that_it_writes_to(hub, home, run_cli, ok, tmp_path):
    place, _ = home
    run, policy = tmp_path / "north" / "runs" / "second", tmp_path / "north" / "policy.yaml"
    write_run(site.open_site(tmp_path / "north"), run, seed=5)
    policy.write_text(f"allowed_hubs: [{hub.root}]\n")
    refused = run_cli("publish", tmp_path / "north", "--run", run)
    assert refused.exit_code == 1
    assert f"the site's own policy lets nothing go to {place}; it allows" in refused.stderr
    policy.write_text(f"allowed_hubs: [{place}]\n")
    ok("publish", tmp_path / "north", "--run", run)


def test_what_was_published_before_counts_and_is_replaced_there(
    hub, own, key_of, contribute, ok, states, tmp_path
):
    first = contribute("north", seed=1)
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    assert states(hub.root) == {("north", "ready")}
    second = contribute("north", seed=3)
    assert second.manifest.supersedes == f"sha256:{first.manifest.id}"
    assert states(hub.root) == {("north", "ready"), ("north", "replaced")}
    run = tmp_path / "north" / "runs" / "seed1"
    assert "Published" in ok("publish", tmp_path / "north", "--run", run)
    copied = (place / folder_of(first.manifest) / "manifest.json").read_bytes()
    assert copied == first.manifest.to_bytes()  # the same contribution, now in both
    assert states(hub.root) == {("north", "ready"), ("north", "replaced")}


def test_it_takes_back_there(hub, home, ok, states, tmp_path):
    place, parcel = home
    said = ok("withdraw", tmp_path / "north", "--all")
    assert f"its tensors are removed from {place}\n" in said
    assert notes_of(place, "north") == [parcel.manifest.id]
    assert not (hub.root / "withdrawals").exists()
    assert states(hub.root) == {("north", "withdrawn"), ("south", "ready")}


def test_what_lies_on_the_federations_hub_is_taken_back_by_a_note_on_its_own(
    hub, own, key_of, contribute, ok, states, tmp_path
):
    """Also where the site may not write to the federation's hub."""
    contribute("south", seed=2)
    parcel = contribute("north", seed=1)
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    locked = [hub.root, hub.root / folder_of(parcel.manifest)]
    (hub.root / "withdrawals").write_text("")  # whoever runs as root may write everywhere
    for folder in locked:
        folder.chmod(0o555)
    try:
        said = ok("withdraw", tmp_path / "north", "--all")
    finally:
        for folder in locked:
            folder.chmod(0o755)
        (hub.root / "withdrawals").unlink()
    assert f"  it lies on {hub.root}, too, where it counts no more either, and its ten" in said
    assert states(hub.root) == {("north", "withdrawn"), ("south", "ready")}
    said = ok("withdraw", tmp_path / "north", "--all")
    assert f"  its tensors are removed from {hub.root}" in said
    assert notes_of(hub.root, "north") == notes_of(place, "north") == [parcel.manifest.id]


def test_a_model_is_made_again_without_what_it_took_back(hub, home, ok, tmp_path):
    model(ok, hub.root, tmp_path / "merged")
    ok("withdraw", tmp_path / "north", "--all")
    said = ok("remerge", hub.root, tmp_path / "merged")
    assert "site 'north' has withdrawn it" in said
    alone = model(ok, hub.root, tmp_path / "alone", "--exclude", "north")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == alone


def test_moments_are_found_there(hub, own, key_of, measured, ok, tmp_path):
    measured("south", seed=2)
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    measured("north", seed=1)
    assert (place / "contributions" / "north").is_dir()
    assert "classifier of 2 site(s)" in ok("head", hub.root, "--out", tmp_path / "first")


# When its address changes.


def test_withdrawals_are_kept_when_the_hub_is_left(hub, home, own, ok, states, tmp_path):
    """Else what was taken back would count again where it was published before."""
    place, parcel = home
    shutil.copytree(place / "contributions" / "north", hub.root / "contributions" / "north")
    payload = (place / folder_of(parcel.manifest) / PAYLOAD).read_bytes()
    ok("withdraw", tmp_path / "north", "--all")
    shutil.rmtree(hub.root / "withdrawals")
    (hub.root / folder_of(parcel.manifest) / PAYLOAD).write_bytes(payload)
    key = signing.public_key(site.open_site(tmp_path / "north").key_file)
    said = ok("admit", hub.root, "north", key, "--hub", own("second"))
    assert f"its withdrawals on {place} are kept on {hub.root}: 1\n" in said
    assert "its contributions there are not looked at any more: 1; let the site publish" in said
    assert states(hub.root) == {("north", "withdrawn"), ("south", "ready")}


def test_a_hub_that_is_gone_is_left_only_if_that_is_said(
    hub, home, own, ok, states, run_cli, tmp_path
):
    place, _ = home
    shutil.rmtree(place)
    key = signing.public_key(site.open_site(tmp_path / "north").key_file)
    refused = run_cli("admit", hub.root, "north", key, "--hub", "none")
    assert refused.exit_code == 1
    assert "if it is gone for good, and the site has told you so, pass --lost." in refused.stderr
    assert hubs(hub) == {"north": str(place)}
    ok("admit", hub.root, "north", key, "--hub", "none", "--lost")
    assert states(hub.root) == {("south", "ready")}


def test_what_is_published_again_on_another_hub_is_the_same_contribution(
    hub, home, own, ok, states, tmp_path
):
    _, parcel = home
    before = model(ok, hub.root, tmp_path / "before")
    second, key = own("second"), signing.public_key(tmp_path / "north" / site.KEY_FILE)
    ok("admit", hub.root, "north", key, "--hub", second)
    assert states(hub.root) == {("south", "ready")}
    ok("publish", tmp_path / "north", "--run", tmp_path / "north" / "runs" / "seed1")
    assert (second / folder_of(parcel.manifest) / PAYLOAD).is_file()
    assert model(ok, hub.root, tmp_path / "after") == before


def test_nothing_is_sent_to_a_hub_that_was_left_meanwhile(hub, home, own, ok, tmp_path):
    place, _ = home
    joined, run = site.open_site(tmp_path / "north"), tmp_path / "north" / "runs" / "second"
    write_run(joined, run, seed=5)
    parcel = publishing.prepare(joined, run, hub)
    ok("admit", hub.root, "north", signing.public_key(joined.key_file), "--hub", own("second"))
    with says(
        ContributionError,
        f"{place} is not the hub of site 'north' any more, by the federation's file on {hub.root}: "
        "nothing was sent; run the same command again.",
    ):
        publishing.publish(joined, run, hub, parcel)
    assert not (place / folder_of(parcel.manifest)).exists()


# When it cannot be asked.


def test_a_merge_stops_and_says_how_to_go_on(hub, home, ok, run_cli, tmp_path):
    place, _ = home
    alone = model(ok, hub.root, tmp_path / "alone", "--exclude", "north")
    place.rename(tmp_path / "away")
    for options in ([], ["--skip-refused"], ["--allow-unsigned"]):
        refused = run_cli("merge", hub.root, "--out", tmp_path / "merged", *options)
        assert refused.exit_code == 1
        assert refused.stderr == (
            f"Error: the hub of site 'north', {place}, cannot be asked (the hub {place} is not "
            "there: check the path, or mount the share): try again, or leave the site out with "
            "--exclude north.\n"
        )
    assert not (tmp_path / "merged").exists()
    assert model(ok, hub.root, tmp_path / "one", "--exclude", "north") == alone
    assert model(ok, hub.root, tmp_path / "other", "--site", "south") == alone


def test_status_shows_the_others_and_says_who_was_not_asked(hub, home, ok, tmp_path):
    place, _ = home
    place.rename(tmp_path / "away")
    said = ok("status", hub.root)
    assert f"Not asked: the hub of site 'north', {place}, cannot be asked (" in said
    assert "not heard of" not in said
    assert f"merge-kit merge {hub.root} --exclude north --out merged" in said
    told = json.loads(ok("status", hub.root, "--json"))
    assert list(told["not_asked"]) == ["north"]
    assert [row["site"] for row in told["contributions"]] == ["south"]


def test_no_model_is_made_again_while_a_site_cannot_be_asked(hub, home, ok, run_cli, tmp_path):
    place, _ = home
    model(ok, hub.root, tmp_path / "merged")
    place.rename(tmp_path / "away")
    for command in (["remerge", hub.root, tmp_path / "merged"],
                    ["verify", tmp_path / "merged", "--hub", hub.root]):  # fmt: skip
        refused = run_cli(*command)
        assert refused.exit_code == 1
        assert f"the hub of site 'north', {place}, cannot be asked" in refused.stderr


# Copies.


def test_a_copy_holds_all_and_asks_nobody(hub, home, ok, tmp_path):
    place, parcel = home
    expected = model(ok, hub.root, tmp_path / "expected")
    copy = tmp_path / "copy"
    assert "2 new" in ok("pull", hub.root, copy)
    assert (copy / folder_of(parcel.manifest) / PAYLOAD).is_file()
    place.rename(tmp_path / "away")
    said = ok("merge", copy, "--out", tmp_path / "offline")
    assert f"Note: {copy} is a copy, and the own hubs of north are not asked: what" in said
    assert (tmp_path / "offline" / "model.safetensors").read_bytes() == expected
    assert "Note: " in ok("verify", tmp_path / "offline", "--hub", copy)
    ok("pull", copy, tmp_path / "copy-of-copy")
    assert model(ok, tmp_path / "copy-of-copy", tmp_path / "twice") == expected


@pytest.mark.usefixtures("home")
def test_a_site_may_publish_into_a_copy_that_travels(hub, ok, tmp_path):
    ok("pull", hub.root, tmp_path / "copy")
    run = tmp_path / "north" / "runs" / "second"
    write_run(site.open_site(tmp_path / "north"), run, seed=5)
    said = ok("publish", tmp_path / "north", "--run", run, "--hub", tmp_path / "copy")
    assert f"Published: {tmp_path / 'copy'}/contributions/north/" in said


def test_a_later_pull_asks_again(hub, home, ok, states, run_cli, tmp_path):
    place, parcel = home
    copy = tmp_path / "copy"
    ok("pull", hub.root, copy)
    ok("withdraw", tmp_path / "north", "--all")
    ok("pull", hub.root, copy)
    assert states(copy) == {("north", "withdrawn"), ("south", "ready")}
    assert not (copy / folder_of(parcel.manifest) / PAYLOAD).exists()
    place.rename(tmp_path / "away")
    refused = run_cli("pull", hub.root, copy)
    assert refused.exit_code == 1
    assert "or leave the site out with --exclude north." in refused.stderr
    told = (copy / copies.FILE).read_text()
    ok("pull", hub.root, copy, "--exclude", "north")
    assert (copy / copies.FILE).read_text() == told  # as it was asked then


def test_a_copy_without_a_site_asks_that_site(hub, home, ok, states, run_cli, tmp_path):
    place, _ = home
    copy = tmp_path / "copy"
    ok("pull", hub.root, copy, "--exclude", "north")
    assert not (copy / copies.FILE).exists()
    assert states(copy) == {("north", "ready"), ("south", "ready")}
    place.rename(tmp_path / "away")
    refused = run_cli("merge", copy, "--out", tmp_path / "merged")
    assert "leave the site out with --exclude north" in refused.stderr
    refused = run_cli("pull", hub.root, copy, "--exclude", "south")
    assert refused.exit_code == 2
    assert "--exclude south: it is for sites with a hub of their own (north)" in refused.stderr


def test_a_copy_of_before_the_address_changed_asks_the_new_one(hub, home, own, ok, tmp_path):
    ok("pull", hub.root, tmp_path / "copy")
    key = signing.public_key(tmp_path / "north" / site.KEY_FILE)
    ok("admit", hub.root, "north", key, "--hub", own("second"))
    shutil.copy(hub.root / FEDERATION_FILE, tmp_path / "copy" / FEDERATION_FILE)
    assert copies.copied_hubs(FolderHub(tmp_path / "copy"), read_federation(hub.root)) == {}
