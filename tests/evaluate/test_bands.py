"""Curves on a grid with their bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from evaluate.bands import GRID, THRESHOLDS, Band, curve_bands
from evaluate.metrics import decision_curve
from finetune.scores import draws, percentile_bounds
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import binary_sample


def curves(*arguments: Any, **options: Any) -> tuple[Band, Band]:
    found = curve_bands(*arguments, **options)
    return found.roc, found.precision_recall


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
def test_curves_pass_through_the_corners_that_scikit_learn_gives(decimals: int) -> None:
    truth, scores = binary_sample(100, 0, decimals=decimals)
    roc, pr = curves(truth, scores, resamples=5)
    fpr, tpr, _ = sklearn.roc_curve(truth, scores, drop_intermediate=False)
    precision, recall, _ = sklearn.precision_recall_curve(truth, scores)
    for x, value in zip(GRID, roc.value, strict=True):
        left, right = tpr[fpr <= x + 1e-9].max(), tpr[fpr >= x - 1e-9].max()
        assert left - 1e-9 <= value <= right + 1e-9
    for x, value in zip(GRID[1:], pr.value[1:], strict=True):
        reached = np.flatnonzero(recall >= x - 1e-9)[-1]  # recall falls as the threshold rises
        assert value == pytest.approx(precision[reached])
    assert sklearn.auc(GRID, roc.value) == pytest.approx(
        sklearn.roc_auc_score(truth, scores), abs=0.02
    )


def test_the_roc_curve_is_a_line_between_corners_and_the_upper_end_of_a_vertical() -> None:
    # Corners (0, 0), (0, 1/2), then a tie of a positive and two of four negatives to (1/2, 1).
    truth, scores = [1, 1, 0, 0, 0, 0], [0.9, 0.5, 0.5, 0.5, 0.2, 0.1]
    roc, pr = curves(truth, scores, resamples=2, grid=np.array([0, 0.25, 0.5, 1]))
    assert roc.value == pytest.approx([0.5, 0.75, 1, 1])
    assert pr.value == pytest.approx([1, 1, 1, 0.5])


def test_bands_are_the_percentiles_over_the_resamples_of_patients() -> None:
    truth, scores = binary_sample(60, 3)
    groups = [str(case // 2) for case in range(60)]
    roc, pr = curves(truth, scores, groups, resamples=80, seed=4, level=0.9)
    heights = []
    for times in next(draws(30, 80, np.random.default_rng(4), 80)):
        rows = np.repeat(np.arange(60), times.repeat(2).astype(int))
        fpr, tpr, _ = sklearn.roc_curve(truth[rows], scores[rows], drop_intermediate=False)
        heights.append(np.interp(GRID + 1e-12, fpr, tpr))
    for place, column in enumerate(np.array(heights).T):
        low, high = percentile_bounds(column, 0.9)
        assert (roc.low[place], roc.high[place]) == pytest.approx((low, high))
    assert (pr.low <= pr.value + 1e-9).mean() > 0.9


@pytest.mark.parametrize("truth", [[], [1], [0], [1, 1], [0, 0]])
def test_one_class_alone_has_no_roc_curve(truth: list[int]) -> None:
    roc, pr = curves(truth, [0.5] * len(truth), resamples=3)
    assert np.isnan([roc.value, roc.low, roc.high]).all()
    assert np.isnan(pr.value).all() == (1 not in truth)


def test_constant_scores_give_the_diagonal() -> None:
    roc, _ = curves([0, 1, 0, 1], [0.5] * 4, resamples=20)
    assert roc.value == pytest.approx(GRID)
    assert roc.low == pytest.approx(GRID)


def test_an_impossible_level_is_refused() -> None:
    with pytest.raises(DataError, match="Expected level to lie between 0 and 1, but got 95"):
        curve_bands([0, 1], [0.1, 0.2], level=95)


def test_the_decision_curve_lies_in_its_band_and_is_that_of_the_sample() -> None:
    truth, scores = binary_sample(200, 5)
    found = curve_bands(truth, scores, resamples=200, seed=1).net_benefit
    assert found.value == pytest.approx(decision_curve(truth, scores, THRESHOLDS).model)
    assert ((found.low <= found.value) & (found.value <= found.high)).mean() > 0.9
    assert (found.high - found.low).max() > 0.05
    rng = np.random.default_rng(1)
    heights = [
        decision_curve(truth[rows], scores[rows], [0.25]).model[0]
        for times in next(draws(200, 200, rng, 200))
        for rows in [np.repeat(np.arange(200), times.astype(int))]
    ]
    place = int(np.flatnonzero(THRESHOLDS == 0.25)[0])
    assert (found.low[place], found.high[place]) == pytest.approx(
        percentile_bounds(np.array(heights))
    )
