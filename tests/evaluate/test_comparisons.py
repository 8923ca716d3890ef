"""Paired differences: their intervals, p-values, and the families that these are adjusted in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluate.document import Comparison, Report
from evaluate.metrics import delong_test, holm
from tests.evaluate.judged import cases, certain, four_models, letters, predictions
from tests.evaluate.judged import report as report_of


def family(report: Report, name: str) -> list[Comparison]:
    return [entry for entry in report.comparisons if entry.family == name]


def test_differences_are_paired() -> None:
    labelled = cases()
    model = predictions(labelled, "merged", "merged")
    report = report_of(labelled, [model, replace(model, model="own", role="site:lyon")])
    assert report.comparisons
    for entry in report.comparisons:
        found = entry.difference
        assert (found.value, found.low, found.high, entry.p) == (0, None, None, 1)


def test_the_best_model_is_compared_with_every_other() -> None:
    labelled = cases()
    report = report_of(labelled, four_models(labelled))
    found = [(e.scope, e.model, e.against) for e in family(report, "best")]
    others = ["own", "merged", "start"]
    assert found[:3] == [("union", "pooled", name) for name in others]
    assert {scope for scope, _, _ in found[3:]} == {"mean_over_sites"}
    assert len(found) == 6


def test_the_best_merged_model_is_compared_with_the_best_of_each_other_kind() -> None:
    labelled = cases()
    weak = predictions(labelled, "weak", "merged", 0.1)
    worse = predictions(labelled, "worse", "site:oslo", -1)
    report = report_of(labelled, [weak, worse, *four_models(labelled)])
    entries = family(report, "kinds")
    assert [(e.scope, e.model, e.against) for e in entries] == [
        ("union", "merged", name) for name in ("pooled", "own", "start")
    ]
    expected = holm([entry.p or 0 for entry in entries])
    assert [entry.p_adjusted for entry in entries] == pytest.approx(expected.tolist())


def test_without_a_merged_model_kinds_are_not_compared() -> None:
    labelled = cases()
    assert not family(report_of(labelled, four_models(labelled)[1:]), "kinds")


def test_every_merged_model_is_compared_with_a_sites_own_at_that_site() -> None:
    labelled = cases()
    report = report_of(labelled, four_models(labelled), resamples=200)
    (entry,) = family(report, "own")
    assert (entry.scope, entry.model, entry.against) == ("site:lyon", "merged", "own")
    merged, own = (
        m.on("site:lyon").figures["balanced_accuracy"].value or 0 for m in report.models[:2]
    )
    assert entry.difference.value == pytest.approx(merged - own)
    assert entry.difference.low is not None
    assert entry.difference.high is not None
    assert entry.difference.low < merged - own < entry.difference.high
    assert entry.difference.n == len(labelled.rows("site:lyon"))


def test_a_reference_is_compared_with_all_by_both_scores() -> None:
    labelled = cases()
    report = report_of(labelled, four_models(labelled), reference="start", external=("oslo",))
    found = family(report, "reference")
    assert {entry.against for entry in found} == {"start"}
    assert {entry.scope for entry in found} == {"union", "external", "mean_over_sites"}
    assert {entry.score for entry in found} == {"balanced_accuracy", "macro_auroc"}
    assert len(found) == 3 * 3 * 2


def test_p_values_are_adjusted_by_holm_within_their_family() -> None:
    labelled = cases()
    report = report_of(labelled, four_models(labelled), reference="start", resamples=200)
    for name in ("best", "own", "reference"):
        entries = family(report, name)
        expected = holm([entry.p or 0 for entry in entries])
        assert [entry.p_adjusted for entry in entries] == pytest.approx(expected.tolist())


def test_a_clear_difference_has_a_small_p_value_and_none_a_large_one() -> None:
    labelled = cases(300)
    clear = report_of(
        labelled, [predictions(labelled, "a", skill=3), predictions(labelled, "b", skill=0)]
    )
    assert all((entry.p or 1) < 0.05 for entry in clear.comparisons)
    alike = report_of(
        labelled, [predictions(labelled, "a", skill=1), predictions(labelled, "b", skill=1)]
    )
    assert any((entry.p or 0) > 0.05 for entry in alike.comparisons)


def test_independent_cases_are_compared_class_by_class_as_delong_does() -> None:
    labelled = cases(patients=(None,) * 120, unit="case")
    models = four_models(labelled)
    report = report_of(labelled, models)
    entries = [e for e in family(report, "auroc") if (e.model, e.against) == ("pooled", "start")]
    assert [entry.label for entry in entries] == list(labelled.classes)
    for column, entry in enumerate(entries):
        pair = (models[2].probabilities[:, column], models[3].probabilities[:, column])
        expected = delong_test(labelled.targets[:, column], *pair)
        assert entry.p == pytest.approx(expected.p)
        assert entry.difference.value == pytest.approx(expected.difference)


def test_cases_of_known_patients_are_not_compared_by_delong() -> None:
    labelled = cases()
    assert not family(report_of(labelled, four_models(labelled)), "auroc")


def test_what_cannot_be_resampled_has_no_p_value() -> None:
    labelled = cases(patients=("one",) * 120)
    report = report_of(labelled, four_models(labelled))
    assert {entry.p for entry in report.comparisons} == {None}
    assert {entry.p_adjusted for entry in report.comparisons} == {None}
    assert not np.isnan(report.comparisons[0].difference.value or 0)


def test_aurocs_that_delong_cannot_compare_have_no_p_value() -> None:
    labelled = letters("aaaaabbbbb", " " * 10)
    perfect, even = certain("aaaaabbbbb", "perfect"), certain("a" * 10, "even", "base")
    entries = family(report_of(labelled, [perfect, even]), "auroc")
    assert [(e.difference.value, e.p, e.p_adjusted) for e in entries] == [(0.5, None, None)] * 2
