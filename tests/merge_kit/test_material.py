"""The file that was checked is the file that is merged."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from merge_kit import merging
from merge_kit.contributions import PAYLOAD, folder_of, list_entries
from merge_kit.errors import TensorFileError
from merge_kit.federation import read_federation
from merge_kit.material import opened
from merge_kit.methods import METHODS, Method
from merge_kit.methods.base import ByValue
from merge_kit.payloads import check_payloads
from merge_kit.recipe import make_recipe
from tests.merge_kit.helpers import listing, says, settle


def rewrite(path):
    """Other bytes in the same file, of the same size."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def spoil(path):
    """A value that is not a number: what comes of it is not the fault."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\x7f")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def exchange(path):
    """Another file of the same name, with the very bytes."""
    shutil.copy2(path, path.with_name(".new"))
    path.with_name(".new").replace(path)


def touch(path):
    """The same bytes: whether they really are is not worth a second reading."""
    os.utime(path)


def changing(*ways):
    return pytest.mark.parametrize("change", ways, ids=lambda change: change.__name__)


def refusal(path):
    return (
        f"{path} changed after it was checked: let whatever writes there finish, "
        "then run the same command again."
    )


@pytest.fixture
def payload(hub, contribute):
    """A payload among three; the clock has ticked since it was published."""
    parcels = [contribute(name, seed=seed) for seed, name in enumerate(("a", "b", "c"))]
    time.sleep(0.02)
    return hub.root / folder_of(parcels[1].manifest) / PAYLOAD


@pytest.fixture
def checked(hub):
    """What `merge` has checked before it begins."""

    def run():
        federation, base = read_federation(hub.root), hub.fetch("base/model.safetensors")
        entries = check_payloads(list_entries(hub, federation), federation, base)
        return merging.choose(entries, allow_unsigned=False, skip_refused=False)[0]

    return run


@pytest.fixture
def merge_checked(hub, tmp_path):
    def run(contributions, method="mean"):
        recipe = make_recipe({"method": method}, "test")
        base = hub.fetch("base/model.safetensors")
        federation = read_federation(hub.root)
        return merging.merge(federation, base, contributions, recipe, tmp_path / "merged")

    return run


@pytest.fixture
def meddle(monkeypatch):
    """A method that changes a file while it merges the first block, as somebody else might."""

    def install(action):
        pending = [action]

        def combine(block, weights, options, state):
            if pending:
                pending.pop()()
            return block.values.double().mean(dim=0)

        method = Method("meddle", "test", "changes a file", "none", ByValue(combine))
        monkeypatch.setitem(METHODS, "meddle", method)

    return install


@changing(rewrite, spoil, exchange, touch)
def test_a_payload_that_changes_between_check_and_merge_is_refused(
    payload, checked, merge_checked, meddle, tmp_path, change
):
    """Before any work is done."""
    contributions, begun = checked(), []
    change(payload)
    meddle(lambda: begun.append(True))
    with says(TensorFileError, refusal(payload)):
        merge_checked(contributions, "meddle")
    assert "merged" not in listing(tmp_path)
    assert not begun


@changing(rewrite, spoil, cut, exchange, touch)
@pytest.mark.parametrize("which", ["payload", "base"])
def test_a_file_that_changes_during_the_merge_is_refused_and_nothing_is_written(
    payload, checked, merge_checked, meddle, hub, tmp_path, change, which
):
    path = payload if which == "payload" else hub.fetch("base/model.safetensors")
    contributions, before = checked(), set(listing(tmp_path))
    meddle(lambda: change(path))
    with says(TensorFileError, refusal(path)):
        merge_checked(contributions, "meddle")
    assert set(listing(tmp_path)) == before


def test_a_merge_during_which_nothing_changes_goes_through(
    payload, checked, merge_checked, meddle, tmp_path
):
    meddle(lambda: payload.read_bytes())
    merge_checked(checked(), "meddle")
    assert "model.safetensors" in listing(tmp_path / "merged")


def test_what_was_not_checked_is_checked_when_it_is_opened(payload, hub, federation):
    federation = read_federation(hub.root)
    found = [e.contribution for e in list_entries(hub, federation)]
    base = hub.fetch("base/model.safetensors")
    with opened(federation, base, found[::-1]) as inputs:
        assert [c.id for c in inputs.contributions] == sorted(c.id for c in found)
        assert [s.id for s in inputs.sources] == sorted(c.id for c in found)
        assert all(c.checked and not c.checked.remembered for c in inputs.contributions)
    rewrite(payload)
    with (
        pytest.raises(Exception, match="damaged or replaced"),
        opened(federation, base, found),
    ):
        pass


def test_a_merge_says_what_it_relied_on(payload, hub, contribute, run_cli, tmp_path):
    """And the folder's bytes do not depend on it."""
    settle(hub.root)
    contribute("d", seed=4)
    said = []
    for name in ("first", "second"):
        result = run_cli("merge", hub.root, "--out", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        said += [line for line in result.stdout.splitlines() if "checked" in line]
    assert said == [
        "  checked now: 4 payloads and the base "
        f"(merge-kit verify {tmp_path / 'first'} --hub {hub.root} checks all again)",
        "  checked now: 1 payload; checked before and unchanged since: 3 payloads and the base "
        f"(merge-kit verify {tmp_path / 'second'} --hub {hub.root} checks all again)",
    ]
    for name in listing(tmp_path / "first"):
        first, second = (tmp_path / out / name for out in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name
