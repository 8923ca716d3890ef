"""Every public figure refuses arrays that do not fit, with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluate import metrics
from merge_kit.errors import DataError

OF_PROBABILITIES: list[Callable[..., Any]] = [
    metrics.brier_score,
    metrics.binary_log_loss,
    metrics.calibration_error,
    metrics.calibration_slope,
    metrics.calibration_intercept,
    lambda truth, scores: metrics.net_benefit(truth, scores, 0.2),
]
OF_SCORES: list[Callable[..., Any]] = [
    metrics.auroc,
    metrics.average_precision,
    metrics.sensitivity,
    metrics.specificity,
    metrics.positive_predictive_value,
    metrics.negative_predictive_value,
    metrics.f1_score,
    lambda truth, scores: metrics.delong_interval(truth, scores).value,
    lambda truth, scores: metrics.delong_test(truth, scores, scores).p,
    lambda truth, scores: metrics.threshold_at_specificity(truth, scores, 0.9),
]
CURVES: list[Callable[..., Any]] = [
    metrics.roc_curve,
    metrics.precision_recall_curve,
    metrics.reliability_bins,
]
BINARY = [*OF_SCORES, *OF_PROBABILITIES, *CURVES]
MULTICLASS: list[Callable[..., Any]] = [
    metrics.cohen_kappa,
    metrics.quadratic_kappa,
    metrics.macro_f1,
    metrics.multiclass_brier_score,
    metrics.log_loss,
    metrics.top_label_calibration_error,
    metrics.fit_temperature,
]


@pytest.mark.parametrize("figure", BINARY)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(figure: Callable[..., Any], odd: float) -> None:
    with pytest.raises(DataError, match="Expected finite scores, but that of case 1 is not"):
        figure([0, 1, 1], [0.1, odd, 0.3])


@pytest.mark.parametrize("figure", BINARY)
@pytest.mark.parametrize(
    ("truth", "scores", "sentence"),
    [
        ([0, 2], [0.1, 0.2], "Expected truth to be 0 or 1, but that of case 1 is 2"),
        ([0, -1], [0.1, 0.2], "Expected truth to be 0 or 1, but that of case 1 is -1"),
        ([0, 1], [0.1], r"same shape \(n,\), but got \(2,\) and \(1,\)"),
        ([[0, 1]], [[0.1, 0.2]], r"same shape \(n,\), but got \(1, 2\) and \(1, 2\)"),
    ],
)
def test_truth_that_does_not_fit_is_refused(
    figure: Callable[..., Any], truth: Any, scores: Any, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        figure(truth, scores)


@pytest.mark.parametrize("figure", [*OF_PROBABILITIES, metrics.reliability_bins])
@pytest.mark.parametrize("odd", [-0.1, 1.1])
def test_logits_are_no_probabilities(figure: Callable[..., Any], odd: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1, but those of case 1 are not: apply"):
        figure([0, 1], [0.5, odd])


@pytest.mark.parametrize("figure", MULTICLASS)
@pytest.mark.parametrize(
    ("labels", "probabilities", "sentence"),
    [
        ([0, 1], [[0.5, 0.5], [np.nan, 1]], "between 0 and 1, but those of case 1 are not"),
        ([0, 2], [[0.5, 0.5]] * 2, "Expected labels between 0 and 1, but they run from 0 to 2"),
        ([0.0], [[0.5, 0.5]], "Expected labels of an integer type, but got float64"),
        ([0, 1], [0.5, 0.5], r"but got \(2,\) and \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    figure: Callable[..., Any], labels: Any, probabilities: Any, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        figure(labels, probabilities)


@pytest.mark.parametrize("figure", [*OF_SCORES, *OF_PROBABILITIES])
def test_no_case_is_undefined_and_no_error(figure: Callable[..., Any]) -> None:
    assert np.isnan(figure([], []))


@pytest.mark.parametrize("figure", MULTICLASS)
def test_no_labelled_case_is_undefined_and_no_error(figure: Callable[..., Any]) -> None:
    assert np.isnan(figure(np.zeros(0, np.int64), np.zeros((0, 3))))


def test_rounding_above_one_is_cut() -> None:
    assert metrics.brier_score([1], [1 + 1e-7]) == 0


def test_every_public_name_is_listed_and_sorted() -> None:
    public = {n for n in vars(metrics) if n[0] != "_" and callable(getattr(metrics, n))}
    assert set(metrics.__all__) == public
    assert list(metrics.__all__) == sorted(metrics.__all__, key=lambda n: (n.islower(), n))
