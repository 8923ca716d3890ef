"""A hub on an SFTP server when the line breaks, the server dies, or the disk is full."""

from __future__ import annotations

import os
import random
import re
import threading
import time

import pytest

from merge_kit.errors import HubError, MergeKitError, UnreachableError
from merge_kit.hub import sftpfiles, ssh
from merge_kit.hub.sftpfiles import Lock
from tests.merge_kit.helpers import listing, says
from tests.merge_kit.hub.contract import ENTRY, FILE, digest_of, publish
from tests.merge_kit.hub.sftp.sshd import Sshd, running

PAYLOAD = f"{ENTRY}/payload.safetensors"
BIG = random.Random(5).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Nobody waits long."""
    monkeypatch.setattr(ssh, "PAUSES", (0.01, 0.02, 0.05, 0.1))
    monkeypatch.setattr(sftpfiles, "LOCK_LASTS", 0.6)


def configure(sshd: Sshd, monkeypatch, tmp_path, text):
    """Another home folder with the same keys, and a file of options."""
    (tmp_path / ".ssh").mkdir()
    for name in ("id_ed25519", "known_hosts"):
        os.symlink(sshd.home / ".ssh" / name, tmp_path / ".ssh" / name)
    (tmp_path / ".ssh" / "config").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))


def meanwhile(go):
    """Run `go` beside; what it raises is kept."""
    faults = []

    def run():
        try:
            go()
        except MergeKitError as error:
            faults.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, faults


def until(ready):
    """Wait for it."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# the line


def places(far, line, way, go, number):
    """Where a line is to break: bytes from shortly before the server is reached to the end."""
    line.passed[way] = 0
    far.has("file")
    reached = line.passed[way]
    go()
    end = line.passed[way]
    return [reached * 3 // 4 + (end - reached * 3 // 4) * n // number for n in range(number)]


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_line_that_breaks_anywhere_is_made_up_for(far, line, root, way):
    """Among the places are those where a rename was done and the answer to it lost."""

    def send(site):
        return publish(far, b"x" * 2000, f"contributions/{site}/entry")

    send("first")
    line.calls, number = 0, 8
    for place in places(far, line, way, lambda: send("second"), number):
        far._server.close()
        line.cuts = [(way, place)]
        assert send(f"s{place}") is True
        folder = root / "contributions" / f"s{place}"
        assert listing(folder) == ["entry"]
        assert listing(folder / "entry") == [
            "manifest.json", "manifest.sig", "payload.safetensors",
        ]  # fmt: skip
        assert (folder / "entry" / "payload.safetensors").read_bytes() == b"x" * 2000
    assert line.calls > 2 * number - 3  # the last ones may have come too late


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_federation_file_is_replaced_once_where_the_line_breaks(far, line, root, way):
    def change(before, after):
        far.replace(FILE, after, before)
        assert (root / FILE).read_bytes() == after
        assert {name for name in listing(root) if ".lock." not in name} == {FILE}

    far.replace(FILE, b"first", None)
    far._server.close()
    line.calls, number, before = 0, 8, b"second"
    for place in places(far, line, way, lambda: change(b"first", b"second"), number):
        far._server.close()
        line.cuts = [(way, place)]
        change(before, b"%06d" % place)
        before = b"%06d" % place
    assert line.calls > 2 * number - 3


def test_an_upload_goes_on_where_the_line_broke(far, line, root):
    line.cuts = [("up", 4_000_000), ("up", 5_000_000)]
    assert publish(far, BIG * 4) is True
    assert (root / PAYLOAD).read_bytes() == BIG * 4
    assert line.calls == 3
    # What is on its way when a line breaks goes again, and no more.
    assert line.passed["up"] < len(BIG) * 4 + 2 * 3_000_000


def test_a_download_goes_on_where_the_line_broke(far, line, root):
    publish(far, BIG * 4)
    far._server.close()
    line.passed["down"], line.calls = 0, 0
    line.cuts = [("down", 4_000_000), ("down", 5_000_000)]
    assert far.fetch(PAYLOAD, digest_of(BIG * 4)).read_bytes() == BIG * 4
    assert line.calls == 3
    assert line.passed["down"] < len(BIG) * 4 + 2 * 3_000_000


def test_a_broken_line_shows_no_warning(far, line, caplog):
    line.cuts = [("up", 1_000_000)]
    publish(far, BIG)
    assert line.calls == 2
    assert [record.getMessage() for record in caplog.records] == []


def test_a_download_begins_anew_where_the_file_is_another_one(far, line, root):
    (root / "file").write_bytes(BIG)
    line.cuts = [("down", 1_500_000)]
    line.then = lambda: (root / "file").write_bytes(BIG[::-1] + b"more")
    assert far.fetch("file").read_bytes() == BIG[::-1] + b"more"


def test_a_file_that_becomes_shorter_is_not_taken(far, line, root, monkeypatch):
    (root / "file").write_bytes(BIG)
    receive = sftpfiles.receive

    async def late(*arguments):
        os.truncate(root / "file", 1_000_000)
        await receive(*arguments)

    monkeypatch.setattr(sftpfiles, "receive", late)
    with says(HubError, f"{root}/file on the server became shorter while it was read: try again."):
        far.fetch("file")


def test_bytes_that_are_damaged_on_the_line_are_fetched_again(far, line, root):
    """SSH notices, and hangs up."""
    (root / "file").write_bytes(BIG)
    line.flips = [("down", 1_000_000)]
    assert far.fetch("file", digest_of(BIG)).read_bytes() == BIG
    assert line.calls == 2


def test_a_line_that_breaks_every_time_is_named(sshd, far, line, root):
    line.cuts = [("up", 200_000)] + [("up", 800)] * 20
    with pytest.raises(UnreachableError) as caught:
        publish(far, BIG)
    assert re.fullmatch(
        f"{sshd.user}@127.0.0.1:{line.port} cannot be reached \\(.*\\): check the address, and "
        "that its SSH server runs.",
        str(caught.value),
    )
    assert line.calls < 20
    line.cuts = []
    assert publish(far, BIG) is True
    assert listing(root / ENTRY / "..") == ["abc"]


def test_a_slow_line_is_no_fault(far, line):
    line.delay = 0.01
    assert publish(far, BIG[:300_000]) is True
    assert far.fetch(PAYLOAD, digest_of(BIG[:300_000])).stat().st_size == 300_000


def test_a_line_that_hangs_is_given_up_for_another_one(far, line, root, monkeypatch):
    monkeypatch.setattr(ssh, "PATIENCE", 1.0)
    thread, faults = meanwhile(lambda: publish(far, BIG * 5))
    until(lambda: any(root.glob("contributions/north/.*/payload.safetensors")))
    line.hang()  # those that are open; new ones pass
    thread.join(60)
    assert faults == []
    assert (root / PAYLOAD).read_bytes() == BIG * 5


def test_a_server_that_says_nothing_is_named(sshd, far, line, tmp_path, monkeypatch):
    configure(sshd, monkeypatch, tmp_path, "Host *\nConnectTimeout 1\n")
    line.held.set()
    with says(
        UnreachableError,
        f"{sshd.user}@127.0.0.1:{line.port} did not let us in within 1 s: try again later, or set "
        "a longer ConnectTimeout in ~/.ssh/config.",
    ):
        far.has("file")


# the server


def test_a_server_that_dies_and_comes_back_is_waited_for(
    tmp_path, root, opened, line_to, monkeypatch
):
    monkeypatch.setattr(ssh, "PAUSES", (0.2, 0.2, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1, 1))
    with running(tmp_path / "own") as own:
        monkeypatch.setenv("HOME", str(own.home))
        slow = line_to(own)
        slow.delay = 0.01
        hub = opened(own.uri(root, slow.port))
        thread, faults = meanwhile(lambda: publish(hub, BIG[:1_500_000]))
        until(lambda: any(root.glob("contributions/north/.*/payload.safetensors")))
        own.kill()
        time.sleep(0.3)
        own.start()
        thread.join(60)
        assert faults == []
        assert (root / PAYLOAD).read_bytes() == BIG[:1_500_000]
        assert listing(root / "contributions" / "north") == ["abc"]


def test_a_server_that_is_gone_is_named_and_the_next_publisher_tidies_up(
    tmp_path, root, opened, line_to, monkeypatch
):
    with running(tmp_path / "own") as own:
        monkeypatch.setenv("HOME", str(own.home))
        slow = line_to(own)
        slow.delay = 0.01
        hub = opened(own.uri(root, slow.port))
        thread, faults = meanwhile(lambda: publish(hub, BIG[:1_500_000]))
        until(lambda: any(root.glob("contributions/north/.*/payload.safetensors")))
        own.kill()
        thread.join(60)
        (said,) = faults
        assert re.fullmatch(
            f"{own.user}@127.0.0.1:{slow.port} cannot be reached \\(.*\\): check the address, and "
            "that its SSH server runs.",
            said,
        )
        (left,) = listing(root / "contributions" / "north")
        assert left.startswith(".abc.")
        own.start()
        assert list(hub.list("contributions/north")) == []
        assert publish(hub) is True
        assert listing(root / "contributions" / "north") == ["abc"]


def test_a_server_that_is_too_busy_is_called_again(tmp_path, root, opened, at_once, monkeypatch):
    """OpenSSH hangs up on some of those who call at the same time."""
    monkeypatch.setattr(ssh, "PAUSES", (0.1, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4))
    with running(tmp_path / "own", lines="MaxStartups 1:90:3\nLogLevel VERBOSE\n") as own:
        monkeypatch.setenv("HOME", str(own.home))
        hubs = [opened(own.uri(root)) for _ in range(8)]
        gave, said = at_once(8, lambda n: publish(hubs[n], b"x" * 1000, f"contributions/s{n}/e"))
        assert (gave, said) == ([True] * 8, [])
        assert "past MaxStartups" in (own.folder / "log").read_text()


def test_a_read_only_account_is_named(tmp_path, root, opened, monkeypatch):
    (root / "file").write_text("text")
    with running(tmp_path / "own", "internal-sftp -R") as own:
        monkeypatch.setenv("HOME", str(own.home))
        hub = opened(own.uri(root))
        why = "the server denies it to this user: ask who runs it for the right to write there"
        for name, use in (
            (ENTRY, lambda: publish(hub)),
            (FILE, lambda: hub.replace(FILE, b"", None)),
            ("file", lambda: hub.remove("file")),
        ):
            with says(HubError, f"{hub.uri}/{name} cannot be written: {why}."):
                use()
        assert hub.read("file") == b"text"
        assert listing(root) == ["file"]


def test_what_may_not_be_read_is_named(tmp_path, root, opened, monkeypatch):
    (root / "file").write_text("text")
    with running(tmp_path / "own", "internal-sftp -P open,opendir") as own:
        monkeypatch.setenv("HOME", str(own.home))
        hub = opened(own.uri(root))
        (root / "folder").mkdir()
        for name, use in (
            ("file", hub.read), ("file", hub.fetch), ("folder", lambda n: [*hub.list(n)]),
        ):  # fmt: skip
            with says(
                HubError,
                f"{hub.uri}/{name} cannot be read: the server says 'Permission denied': ask "
                "whoever published it to make it readable.",
            ):
                use(name)


# the disk


def test_a_full_disk_is_named_and_leaves_nothing(sshd, small_disk, opened):
    hub = opened(sshd.uri(small_disk))
    full = "no space left on the server (0 MiB free): make room and run the same command again"
    with says(HubError, f"{hub.uri}/{ENTRY} cannot be written: {full}."):
        publish(hub, b"x" * 100_000)
    assert listing(small_disk / "contributions" / "north") == []
    hub.replace(FILE, b"old", None)
    with says(HubError, f"{hub.uri}/{FILE} cannot be written: {full}."):
        hub.replace(FILE, b"x" * 100_000, b"old")
    assert listing(small_disk) == ["contributions", FILE]
    assert hub.read(FILE) == b"old"


def test_a_read_only_disk_is_named(sshd, read_only_disk, opened):
    hub = opened(sshd.uri(read_only_disk))
    why = "the server's file system is read-only: ask who runs it"
    for name, use in ((ENTRY, lambda: publish(hub)), (FILE, lambda: hub.replace(FILE, b"", None))):
        with says(HubError, f"{hub.uri}/{name} cannot be written: {why}."):
            use()


def test_a_full_disk_here_is_named(sshd, place, small_disk, root, monkeypatch, opened):
    publish(place, BIG)
    monkeypatch.setenv("MERGE_KIT_CACHE", str(small_disk))
    hub = opened(place.uri)
    with pytest.raises(MergeKitError, match=r"no space left \(0 MiB free\): make room and run"):
        hub.fetch(PAYLOAD, digest_of(BIG))
    assert not any(path.is_file() for path in small_disk.rglob("*"))


# the federation file


def test_of_coordinators_that_begin_alike_one_wins(place, root, opened, at_once):
    place.replace(FILE, b"old", None)
    hubs = [opened(place.uri) for _ in range(6)]
    gave, said = at_once(6, lambda n: hubs[n].replace(FILE, b"new %d" % n, b"old") or n)
    assert len(gave) == 1
    assert (
        said
        == [
            f"{place.uri}/{FILE} has been changed by somebody else meanwhile: run the same command "
            "again."
        ]
        * 5
    )
    assert place.read(FILE) == b"new %d" % gave[0]
    assert listing(root) == [FILE]


def test_of_coordinators_that_create_one_wins(place, root, opened, at_once):
    hubs = [opened(place.uri) for _ in range(4)]
    gave, said = at_once(4, lambda n: hubs[n].replace(FILE, b"new %d" % n, None) or n)
    assert (len(gave), len(said)) == (1, 3)
    assert place.read(FILE) == b"new %d" % gave[0]
    assert listing(root) == [FILE]


@pytest.mark.parametrize("content", [b"", b"0" * 32])
def test_a_lock_of_a_killed_coordinator_is_broken_by_one(place, root, opened, at_once, content):
    (root / FILE).write_bytes(b"old")
    (root / f".{FILE}.lock").write_bytes(content)
    (root / f".{FILE}.{'0' * 32}").write_bytes(b"half")
    hubs, begun = [opened(place.uri) for _ in range(4)], time.monotonic()
    gave, said = at_once(4, lambda n: hubs[n].replace(FILE, b"new %d" % n, b"old") or n)
    assert (len(gave), len(said)) == (1, 3)
    assert time.monotonic() - begun > sftpfiles.LOCK_LASTS
    place.replace(FILE, b"newer", b"new %d" % gave[0])
    assert listing(root) == [FILE]


def test_a_lock_of_a_coordinator_that_is_alive_is_waited_for(place, root, opened):
    path = f"{root}/.{FILE}.lock"
    with Lock(opened(place.uri)._server, path).held():
        thread, faults = meanwhile(lambda: place.replace(FILE, b"new", None))
        time.sleep(sftpfiles.LOCK_LASTS / 2)
        assert not (root / FILE).exists()
    thread.join(60)
    assert faults == []
    assert place.read(FILE) == b"new"


def test_a_coordinator_that_slept_too_long_changes_nothing(place, root, opened, monkeypatch):
    """Its lock was broken meanwhile, and others may have changed the file."""
    place.replace(FILE, b"old", None)
    upload = sftpfiles.Upload.run

    def asleep(self, server):
        monkeypatch.setattr(sftpfiles.Upload, "run", upload)
        opened(place.uri).replace(FILE, b"theirs", b"old")
        upload(self, server)

    monkeypatch.setattr(sftpfiles.Upload, "run", asleep)
    with pytest.raises(HubError, match="has been changed by somebody else meanwhile"):
        place.replace(FILE, b"ours", b"old")
    assert place.read(FILE) == b"theirs"
    assert [name for name in listing(root) if ".lock." not in name] == [FILE]
