"""All figures under weights: the value is the public figure, a weight is a repetition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evaluate import metrics
from evaluate.resampling import Figures, Scored, replicates
from finetune.scores import accuracy, balanced_accuracy, bootstrap_replicates, macro_auroc
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import multiclass_sample, one_hot

OPTIONS: dict[str, Any] = {"thresholds": [0.1, 0.5, 0.8], "bins": 10}


def options(classes: int) -> dict[str, Any]:
    points = {"90": np.linspace(0.2, 0.6, classes), "95": np.full(classes, np.nan)}
    return {**OPTIONS, "operating_points": points, "prevalences": np.full(classes, 0.07)}


def single(n: int, classes: int, seed: int) -> Scored:
    labels, probabilities = multiclass_sample(n, classes, seed)
    return Scored.prepare(one_hot(labels, classes), probabilities, ordered=True, **options(classes))


def several_labels(n: int, classes: int, seed: int) -> tuple[NDArray[np.int8], Any]:
    """Targets of which a fifth is not annotated, and probabilities."""
    rng = np.random.default_rng(seed)
    probabilities = rng.random((n, classes)).round(2)
    targets = (rng.random((n, classes)) < probabilities).astype(np.int8)
    return np.where(rng.random((n, classes)) < 0.2, -1, targets).astype(np.int8), probabilities


def equal(one: Figures, other: Figures, tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("seed", range(3))
def test_values_of_one_label_are_the_public_figures(seed: int) -> None:
    labels, probabilities = multiclass_sample(150, 4, seed)
    values = single(150, 4, seed).values()
    sample = labels, probabilities
    expected = {
        "accuracy": accuracy(*sample),
        "balanced_accuracy": balanced_accuracy(*sample),
        "macro_auroc": macro_auroc(*sample),
        "macro_f1": metrics.macro_f1(*sample),
        "kappa": metrics.cohen_kappa(*sample),
        "quadratic_kappa": metrics.quadratic_kappa(*sample),
        "brier": metrics.multiclass_brier_score(*sample),
        "ece": metrics.top_label_calibration_error(*sample, bins=10),
        "log_loss": metrics.log_loss(*sample),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value), name
    for c in range(4):
        truth = labels == c
        predicted = (probabilities.argmax(axis=1) == c).astype(float)
        ranked(values, c, truth, probabilities[:, c])
        decided(values, c, truth, predicted, 0.5)


def ranked(values: Figures, c: int, truth: Any, scores: Any) -> None:
    """What hangs on the probabilities of a class."""
    ece = metrics.calibration_error(truth, scores, bins=10)
    curve = metrics.decision_curve(truth, scores, OPTIONS["thresholds"])
    point = options(len(values["auroc"]))["operating_points"]["90"][c]
    sensitivity = metrics.sensitivity(truth, scores, point)
    specificity = metrics.specificity(truth, scores, point)
    at = metrics.predictive_values_at_prevalence(sensitivity, specificity, 0.07)
    for name, expected in {
        "auroc": metrics.auroc(truth, scores),
        "auprc": metrics.average_precision(truth, scores),
        "prevalence": metrics.prevalence(truth),
        "class_brier": metrics.brier_score(truth, scores),
        "class_ece": ece,
        "class_log_loss": metrics.binary_log_loss(truth, scores),
        "calibration_slope": metrics.calibration_slope(truth, scores),
        "calibration_intercept": metrics.calibration_intercept(truth, scores),
        "net_benefit": curve.model,
        "net_benefit_treat_all": curve.treat_all,
        "sensitivity@90": sensitivity,
        "specificity@90": specificity,
        "ppv_at_prevalence@90": at[0],
        "npv_at_prevalence@90": at[1],
        "sensitivity@95": np.nan,
    }.items():
        assert values[name][c] == pytest.approx(expected, nan_ok=True), name


def decided(values: Figures, c: int, truth: Any, scores: Any, threshold: float) -> None:
    """What hangs on the decision for a class."""
    counts = metrics.binary_counts(truth, scores, threshold)
    for name in ("sensitivity", "specificity", "ppv", "npv", "f1"):
        assert values[name][c] == pytest.approx(float(getattr(counts, name))), name
    assert values["ppv_at_prevalence"][c] == pytest.approx(float(counts.ppv_at(0.07)))
    assert values["npv_at_prevalence"][c] == pytest.approx(float(counts.npv_at(0.07)))


@pytest.mark.parametrize("seed", range(2))
def test_values_of_several_labels_skip_what_is_not_annotated(seed: int) -> None:
    targets, probabilities = several_labels(120, 3, seed)
    values = Scored.prepare(targets, probabilities, multi_label=True, **options(3)).values()
    balanced, right = [], []
    for c in range(3):
        known = targets[:, c] >= 0
        truth, scores = targets[known, c], probabilities[known, c]
        ranked(values, c, truth, scores)
        decided(values, c, truth, scores, 0.5)
        counts = metrics.binary_counts(truth, scores)
        balanced.append(float(counts.sensitivity + counts.specificity) / 2)
        right.append(float(counts.accuracy))
    assert values["accuracy"] == pytest.approx(np.mean(right))
    assert values["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    for name in ("brier", "ece", "log_loss"):
        assert values[name] == pytest.approx(values[f"class_{name}"].mean())
    assert "kappa" not in values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_a_weight_is_a_repetition(n: int, classes: int, seed: int, several: bool) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, n)
    if several:
        targets, probabilities = several_labels(n, classes, seed)
    else:
        labels, probabilities = multiclass_sample(n, classes, seed)
        probabilities = probabilities.round(1)
        targets = one_hot(labels, classes)
    given = {**options(classes), "multi_label": several, "ordered": True}
    found = Scored.prepare(targets, probabilities, **given).under(weights[None])
    rows = np.repeat(np.arange(n), weights)
    repeated = Scored.prepare(targets[rows], probabilities[rows], **given).values()
    # Where the classes are all but separated the slope has no sharp end.
    equal({k: v[0] for k, v in found.items()}, repeated, 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_order_of_the_cases_does_not_matter(n: int, seed: int) -> None:
    targets, probabilities = several_labels(n, 3, seed)
    order = np.random.default_rng(seed).permutation(n)
    one = Scored.prepare(targets, probabilities, multi_label=True, **options(3))
    other = Scored.prepare(targets[order], probabilities[order], multi_label=True, **options(3))
    equal(one.values(), other.values(), 1e-8)


def test_replicates_are_the_figures_of_the_resamples_that_finetune_draws() -> None:
    labels, probabilities = multiclass_sample(90, 3, 1)
    groups = [f"patient {case // 3}" for case in range(90)]
    scores = {"accuracy": accuracy, "macro_auroc": macro_auroc}
    drawn: Any = {"resamples": 60, "seed": [3, 7]}
    found = replicates(single(90, 3, 1), groups, **drawn)
    expected = bootstrap_replicates(labels, probabilities, scores, groups=groups, **drawn)
    for name in scores:
        assert found[name].tolist() == expected[name].tolist()


def test_calibration_of_every_resample_equals_a_fit_of_its_own() -> None:
    scored = single(120, 3, 2)
    labels, probabilities = multiclass_sample(120, 3, 2)
    weights = np.random.default_rng(0).multinomial(120, np.ones(120) / 120, size=20)
    found = scored.under(weights)
    for row, weight in enumerate(weights):
        cases = np.repeat(np.arange(120), weight)
        for c in range(3):
            sample = labels[cases] == c, probabilities[cases, c]
            slope, intercept = found["calibration_slope"], found["calibration_intercept"]
            assert slope[row, c] == pytest.approx(metrics.calibration_slope(*sample), abs=1e-7)
            assert intercept[row, c] == pytest.approx(
                metrics.calibration_intercept(*sample), abs=1e-7
            )


def test_the_number_of_threads_and_the_blocks_do_not_change_a_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = single(80, 3, 0)
    one = replicates(scored, resamples=100, threads=1)
    monkeypatch.setattr("evaluate.resampling._BLOCK", 80 * 7)
    three = replicates(scored, resamples=100, threads=3)
    equal(one, three, 1e-9)
    monkeypatch.undo()
    again = replicates(scored, resamples=100, threads=2)
    assert all(np.array_equal(one[name], again[name], equal_nan=True) for name in one)


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("n", [0, 1])
def test_no_case_and_one_case_are_undefined_and_no_error(n: int, several: bool) -> None:
    scored = Scored.prepare(
        np.eye(3, dtype=np.int8)[:n], np.full((n, 3), 1 / 3), multi_label=several, **options(3)
    )
    values = scored.values()
    assert np.isnan(values["macro_auroc"])
    assert np.isnan(values["accuracy"]) == (n == 0)
    found = replicates(scored, resamples=5)
    assert found["auroc"].shape == (5, 3)
    assert found["net_benefit"].shape == (5, 3, 3)
    assert all(np.isnan(figure).all() for figure in found.values())


def test_one_patient_has_values_and_nothing_to_resample() -> None:
    scored = single(20, 3, 0)
    assert np.isfinite(scored.values()["accuracy"])
    assert np.isnan(replicates(scored, ["only"] * 20, resamples=3)["accuracy"]).all()


def test_constant_predictions_have_an_auroc_of_one_half_in_every_resample() -> None:
    scored = Scored.prepare(one_hot([0, 1, 2] * 5, 3), np.full((15, 3), 1 / 3))
    found = replicates(scored, resamples=50)
    defined = found["auroc"][~np.isnan(found["auroc"])]
    assert set(defined.tolist()) == {0.5}
    assert np.isnan(found["calibration_slope"]).all()


def test_a_class_without_cases_is_nan_by_itself() -> None:
    labels, probabilities = multiclass_sample(60, 3, 0)
    values = Scored.prepare(one_hot(np.minimum(labels, 1), 3), probabilities).values()
    for name in ("auroc", "auprc", "sensitivity", "calibration_slope", "calibration_intercept"):
        assert np.isnan(values[name]).tolist() == [False, False, True], name
    assert values["macro_auroc"] == pytest.approx(values["auroc"][:2].mean())


def test_names_are_those_of_the_figures() -> None:
    scored = single(10, 2, 0)
    assert set(scored.names()) == set(scored.under(np.ones((1, 10))))
    plain = Scored.prepare(one_hot([0, 1], 2), np.eye(2)).names()
    assert "quadratic_kappa" in scored.names()
    assert not {"quadratic_kappa", "sensitivity@90", "ppv_at_prevalence"} & set(plain)


@pytest.mark.parametrize(
    ("targets", "probabilities", "given", "sentence"),
    [
        ([[1, 0]], [[0.5, 0.5, 0]], {}, r"got \(1, 2\) and \(1, 3\)"),
        ([1, 0], [0.5, 0.5], {}, r"got \(2,\) and \(2,\)"),
        ([[1, 0], [0, 2]], [[0.5, 0.5]] * 2, {}, "Expected targets of 1, 0 or -1"),
        ([[1, 0], [1, 1]], [[0.5, 0.5]] * 2, {}, "one label a case, but case 1 has none, several"),
        ([[1, 0], [0, 0]], [[0.5, 0.5]] * 2, {}, "one label a case, but case 1 has none"),
        ([[1, -1]], [[0.5, 0.5]], {}, "one label a case, but case 0 .* not annotated"),
        ([[1, 0]], [[np.nan, 0.5]], {}, "between 0 and 1, but those of case 0 are not"),
        ([[1, 0]], [[0.5, 0.5]], {"prevalences": [0.1]}, "for each of the 2 classes"),
        ([[1, 0]], [[0.5, 0.5]], {"operating_points": {"a": 0.1}}, "for each of the 2 classes"),
        ([[1, 0]], [[0.5, 0.5]], {"thresholds": [1.0]}, "threshold probabilities between 0 and 1"),
        ([[1, 0]], [[0.5, 0.5]], {"bins": 0}, "Expected bins to be an integer larger than 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    targets: Any, probabilities: Any, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        Scored.prepare(targets, probabilities, **given)


def test_an_impossible_bootstrap_is_refused() -> None:
    with pytest.raises(DataError, match="Expected one group a case, but got 1 for 9 cases"):
        replicates(single(9, 2, 0), ["a"])
    with pytest.raises(DataError, match="Expected resamples to be an integer larger than 0"):
        replicates(single(9, 2, 0), resamples=0)
