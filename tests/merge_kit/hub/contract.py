"""What every hub promises, whatever the storage: the tests of a backend inherit from this class.

A backend's test module defines a fixture `hub`, an empty hub on a real storage, and a fixture
`again`, which opens the same place once more as another process would (no cache in common).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_kit.errors import HubError
from merge_kit.hub import Hub
from tests.merge_kit.helpers import says

ENTRY = "contributions/north/abc"
FILE = "federation.yaml"
Again = Callable[[], Hub]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def publish(hub: Hub, payload: Path | bytes = b"payload", folder: str = ENTRY) -> bool:
    return hub.publish(
        folder, {"payload.safetensors": payload, "manifest.sig": b"s", "manifest.json": b"m"}
    )


class HubContract:
    """Inherit, and give `hub` and `again`."""

    def test_an_entry_appears_with_all_its_files(self, hub: Hub, again: Again, tmp_path: Path):
        data = bytes(range(256)) * 20_000
        (tmp_path / "vector").write_bytes(data)
        assert publish(hub, tmp_path / "vector") is True
        other = again()
        assert list(other.list("contributions")) == ["north"]
        assert list(other.list("contributions/north")) == ["abc"]
        assert list(other.list(ENTRY)) == ["manifest.json", "manifest.sig", "payload.safetensors"]
        name = f"{ENTRY}/payload.safetensors"
        assert other.size(name) == len(data)
        assert other.fetch(name, digest_of(data)).read_bytes() == data
        assert other.read(f"{ENTRY}/manifest.json") == b"m"

    def test_publishing_twice_changes_nothing(self, hub: Hub, again: Again):
        assert publish(hub) is True
        assert publish(hub, b"other") is False
        assert publish(again(), b"other") is False
        assert again().read(f"{ENTRY}/payload.safetensors") == b"payload"

    def test_what_is_not_there_is_not_there(self, hub: Hub):
        assert not hub.has(FILE)
        assert list(hub.list("contributions")) == []
        sentence = f"{hub.uri} has no file {FILE}: is it the right hub, and complete?"
        for use in (hub.fetch, hub.size, hub.read):
            with says(HubError, sentence):
                use(FILE)

    @pytest.mark.parametrize(
        "name", ["", "/etc/passwd", "a/../b", "..", "a//b", "./a", "a\\b", "a\0b"]
    )
    def test_names_that_lead_elsewhere_are_refused(self, hub: Hub, name: str):
        for use in (hub.read, hub.fetch, hub.has, hub.size, hub.remove, lambda n: [*hub.list(n)]):
            with says(
                HubError, f"'{name}' is no name inside a hub: it must be relative and plain."
            ):
                use(name)
        with pytest.raises(HubError):
            hub.publish(name, {"a": b""})
        with pytest.raises(HubError):
            hub.replace(name, b"", None)

    def test_the_federation_file_is_replaced_by_who_knows_it(self, hub: Hub, again: Again):
        hub.replace(FILE, b"one", None)
        hub.replace(FILE, b"two", b"one")
        assert again().read(FILE) == b"two"
        for expected in (None, b"one"):
            with pytest.raises(HubError, match="changed by somebody else meanwhile"):
                again().replace(FILE, b"three", expected)
        assert hub.read(FILE) == b"two"

    def test_a_file_is_read_anew_after_it_was_replaced(self, hub: Hub, again: Again):
        hub.replace(FILE, b"one", None)
        assert hub.fetch(FILE).read_bytes() == b"one"
        again().replace(FILE, b"two", b"one")
        assert hub.fetch(FILE).read_bytes() == b"two"
        assert hub.read(FILE) == b"two"

    def test_eight_publishers_of_one_entry_leave_one_whole_entry(self, hub: Hub, again: Again):
        barrier, answers, faults = threading.Barrier(8), [], []

        def go(number: int) -> None:
            own = again()
            barrier.wait()
            try:
                answers.append(publish(own, b"x" * 100_000))
            except HubError as error:
                faults.append(str(error))

        threads = [threading.Thread(target=go, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert sorted(answers) == [False] * 7 + [True]
        assert len(again().read(f"{ENTRY}/payload.safetensors")) == 100_000
        assert list(again().list("contributions/north")) == ["abc"]

    def test_eight_publishers_of_eight_entries_do_not_disturb_each_other(
        self, hub: Hub, again: Again
    ):
        barrier, answers, faults = threading.Barrier(8), [], []

        def go(number: int) -> None:
            own = again()
            barrier.wait()
            try:
                answers.append(publish(own, bytes([number]) * 50_000, f"contributions/s{number}/e"))
            except HubError as error:
                faults.append(str(error))

        threads = [threading.Thread(target=go, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert answers == [True] * 8
        for number in range(8):
            name = f"contributions/s{number}/e/payload.safetensors"
            assert again().read(name) == bytes([number]) * 50_000

    def test_a_publisher_that_fails_leaves_nothing_to_be_seen(
        self, hub: Hub, again: Again, tmp_path: Path
    ):
        with pytest.raises(HubError):
            publish(hub, tmp_path / "gone")
        assert list(again().list("contributions/north")) == []
        assert publish(again()) is True

    def test_a_large_file_in_place_of_a_small_one_is_not_read(self, hub: Hub, tmp_path: Path):
        with (tmp_path / "large").open("wb") as file:
            file.truncate(8 * 2**20 + 1)
        publish(hub, tmp_path / "large")
        with pytest.raises(HubError, match="is larger than 8388608 bytes: it is no file of a fed"):
            hub.read(f"{ENTRY}/payload.safetensors")

    def test_a_file_that_was_removed_is_gone_or_said_to_be_kept(self, hub: Hub, again: Again):
        publish(hub)
        name = f"{ENTRY}/payload.safetensors"
        if hub.remove(name):
            assert not again().has(name)
        assert again().has(f"{ENTRY}/manifest.json")
        assert publish(again()) is False


class RemoteContract(HubContract):
    """Of hubs whose files are copied here."""

    def test_other_bytes_than_those_promised_are_refused(self, hub: Hub):
        publish(hub)
        name = f"{ENTRY}/payload.safetensors"
        with pytest.raises(HubError, match=r"was promised as sha256:0+ and arrived as sha256:"):
            hub.fetch(name, "sha256:" + "0" * 64)
        assert hub.fetch(name, digest_of(b"payload")).read_bytes() == b"payload"

    def test_a_copy_that_was_damaged_here_is_not_taken(self, hub: Hub, again: Again):
        publish(hub)
        name = f"{ENTRY}/payload.safetensors"
        path = hub.fetch(name, digest_of(b"payload"))
        path.write_bytes(b"broken")
        path.with_name(f"{path.name}.seal").write_text("")
        assert hub.fetch(name, digest_of(b"payload")).read_bytes() == b"payload"

    def test_a_copy_that_was_given_up_is_gone_and_can_be_had_again(self, hub: Hub):
        publish(hub)
        name = f"{ENTRY}/payload.safetensors"
        path = hub.fetch(name, digest_of(b"payload"))
        hub.forget(name)
        hub.forget(name)
        assert list(path.parent.glob("payload*")) == []
        assert hub.fetch(name, digest_of(b"payload")).read_bytes() == b"payload"
