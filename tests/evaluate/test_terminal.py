"""The table that `evaluate` prints."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from evaluate import terminal
from evaluate.document import Report
from tests.evaluate.reports import made_up

NAMES = tuple(f"abcdefghij{index:02}" for index in range(9))


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up(dict.fromkeys(NAMES, "merged"), external=("kiel",))


def printed(report: Report, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal.table(report))
    return captured.get()


def test_nine_models_stand_whole_in_80_columns(report: Report) -> None:
    words = printed(report, 80).split()
    for model in report.models:
        union = model.on("union").figures["balanced_accuracy"]
        external = model.on("external").figures["balanced_accuracy"]
        assert model.name in words
        for figure in (union, external):
            assert f"{figure.low:.2f}-{figure.high:.2f}" in words
            assert f"{figure.value:.3f}" in words


@pytest.mark.parametrize("width", [60, 40])
def test_a_narrow_terminal_folds_and_loses_nothing(report: Report, width: int) -> None:
    def letters(text: str) -> list[str]:
        return sorted(re.sub(r"[^a-z0-9.]", "", text))

    text = printed(report, width)
    assert "…" not in text
    assert letters(text) == letters(printed(report, 80))


def test_the_title_has_the_level_of_the_intervals(report: Report) -> None:
    resampling = report.resampling.model_copy(update={"level": 0.9})
    changed = report.model_copy(update={"resampling": resampling})
    assert printed(changed, 80).startswith("balanced accuracy (90 % interval below)")
