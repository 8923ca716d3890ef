"""What plots, tables and words make of a report's figures."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from evaluate.document import Figure
from evaluate.page import calibration, curves, forest, reading, tables, vectors, words
from evaluate.wording import number
from tests.evaluate.reports import made_up
from tests.evaluate.sentences import similarity

REPORT = made_up(reference="base")


def test_dots_and_intervals_lie_where_the_figures_say() -> None:
    (zero, *_), *_, (one, *_) = (panel := forest.score_panels(REPORT)[0]).ticks
    low = float(panel.ticks[0][1])
    for row, model in zip(panel.rows, REPORT.models, strict=True):
        figure = model.scopes[0].figures["balanced_accuracy"]
        for x, value in ((row.low, figure.low), (row.x, figure.value), (row.high, figure.high)):
            assert x is not None
            share = (x - zero) / (one - zero)
            assert low + (1 - low) * share == pytest.approx(value, abs=2e-3)


def test_the_sites_own_model_is_marked_at_its_site_and_nowhere_else() -> None:
    own = {
        (p.heading, row.name)
        for p in forest.score_panels(REPORT)
        for row in p.rows
        if row.kind == "own"
    }
    assert own == {(site, site) for site in ("lyon", "oslo", "graz")}


def test_zero_is_in_the_middle_of_all_differences() -> None:
    panels = forest.difference_panels(REPORT)
    assert {panel.reference for panel in panels} == {170.0}
    assert {tuple(label for _, label in panel.ticks) for panel in panels} == {("−0.2", "0", "+0.2")}
    for row in (row for panel in panels for row in panel.rows):
        assert row.x is not None
        assert (row.x > 170) == row.figure.startswith("+")


def test_the_curves_drawn_first_are_the_best_merged_reference_pooled_and_single() -> None:
    kinds = [model.role.partition(":")[0] for model in reading.chosen(REPORT)]
    assert kinds == ["merged", "base", "pooled", "site"]


def test_all_of_few_models_are_drawn_in_their_order() -> None:
    report = made_up({"b": "base", "a": "merged"})
    assert [model.name for model in reading.chosen(report)] == ["b", "a"]


def test_a_withheld_class_has_an_empty_plot() -> None:
    report = made_up(undefined=("monocyte",))
    panel = curves.roc_panels(report, report.models[:4])[-1]
    assert panel.empty == "withheld or undefined"
    assert not any(line.path or line.band for line in panel.lines)


def test_curves_are_told_apart_by_letter_and_dash() -> None:
    for panel in curves.net_benefit_panels(REPORT, REPORT.models[:4]):
        assert [line.letter for line in panel.lines] == list("ABCD")
        assert len({line.style for line in panel.lines}) == 4
        assert all(line.path and line.band and line.x is not None for line in panel.lines)
        assert panel.everyone
        assert panel.nobody


def test_reliability_points_lie_at_confidence_and_fraction() -> None:
    model = REPORT.models[0]
    for bar, row in zip(calibration.reliability_panel(model).bars, model.reliability, strict=True):
        if row.n is None:
            assert (bar.count, bar.x, bar.y) == ("*", None, None)
            continue
        assert (bar.x, bar.y, row.observed, row.confidence) != (None,) * 4
        assert bar.count == str(row.n)
        assert (bar.x or 0) == pytest.approx(46 + 248 * (row.confidence or 0), abs=0.1)
        assert (bar.y or 0) == pytest.approx(208 - 200 * (row.observed or 0), abs=0.1)


def test_only_so_many_norms_are_drawn_as_can_be_told_apart() -> None:
    plot = vectors.norms_plot(similarity([f"m{i}" for i in range(11)], np.random.default_rng(0)))
    assert (len(plot.lines), plot.left_out) == (8, 3)
    heights = sorted(line[3] for line in plot.lines)
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(heights))


def test_errors_are_best_when_low_and_calibration_has_no_best() -> None:
    figures = [Figure(value=0.1), Figure(value=0.4), None, Figure(value=None)]
    assert reading.best(figures, "auroc") == 0.4
    assert reading.best(figures, "brier") == 0.1
    assert reading.best(figures, "calibration_slope") is None
    assert reading.best(figures[:1], "auroc") is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("auprc", "AUPRC"),
        ("sensitivity_at_0.95", "Sensitivity at the threshold for specificity 0.95"),
        ("ppv_at_prevalence", "PPV at stated prevalence"),
        ("some_new_score", "Some new score"),
    ],
)
def test_scores_have_names_for_people(key: str, name: str) -> None:
    assert words.score_name(key) == name


def test_scores_stand_in_one_order_with_unknown_ones_last() -> None:
    keys = ["zeta", "brier", "sensitivity_at_0.95", "specificity", "sensitivity", "auroc"]
    assert words.in_order(keys) == [
        "auroc", "sensitivity", "sensitivity_at_0.95", "specificity", "brier", "zeta"
    ]  # fmt: skip


def test_numbers_are_written_as_in_print() -> None:
    assert [number(v) for v in (0.12345, -0.5, -0.0001)] == ["0.123", "−0.500", "0.000"]
    assert [words.signed(v) for v in (0.1, -0.1, 0.0)] == ["+0.100", "−0.100", "0.000"]
    assert [words.p_value(p) for p in (None, 0.0004, 0.04, 1.0)] == [
        "–",
        "<0.001",
        "0.040",
        "1.000",
    ]
    assert words.span(Figure(value=0.0, low=-0.1, high=0.1)) == "−0.100 to 0.100"
    assert words.span(Figure(value=0.0)) == ""


def test_names_are_cut_in_their_middle() -> None:
    assert words.shortened("federation-ties-0.2", 12) == "federat…-0.2"
    assert words.shortened("short", 12) == "short"


def test_roles_are_written_unless_the_name_says_them() -> None:
    assert words.role_name("site:lyon", "lyon") == "trained at lyon"
    assert words.role_name("base", "base") == ""
    assert words.role_name("other", "x") == ""
    assert [words.kind(role) for role in ("site:a", "merged", "new")] == ["site", "merged", "other"]


def test_the_thresholds_of_a_model_stand_below_its_figures() -> None:
    table = tables.classes_table(REPORT, REPORT.models[0])
    (row,) = (row for row in table.rows if row.head.text == "Threshold for specificity 0.95")
    expected = [number(entry.threshold or 0) for entry in REPORT.models[0].thresholds]
    assert [cell.text for cell in row.cells] == expected
    assert row.head.sub == "from validation cases"


@pytest.mark.parametrize("floor", [0.0, 0.13, 0.38, 0.55, 0.79, 0.97])
def test_the_axis_of_scores_begins_on_a_tick_below_every_interval(floor: float) -> None:
    report = made_up(sites=())
    models = tuple(
        m.model_copy(
            update={
                "scopes": tuple(
                    s.model_copy(
                        update={"figures": dict.fromkeys(s.figures, Figure(value=1.0, low=floor))}
                    )
                    for s in m.scopes
                )
            }
        )
        for m in report.models
    )
    (panel,) = forest.score_panels(report.model_copy(update={"models": models}))
    first, label = panel.ticks[0]
    assert first == 126.0
    assert float(label) <= floor


def test_a_net_benefit_is_drawn_where_its_band_is_undefined() -> None:
    model = REPORT.models[0]
    (found, *_) = model.curves
    assert found.net_benefit is not None
    none = (None,) * len(found.net_benefit.x)
    curve = found.net_benefit.model_copy(update={"low": none, "high": none})
    bare = model.model_copy(update={"curves": (found.model_copy(update={"net_benefit": curve}),)})
    (line,) = curves.net_benefit_panels(REPORT, [bare])[0].lines
    assert line.path
    assert not line.band


def test_the_letter_of_a_line_lies_on_it_where_the_net_benefit_is_0() -> None:
    model = REPORT.models[0]
    (found, *_) = model.curves
    assert found.net_benefit is not None
    x = found.net_benefit.x
    curve = found.net_benefit.model_copy(
        update={"y": (0.1,) + (0.0,) * (len(x) - 1), "low": None, "high": None}
    )
    bare = model.model_copy(update={"curves": (found.model_copy(update={"net_benefit": curve}),)})
    (line,) = curves.net_benefit_panels(REPORT, [bare])[0].lines
    ends = [float(number) for number in re.findall(r" ([\d.]+)", line.path)]
    assert line.y is not None
    assert min(ends) <= line.y <= max(ends)
