"""Files and folders that are whole or not there."""

from __future__ import annotations

import math
import os
import sys
import threading
import time

import pytest

from merge_kit.errors import MergeKitError, UsageError
from merge_kit.files import (
    canonical_json,
    in_turn,
    new_folder,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from tests.merge_kit.helpers import listing, says


def fill(folder, text):
    (folder / "model").write_text(text)


def test_canonical_json_has_one_form():
    value = {"b": [1, 2.5, None, True], "ä": "é", "a": {"y": 0, "x": 1e-7}}
    golden = '{"a":{"x":1e-07,"y":0},"b":[1,2.5,null,true],"ä":"é"}'
    assert canonical_json(value) == golden.encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_has_no_nan(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": value})


def test_digests_are_sha256_of_bytes_and_of_files(tmp_path):
    golden = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == golden


def test_write_atomic_makes_parents_and_replaces(tmp_path):
    target = tmp_path / "a" / "b" / "text"
    write_atomic(target, "old")
    write_atomic(target, b"n\xc3\xa9w")
    assert target.read_text(encoding="utf-8") == "néw"
    assert listing(target.parent) == ["text"]


@pytest.fixture
def _hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hasty")
def test_writers_of_one_file_do_not_trip_over_each_other(tmp_path):
    """As commands of several processes do that keep the same fact about a hub."""
    texts = [letter * 1000 for letter in "abcdefgh"]
    faults, seen = [], set()

    def write(text):
        for _ in range(300):
            try:
                write_atomic(tmp_path / "text", text)
                seen.add((tmp_path / "text").read_text())
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert seen <= set(texts)
    assert listing(tmp_path) == ["text"]


def test_write_atomic_replaces_what_a_killed_run_left(tmp_path):
    (tmp_path / ".text.partial").write_bytes(b"half of a much longer tex")
    write_atomic(tmp_path / "text", "whole")
    assert listing(tmp_path) == ["text"]
    assert (tmp_path / "text").read_text() == "whole"


def test_write_atomic_gives_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "text", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_named_and_keeps_the_old_file(small_disk):
    write_atomic(small_disk / "text", "old")
    with says(
        MergeKitError,
        f"{small_disk}/text cannot be written: no space left (0 MiB free): "
        "make room and run the same command again.",
    ):
        write_atomic(small_disk / "text", b"x" * 100_000)
    assert (small_disk / "text").read_text() == "old"
    assert listing(small_disk) == ["text"]


def test_a_read_only_disk_is_named(read_only_disk):
    with says(
        MergeKitError,
        f"{read_only_disk}/text cannot be written: Read-only file system: "
        "choose a folder that you may write to.",
    ):
        write_atomic(read_only_disk / "text", "x")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with says(
        MergeKitError,
        f"{tmp_path}/file/text cannot be written: File exists: check the folder and the disk.",
    ):
        write_atomic(tmp_path / "file" / "text", "x")


def test_new_folder_is_not_there_until_it_is_whole(tmp_path):
    with new_folder(tmp_path / "a" / "model") as draft:
        fill(draft, "new")
        assert not (tmp_path / "a" / "model").exists()
    assert (tmp_path / "a" / "model" / "model").read_text() == "new"
    assert listing(tmp_path / "a") == ["model"]


def test_new_folder_refuses_an_existing_one(tmp_path):
    (tmp_path / "model").mkdir()
    sentence = f"{tmp_path}/model exists already: choose another folder or remove this one."
    with says(UsageError, sentence), new_folder(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == ["model"]


def test_new_folder_replaces_when_asked(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "model", replace=True) as draft:
            fill(draft, text)
    assert (tmp_path / "model" / "model").read_text() == "new"
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path, stop):
    with new_folder(tmp_path / "model") as draft:
        fill(draft, "old")

    def interrupted():
        with new_folder(tmp_path / "model", replace=True) as draft:
            fill(draft, "new")
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert (tmp_path / "model" / "model").read_text() == "old"
    assert listing(tmp_path) == ["model"]


def test_a_folder_lost_between_the_two_renames_is_put_back(tmp_path):
    (tmp_path / ".model.old").mkdir()
    fill(tmp_path / ".model.old", "old")
    with pytest.raises(UsageError), new_folder(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert (tmp_path / "model" / "model").read_text() == "old"
    assert listing(tmp_path) == ["model"]


def test_what_a_killed_run_left_is_not_in_the_new_folder(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    fill(tmp_path / ".model.partial", "half")
    with new_folder(tmp_path / "model"):
        pass
    assert listing(tmp_path / "model") == []


def test_a_retired_folder_that_was_not_removed_is_no_obstacle(tmp_path):
    for name in ("model", ".model.old"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    with new_folder(tmp_path / "model", replace=True) as draft:
        fill(draft, "new")
    assert (tmp_path / "model" / "model").read_text() == "new"
    assert listing(tmp_path) == ["model"]


def test_a_second_process_is_kept_out_of_a_folder_that_is_being_written(tmp_path):
    sentence = (
        f"{tmp_path}/model is being written by another process: wait for it, or choose another "
        "folder."
    )
    with new_folder(tmp_path / "model") as draft:
        fill(draft, "first")
        with says(MergeKitError, sentence), new_folder(tmp_path / "model", replace=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "model" / "model").read_text() == "first"
    assert listing(tmp_path) == ["model"]


def test_the_lock_file_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / ".model.lock").touch()
    with new_folder(tmp_path / "model") as draft:
        fill(draft, "new")
    assert listing(tmp_path) == ["model"]


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("model")
    for text in ("first", "second", "third"):
        with new_folder(tmp_path / "link", replace=True) as draft:
            fill(draft, text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "model" / "model").read_text() == "third"
    assert listing(tmp_path) == ["link", "model"]


def test_new_folder_on_a_read_only_disk_is_named(read_only_disk):
    sentence = (
        f"{read_only_disk}/model cannot be written: Read-only file system: "
        "choose a folder that you may write to."
    )
    with says(MergeKitError, sentence), new_folder(read_only_disk / "model"):
        pytest.fail("the block must not run")


def test_writers_wait_for_their_turn(tmp_path):
    path, order = tmp_path / "report.json", []

    def write(name):
        with in_turn(path):
            order.append(name)
            time.sleep(0.1)
            order.append(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[0::2] == order[1::2]
    assert sorted(order[0::2]) == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == []
