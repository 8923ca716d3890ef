"""DeLong's interval and test against MLstatkit, the textbook formula and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from MLstatkit import Delong_test

from evaluate.metrics import auroc, delong_interval, delong_test
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import Binary, binary_sample, binary_samples


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
@pytest.mark.parametrize("seed", range(4))
def test_interval_and_test_equal_those_of_mlstatkit(seed: int, decimals: int) -> None:
    truth, first = binary_sample(90, seed, decimals=decimals)
    second = binary_sample(90, seed, decimals=decimals, signal=2.0)[1][::-1] * 0.2 + first * 0.8
    z, p, ci_a, ci_b, auc_a, auc_b, _ = Delong_test(truth, first, second)
    found = delong_test(truth, first, second)
    assert (found.z, found.p) == pytest.approx((-z, p))
    assert found.difference == pytest.approx(auc_a - auc_b)
    for scores, bounds, auc in ((first, ci_a, auc_a), (second, ci_b, auc_b)):
        interval = delong_interval(truth, scores)
        assert (interval.low, interval.high) == pytest.approx(tuple(bounds), abs=1e-4)
        assert interval.value == pytest.approx(auc)


def test_the_variance_is_the_textbook_sum_over_pairs() -> None:
    truth, scores = binary_sample(40, 5, decimals=1)
    positives, negatives = scores[truth == 1], scores[truth == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    variance = wins.mean(axis=1).var(ddof=1) / len(positives)
    variance += wins.mean(axis=0).var(ddof=1) / len(negatives)
    interval = delong_interval(truth, scores, 0.9)
    assert interval.high - interval.value == pytest.approx(1.6448536 * math.sqrt(variance))


@settings(deadline=None)
@given(binary_samples())
def test_a_model_does_not_differ_from_itself_or_from_its_scores_bent(sample: Binary) -> None:
    truth, scores = sample
    bent = scores**3 + 2
    found = delong_test(truth, scores, bent)
    if 1 < truth.sum() < len(truth) - 1:
        assert found == type(found)(0.0, 0.0, 0.0, 0.0, 1.0)
    else:
        assert math.isnan(found.p)


@settings(deadline=None)
@given(binary_samples())
def test_the_difference_turns_round_with_the_models(sample: Binary) -> None:
    truth, scores = sample
    other = np.roll(scores, 1)
    one, two = delong_test(truth, scores, other), delong_test(truth, other, scores)
    assert (one.z, one.p, one.low) == pytest.approx((-two.z, two.p, -two.high), nan_ok=True)


def test_a_perfect_model_has_an_interval_without_width() -> None:
    interval = delong_interval([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)


def test_a_perfect_model_against_a_perfectly_wrong_one_has_no_p_value() -> None:
    scores = np.array([0.1, 0.2, 0.8, 0.9])
    found = delong_test([0, 0, 1, 1], scores, -scores)
    assert found.difference == 1
    assert np.isnan([found.p, found.z, found.low, found.high]).all()


def test_bounds_stay_between_zero_and_one() -> None:
    truth, scores = [0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.5, 0.8, 0.9]
    assert delong_interval(truth, scores).high == 1
    assert delong_interval(truth, [-s for s in scores]).low == 0


@pytest.mark.parametrize("truth", [[1], [1, 1, 1], [0, 1, 1]])
def test_fewer_than_two_of_a_class_give_no_interval(truth: list[int]) -> None:
    scores = [0.1, 0.5, 0.7][: len(truth)]
    interval = delong_interval(truth, scores)
    assert math.isnan(interval.low)
    assert interval.value == pytest.approx(auroc(truth, scores), nan_ok=True)


def test_a_hundred_thousand_cases_take_no_pairs() -> None:
    truth, scores = binary_sample(100_000, 1, decimals=3)
    interval = delong_interval(truth, scores)
    assert 0.003 < interval.high - interval.low < 0.01


def test_the_interval_covers_as_often_as_it_says() -> None:
    expected = 0.7602499389065234  # of normal scores one standard deviation apart: Φ(1/√2)
    hits = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        truth = np.repeat([0, 1], 60)
        interval = delong_interval(truth, rng.normal(size=120) + truth)
        hits += interval.low <= expected <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_an_impossible_level_is_refused() -> None:
    with pytest.raises(DataError, match="Expected level to lie between 0 and 1, but got 95"):
        delong_interval([0, 1], [0.1, 0.2], 95)
    with pytest.raises(DataError, match="Expected level"):
        delong_test([0, 1], [0.1, 0.2], [0.1, 0.2], 0)
