"""Brier score, log loss, ECE and reliability against scikit-learn and torchmetrics, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from evaluate import metrics
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import binary_sample, multiclass_sample


@pytest.mark.parametrize("seed", range(3))
def test_brier_score_and_log_loss_equal_those_of_scikit_learn(seed: int) -> None:
    truth, scores = binary_sample(100, seed)
    assert metrics.brier_score(truth, scores) == pytest.approx(
        sklearn.brier_score_loss(truth, scores)
    )
    assert metrics.binary_log_loss(truth, scores) == pytest.approx(sklearn.log_loss(truth, scores))
    labels, probabilities = multiclass_sample(100, 4, seed)
    squares = ((probabilities - np.eye(4)[labels]) ** 2).sum(axis=1)
    assert metrics.multiclass_brier_score(labels, probabilities) == pytest.approx(squares.mean())
    assert metrics.log_loss(labels, probabilities) == pytest.approx(
        sklearn.log_loss(labels, probabilities)
    )


def test_two_classes_have_twice_the_binary_brier_score() -> None:
    truth, scores = binary_sample(50, 1)
    both = np.stack([1 - scores, scores], axis=1)
    assert metrics.multiclass_brier_score(truth, both) == pytest.approx(
        2 * metrics.brier_score(truth, scores)
    )


def test_a_certain_error_costs_what_scikit_learn_says() -> None:
    assert metrics.log_loss([0], [[0.0, 1.0]]) == pytest.approx(
        sklearn.log_loss([0], [[0.0, 1.0]], labels=[0, 1])
    )
    assert metrics.multiclass_brier_score([0], [[0.0, 1.0]]) == 2


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_errors_equal_those_of_torchmetrics(seed: int, bins: int) -> None:
    labels, probabilities = multiclass_sample(200, 4, seed)
    top = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), 4, n_bins=bins
    )
    assert metrics.top_label_calibration_error(labels, probabilities, bins=bins) == pytest.approx(
        float(top), abs=1e-6
    )
    # That library's binary error is of the probability of the class, as ours.
    truth, scores = binary_sample(200, seed)
    binary = binary_calibration_error(torch.from_numpy(scores), torch.from_numpy(truth), bins)
    assert metrics.calibration_error(truth, scores, bins=bins) == pytest.approx(
        float(binary), abs=1e-6
    )


def test_the_calibration_error_of_a_hundred_thousand_good_probabilities_is_small() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(100_000)
    truth = rng.random(100_000) < scores
    for scheme in ("width", "mass"):
        assert metrics.calibration_error(truth, scores, scheme=scheme) < 0.01


def test_bins_of_equal_mass_hold_equally_many_cases() -> None:
    truth, scores = binary_sample(120, 4)
    found = metrics.reliability_bins(truth, scores, bins=10, scheme="mass")
    assert found.counts.tolist() == [12] * 10
    order = np.argsort(scores).reshape(10, 12)
    gaps = np.abs((scores - truth)[order].mean(axis=1))
    error = metrics.calibration_error(truth, scores, bins=10, scheme="mass")
    assert error == pytest.approx(gaps.mean())


def test_ties_leave_fewer_bins_of_equal_mass() -> None:
    found = metrics.reliability_bins([0, 1, 1, 0], [0.5] * 4, scheme="mass")
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.counts.tolist() == [4, 0]


def test_the_reliability_diagram_is_that_of_scikit_learn() -> None:
    truth, scores = binary_sample(150, 6)
    found = metrics.reliability_bins(truth, scores, bins=10)
    observed, predicted = calibration_curve(truth, scores, n_bins=10)
    filled = found.counts > 0
    assert found.counts.sum() == 150
    assert found.observed[filled] == pytest.approx(observed)
    assert found.predicted[filled] == pytest.approx(predicted)


def test_an_edge_belongs_to_the_bin_below_and_empty_bins_are_nan() -> None:
    found = metrics.reliability_bins([0, 1, 1], [0.0, 0.5, 0.6], bins=4)
    assert found.counts.tolist() == [1, 1, 1, 0]
    assert found.observed == pytest.approx([0, 1, 1, np.nan], nan_ok=True)
    assert np.isnan([found.low[3], found.high[3], found.predicted[3]]).all()
    assert found.low[1] == pytest.approx(0.2065, abs=1e-4)  # Wilson, 1 of 1


def test_the_top_label_is_the_most_probable_class() -> None:
    right, confidence = metrics.top_label([0, 1], [[0.3, 0.7], [0.2, 0.8]])
    assert right.tolist() == [False, True]
    assert confidence.tolist() == [0.7, 0.8]


def test_one_case_has_every_figure() -> None:
    assert metrics.brier_score([1], [0.75]) == 0.0625
    assert metrics.calibration_error([1], [0.75]) == 0.25
    assert metrics.top_label_calibration_error([0], [[0.75, 0.25]]) == 0.25


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bins": 0}, "Expected bins to be an integer larger than 0, but got 0"),
        ({"scheme": "even"}, "Expected scheme to be 'width' or 'mass', but got 'even'"),
    ],
)
def test_impossible_bins_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        metrics.calibration_error([0, 1], [0.1, 0.2], **options)
