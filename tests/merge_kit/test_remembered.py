"""What is remembered of files: real files, a real cache folder, and the clock's two seconds."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from merge_kit.encoding import Decoded
from merge_kit.errors import TensorFileError
from merge_kit.remembered import LIMIT, VARIABLE, Checked, cache_folder, check_unchanged, look
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.vector import Measured, measure
from tests.merge_kit.helpers import listing, says, settle


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Files that nobody has touched for two seconds; each test takes one."""
    folder = tmp_path_factory.mktemp("settled")
    for number in range(40):
        write_tensors(folder / f"{number}", {"a": torch.full((3,), float(number))})
    settle(folder)
    return iter(sorted(folder.iterdir()))


@pytest.fixture
def settled(pool):
    return next(pool)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


class Reader:
    """Looks at a file and counts how often it had to be read."""

    def __init__(self):
        self.readings = 0

    def find(self, file):
        self.readings += 1
        return measure(Decoded(file, {}))

    def look(self, path, **options):
        with TensorFile(path) as file:
            return look(file, Measured, self.find, **options)


@pytest.fixture
def reader():
    return Reader()


def record_of(cache):
    (name,) = listing(cache)
    return cache / name


def test_a_settled_file_is_read_once(cache, settled, reader):
    found, checked = reader.look(settled)
    with TensorFile(settled) as file:
        assert checked == Checked(file.identity(), remembered=False)
    assert reader.look(settled) == (found, Checked(checked.identity, remembered=True))
    assert reader.readings == 1


def test_asked_to_look_again_it_reads_again(cache, settled, reader):
    reader.look(settled)
    assert reader.look(settled, again=True)[1].remembered is False
    assert reader.readings == 2


def test_a_fresh_file_is_not_remembered(cache, tmp_path, reader):
    """A second change within one tick of the clock would leave no trace."""
    write_tensors(tmp_path / "fresh", {"a": torch.zeros(3)})
    os.utime(tmp_path / "fresh", (0, 0))  # its time of change is of now, whatever it claims
    for _ in range(2):
        assert reader.look(tmp_path / "fresh")[1].remembered is False
    assert not cache.exists()


def test_a_changed_file_is_read_again_though_its_time_was_put_back(cache, settled, reader):
    before, _ = reader.look(settled)
    times, content = settled.stat(), settled.read_bytes()
    settled.write_bytes(content[:-1] + b"\x01")
    os.utime(settled, ns=(times.st_atime_ns, times.st_mtime_ns))
    found, checked = reader.look(settled)
    assert (checked.remembered, found.sha256 != before.sha256) == (False, True)


def test_another_file_in_its_place_is_read(cache, pool, reader):
    one, two = next(pool), next(pool)
    reader.look(one)
    expected, _ = reader.look(two)
    two.replace(one)
    found, checked = reader.look(one)
    assert (checked.remembered, found) == (False, expected)


def test_another_kind_of_finding_is_not_taken_for_this_one(cache, settled, reader):
    class Other(Measured):
        pass

    reader.look(settled)
    with TensorFile(settled) as file:
        found, checked = look(file, Other, lambda f: Other(sha256="sha256:" + "0" * 64, norm=1.0))
    assert (checked.remembered, found.norm) == (False, 1.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: b"",
        lambda record: b"\xff",
        lambda record: b"{}",
        lambda record: b"[" * 60_000,
        lambda record: b" " * 70_000 + json.dumps(record).encode(),
        lambda record: json.dumps(record).encode()[:-1],
        lambda record: json.dumps({**record, "format": 2}).encode(),
        lambda record: json.dumps({**record, "odd": 1}).encode(),
        lambda record: json.dumps({**record, "identity": record["identity"][:-1]}).encode(),
        lambda record: json.dumps({**record, "identity": [*map(str, record["identity"])]}).encode(),
        lambda record: json.dumps({**record, "found": {"norm": 1.0}}).encode(),
        lambda record: json.dumps({**record, "found": {**record["found"], "x": 1}}).encode(),
        lambda record: json.dumps(
            {**record, "found": {**record["found"], "sha256": "md5"}}
        ).encode(),
        lambda record: json.dumps({**record, "found": [1]}).encode(),
    ],
    ids=[
        "empty", "bytes", "nothing", "deep", "large", "cut", "format", "key", "short identity",
        "text identity", "no digest", "key of finding", "odd digest", "list",
    ],
)  # fmt: skip
def test_an_odd_record_is_not_believed(cache, settled, reader, spoil):
    expected, _ = reader.look(settled)
    record = record_of(cache)
    record.write_bytes(spoil(json.loads(record.read_bytes())))
    found, checked = reader.look(settled)
    assert (found, checked.remembered) == (expected, False)
    assert reader.look(settled)[1].remembered is True


def test_a_record_names_no_path(cache, settled, reader):
    reader.look(settled)
    record = record_of(cache)
    assert settled.parent.name not in record.read_text()
    assert set(json.loads(record.read_bytes())) == {"format", "identity", "found"}
    assert record.parent.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_is_switched_off_remembers_nothing(monkeypatch, tmp_path, settled, reader):
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        reader.look(settled)
    assert (reader.readings, listing(tmp_path)) == (2, [])


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch, tmp_path, read_only_disk, settled, reader
):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", read_only_disk / "cache"):
        monkeypatch.setenv(VARIABLE, str(place))
        assert reader.look(settled)[1].remembered is False
    assert reader.readings == 2


def test_a_folder_that_others_may_write_to_is_not_used(cache, settled, reader):
    reader.look(settled)
    cache.chmod(0o777)
    assert reader.look(settled)[1].remembered is False
    cache.chmod(0o700)
    assert reader.look(settled)[1].remembered is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_somebody_elses_folder_is_not_used(cache, settled, reader):
    reader.look(settled)
    os.chown(cache, 12345, -1)
    assert reader.look(settled)[1].remembered is False


def test_old_records_give_way_and_other_files_stay(cache, settled, reader):
    cache.mkdir(mode=0o700, parents=True)
    (cache / "notes.txt").touch()
    for number in range(LIMIT):
        path = cache / f"{number:064x}.json"
        path.touch()
        os.utime(path, (number, number))
    os.utime(cache / "notes.txt", (0, 0))
    reader.look(settled)
    left = listing(cache)
    assert len(left) == LIMIT * 3 // 4 + 2
    assert "notes.txt" in left
    assert f"{LIMIT // 4 - 1:064x}.json" not in left
    assert f"{LIMIT // 4:064x}.json" in left
    assert reader.look(settled)[1].remembered is True


def test_where_records_lie(monkeypatch, tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("checked") == home / ".cache" / "merge-kit" / "checked"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("checked") == home / ".cache" / "merge-kit" / "checked"
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    assert cache_folder("checked") == other / "merge-kit" / "checked"
    monkeypatch.setenv(VARIABLE, "~/mine")
    assert cache_folder("checked") == home / "mine" / "checked"
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_folder("checked") is None


def test_a_file_that_changes_while_it_is_read_is_refused(cache, settled):
    def find(file):
        os.utime(settled)
        return measure(Decoded(file, {}))

    with (
        TensorFile(settled) as file,
        says(
            TensorFileError,
            f"{settled} changed after it was checked: let whatever writes there finish, "
            "then run the same command again.",
        ),
    ):
        look(file, Measured, find)
    assert not cache.exists()


def test_an_open_file_is_what_was_checked_until_it_changes(tmp_path):
    write_tensors(tmp_path / "f", {"a": torch.zeros(3)})
    with TensorFile(tmp_path / "f") as file:
        checked = Checked(file.identity(), remembered=False)
        check_unchanged(file, checked)
        time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
        with (tmp_path / "f").open("r+b") as writer:
            writer.seek(-1, os.SEEK_END)
            writer.write(b"\x01")
        with pytest.raises(TensorFileError, match=r"/f changed after it was checked"):
            check_unchanged(file, checked)
