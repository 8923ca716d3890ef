"""Figures of decisions against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from sklearn import metrics as sklearn

from evaluate import metrics
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import Binary, binary_sample, binary_samples, multiclass_sample


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
@pytest.mark.parametrize("seed", range(3))
def test_binary_figures_equal_those_of_scikit_learn(seed: int, decimals: int) -> None:
    truth, scores = binary_sample(120, seed, decimals=decimals)
    flagged = scores >= 0.4
    expected = {
        metrics.sensitivity: sklearn.recall_score(truth, flagged),
        metrics.specificity: sklearn.recall_score(truth, flagged, pos_label=0),
        metrics.positive_predictive_value: sklearn.precision_score(truth, flagged),
        metrics.negative_predictive_value: sklearn.precision_score(truth, flagged, pos_label=0),
        metrics.f1_score: sklearn.f1_score(truth, flagged),
    }
    for figure, value in expected.items():
        assert figure(truth, scores, 0.4) == pytest.approx(value)


@pytest.mark.parametrize("seed", range(3))
def test_kappas_and_macro_f1_equal_those_of_scikit_learn(seed: int) -> None:
    labels, probabilities = multiclass_sample(90, 5, seed)
    predicted = probabilities.argmax(axis=1)
    assert metrics.cohen_kappa(labels, probabilities) == pytest.approx(
        sklearn.cohen_kappa_score(labels, predicted)
    )
    assert metrics.quadratic_kappa(labels, probabilities) == pytest.approx(
        sklearn.cohen_kappa_score(labels, predicted, weights="quadratic")
    )
    assert metrics.macro_f1(labels, probabilities) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro")
    )


def test_macro_f1_counts_a_class_that_is_only_predicted_and_leaves_out_one_that_is_nowhere() -> (
    None
):
    labels, probabilities = np.array([0, 0, 1]), np.eye(4)[[0, 2, 1]]
    assert metrics.macro_f1(labels, probabilities) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_case_at_the_threshold_is_flagged() -> None:
    assert metrics.sensitivity([1, 1, 0], [0.5, 0.4, 0.5], 0.5) == 0.5
    assert metrics.specificity([1, 1, 0], [0.5, 0.4, 0.5], 0.5) == 0


def test_predictive_values_at_a_prevalence_follow_a_worked_example() -> None:
    # A test of 90 % sensitivity and 95 % specificity where 1 % are ill: of 10,000 people 90 + 495
    # are flagged, and 9,405 of the 9,415 who are not flagged are well.
    ppv, npv = metrics.predictive_values_at_prevalence(0.9, 0.95, 0.01)
    assert ppv == pytest.approx(90 / 585)
    assert npv == pytest.approx(9405 / 9415)


def test_predictive_values_at_the_prevalence_of_the_sample_are_those_of_the_sample() -> None:
    truth, scores = binary_sample(200, 3)
    counts = metrics.binary_counts(truth, scores)
    assert counts.ppv_at(truth.mean()) == pytest.approx(float(counts.ppv))
    assert counts.npv_at(truth.mean()) == pytest.approx(float(counts.npv))


def test_kappa_is_nan_where_chance_alone_agrees_in_full() -> None:
    assert np.isnan(metrics.cohen_kappa([1, 1], [[0.2, 0.8], [0.1, 0.9]]))
    assert np.isnan(metrics.quadratic_kappa([1], [[0.2, 0.8]]))


def test_constant_predictions_have_a_kappa_of_zero() -> None:
    assert metrics.cohen_kappa([0, 1, 1, 0], [[0.4, 0.6]] * 4) == 0


@pytest.mark.parametrize("truth", [[], [0], [1]], ids=["no case", "a negative", "a positive"])
def test_a_set_of_one_class_has_only_the_figures_of_that_class(truth: list[int]) -> None:
    scores = [0.7] * len(truth)
    assert np.isnan(metrics.sensitivity(truth, scores)) == (1 not in truth)
    assert np.isnan(metrics.specificity(truth, scores)) == (0 not in truth)


@settings(deadline=None)
@given(binary_samples())
def test_counts_add_up_to_the_cases_at_every_threshold(sample: Binary) -> None:
    truth, scores = sample
    for threshold in (0.0, *scores, 1.0):
        counts = metrics.binary_counts(truth, scores, threshold)
        assert counts.n == len(truth)
        assert counts.tp + counts.fn == truth.sum()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((1.2, 0.5, 0.1), "Expected sensitivity to lie between 0 and 1, but got 1.2"),
        ((0.5, -0.1, 0.1), "Expected specificity to lie between 0 and 1, but got -0.1"),
        ((0.5, 0.5, 1.0), "Expected prevalence to lie between 0 and 1, but got 1.0"),
    ],
)
def test_impossible_rates_are_refused(arguments: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        metrics.predictive_values_at_prevalence(*arguments)
