"""A copy of a hub: whole, checked, and only what is missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest

from merge_kit import remembered
from merge_kit.contributions import MANIFEST, PAYLOAD, SIGNATURE, folder_of, list_entries, live
from merge_kit.federation import BASE_WEIGHTS, FEDERATION_FILE, read_federation
from merge_kit.hub import FolderHub
from merge_kit.pulling import pull
from merge_kit.tensorfile import write_tensors
from tests.merge_kit.helpers import load, settle


@pytest.fixture
def full(hub, contribute):
    """A hub with the vectors of three sites, one with statistics."""
    contribute("north", seed=1, beside=("fisher",))
    contribute("south", seed=2)
    contribute("west", seed=3)
    return hub


def content(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }  # fmt: skip


def test_a_copy_is_a_hub_and_everything_works_from_it(full, ok, tmp_path):
    said = ok("pull", full.root, tmp_path / "copy")
    assert "4 new, 0 that were there" in said
    assert content(tmp_path / "copy") == content(full.root)
    ok("merge", tmp_path / "copy", "--out", tmp_path / "from-copy")
    ok("merge", full.root, "--out", tmp_path / "from-hub")
    one, other = (load(tmp_path / n / "model.safetensors") for n in ("from-copy", "from-hub"))
    assert all((other[name] == tensor).all() for name, tensor in one.items())


def test_again_only_what_is_missing_is_copied(full, contribute, ok, tmp_path):
    ok("pull", full.root, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("payload.*")}
    contribute("east", seed=4)
    said = ok("pull", full.root, tmp_path / "copy")
    assert "1 new, 4 that were there" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert content(tmp_path / "copy") == content(full.root)  # with the new federation file


def test_of_what_is_in_the_copy_the_hub_is_asked_nothing_and_nothing_is_read_again(
    full, contribute, tmp_path, monkeypatch
):
    class Asked(FolderHub):
        asked: ClassVar[list[str]] = []

        def fetch(self, name, digest=None):
            self.asked.append(name)
            return super().fetch(name, digest)

    for path in full.root.rglob(PAYLOAD):
        settle(path.parent)
    pull(full, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob(PAYLOAD):
        settle(path.parent)
    pull(full, tmp_path / "copy")  # reads all, and remembers it
    parcel, hashed = contribute("east", seed=4), []
    digest = remembered.sha256_open
    monkeypatch.setattr(remembered, "sha256_open", lambda f: hashed.append(f.name) or digest(f))
    done = pull(Asked(full.root), tmp_path / "copy")
    assert (done.new, done.there) == (1, 4)
    assert hashed == []
    named = {name for name in Asked.asked if name.startswith("contributions")}
    assert named == {
        f"{folder_of(parcel.manifest)}/{file}" for file in (MANIFEST, SIGNATURE, PAYLOAD)
    }


def test_what_was_withdrawn_leaves_the_copy(full, ok, tmp_path):
    ok("pull", full.root, tmp_path / "copy")
    ok("withdraw", tmp_path / "south", "--all")
    said = ok("pull", full.root, tmp_path / "copy")
    assert "1 withdrawn: their tensors are not in the copy" in said
    assert content(tmp_path / "copy") == content(full.root)
    copy = FolderHub(tmp_path / "copy")
    sites = {c.site for c in live(list_entries(copy, read_federation(copy.root)))}
    assert sites == {"north", "west"}
    ok("pull", full.root, tmp_path / "late")
    assert content(tmp_path / "late") == content(full.root)


def test_what_is_refused_is_named_and_not_copied(full, run_cli, tmp_path, contribute):
    parcel = contribute("east", seed=4)
    path = full.root / folder_of(parcel.manifest) / PAYLOAD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = run_cli("pull", full.root, tmp_path / "copy")
    assert found.exit_code == 0
    assert "is not what its manifest names" in found.stderr
    assert not (tmp_path / "copy" / folder_of(parcel.manifest)).exists()


def test_a_copy_that_was_damaged_here_is_named(full, contribute, ok, run_cli, tmp_path):
    ok("pull", full.root, tmp_path / "copy")
    path = next((tmp_path / "copy").rglob(PAYLOAD))
    path.write_bytes(b"rubbish")
    found = run_cli("pull", full.root, tmp_path / "copy")
    assert found.exit_code == 1
    assert "was damaged since it was copied: remove this folder, and pull again." in found.stderr


def test_a_copy_that_was_killed_goes_on(full, tmp_path, ok):
    command = [sys.executable, "-m", "merge_kit", "pull", str(full.root), str(tmp_path / "copy")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list((tmp_path / "copy").glob("contributions/*/*")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for manifest in (tmp_path / "copy").glob(f"contributions/*/[!.]*/{MANIFEST}"):
        assert (manifest.parent / PAYLOAD).is_file()
    ok("pull", full.root, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(full.root)


def test_another_folder_is_never_written_into(full, ok, run_cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    found = run_cli("pull", full.root, tmp_path / "mine")
    assert found.exit_code == 2
    assert f"{tmp_path / 'mine'} holds something else: choose another folder." in found.stderr
    ok("init", tmp_path / "other", "--backbone", "test_resnet", "--weights", "none",
       "--input-size", 32, "--classes", "a,b")  # fmt: skip
    found = run_cli("pull", full.root, tmp_path / "other")
    assert found.exit_code == 2
    assert "is a copy of the federation 'other' and not of this one" in found.stderr


def test_the_federation_file_comes_last(full, tmp_path):
    """A copy without it is no hub yet."""
    seen = []
    copy = FolderHub(tmp_path / "copy")
    pull(full, copy.root, lambda label: seen.append(copy.has(FEDERATION_FILE)))
    assert seen == [False] * 4
    assert copy.has(FEDERATION_FILE)


@pytest.mark.parametrize("direction", ["into a newer copy", "into the hub itself"])
def test_an_older_federation_file_is_never_written_over_a_newer_one(
    ok, run_cli, tmp_path, direction
):
    """It would bring a revoked site back."""
    ok("init", tmp_path / "hub", "--backbone", "test_resnet", "--weights", "none",
       "--input-size", 32, "--classes", "a,b")  # fmt: skip
    ok("join", tmp_path / "hub", "--site", "north", "--folder", tmp_path / "north")
    ok("admit", tmp_path / "hub", "north", tmp_path / "north" / "keys" / "site.pub")
    ok("pull", tmp_path / "hub", tmp_path / "old")
    ok("revoke", tmp_path / "hub", "north")
    target = tmp_path / "hub"
    if direction == "into a newer copy":
        target = tmp_path / "new"
        ok("pull", tmp_path / "hub", target)
    before = content(target)
    found = run_cli("pull", tmp_path / "old", target)
    assert found.exit_code == 2
    assert f"{target} holds the federation file with the serial number 3, and" in found.stderr
    assert f"{tmp_path / 'old'} an older one with 2" in found.stderr
    assert content(target) == before
    ok("pull", tmp_path / "hub", tmp_path / "old")
    assert content(tmp_path / "old") == content(tmp_path / "hub")


@pytest.mark.parametrize("how", ["manifest", "signature", "no signature", "no tensors"])
def test_every_file_of_a_copy_is_checked(full, ok, run_cli, tmp_path, how):
    ok("pull", full.root, tmp_path / "copy")
    entry = next((tmp_path / "copy").rglob(PAYLOAD)).parent
    if how == "no tensors":
        (entry / PAYLOAD).unlink()
    elif how == "no signature":
        (entry / SIGNATURE).unlink()
    else:
        (entry / (MANIFEST if how == "manifest" else SIGNATURE)).write_text("{}")
    found = run_cli("pull", full.root, tmp_path / "copy")
    assert found.exit_code == 1
    assert f"{entry} was damaged since it was copied" in found.stderr
    shutil.rmtree(entry)
    ok("pull", full.root, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(full.root)


def test_what_is_withdrawn_in_the_copy_does_not_come_back(full, ok, run_cli, tmp_path):
    """Somebody has removed the note from the hub, and put the tensors there again."""
    shutil.copytree(full.root, tmp_path / "before")
    ok("withdraw", tmp_path / "south", "--all")
    ok("pull", full.root, tmp_path / "copy")
    before = content(tmp_path / "copy")
    found = run_cli("pull", tmp_path / "before", tmp_path / "copy")
    assert found.exit_code == 0
    assert "contribution south/" in found.stderr
    assert "it stays withdrawn here; ask site 'south'." in found.stderr
    assert content(tmp_path / "copy") == before


def test_a_copy_of_a_copy_is_a_hub_and_keeps_what_its_hub_has_lost(full, ok, tmp_path):
    ok("pull", full.root, tmp_path / "copy")
    ok("pull", tmp_path / "copy", tmp_path / "second")
    whole = content(full.root)
    assert content(tmp_path / "second") == whole
    shutil.rmtree(tmp_path / "copy" / "contributions" / "west")
    said = ok("pull", tmp_path / "copy", tmp_path / "second")
    assert "0 new, 3 that were there" in said
    assert content(tmp_path / "second") == whole


@pytest.mark.parametrize("whose", ["hub", "copy"])
def test_another_base_is_not_taken(full, ok, run_cli, tmp_path, whose):
    copy = tmp_path / "copy"
    if whose == "copy":
        ok("pull", full.root, copy)
    path = (full.root if whose == "hub" else copy) / BASE_WEIGHTS
    tensors = {name: tensor + 1 for name, tensor in load(path).items()}
    write_tensors(path, tensors, ("format", "pt"))
    found = run_cli("pull", full.root, copy)
    assert found.exit_code == 1
    assert f"{path} has the fingerprint" in found.stderr
    if whose == "hub":
        assert not (copy / "base").exists()
        assert not (copy / FEDERATION_FILE).exists()


def test_what_a_revoked_key_has_signed_is_not_copied(full, run_cli, ok, tmp_path):
    ok("revoke", full.root, "west")
    found = run_cli("pull", full.root, tmp_path / "copy")
    assert found.exit_code == 0
    assert "Left out: contributions/west/" in found.stderr
    assert not (tmp_path / "copy" / "contributions" / "west").exists()
    assert "3 new, 0 that were there" in found.stdout
