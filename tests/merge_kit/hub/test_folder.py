"""A hub that is a folder: the contract, and what is a folder's own."""

from __future__ import annotations

import threading

import pytest

from merge_kit.errors import HubError
from merge_kit.hub import FolderHub, open_hub
from tests.merge_kit.helpers import listing, says
from tests.merge_kit.hub.contract import HubContract

ENTRY = "contributions/north/abc"


class TestFolder(HubContract):
    """The contract."""

    @pytest.fixture
    def hub(self, tmp_path):
        """An empty folder."""
        (tmp_path / "place").mkdir()
        return FolderHub(tmp_path / "place")

    @pytest.fixture
    def again(self, hub):
        """The same folder."""
        return lambda: FolderHub(hub.root)


@pytest.fixture
def place(tmp_path):
    """An empty folder as a hub."""
    (tmp_path / "place").mkdir()
    return FolderHub(tmp_path / "place")


def publish(place, payload=b"payload", **more):
    return place.publish(ENTRY, {"payload": payload, "manifest": b"manifest", **more})


def test_an_entry_appears_with_all_its_files(place, tmp_path):
    (tmp_path / "vector").write_bytes(b"x" * 3_000_000)
    assert publish(place, tmp_path / "vector") is True
    assert list(place.list(ENTRY)) == ["manifest", "payload"]
    assert place.read(f"{ENTRY}/payload") == b"x" * 3_000_000
    assert listing(place.root / "contributions" / "north") == ["abc"]


def test_publishing_twice_changes_nothing(place):
    publish(place)
    assert publish(place, b"other") is False
    assert place.read(f"{ENTRY}/payload") == b"payload"


def test_a_failed_publication_leaves_nothing(place, tmp_path):
    with says(
        HubError,
        f"{place.root}/{ENTRY} cannot be written: No such file or directory: "
        "check the folder and the disk.",
    ):
        publish(place, tmp_path / "gone")
    assert listing(place.root / "contributions" / "north") == []


def test_a_full_disk_is_named_and_leaves_nothing(small_disk):
    with says(
        HubError,
        f"{small_disk}/{ENTRY} cannot be written: no space left (0 MiB free): "
        "make room and run the same command again.",
    ):
        publish(FolderHub(small_disk), b"x" * 100_000)
    assert listing(small_disk / "contributions" / "north") == []


def test_a_read_only_hub_is_named(read_only_disk):
    with says(
        HubError,
        f"{read_only_disk}/{ENTRY} cannot be written: Read-only file system: "
        "choose a folder that you may write to.",
    ):
        publish(FolderHub(read_only_disk))


def test_what_is_still_being_written_is_invisible(place):
    (place.root / "contributions" / "north" / ".abc.0123").mkdir(parents=True)
    assert list(place.list("contributions/north")) == []


def test_names_that_no_publisher_writes_are_invisible(place):
    """They could not be addressed, or would drive the terminal that shows them."""
    for name in ("a\\b", "a\x1b[2J", "a\nb", b"a\xff".decode("utf-8", "surrogateescape"), "sound"):
        (place.root / "contributions" / name).mkdir(parents=True)
    assert list(place.list("contributions")) == ["sound"]


def test_the_next_publisher_removes_what_a_killed_one_left(place):
    folder = place.root / "contributions" / "north"
    for stale in (".abc.0123", ".other.4567"):
        (folder / stale).mkdir(parents=True)
    publish(place)
    assert listing(folder) == [".other.4567", "abc"]


class Overtaken(dict):
    """Files whose publication is overtaken by another one after the first file."""

    def __init__(self, place):
        super().__init__(payload=b"payload", manifest=b"manifest")
        self.place = place

    def items(self):
        for number, pair in enumerate(super().items()):
            if number == 1:
                assert publish(self.place) is True
            yield pair


def test_a_publisher_that_is_overtaken_finds_the_entry_there(place):
    """The faster one removes the other's folder while it is still being filled."""
    assert place.publish(ENTRY, Overtaken(place)) is False
    assert listing(place.root / "contributions" / "north") == ["abc"]
    assert list(place.list(ENTRY)) == ["manifest", "payload"]


@pytest.mark.parametrize("run", range(3))
def test_publishers_of_one_entry_cannot_disturb_each_other(place, run):
    """One of them wins, nobody fails, and the entry is whole."""
    barrier, answers = threading.Barrier(4), []

    def go():
        barrier.wait()
        answers.append(publish(place, b"x" * 200_000))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False, False, False, True]
    assert len(place.read(f"{ENTRY}/payload")) == 200_000
    assert listing(place.root / "contributions" / "north") == ["abc"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a/../b", "..", "a//b", "./a", "a\\b", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(place, name):
    for use in (place.read, place.fetch, place.has, lambda n: list(place.list(n))):
        with says(HubError, f"'{name}' is no name inside a hub: it must be relative and plain."):
            use(name)
    with pytest.raises(HubError):
        place.publish(name, {"a": b""})
    with pytest.raises(HubError):
        place.replace(name, b"", None)


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_symbolic_links_are_refused(place, tmp_path, linked):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    link = place.root / "folder" if linked == "folder" else place.root / "folder" / "file"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "secret" / ("file" if linked == "file" else ""))
    sentence = f"{link} is a symbolic link: a hub must hold the files themselves."
    for use in (place.read, place.fetch):
        with says(HubError, sentence):
            use("folder/file")


def test_a_hub_below_a_symbolic_link_is_fine(place, tmp_path):
    """Only links inside the hub are refused: shares are often mounted through a link."""
    publish(place)
    (tmp_path / "link").symlink_to(place.root)
    assert FolderHub(tmp_path / "link").read(f"{ENTRY}/payload") == b"payload"


def test_a_file_that_is_not_there_is_named(place):
    assert not place.has("federation.yaml")
    assert list(place.list("contributions")) == []
    with says(
        HubError,
        f"{place.root} has no file federation.yaml: is it the right hub, and complete?",
    ):
        place.fetch("federation.yaml")


def test_a_huge_file_in_place_of_a_small_one_is_not_read(place):
    """A manifest of gigabytes must not fill the merger's memory."""
    with (place.root / "manifest.json").open("wb") as file:
        file.truncate(8 * 2**20 + 1)
    with says(
        HubError,
        f"{place.root}/manifest.json is larger than 8388608 bytes: it is no file of a federation.",
    ):
        place.read("manifest.json")


def test_replacing_is_atomic(place):
    for before, text in ((None, b"old"), (b"old", b"new")):
        place.replace("federation.yaml", text, before)
    assert place.read("federation.yaml") == b"new"
    assert listing(place.root) == ["federation.yaml"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_is_opened_by_path_or_uri(tmp_path, monkeypatch, scheme):
    assert open_hub(f"{scheme}{tmp_path}").uri == str(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert open_hub(tmp_path.name).uri == str(tmp_path)


def test_a_missing_hub_is_named(tmp_path):
    with says(HubError, f"the hub {tmp_path}/no is not there: check the path, or mount the share."):
        open_hub(f"{tmp_path}/no")


@pytest.mark.parametrize("scheme", ["ftp", "https"])
def test_an_unknown_kind_of_hub_is_named(scheme):
    with says(
        HubError,
        f"'{scheme}://place/x': there are no hubs of the kind '{scheme}'; there are folders (a "
        "path, or file://), hf://, s3://, gs://, az:// and sftp://.",
    ):
        open_hub(f"{scheme}://place/x")
