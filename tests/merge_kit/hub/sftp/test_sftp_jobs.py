"""The whole main job through the real commands, on a hub on an SFTP server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from merge_kit import signing, site
from merge_kit.hub import sftpfiles, ssh
from merge_kit.site import federation_on
from tests.conftest import write_run
from tests.merge_kit.helpers import listing

INIT = (
    "--backbone", "test_resnet", "--weights", "none", "--classes", "round,lobed,granular",
    "--input-size", "32",
)  # fmt: skip


@pytest.fixture
def uri(sshd, root, tmp_path, monkeypatch):
    """An empty folder on the server, and an empty folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return sshd.uri(root)


@pytest.fixture
def sites(uri, ok):
    """A federation with two sites that are admitted and have a finished run."""
    ok("init", uri, *INIT)
    for seed, name in enumerate(("north", "river")):
        ok("join", uri, "--site", name)
        ok("admit", uri, name, f"{name}/keys/site.pub")
        write_run(site.open_site(Path(name)), Path(name, "runs", "first"), seed=seed)
    return ("north", "river")


def published(sites, ok):
    for name in sites:
        ok("publish", name, "--run", f"{name}/runs/first")


def test_the_main_job(uri, root, sites, ok):
    for name in sites:
        said = ok("publish", name, "--run", f"{name}/runs/first")
        assert f"Published: {uri}/contributions/{name}/" in said
        assert "Already published" in ok("publish", name, "--run", f"{name}/runs/first")
    rows = json.loads(ok("status", uri, "--json"))["contributions"]
    assert [(row["site"], row["state"]) for row in rows] == [("north", "ready"), ("river", "ready")]
    ok("merge", uri, "--method", "mean", "--out", "merged")
    assert "verified" in ok("verify", "merged", "--hub", uri).lower()
    assert listing(root) == ["base", "contributions", "federation.yaml"]
    shutil.copytree(root, "copy")
    ok("merge", "copy", "--method", "mean", "--out", "again")
    for name in ("model.safetensors", "config.json"):
        assert Path("merged", name).read_bytes() == Path("again", name).read_bytes()


def test_a_withdrawal_is_respected_and_its_tensors_go(uri, root, sites, ok):
    published(sites, ok)
    assert f"its tensors are removed from {uri}" in ok("withdraw", "river", "--all")
    states = json.loads(ok("status", uri, "--json"))["contributions"]
    assert {row["site"]: row["state"] for row in states} == {"north": "ready", "river": "withdrawn"}
    assert [path.parts[-3] for path in root.rglob("payload.safetensors")] == ["north"]


def test_a_copy_works_without_the_hub(uri, sites, ok):
    published(sites, ok)
    ok("pull", uri, "copy")
    rows = json.loads(ok("status", "copy", "--json"))["contributions"]
    assert [row["state"] for row in rows] == ["ready", "ready"]


def test_an_init_that_was_broken_off_goes_on(
    sshd, root, uri, ok, run_cli, line, opened, monkeypatch
):
    """Cut at one place after another: no federation is there until all of it is."""
    monkeypatch.setattr(ssh, "PAUSES", ())
    monkeypatch.setattr(sftpfiles, "LOCK_LASTS", 0.5)
    ok("init", sshd.uri(root, line.port), *INIT, "--name", "whole", "--key", "key.pem")
    end, broken = line.passed["up"], 0
    for number in range(1, 6):
        folder = root / str(number)
        folder.mkdir()
        where = sshd.uri(folder, line.port)
        line.cuts = [("up", end * number // 6)]
        result = run_cli("init", where, *INIT, "--name", "whole", "--key", "key.pem")
        broken += result.exit_code
        assert result.exit_code == 0 or not (folder / "federation.yaml").exists()
        if result.exit_code:
            assert "broke off (" in result.stderr or "cannot be reached (" in result.stderr
            ok("init", where, *INIT, "--name", "whole", "--key", "key.pem")
        assert federation_on(opened(where)).coordinator == signing.public_key(Path("key.pem"))
        assert listing(folder) == ["base", "federation.yaml"]
    assert broken > 2


def test_a_hub_that_cannot_be_reached_ends_a_merge_with_one_sentence(
    sshd, root, sites, ok, run_cli, tmp_path, monkeypatch
):
    """Contributions that cannot be asked for are not left out in silence."""
    published(sites, ok)
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    result = run_cli("merge", sshd.uri(root), "--out", "merged")
    assert result.exit_code == 1
    assert "is not known here, it shows ssh-ed25519 SHA256:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("merged").exists()
