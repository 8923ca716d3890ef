"""Figures of a report: those of scikit-learn, withheld where cases are few, null if undefined."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from evaluate.document import Figure, Report
from evaluate.fitting import Validation
from evaluate.metrics import wilson_interval
from evaluate.predictions import Predictions
from finetune.scores import balanced_accuracy, bootstrap_intervals, macro_auroc
from merge_kit.errors import DataError, UsageError
from tests.evaluate.judged import (
    CLASSES,
    SITES,
    cases,
    certain,
    four_models,
    letters,
    many_and_few,
    predictions,
)
from tests.evaluate.judged import report as report_of


def on(report: Report, scope: str, name: str = "balanced_accuracy", model: int = 0) -> Figure:
    return report.models[model].on(scope).figures[name]


def test_figures_of_all_cases_and_of_sites_equal_those_of_scikit_learn() -> None:
    labelled = cases()
    model = predictions(labelled)
    report = report_of(labelled, model)
    for scope in ("union", *(f"site:{site}" for site in SITES)):
        rows = labelled.rows(scope)
        truth, chances = labelled.labels[rows], model.probabilities[rows]
        said = chances.argmax(axis=1)
        expected = {
            "balanced_accuracy": sklearn.recall_score(truth, said, average="macro"),
            "macro_auroc": sklearn.roc_auc_score(np.eye(3)[truth], chances, average="macro"),
            "accuracy": np.mean(truth == said),
            "kappa": sklearn.cohen_kappa_score(truth, said),
            "macro_f1": sklearn.f1_score(truth, said, average="macro"),
            "log_loss": sklearn.log_loss(truth, chances),
        }
        for name, value in expected.items():
            figure = on(report, scope, name)
            assert figure.value == pytest.approx(value)
            assert figure.n == len(rows)


def test_class_figures_and_confusion_equal_those_of_scikit_learn() -> None:
    labelled = cases()
    model = predictions(labelled)
    union = report_of(labelled, model, minimum=1).models[0].on("union")
    said = model.probabilities.argmax(axis=1)
    recalls = sklearn.recall_score(labelled.labels, said, average=None)
    precisions = sklearn.precision_score(labelled.labels, said, average=None)
    aurocs = sklearn.roc_auc_score(labelled.targets, model.probabilities, average=None)
    assert [row.name for row in union.classes] == list(CLASSES)
    for name, expected in (("sensitivity", recalls), ("ppv", precisions), ("auroc", aurocs)):
        assert [row.figures[name].value for row in union.classes] == pytest.approx(expected)
    found = [[n or 0 for n in row] for row in union.confusion or ()]
    assert found == sklearn.confusion_matrix(labelled.labels, said).tolist()


def test_a_tiny_report_by_hand() -> None:
    labelled = letters("aaabab", "xxxxyy")
    report = report_of(labelled, certain("aabaab"), minimum=1)
    (model,) = report.models
    assert on(report, "union").value == (3 / 4 + 1 / 2) / 2
    assert [on(report, f"site:{site}").value for site in "xy"] == [1 / 3, 1]
    assert on(report, "mean_over_sites").value == pytest.approx(2 / 3)
    assert model.worst_site is not None
    assert (model.worst_site.name, model.worst_site.n) == ("x", 4)
    assert model.worst_class is not None
    assert (model.worst_class.name, model.worst_class.value) == ("b", 1 / 2)
    assert model.on("union").confusion == ((3, 1), (1, 1))


def test_n_is_the_number_of_cases_that_a_figure_is_of() -> None:
    labelled = letters("aaaaaaaabb", "x" * 10)
    first, _ = report_of(labelled, certain("aaaaaaabbb"), minimum=1).models[0].on("union").classes
    found = {name: figure.n for name, figure in first.figures.items()}
    assert found["sensitivity"] == 8
    assert found["specificity"] == 2
    assert (found["ppv"], found["npv"]) == (7, 3)
    assert (found["brier"], found["auroc"]) == (10, 10)


def test_figures_of_few_cases_are_withheld_and_so_are_their_counts() -> None:
    labelled = letters("aaaaabbbb" + "ab", "x" * 9 + "yy")
    report = report_of(labelled, certain("aaaaabbbb" + "ab"))
    union, site = report.scopes[0], next(s for s in report.scopes if s.key == "site:y")
    assert [(c.n, c.small) for c in union.classes] == [(6, False), (5, False)]
    assert (site.cases, site.small) == (None, True)
    assert on(report, "site:y") == Figure(value=None, small=True)
    first, second = report.models[0].on("site:x").classes
    assert first.figures["sensitivity"].value == 1
    assert second.figures["sensitivity"] == Figure(value=None, small=True)
    assert second.figures["auroc"].small
    assert first.figures["specificity"].small
    assert second.prevalence is None
    assert report.models[0].on("union").confusion == ((6, 0), (0, 5))


def test_a_withheld_site_is_no_part_of_the_mean_over_sites() -> None:
    labelled = letters("aaaaabbbbb" + "ab", "x" * 10 + "yy")
    report = report_of(labelled, certain("aaaaabbbbb" + "ba"))
    assert on(report, "mean_over_sites").value == 1
    assert on(report, "mean_over_sites").n == 1


def test_what_is_undefined_is_null_and_the_report_is_plain_json() -> None:
    report = report_of(letters("aaaaa", "xxxxx"), certain("aaaab"))
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    assert json.loads(report.model_dump_json())["models"][0]["scopes"]
    assert on(report, "union", "macro_auroc").value is None
    second = report.models[0].on("union").classes[1]
    assert second.figures["sensitivity"] == Figure(value=None, n=0)


def test_no_case_at_all_gives_nulls_and_a_sentence() -> None:
    report = report_of(letters("", ""), certain(""))
    assert on(report, "union", "accuracy").value is None
    assert report.models[0].worst_site is None
    text = "No model has a defined balanced accuracy: there are too few labelled cases."
    assert report.verdict == (text,)


def test_patients_are_drawn_whole() -> None:
    labelled = cases()
    model = predictions(labelled)
    one_each = replace(labelled, patients=tuple(str(index) for index in range(120)))
    unknown = replace(labelled, patients=(None,) * 120)
    found = [on(report_of(c, model), "union") for c in (labelled, one_each, unknown)]
    assert found[0] != found[1]
    assert found[1] == found[2]


def test_intervals_are_those_of_the_bootstrap_by_patient() -> None:
    labelled = cases(sites=("lyon",) * 120)
    model = predictions(labelled)
    scores = {"balanced_accuracy": balanced_accuracy, "macro_auroc": macro_auroc}
    options: dict[str, Any] = {"groups": labelled.patients, "seed": [7, 0], "resamples": 50}
    expected = bootstrap_intervals(labelled.labels, model.probabilities, scores, **options)
    report = report_of(labelled, model, seed=7)
    for name, interval in expected.items():
        figure = on(report, "union", name)
        assert (figure.low, figure.high) == pytest.approx((interval.low, interval.high))


def test_auroc_of_independent_cases_has_the_interval_of_delong() -> None:
    labelled = cases(patients=(None,) * 120, unit="case")
    report = report_of(labelled, predictions(labelled))
    figures = [row.figures["auroc"] for row in report.models[0].on("union").classes]
    assert {figure.method for figure in figures} == {"delong"}
    assert report.models[0].on("union").figures["macro_auroc"].method == "bootstrap"
    by_patient = report_of(cases(), predictions(cases())).models[0].on("union").classes
    assert {row.figures["auroc"].method for row in by_patient} == {"bootstrap"}


@pytest.mark.parametrize(
    ("patients", "unit"), [((None,) * 4, "case"), (("1", None, "2", None), "patient or case")]
)
def test_unknown_patients_are_said_to_be_unknown(
    patients: tuple[str | None, ...], unit: str
) -> None:
    labelled = letters("abab", "xxyy", patients=patients, unit="patient")
    report = report_of(labelled, certain("abab"), minimum=1)
    assert report.resampling.unit == unit
    assert report.scopes[0].patients is None


def test_sites_of_one_case_have_no_interval_and_neither_has_their_mean() -> None:
    report = report_of(letters("ab", "xy"), certain("ab"), minimum=1)
    assert on(report, "site:x", "accuracy") == Figure(value=1, n=1)
    assert on(report, "mean_over_sites", "accuracy").low is None


def test_cases_without_a_site_count_in_the_union_only() -> None:
    report = report_of(letters("abab", "xx  "), certain("abba"), minimum=1)
    assert [s.name for s in report.sites()] == ["x"]
    assert on(report, "union").n == 4
    assert on(report, "mean_over_sites", "accuracy").value == 1


def test_a_site_keeps_its_figures_when_another_joins() -> None:
    labelled = cases()
    model = predictions(labelled)
    rows = labelled.rows("site:lyon")
    both = report_of(labelled, model)
    alone = report_of(labelled.take(rows), model.take(rows))
    assert both.models[0].on("site:lyon") == alone.models[0].on("site:lyon")


def test_external_sites_have_a_column_of_their_own() -> None:
    labelled = cases()
    report = report_of(labelled, predictions(labelled), external=("oslo",))
    assert on(report, "external") == on(report, "external")
    assert on(report, "external").value == on(report, "site:oslo").value
    assert [s.external for s in report.sites()] == [False, True]
    assert report.verdict[2].startswith("On oslo, which no model was trained on, “merged” has")


def test_the_best_merged_model_is_named_where_another_is_best_on_external_sites() -> None:
    labelled, models = many_and_few()
    said = report_of(labelled, models, external=("y",)).verdict
    text = next(s for s in said if s.startswith("On y, which no model was trained on"))
    assert (
        "“few” is best: 1.000 on 10 cases; “many”, the best merged model on all cases, has" in text
    )


def test_an_unknown_external_site_is_refused() -> None:
    labelled = cases()
    with pytest.raises(UsageError, match=r"--external rome: no case is of this site \(known: lyon"):
        report_of(labelled, predictions(labelled), external=("rome",))


def test_a_site_that_a_model_was_trained_on_is_not_external() -> None:
    labelled = cases()
    with pytest.raises(UsageError, match="--external lyon: model 'own' was trained on this site"):
        report_of(labelled, four_models(labelled), external=("lyon",))


def test_groups_have_figures_and_the_gap_between_best_and_worst_an_interval() -> None:
    labelled = cases()
    sex = tuple("fm"[index % 2] if index > 9 else "unknown" for index in range(120))
    grouped = replace(labelled, columns={"sex": sex})
    report = report_of(grouped, predictions(grouped))
    keys = [s.key for s in report.scopes if s.kind == "group"]
    assert keys == ["group:sex=f", "group:sex=m", "group:sex=unknown"]
    (gap,) = report.gaps
    assert gap.unknown == 10
    assert {gap.best, gap.worst} == {"group:sex=f", "group:sex=m"}
    values = [on(report, key).value or 0 for key in (gap.best, gap.worst)]
    assert gap.difference.value == pytest.approx(values[0] - values[1])
    assert gap.difference.low is not None
    assert gap.difference.low < (gap.difference.value or 0)


def test_every_model_has_its_gaps() -> None:
    grouped = cases(columns={"sex": ("f", "m") * 60})
    report = report_of(grouped, four_models(grouped))
    assert [gap.model for gap in report.gaps] == ["merged", "own", "pooled", "start"]


def test_withheld_scopes_have_the_scores_of_the_others() -> None:
    targets = np.random.default_rng(0).integers(0, 2, (12, 2)).astype(np.int8)
    labelled = letters("a" * 12, "x" * 10 + "yy", targets=targets, multi_label=True)
    report = report_of(labelled, predictions(labelled))
    names = [set(scope.figures) for scope in report.models[0].scopes]
    assert names[0] == names[-1] == names[1]
    assert "kappa" not in names[0]


def test_thresholds_are_fitted_on_validation_cases_and_used_on_the_others() -> None:
    labelled, held = cases(), cases(seed=1)
    model, own = predictions(labelled, "m", skill=2), predictions(held, "m", skill=2)
    report = report_of(labelled, model, Validation(held, [own]), specificities=(0.8,))
    point = report.models[0].thresholds[1]
    assert (point.name, point.specificity) == ("malignant", 0.8)
    rest = held.labels != 1
    assert np.mean(own.probabilities[rest, 1] < point.threshold) >= 0.8
    row = report.models[0].on("union").classes[1]
    flagged = model.probabilities[:, 1] >= point.threshold
    positive = labelled.labels == 1
    assert row.figures["sensitivity_at_0.8"].value == pytest.approx(flagged[positive].mean())
    assert row.figures["specificity_at_0.8"].value == pytest.approx(1 - flagged[~positive].mean())
    assert report.validation_cases == 120


def test_without_validation_cases_there_are_no_thresholds() -> None:
    labelled = cases()
    report = report_of(labelled, predictions(labelled))
    assert report.models[0].thresholds == ()
    assert not any("_at_" in n for n in report.models[0].on("union").classes[0].figures)


def test_calibration_lowers_the_log_loss_of_a_model_that_is_too_sure() -> None:
    def sure(labelled: Any) -> Predictions:
        model = predictions(labelled, "m", skill=1)
        odds = model.probabilities**5
        return replace(model, probabilities=odds / odds.sum(axis=1, keepdims=True))

    labelled, held = cases(600), cases(600, seed=1)
    plain = report_of(labelled, sure(labelled), Validation(held, [sure(held)]))
    calibrated = report_of(labelled, sure(labelled), Validation(held, [sure(held)], calibrate=True))
    assert plain.models[0].temperature is None
    assert (calibrated.models[0].temperature or 0) > 2
    before, after = (on(r, "union", "log_loss").value or 0 for r in (plain, calibrated))
    assert after < before
    assert on(calibrated, "union").value == on(plain, "union").value


def test_stated_prevalences_give_predictive_values_by_bayes() -> None:
    labelled = cases()
    report = report_of(labelled, predictions(labelled), prevalences={"malignant": 0.02})
    first, second, _ = report.models[0].on("union").classes
    figures = {name: figure.value or 0.0 for name, figure in second.figures.items()}
    hit = 0.02 * figures["sensitivity"]
    expected = hit / (hit + 0.98 * (1 - figures["specificity"]))
    assert figures["ppv_at_prevalence"] == pytest.approx(expected)
    assert first.figures["ppv_at_prevalence"].value is None


def test_several_labels_a_case_are_judged_class_by_class() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(-1, 2, (120, 3)).astype(np.int8)
    labelled = cases(targets=targets, multi_label=True)
    model = predictions(labelled)
    report = report_of(labelled, model)
    assert (report.task, report.main_score) == ("multi-label", "macro_auroc")
    for column, row in enumerate(report.models[0].on("union").classes):
        known = targets[:, column] >= 0
        expected = sklearn.roc_auc_score(targets[known, column], model.probabilities[known, column])
        assert row.figures["auroc"].value == pytest.approx(expected)
        assert row.figures["auroc"].n == known.sum()
    assert report.models[0].on("union").confusion is None
    assert "macro AUROC" in report.verdict[0]


def test_ordered_classes_have_a_quadratic_kappa() -> None:
    labelled = cases()
    model = predictions(labelled)
    expected = sklearn.cohen_kappa_score(
        labelled.labels, model.probabilities.argmax(axis=1), weights="quadratic"
    )
    ordered, plain = (report_of(labelled, model, ordered=o) for o in (True, False))
    assert on(ordered, "union", "quadratic_kappa").value == pytest.approx(expected)
    assert "quadratic_kappa" not in plain.models[0].on("union").figures


def test_curves_begin_and_end_where_they_must_and_lie_in_their_bands() -> None:
    labelled = cases()
    curves = report_of(labelled, predictions(labelled, skill=2)).models[0].curves[0]
    assert curves.roc is not None
    assert (curves.roc.x[0], curves.roc.x[-1], curves.roc.y[-1]) == (0, 1, 1)
    low, high = curves.roc.low or (), curves.roc.high or ()
    inside = [a <= y <= b for a, y, b in zip(low, curves.roc.y, high, strict=True)]  # type: ignore[operator]
    assert np.mean(inside) > 0.9
    assert curves.net_benefit is not None
    assert curves.net_benefit.low is not None
    assert curves.treat_all is not None
    prevalence = np.mean(labelled.labels == 0)
    assert curves.treat_all.y[0] == pytest.approx(prevalence - (1 - prevalence) / 99, abs=1e-6)


def test_reliability_bins_hold_every_case_and_few_are_withheld() -> None:
    labelled = cases()
    model = predictions(labelled, skill=2)
    bins = report_of(labelled, model, minimum=1).models[0].reliability
    assert sum(b.n or 0 for b in bins) == 120
    withheld = report_of(labelled, model, minimum=20).models[0].reliability
    counts = [b.n or 0 for b in bins]
    assert [b.n for b in withheld] == [None if 0 < n < 20 else n for n in counts]


def test_the_survey_means_models_at_home_and_abroad() -> None:
    labelled = cases()
    own = [predictions(labelled, s, f"site:{s}", 2) for s in SITES]
    pooled = predictions(labelled, "all", "pooled", 3)
    report = report_of(labelled, [*own, pooled])
    home = [on(report, f"site:{s}", model=i).value or 0 for i, s in enumerate(SITES)]
    abroad = [on(report, f"site:{s}", model=1 - i).value or 0 for i, s in enumerate(SITES)]
    rows = {row.name: row.balanced_accuracy for row in report.survey}
    assert rows["single"].value == pytest.approx(np.mean(home))
    assert rows["cross"].value == pytest.approx(np.mean(abroad))
    assert rows["mix"] == on(report, "mean_over_sites", model=2)
    low, high = rows["single"].low or 0, rows["single"].high or 0
    assert 0 < low < np.mean(home) < high < 1


def test_every_row_of_the_survey_is_over_the_sites_with_a_model_of_their_own() -> None:
    labelled = cases()
    models = [predictions(labelled, "l", "site:lyon", 2), predictions(labelled, "m", "merged", 1)]
    report = report_of(labelled, models)
    assert [row.name for row in report.survey] == ["single", "merged"]
    assert {row.sites for row in report.survey} == {("site:lyon",)}
    merged = report.survey[1].balanced_accuracy
    assert merged.value == on(report, "site:lyon", model=1).value
    assert merged.value != on(report, "mean_over_sites", model=1).value


def test_a_survey_without_sites_models_is_over_all_sites() -> None:
    labelled = cases()
    report = report_of(labelled, predictions(labelled, "m", "merged", 1))
    (row,) = report.survey
    assert set(row.sites) == {"site:lyon", "site:oslo"}
    assert row.balanced_accuracy == on(report, "mean_over_sites")


def test_every_score_has_a_mean_over_sites_of_those_that_have_it() -> None:
    labelled = letters("aaaaabbbbb" + "aaaaa", "x" * 10 + "y" * 5)
    report = report_of(labelled, certain("aaaabbbbba" + "aaaab"))
    both = [on(report, f"site:{site}", "brier").value or 0 for site in "xy"]
    assert on(report, "mean_over_sites", "brier").value == pytest.approx(np.mean(both))
    assert on(report, "mean_over_sites", "brier").n == 2
    assert on(report, "mean_over_sites", "macro_auroc").n == 1


def test_a_share_of_one_has_the_interval_of_wilson_by_patient() -> None:
    labelled = letters("aaaaaabbbbbb", " " * 12, patients=tuple("112233445566"), unit="patient")
    report = report_of(labelled, certain("aaaaaabbbbbb"), minimum=1)
    union = report.models[0].on("union")
    sensitivity = union.classes[0].figures["sensitivity"]
    low, high = wilson_interval(3, 3)
    assert (sensitivity.low, sensitivity.high) == pytest.approx((float(low), float(high)))
    assert (sensitivity.method, sensitivity.n) == ("wilson", 6)
    assert union.figures["accuracy"].low == pytest.approx(float(wilson_interval(6, 6)[0]))


def test_what_no_resample_changes_has_no_interval() -> None:
    report = report_of(letters("aaaaabbbbb", " " * 10), certain("aaaaabbbbb"))
    for name in ("balanced_accuracy", "macro_auroc", "kappa", "ece"):
        figure = on(report, "union", name)
        assert (figure.low, figure.high) == (None, None), name
    auroc = report.models[0].on("union").classes[0].figures["auroc"]
    assert (auroc.value, auroc.low) == (1, None)


def test_predictive_values_of_one_at_a_stated_prevalence_are_bounded_by_wilson() -> None:
    labelled = letters("aaaaabbbbb", " " * 10)
    report = report_of(labelled, certain("aaaaabbbbb"), prevalences={"a": 0.02})
    first, second = report.models[0].on("union").classes
    figure = first.figures["ppv_at_prevalence"]
    rate = float(wilson_interval(5, 5)[0])
    expected = 0.02 * rate / (0.02 * rate + 0.98 * (1 - rate))
    assert (figure.value, figure.low, figure.high) == (1, pytest.approx(expected), 1)
    assert second.figures["ppv_at_prevalence"].value is None


def test_the_interval_of_a_calibration_error_lies_about_it() -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet((1, 1, 1), 200)
    truth = (chances.cumsum(axis=1) < rng.random((200, 1))).sum(axis=1)  # right as often as it says
    labelled = cases(200, targets=np.eye(3, dtype=np.int8)[truth], patients=(None,) * 200)
    model = replace(predictions(labelled), probabilities=chances)
    report = report_of(replace(labelled, unit="case"), model, resamples=400)
    figures = [on(report, "union", "ece"), report.models[0].on("union").classes[0].figures["ece"]]
    for figure in figures:
        low, value, high = figure.low or 0.0, figure.value or 0.0, figure.high or 0.0
        assert low < value < high
        assert abs((low + high) / 2 - value) < 0.2 * (high - low)


def test_the_same_predictions_give_the_same_report() -> None:
    labelled = cases()
    first = report_of(labelled, four_models(labelled), seed=1)
    assert first == report_of(labelled, four_models(labelled), seed=1)
    assert first != report_of(labelled, four_models(labelled), seed=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"classes": ("benign", "other", "malignant")},
            "predictions of model 'b' are of 120 cases",
        ),
        ({"probabilities": np.full((90, 3), 0.3)}, "of model 'b' are of 90 cases and the classes"),
        ({"model": "merged"}, "Two models are called 'merged': give each a name of its own"),
        ({"role": "best"}, "'b' has the role 'best', but a role is base, site:<site>"),
        ({"role": "site:"}, "'b' has the role 'site:', but a role is base"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    labelled = cases()
    pair = [predictions(labelled), replace(predictions(labelled, "b"), **changes)]
    with pytest.raises(DataError, match=sentence):
        report_of(labelled, pair)


def test_no_model_and_an_unknown_reference_are_refused() -> None:
    labelled = cases()
    with pytest.raises(DataError, match="There is no model to report on: name at least one"):
        report_of(labelled, [])
    with pytest.raises(DataError, match="There is no model 'x' to compare with"):
        report_of(labelled, predictions(labelled), reference="x")
