"""A merged model's folder, and the running sum beside it, on a real hub."""

from __future__ import annotations

import pytest

from merge_kit import running
from merge_kit.running import FOLDER, RECORD, SUMS
from tests.merge_kit.helpers import listing


@pytest.fixture
def merge_all(run_cli, hub, tmp_path):
    """Merge what is on the hub through the command, with more options."""

    def run(out="merged", *options):
        result = run_cli("merge", hub.root, "--out", tmp_path / out, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    return run


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def counts(number):
    return {"round": number, "lobed": number, "granular": number}


@pytest.fixture
def three(contribute):
    """Three sites that have published."""
    for index, name in enumerate(("north", "south", "west")):
        contribute(name, seed=index, counts=counts(10 + index))


def test_a_site_that_arrives_is_the_only_one_read(three, contribute, merge_all, tmp_path):
    said = merge_all("merged", "--keep-sum")
    assert "3 vector(s) read, the running sum is kept beside the model" in said
    contribute("east", seed=9, counts=counts(30))
    said = merge_all("merged", "--replace")
    assert "1 vector(s) read, the running sum is kept beside the model" in said
    merge_all("scratch", "--keep-sum")
    assert content(tmp_path / "merged") == content(tmp_path / "scratch")
    merge_all("plain")
    weights = [tmp_path / out / "model.safetensors" for out in ("merged", "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "plain" / FOLDER).exists()


def test_merging_the_same_again_reads_no_vector(three, merge_all, tmp_path):
    merge_all("merged", "--keep-sum")
    before = content(tmp_path / "merged")
    assert "0 vector(s) read, the running sum is kept" in merge_all("merged", "--replace")
    assert content(tmp_path / "merged") == before
    said = merge_all("merged", "--replace", "--scale", "0.5")
    assert "0 vector(s) read" in said
    merge_all("scratch", "--keep-sum", "--scale", "0.5")
    assert content(tmp_path / "merged") == content(tmp_path / "scratch")


def test_a_site_that_withdraws_leaves_no_trace(three, merge_all, tmp_path):
    """Its vector is taken away, and all bytes are those of a merge that never had it."""
    merge_all("merged", "--keep-sum")
    said = merge_all("merged", "--replace", "--exclude", "south")
    assert "1 vector(s) read" in said
    merge_all("never", "--keep-sum", "--exclude", "south")
    assert content(tmp_path / "merged") == content(tmp_path / "never")


def test_a_vector_that_is_gone_from_the_hub_costs_a_merge_from_scratch(
    three, hub, merge_all, tmp_path
):
    merge_all("merged", "--keep-sum")
    for path in sorted((hub.root / "contributions" / "south").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    said = merge_all("merged", "--replace")
    assert "2 vector(s) read" in said
    merge_all("never", "--keep-sum")
    assert content(tmp_path / "merged") == content(tmp_path / "never")


@pytest.mark.parametrize("name", [SUMS, RECORD])
def test_a_damaged_sum_is_made_again(three, contribute, merge_all, tmp_path, name):
    merge_all("merged", "--keep-sum")
    path = tmp_path / "merged" / FOLDER / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    contribute("east", seed=9, counts=counts(30))
    said = merge_all("merged", "--replace")
    assert "4 vector(s) read, the running sum is kept" in said
    merge_all("scratch", "--keep-sum")
    assert content(tmp_path / "merged") == content(tmp_path / "scratch")


def test_the_sum_that_a_killed_run_had_put_aside_is_used(three, merge_all, tmp_path):
    merge_all("merged", "--keep-sum")
    before = content(tmp_path / "merged")
    (tmp_path / "merged").rename(tmp_path / ".merged.old")
    assert "0 vector(s) read, the running sum is kept" in merge_all("merged", "--replace")
    assert content(tmp_path / "merged") == before


def test_another_method_leaves_the_sum_behind(three, merge_all, tmp_path):
    merge_all("merged", "--keep-sum")
    said = merge_all("merged", "--replace", "--method", "median")
    assert FOLDER not in listing(tmp_path / "merged")
    lost = "no running sum is kept: the one that was there is gone, only linear methods have one"
    assert lost in said
    assert "running sum" not in merge_all("merged", "--replace", "--method", "median")


def test_a_sum_is_kept_of_linear_methods_only(three, run_cli, hub, tmp_path):
    result = run_cli(
        "merge", hub.root, "--method", "ties", "--keep-sum", "--out", tmp_path / "merged"
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: a running sum can be kept of linear methods only, 'ties' is none: leave --keep-sum "
        "out."
    )
    assert not (tmp_path / "merged").exists()


def test_a_sum_with_too_many_digits_is_said_and_not_kept(three, merge_all, tmp_path, monkeypatch):
    """As if every value needed its second number."""
    monkeypatch.setattr(running, "_MOST_RESTS", -1)
    said = merge_all("merged", "--keep-sum")
    assert "no running sum is kept: the vectors' sum has too many digits for one" in said
    assert FOLDER not in listing(tmp_path / "merged")
    monkeypatch.undo()
    merge_all("plain")
    assert content(tmp_path / "merged") == content(tmp_path / "plain")


def test_a_dry_run_shows_what_would_be_done_and_does_nothing(three, merge_all, tmp_path):
    before = listing(tmp_path)
    said = merge_all("merged", "--dry-run", "--method", "ties")
    assert listing(tmp_path) == before
    assert said.startswith("3 vectors: ")
    for words in ("ties", "norm mean", "rows from the sites", "Reads ", "Memory", "Time ", "MiB"):
        assert words in said
    assert (
        "Reads  each vector 2.0 times (less, where an earlier merge noted its first pass)" in said
    )


def test_a_dry_run_knows_of_running_sums_and_masks(three, merge_all, tmp_path):
    merge_all("merged", "--keep-sum")
    before = content(tmp_path / "merged")
    said = merge_all("merged", "--dry-run", "--replace", "--exclude", "north")
    assert "Reads  1 vector(s), the running sum there stands for the others\n" in said
    assert "for the running sum beside it" in said
    assert content(tmp_path / "merged") == before
    assert "Reads  each vector 1.0 times\n" in merge_all("other", "--dry-run", "--keep-sum")
    assert "for the sites' masks beside it" in merge_all("other", "--dry-run", "--method", "emr")
    assert "running sum" not in merge_all("other", "--dry-run")


def test_what_a_method_did_not_merge_itself_is_said(three, merge_all):
    said = merge_all("ace", "--method", "ace")
    assert "  ace merged 0 of 45 tensors itself, the others got the weighted mean\n" in said
    options = ("--method", "wudi", "--option", "others=base", "--option", "iterations=1")
    said = merge_all("wudi", *options, "--option", "tensors=kernels")
    assert "tensors itself, the others got the base's values\n" in said
    assert "itself" not in merge_all("ties", "--method", "ties")
