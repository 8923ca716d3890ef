"""The table: means, spreads, and how far a way goes."""

from __future__ import annotations

import pytest

from evaluate.experiments.results import (
    AVERAGE,
    FIGURES,
    HEADINGS,
    Row,
    cells,
    lines_of,
    to_csv,
    to_markdown,
)


def row(seed, model, union, **changes):
    figures = {**dict.fromkeys(FIGURES), "union": union, **changes}
    return Row(seed, model, figures, 8.5, 1)


def test_means_and_spreads_are_over_the_seeds():
    rows = [row(0, "sum", 0.8), row(1, "sum", 0.9), row(2, "sum", 1.0)]
    (line,) = lines_of(rows)
    assert line.mean["union"] == pytest.approx(0.9)
    assert line.spread["union"] == pytest.approx(0.1)
    assert line.mean["unseen"] is line.spread["unseen"] is None


def test_a_figure_of_one_seed_has_no_spread():
    rows = [row(0, "sum", 0.8, unseen=0.7), row(1, "sum", 0.9)]
    (line,) = lines_of(rows)
    assert (line.mean["unseen"], line.spread["unseen"]) == (0.7, None)


def test_the_way_goes_from_the_mean_single_site_to_the_pooled_model():
    rows = [row(0, AVERAGE, 0.6), row(0, "pooled", 0.9), row(0, "sum", 0.84)]
    assert [line.way for line in lines_of(rows)] == [pytest.approx(v) for v in (0.0, 1.0, 0.8)]


@pytest.mark.parametrize("pooled", [None, 0.6, 0.5])
def test_without_a_way_there_is_none(pooled):
    rows = [row(0, AVERAGE, 0.6), row(0, "pooled", pooled), row(0, "sum", 0.84)]
    assert [line.way for line in lines_of(rows)] == [None] * 3


def test_the_tables_hold_what_was_found():
    rows = [row(0, "sum", 0.8), row(1, "sum", 0.9)]
    (line,) = lines_of(rows)
    assert dict(zip(HEADINGS, cells(line), strict=True)) == {
        "model": "sum", "union": "0.850 ± 0.071", "mean over sites": "", "worst site": "",
        "worst class": "", "unseen site": "", "ECE": "", "MB per site": "8.5", "visits": "1",
        "way to pooled": "",
    }  # fmt: skip
    assert to_csv(rows).splitlines()[1] == "0,sum,0.800000,,,,,,8.500,1"
    assert to_markdown([line]).count("\n") == 3
