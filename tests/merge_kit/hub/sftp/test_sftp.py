"""A hub on a real SFTP server: the contract, what this server promises, and bad luck on the way."""

from __future__ import annotations

import os
import signal
import time

import asyncssh
import pytest

from merge_kit.errors import HubError
from merge_kit.remembered import VARIABLE
from tests.merge_kit.helpers import listing, says
from tests.merge_kit.hub.contract import ENTRY, FILE, RemoteContract, digest_of, publish
from tests.merge_kit.hub.killing import Publisher, publish_all, unbroken
from tests.merge_kit.hub.sftp.sshd import running

PAYLOAD = f"{ENTRY}/payload.safetensors"


class TestSftp(RemoteContract):
    """The contract."""

    @pytest.fixture
    def hub(self, place):
        """An empty folder on the server."""
        return place

    @pytest.fixture
    def again(self, place, opened):
        """The same folder, on a connection of its own."""
        return lambda: opened(place.uri)


# what the server does


@pytest.mark.parametrize("there", ["a file", "an empty folder", "a folder", "a link"])
def test_the_server_renames_a_folder_over_nothing(place, root, there):
    """What all this rests on; the protocol leaves it to the server."""
    (root / "new").mkdir()
    (root / "new" / "file").write_text("new")
    old = root / "old"
    old.write_text("old") if there == "a file" else None
    old.mkdir() if "folder" in there else None
    (old / "file").write_text("old") if there == "a folder" else None
    old.symlink_to("nowhere") if there == "a link" else None

    async def rename(session):
        await session.sftp.rename(f"{root}/new", f"{root}/old")

    with pytest.raises(asyncssh.SFTPError):
        place._server.run(rename)
    assert listing(root) == ["new", "old"]
    assert old.is_symlink() == (there == "a link")


def test_nothing_of_an_extension_is_needed_to_publish(tmp_path, root, opened, monkeypatch):
    """No fsync, no limits, no statvfs: as other servers are."""
    denied = "internal-sftp -P fsync,limits,statvfs,posix-rename,lsetstat,hardlink"
    with running(tmp_path / "bare", denied) as bare:
        monkeypatch.setenv("HOME", str(bare.home))
        hub = opened(bare.uri(root))
        assert publish(hub, b"x" * 300_000) is True
        assert hub.fetch(PAYLOAD, digest_of(b"x" * 300_000)).stat().st_size == 300_000
        hub.replace(FILE, b"one", None)
        with says(
            HubError,
            f"{hub.uri}/{FILE} cannot be replaced: the server does not offer to rename a file over "
            "another one (posix-rename@openssh.com); change the file on the server.",
        ):
            hub.replace(FILE, b"two", b"one")
        assert listing(root) == ["contributions", FILE]
        assert hub.read(FILE) == b"one"


def test_files_get_the_permissions_that_the_server_gives(place, root):
    """Not those of a library: whoever merges must be able to read them."""
    publish(place)
    mask = os.umask(0)
    os.umask(mask)
    assert (root / PAYLOAD).stat().st_mode & 0o777 == 0o666 & ~mask
    assert (root / ENTRY).stat().st_mode & 0o777 == 0o777 & ~mask


# what is beside ours


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_symbolic_links_are_refused(place, root, tmp_path, linked):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    link = root / "folder" if linked == "folder" else root / "folder" / "file"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "secret" / ("file" if linked == "file" else ""))
    name = link.relative_to(root)
    sentence = f"{place.uri}/{name} is a symbolic link: a hub must hold the files themselves."
    for use in (place.read, place.fetch, place.size, place.has):
        with says(HubError, sentence):
            use("folder/file")
    if linked == "folder":
        with says(HubError, sentence):  # what it leads to might hold the withdrawals
            list(place.list("folder"))
        for write in (place.remove, lambda name: place.publish(name, {"a": b""})):
            with says(HubError, sentence):
                write("folder/file")
        assert listing(tmp_path / "secret") == ["file"]


def test_a_hub_below_a_symbolic_link_is_fine(sshd, place, root, tmp_path, opened):
    publish(place)
    (tmp_path / "link").symlink_to(root)
    assert opened(sshd.uri(tmp_path / "link")).read(PAYLOAD) == b"payload"


def test_names_that_no_publisher_writes_are_invisible(place, root):
    for name in (
        "a\\b",
        "a\x1b[2J",
        "a\nb",
        b"a\xff".decode("utf-8", "surrogateescape"),
        ".a",
        "sound",
    ):
        (root / "contributions" / name).mkdir(parents=True)
    assert list(place.list("contributions")) == ["sound"]


def test_what_is_no_file_is_not_opened(place, root):
    """To read from a pipe would keep the server waiting for ever."""
    (root / "folder").mkdir()
    os.mkfifo(root / "folder" / "pipe")
    for name in ("folder/pipe", "folder"):
        assert not place.has(name)
        for use in (place.read, place.fetch):
            with says(
                HubError, f"{place.uri} has no file {name}: is it the right hub, and complete?"
            ):
                use(name)


def test_an_entry_lies_in_one_folder(place):
    with says(HubError, "'a/b' cannot be published: an entry's files lie in no folders."):
        place.publish(ENTRY, {"a/b": b""})


# publishing


def test_the_next_publisher_removes_what_killed_ones_have_left(place, root):
    folder = root / "contributions" / "north"
    ours = ["." + "abc." + digit * 32 for digit in "01"]
    others = [f".abc.x.{'0' * 32}", ".abc.0123", f".other.{'0' * 32}"]
    for stale in (*ours, *others):
        (folder / stale).mkdir(parents=True)
        (folder / stale / "payload").write_text("half")
    assert publish(place) is True
    assert listing(folder) == [*sorted(others), "abc"]
    (folder / ours[0]).mkdir()
    assert publish(place) is False
    assert listing(folder) == [*sorted(others), "abc"]


class Overtaken(dict):
    """Files whose publication is overtaken by another one after the first file."""

    def __init__(self, other):
        super().__init__(payload=b"payload", manifest=b"manifest")
        self.other = other

    def items(self):
        for number, pair in enumerate(super().items()):
            if number == 1:
                assert publish(self.other) is True
            yield pair


def test_a_publisher_that_is_overtaken_finds_the_entry_there(place, root, opened):
    """The faster one removes the other's folder while it is still being filled."""
    assert place.publish(ENTRY, Overtaken(opened(place.uri))) is False
    assert listing(root / "contributions" / "north") == ["abc"]
    assert list(place.list(ENTRY)) == ["manifest.json", "manifest.sig", "payload.safetensors"]


def test_a_local_file_that_cannot_be_read_is_named(place, root, tmp_path):
    with says(
        HubError,
        f"{tmp_path}/gone cannot be read: No such file or directory: check the path, and that the "
        "file may be read.",
    ):
        publish(place, tmp_path / "gone")
    assert listing(root / "contributions" / "north") == []


def test_publishers_that_are_killed_and_started_again_leave_whole_entries(
    place, root, tmp_path, monkeypatch
):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))  # a temporary one would be left
    payloads = [tmp_path / str(number) for number in range(8)]
    for number, path in enumerate(payloads):
        path.write_bytes(bytes([number]) * 4_000_000)
    window = unbroken(place.uri, payloads[0])
    stories = publish_all(place.uri, payloads, doomed=4, window=2 * window, seed=20)
    assert sum(story.kills for story in stories) > 0
    for number, path in enumerate(payloads):
        folder = root / "contributions" / f"s{number}"
        assert listing(folder) == ["e"]
        assert listing(folder / "e") == ["manifest.json", "manifest.sig", "payload.safetensors"]
        assert (folder / "e" / "payload.safetensors").read_bytes() == path.read_bytes()


def test_an_interrupted_publisher_removes_what_it_has_sent(place, root, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(100_000_000))
    one = Publisher(place.uri, ENTRY, path)
    one.begin()
    folder, deadline = root / "contributions" / "north", time.monotonic() + 60
    while not any(folder.glob(".abc.*/payload.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    one.signal(signal.SIGINT)
    _, said = one.end(60)
    assert "KeyboardInterrupt" in said
    assert listing(folder) == []
