"""The log of what has left a site: what is in it, and what its chain shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import auditlog
from merge_kit.errors import AuditError, MergeKitError
from merge_kit.files import canonical_json, sha256_bytes, sha256_file
from tests.merge_kit.helpers import quick, says

DIGEST = "sha256:" + "1" * 64


@pytest.fixture
def published(contribute, tmp_path):
    """A site that has published a vector and statistics."""
    contribute("north", seed=1, beside=("fisher",))
    return tmp_path / "north"


def lines_of(root):
    return (root / auditlog.LOG).read_bytes().splitlines(keepends=True)


def test_all_that_leaves_is_named_before_and_after(published, hub):
    records = auditlog.read(published)
    assert [r.action for r in records] == ["publishing", "published"] * 2
    assert {r.hub for r in records} == {hub.uri}
    for record in records:
        there = {p.name: sha256_file(p) for p in (hub.root / record.place).iterdir()}
        assert record.files == there


def test_a_withdrawal_is_in_it(published, ok):
    ok("withdraw", published, "--all")
    actions = [record.action for record in auditlog.read(published)]
    assert actions[4:] == ["withdrawing", "withdrawn"] * 2


def test_what_was_there_already_has_not_left_twice(published, ok):
    ok("publish", published, "--run", published / "runs" / "seed1")
    actions = [record.action for record in auditlog.read(published)]
    assert actions[4:] == ["publishing", "publishing"]


def test_a_dry_run_leaves_no_line(published, ok):
    before = lines_of(published)
    ok("publish", published, "--run", published / "runs" / "seed1", "--dry-run")
    assert lines_of(published) == before


def test_nothing_leaves_a_site_whose_log_was_changed(published, run_cli, hub):
    lines = lines_of(published)
    (published / auditlog.LOG).write_bytes(b"".join(lines[1:]))
    before = sorted(p for p in hub.root.rglob("*"))
    found = run_cli("withdraw", published, "--all")
    assert found.exit_code == 1
    assert f"{published / auditlog.LOG}, line 1 has been changed" in found.stderr
    assert sorted(p for p in hub.root.rglob("*")) == before


@quick
@given(st.data())
def test_any_change_before_the_end_is_found(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("site")
    for number in range(4):
        auditlog.append(root, "publishing", "hub", f"contributions/n/{number}", {"a": DIGEST})
    text = (root / auditlog.LOG).read_bytes()
    lines = text.splitlines(keepends=True)
    how = data.draw(st.sampled_from(["flip", "drop", "swap", "twice"]))
    if how == "flip":
        place = data.draw(st.integers(0, len(text) - 1))
        changed = bytearray(text)
        changed[place] ^= 1 << data.draw(st.integers(0, 6))
        changed = bytes(changed)
    elif how == "drop":
        at = data.draw(st.integers(0, 2))
        changed = b"".join(lines[:at] + lines[at + 1 :])
    elif how == "swap":
        at = data.draw(st.integers(0, 2))
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
        changed = b"".join(lines)
    else:
        at = data.draw(st.integers(0, 3))
        changed = b"".join(lines[: at + 1] + lines[at:])
    head = auditlog.heads(root)[-1]
    (root / auditlog.LOG).write_bytes(changed)
    # A last line that was changed shows by the head that somebody has kept.
    with pytest.raises((AuditError, AssertionError)):
        assert head in auditlog.heads(root)


def test_lines_that_were_cut_off_show_by_the_head_that_was_kept(published, ok, run_cli):
    said = ok("audit-log", "verify", published)
    head = said.split("its head is ")[1].split()[0]
    assert "The chain of 4 lines is whole" in said
    assert "is whole" in ok("audit-log", "verify", published, "--head", head)
    ok("withdraw", published, "--all")
    assert "is whole" in ok("audit-log", "verify", published, "--head", head)
    (published / auditlog.LOG).write_bytes(b"".join(lines_of(published)[:3]))
    assert "The chain of 3 lines is whole" in ok("audit-log", "verify", published)
    found = run_cli("audit-log", "verify", published, "--head", head)
    assert found.exit_code == 1
    assert f"never had the head {head}: lines were cut off or replaced" in found.stderr


def test_a_line_that_a_kill_cut_short_is_written_over(published):
    """It was being written before anything left."""
    lines = lines_of(published)
    (published / auditlog.LOG).write_bytes(b"".join(lines)[:-40])
    assert len(auditlog.read(published)) == 3
    auditlog.append(published, "publishing", "hub", "place", {})
    assert [r.number for r in auditlog.read(published)] == [1, 2, 3, 4]
    assert auditlog.read(published)[-1].place == "place"


def test_many_at_once_write_one_chain(tmp_path):
    barrier = threading.Barrier(8)

    def go(number):
        barrier.wait()
        for _ in range(5):
            auditlog.append(tmp_path, "publishing", "hub", f"place-{number}", {})

    threads = [threading.Thread(target=go, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(auditlog.read(tmp_path)) == 40


def test_it_is_shown_in_words_and_for_programs(published, ok, run_cli, hub, tmp_path):
    said = ok("audit-log", "show", published)
    assert f"published    {hub.uri}/contributions/north/" in said
    told = json.loads(ok("audit-log", "show", published, "--json"))
    assert [record["number"] for record in told] == [1, 2, 3, 4]
    ok("join", hub.root, "--site", "south", "--folder", tmp_path / "south")
    assert ok("audit-log", "show", tmp_path / "south") == "Nothing has left this site yet.\n"
    said = ok("audit-log", "verify", tmp_path / "south")
    assert said == "Nothing has left this site yet. Its log holds no line to check.\n"


def test_the_log_is_the_owners_alone(published):
    assert (published / auditlog.LOG).stat().st_mode & 0o077 == 0


def test_without_room_for_the_line_nothing_leaves(read_only_disk):
    with pytest.raises(MergeKitError, match="Read-only file system"):
        auditlog.append(read_only_disk, "publishing", "hub", "place", {})


@pytest.mark.parametrize("what", ["a folder", "a link", "a link to a file"])
def test_something_else_in_the_place_of_the_log_is_no_empty_log(published, run_cli, hub, what):
    path = published / auditlog.LOG
    path.unlink()
    target = "/dev/null" if what == "a link" else published / "other.jsonl"
    path.mkdir() if what == "a folder" else path.symlink_to(target)
    (published / "other.jsonl").touch()
    before = sorted(hub.root.rglob("*"))
    for command in (("audit-log", "verify"), ("audit-log", "show"), ("withdraw", "--all")):
        found = run_cli(*command, published)
        assert found.exit_code == 1
        assert f"{path} is no file: somebody has put something else in its" in found.stderr
    assert sorted(hub.root.rglob("*")) == before


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_without_its_end_is_named(published, ok, cut):
    assert "part of a line" not in ok("audit-log", "verify", published)
    path = published / auditlog.LOG
    path.write_bytes(path.read_bytes()[:-cut])
    said = ok("audit-log", "verify", published)
    assert "The chain of 3 lines is whole" in said
    assert f"{path} ends in a part of a line, which does not count" in said
    auditlog.append(published, "publishing", "hub", "place", {})
    assert "part of a line" not in ok("audit-log", "verify", published)
    path.write_bytes(b"")
    assert not auditlog.is_unfinished(published)


def test_two_processes_write_one_chain(tmp_path):
    code = (
        "import sys; from pathlib import Path; from merge_kit import auditlog\n"
        "for n in range(20): auditlog.append(Path(sys.argv[1]), 'publishing', 'h', str(n), {})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(auditlog.read(tmp_path)) == 40


def record_of(number, previous, **changes):
    told = {
        "format": 1, "number": number, "time": "2026-01-01T00:00:00Z", "action": "published",
        "hub": "hub", "place": "place", "files": {}, "previous": previous, **changes,
    }  # fmt: skip
    return canonical_json(told) + b"\n"


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda first: record_of(3, sha256_bytes(first[:-1])), "it is not as it was written"),
        (lambda first: record_of(2, auditlog.START), "it does not follow from the line before it"),
        (
            lambda first: record_of(2, sha256_bytes(first[:-1])).replace(b":2,", b": 2,"),
            "it is not as it was written",
        ),
        (lambda first: record_of(2, sha256_bytes(first[:-1]), more=1), "it is no record"),
        (lambda first: b"\xff\n", "it is no JSON"),
        (lambda first: b"\n", "it is no JSON"),
    ],
    ids=["number", "chain", "spaces", "more keys", "bytes", "empty"],
)
def test_the_line_and_the_reason_are_named(tmp_path, second, reason):
    first = record_of(1, auditlog.START)
    path = tmp_path / auditlog.LOG
    path.write_bytes(first + second(first))
    sentence = (
        f"{path}, line 2 has been changed, or was never written by merge-kit ({reason}): keep the "
        "file for whoever looks into it, and move it away to start a new one."
    )
    with says(AuditError, sentence):
        auditlog.read(tmp_path)
    with says(AuditError, sentence):
        auditlog.append(tmp_path, "publishing", "hub", "place", {})
    path.write_bytes(first + record_of(2, sha256_bytes(first[:-1])))
    assert len(auditlog.read(tmp_path)) == 2


def test_a_line_is_on_the_disk_before_anything_leaves(tmp_path, monkeypatch):
    sizes = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: sizes.append(os.fstat(file).st_size) or sync(file)
    )
    auditlog.append(tmp_path, "publishing", "hub", "place", {})
    assert sizes == [(tmp_path / auditlog.LOG).stat().st_size]


@pytest.mark.parametrize("how", ["removed", "emptied", "first line cut"])
@pytest.mark.parametrize("left", ["manifest", "withdrawal"])
def test_a_log_that_is_gone_is_no_log_that_nothing_was_written_to(
    published, ok, run_cli, how, left
):
    log, first = published / auditlog.LOG, lines_of(published)[0]
    if left == "withdrawal":
        ok("withdraw", published, "--all")
        for path in published.glob("runs/*/*manifest.json"):
            path.unlink()
    log.unlink()
    if how != "removed":
        log.write_bytes(b"" if how == "emptied" else first[:-9])
    places = published.glob("runs/*/*manifest.json" if left == "manifest" else "withdrawals/*.json")
    sentence = (
        f"Error: {log} holds no line, and {sorted(places)[0]} has left this site: the log was "
        "removed or emptied; find out who did it, and put the file back if there is a copy.\n"
    )
    for arguments in (("verify",), ("show",), ("verify", "--head", auditlog.START)):
        command, *options = arguments
        found = run_cli("audit-log", command, published, *options)
        assert (found.exit_code, found.stderr, found.stdout) == (1, sentence, "")


def test_what_has_not_left_is_no_evidence(published, ok, run_cli, tmp_path):
    """A log that cannot be written keeps the manifest and the note back, too."""
    for path in published.glob("runs/*/*manifest.json"):
        path.unlink()
    (published / auditlog.LOG).unlink()
    (published / auditlog.LOG).symlink_to("/dev/null")
    run = published / "runs" / "seed1"
    assert run_cli("publish", published, "--run", run).exit_code == 1
    assert run_cli("withdraw", published, "--all").exit_code == 1
    (published / auditlog.LOG).unlink()
    assert "Nothing has left this site yet." in ok("audit-log", "verify", published)
