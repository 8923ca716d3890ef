"""Curves, areas and thresholds against scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from evaluate import metrics
from tests.evaluate.metrics.helpers import Binary, binary_sample, binary_samples


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
@pytest.mark.parametrize("seed", range(4))
def test_areas_equal_those_of_scikit_learn(seed: int, decimals: int) -> None:
    truth, scores = binary_sample(150, seed, decimals=decimals)
    assert metrics.auroc(truth, scores) == pytest.approx(sklearn.roc_auc_score(truth, scores))
    assert metrics.average_precision(truth, scores) == pytest.approx(
        sklearn.average_precision_score(truth, scores)
    )


def test_areas_equal_those_of_torchmetrics() -> None:
    truth, scores = binary_sample(150, 9, decimals=2)
    tensors = torch.from_numpy(scores), torch.from_numpy(truth)
    assert metrics.auroc(truth, scores) == pytest.approx(float(binary_auroc(*tensors)), abs=1e-6)
    assert metrics.average_precision(truth, scores) == pytest.approx(
        float(binary_average_precision(*tensors)), abs=1e-6
    )


def test_a_hundred_thousand_cases_with_ties_equal_scikit_learn() -> None:
    truth, scores = binary_sample(100_000, 0, decimals=3)
    assert metrics.auroc(truth, scores) == pytest.approx(sklearn.roc_auc_score(truth, scores))
    assert metrics.average_precision(truth, scores) == pytest.approx(
        sklearn.average_precision_score(truth, scores)
    )


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
def test_the_roc_curve_is_that_of_scikit_learn(decimals: int) -> None:
    truth, scores = binary_sample(80, 2, decimals=decimals)
    curve = metrics.roc_curve(truth, scores)
    fpr, tpr, thresholds = sklearn.roc_curve(truth, scores, drop_intermediate=False)
    assert curve.fpr == pytest.approx(fpr)
    assert curve.tpr == pytest.approx(tpr)
    assert curve.thresholds == pytest.approx(thresholds)


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
def test_the_precision_recall_curve_is_that_of_scikit_learn(decimals: int) -> None:
    truth, scores = binary_sample(80, 2, decimals=decimals)
    curve = metrics.precision_recall_curve(truth, scores)
    precision, recall, thresholds = sklearn.precision_recall_curve(truth, scores)
    assert curve.precision == pytest.approx(precision[:-1][::-1])
    assert curve.recall == pytest.approx(recall[:-1][::-1])
    assert curve.thresholds == pytest.approx(thresholds[::-1])


def test_an_example_by_hand() -> None:
    truth, scores = [1, 0, 1, 0], [0.9, 0.8, 0.8, 0.1]
    # Pairs: 0.9 beats both, 0.8 ties with 0.8 and beats 0.1. Steps: 1/2 at precision 1, then 2/3.
    assert metrics.auroc(truth, scores) == 3.5 / 4
    assert metrics.average_precision(truth, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_constant_scores_get_one_half_and_the_prevalence() -> None:
    truth = [1, 0, 0, 0]
    assert metrics.auroc(truth, [0.3] * 4) == 0.5
    assert metrics.average_precision(truth, [0.3] * 4) == metrics.prevalence(truth) == 0.25


@pytest.mark.parametrize("truth", [[1], [1, 1], [0], [0, 0]])
def test_one_class_alone_has_no_auroc(truth: list[int]) -> None:
    scores = [0.5] * len(truth)
    assert np.isnan(metrics.auroc(truth, scores))
    assert np.isnan(metrics.average_precision(truth, scores)) == (truth[0] == 0)
    assert np.isnan(metrics.roc_curve(truth, scores).tpr).all() == (truth[0] == 0)


@settings(deadline=None)
@given(binary_samples(), st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(sample: Binary, random: object) -> None:
    truth, scores = sample
    order = random.sample(range(len(truth)), len(truth))  # type: ignore[attr-defined]
    for figure in (metrics.auroc, metrics.average_precision):
        there = figure(truth[order], scores[order])
        assert there == pytest.approx(figure(truth, scores), nan_ok=True)


@settings(deadline=None)
@given(binary_samples(), st.floats(0.05, 0.95))
def test_the_threshold_is_the_smallest_score_that_is_specific_enough(
    sample: Binary, wanted: float
) -> None:
    truth, scores = sample
    threshold = metrics.threshold_at_specificity(truth, scores, wanted)
    if truth.all():
        assert np.isnan(threshold)
        return
    assert metrics.specificity(truth, scores, threshold) >= wanted
    for smaller in scores[scores < threshold]:
        assert metrics.specificity(truth, scores, smaller) < wanted


def test_where_the_highest_score_is_a_negative_nobody_is_flagged() -> None:
    threshold = metrics.threshold_at_specificity([0, 1, 0], [0.9, 0.4, 0.1], 0.95)
    assert threshold == np.nextafter(0.9, 1)
    assert metrics.sensitivity([0, 1, 0], [0.9, 0.4, 0.1], threshold) == 0


def test_the_threshold_at_a_specificity_by_hand() -> None:
    truth, scores = [0, 0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.3, 0.8]
    assert metrics.threshold_at_specificity(truth, scores, 0.75) == 0.7
    assert metrics.threshold_at_specificity(truth, scores, 0.5) == 0.3
