"""A site's fine-tuning runs."""

from __future__ import annotations

import os

from merge_kit.runs import SUMMARY, latest_run


def finish(root, name, when):
    path = root / "runs" / name / SUMMARY
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    os.utime(path, (when, when))
    return path.parent


def test_the_run_that_finished_last_is_found(tmp_path):
    newer = finish(tmp_path, "a", 2_000)
    finish(tmp_path, "z", 1_000)
    assert latest_run(tmp_path) == newer


def test_runs_that_are_hidden_or_unfinished_do_not_count(tmp_path):
    finish(tmp_path, ".a.partial", 1_000)
    (tmp_path / "runs" / "b").mkdir()
    assert latest_run(tmp_path) is None
    assert latest_run(tmp_path / "nowhere") is None
