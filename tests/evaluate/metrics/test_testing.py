"""Wilson, Holm and the p-value of paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from evaluate.metrics import bootstrap_p, holm, wilson_interval
from merge_kit.errors import DataError


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_intervals_equal_those_of_statsmodels(level: float) -> None:
    successes, n = np.array([0, 1, 5, 50, 10]), np.array([1, 1, 9, 100, 10])
    low, high = wilson_interval(successes, n, level)
    expected = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert low == pytest.approx(expected[0], abs=1e-12)
    assert high == pytest.approx(expected[1])


def test_no_case_has_no_wilson_interval() -> None:
    assert np.isnan(wilson_interval(0, 0)).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_equals_that_of_statsmodels(values: list[float]) -> None:
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_holm_leaves_undefined_values_out_of_the_count() -> None:
    assert holm([0.01, float("nan"), 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)


def test_holm_of_nothing_is_nothing() -> None:
    assert len(holm([])) == 0


def test_impossible_p_values_are_refused() -> None:
    with pytest.raises(DataError, match="Expected p-values between 0 and 1"):
        holm([0.1, 1.5])


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0] * 99, 2 / 100),
        ([1.0] * 95 + [-1.0] * 4, 10 / 100),
        ([0.0] * 99, 1),
        ([1.0, -1.0], 1),
        ([1.0] * 99 + [np.nan], 2 / 100),
        ([-1.0] * 99, 2 / 100),
    ],
)
def test_the_p_value_counts_the_smaller_tail_twice(differences: list[float], p: float) -> None:
    assert bootstrap_p(np.array(differences)) == pytest.approx(p)


def test_no_defined_difference_has_no_p_value() -> None:
    assert np.isnan(bootstrap_p(np.array([np.nan])))


def test_p_values_under_the_null_are_small_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(400):
        sample = rng.normal(size=50)
        means = sample[rng.integers(0, 50, (500, 50))].mean(axis=1)
        small += bootstrap_p(means) < 0.05
    assert 0.02 <= small / 400 <= 0.09
