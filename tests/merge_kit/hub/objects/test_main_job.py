"""The whole main job through the real commands, on a hub in an object store."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from merge_kit import remembered, signing, site
from merge_kit.hub import objects, open_hub
from merge_kit.site import federation_on
from tests.conftest import write_run
from tests.merge_kit.helpers import load
from tests.merge_kit.hub.objects.conftest import QUICK, SECRET
from tests.merge_kit.hub.objects.proxy import cut_answer, flip, status

INIT = (
    "--backbone", "test_resnet", "--weights", "none", "--classes", "round,lobed,granular",
    "--input-size", "32",
)  # fmt: skip


@pytest.fixture
def place(line, uri, tmp_path, monkeypatch):
    """An empty bucket, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return uri


@pytest.fixture
def sites(place, ok):
    """A federation with two sites that are admitted and have a finished run."""
    ok("init", place, *INIT)
    for seed, name in enumerate(("north", "river")):
        ok("join", place, "--site", name)
        ok("admit", place, name, f"{name}/keys/site.pub")
        write_run(site.open_site(Path(name)), Path(name, "runs", "first"), seed=seed)
    return ("north", "river")


CODE = {"manifest.json": " SlowDown", "manifest.sig": "", "payload": ""}
"""Asked for by GET, or by HEAD, whose answer has no body to say why."""


def published(sites, ok):
    for name in sites:
        ok("publish", name, "--run", f"{name}/runs/first")


def test_the_main_job(place, sites, ok, keys):
    for name in sites:
        said = ok("publish", name, "--run", f"{name}/runs/first")
        assert f"Published: {place}/contributions/{name}/" in said
        assert "Already published" in ok("publish", name, "--run", f"{name}/runs/first")
    rows = json.loads(ok("status", place, "--json"))["contributions"]
    assert [(row["site"], row["state"]) for row in rows] == [("north", "ready"), ("river", "ready")]
    said = ok("merge", place, "--method", "mean", "--out", "merged")
    assert f"merge-kit verify merged --hub {place}" in said
    assert "verified" in ok("verify", "merged", "--hub", place).lower()
    base = load(Path("north/federation/base/model.safetensors"))
    assert load(Path("merged/model.safetensors")).keys() == base.keys()
    assert sorted({name.partition("/")[0] for name in keys()}) == [
        "base", "contributions", "federation.yaml"
    ]  # fmt: skip
    for path in Path().rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_the_same_merge_as_from_a_copy_of_another_program_or_ours(place, sites, ok, other, bucket):
    published(sites, ok)
    ok("merge", place, "--method", "mean", "--out", "merged")
    for page in other.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for one in page["Contents"]:
            path = Path("copy", one["Key"])
            path.parent.mkdir(parents=True, exist_ok=True)
            other.download_file(bucket, one["Key"], str(path))
    kept = remembered.cache_folder("hubs")
    before = set(kept.rglob("payload.safetensors"))
    ok("pull", place, "pulled")
    # What is in the folder that was asked for need not lie here too.
    assert set(kept.rglob("payload.safetensors")) < before
    for number, hub in enumerate(("copy/some/folder", "pulled")):
        ok("merge", hub, "--method", "mean", "--out", f"merged-{number}")
        for name in ("model.safetensors", "config.json"):
            assert Path("merged", name).read_bytes() == Path(f"merged-{number}", name).read_bytes()


def test_a_withdrawal_is_respected_and_its_tensors_go(place, sites, ok, keys):
    published(sites, ok)
    assert f"its tensors are removed from {place}" in ok("withdraw", "river", "--all")
    states = json.loads(ok("status", place, "--json"))["contributions"]
    assert {row["site"]: row["state"] for row in states} == {"north": "ready", "river": "withdrawn"}
    assert sum(name.endswith("payload.safetensors") for name in keys()) == 1
    assert "Withdrawn before" in ok("withdraw", "river", "--all")


def test_a_withdrawal_that_was_broken_off_goes_on_with_the_same_note(
    place, sites, ok, run_cli, line, keys
):
    """Its signature has arrived; another time in the note would not fit it any more."""
    published(sites, ok)
    with line.faulty("PUT .*/withdrawal.json", status(403, "AccessDenied")):
        assert run_cli("withdraw", "river", "--all").exit_code == 1
    assert any(name.endswith("withdrawal.sig") for name in keys())
    states = json.loads(ok("status", place, "--json"))["contributions"]
    assert [row["state"] for row in states] == ["ready", "ready"]
    time.sleep(1.1)  # the note tells the second
    assert "Withdrawn: vector" in ok("withdraw", "river", "--all")
    states = json.loads(ok("status", place, "--json"))["contributions"]
    assert {row["site"]: row["state"] for row in states} == {"north": "ready", "river": "withdrawn"}


def test_a_damaged_download_stops_a_merge_with_one_sentence(place, sites, ok, run_cli, line):
    published(sites, ok)
    with line.faulty("GET .*payload", flip):
        result = run_cli("merge", place, "--out", "merged")
    assert result.exit_code == 1
    assert "it was damaged or changed; try again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("merged").exists()
    ok("merge", place, "--out", "merged")


@pytest.mark.parametrize("part", ["manifest.json", "manifest.sig", "payload"])
def test_a_store_that_cannot_be_asked_makes_no_entry_unsound(
    place, sites, ok, run_cli, line, monkeypatch, part
):
    """Else --skip-refused would merge without a site whose line was bad for a moment."""
    published(sites, ok)
    monkeypatch.setattr(objects, "Patience", lambda: QUICK)
    with line.faulty(f"(GET|HEAD) .*north/.*{part}", status(503, "SlowDown")):
        result = run_cli("merge", place, "--skip-refused", "--out", "merged")
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"Error: {line.host} answers '503{CODE[part]}' each time: try again later.\n"
    )
    assert not Path("merged").exists()


def test_a_file_that_one_may_not_read_makes_its_entry_refused(place, sites, ok, run_cli, line):
    """It is of this entry alone, and stays so: others may be merged."""
    published(sites, ok)
    with line.faulty("(GET|HEAD) .*north/.*manifest.json", status(403, "AccessDenied")):
        stopped = run_cli("merge", place, "--out", "merged")
        assert stopped.exit_code == 1
        assert "north" in stopped.stderr
        said = ok("merge", place, "--skip-refused", "--out", "merged")
    assert "may not be read with these credentials" in said
    assert Path("merged").is_dir()


# init


def test_init_is_refused_where_a_federation_is(place, ok, run_cli):
    ok("init", place, *INIT)
    before = open_hub(place).read("federation.yaml")
    result = run_cli("init", place, *INIT, "--name", "another")
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {place} holds a federation already: choose another place, or join this one.\n"
    )
    assert open_hub(place).read("federation.yaml") == before


def test_an_init_that_was_broken_off_goes_on(place, ok, run_cli, line, keys, monkeypatch):
    """Dead from each request on in turn: no federation is there until all of it is."""
    with line.counted() as sent:
        ok("init", place, *INIT)
    name = "whatever"
    monkeypatch.setattr(objects, "Patience", lambda: QUICK)
    for number in range(1, len(sent)):
        where = f"{place}/{number}"
        with line.faulty("", cut_answer, skip=number):
            result = run_cli("init", where, *INIT, "--name", name, "--key", "key.pem")
        if result.exit_code:
            assert "broke off again and again" in result.stderr
        if not open_hub(where).has("federation.yaml"):
            ok("init", where, *INIT, "--name", name, "--key", "key.pem")
        assert federation_on(open_hub(where)).coordinator == signing.public_key(Path("key.pem"))
    assert not any("/." in name for name in keys())


def test_an_init_beside_another_unfinished_base_is_refused(place, ok, run_cli, line):
    ok("init", f"{place}/a", *INIT)
    hub = open_hub(f"{place}/a")
    hub.remove("federation.yaml")
    result = run_cli("init", f"{place}/a", *INIT, "--seed", "1")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {place}/a holds another base already, of a federation that was never finished: "
        "remove it, or choose another place.\n"
    )
    assert not hub.has("federation.yaml")
    ok("init", f"{place}/a", *INIT)
