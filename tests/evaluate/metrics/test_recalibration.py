"""Calibration slope and intercept against statsmodels, one fit and many fits at once."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics import calibration_intercept, calibration_slope
from evaluate.metrics import recalibration as module
from finetune import ranking
from tests.evaluate.metrics.helpers import Floats, binary_sample


def fitted_by_statsmodels(truth: Floats, scores: Floats, weights: Floats) -> tuple[float, float]:
    """Slope and intercept; the weights are repetitions."""
    x = np.log(scores / (1 - scores))
    family = sm.families.Binomial()
    options = {"family": family, "freq_weights": weights}
    slope = sm.GLM(truth, sm.add_constant(x), **options).fit(tol=1e-12).params[1]
    large = sm.GLM(truth, np.ones((len(x), 1)), offset=x, **options).fit(tol=1e-12).params[0]
    return float(slope), float(large)


@pytest.mark.parametrize("signal", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_slope_and_intercept_equal_those_of_statsmodels(seed: int, signal: float) -> None:
    truth, scores = binary_sample(150, seed, signal=signal)
    expected = fitted_by_statsmodels(truth, scores, np.ones(150))
    found = calibration_slope(truth, scores), calibration_intercept(truth, scores)
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("seed", range(3))
def test_fits_under_weights_equal_refitting_each_resample(n: int, seed: int) -> None:
    truth, scores = binary_sample(n, seed)
    ranked = ranking.rank(truth, scores)
    weights = np.random.default_rng(seed).multinomial(n, np.ones(n) / n, size=30).T.astype(float)
    counted = ranking.count(ranked, weights)
    logits = module.logits(ranked)
    slopes, intercepts = module.slopes(logits, counted), module.intercepts(logits, counted)
    for column, weight in enumerate(weights.T):
        expected = fitted_by_statsmodels(truth, scores, weight)
        assert (slopes[column], intercepts[column]) == pytest.approx(expected, abs=1e-7)


def test_resamples_far_from_the_sample_are_fitted_all_the_same() -> None:
    # The weights turn the sample round: its slope is 3, theirs is -3.
    scores = np.tile([0.2, 0.2, 0.8, 0.8], 25)
    truth = np.tile([0, 1, 0, 1], 25)
    sample = np.tile([9.0, 1.0, 1.0, 9.0], 25)
    repeated = np.repeat(np.arange(100), sample.astype(int))
    ranked = ranking.rank(truth[repeated], scores[repeated])
    weights = np.where(truth == (scores > 0.5), 1.0, 30.0)[repeated][:, None]
    slopes = module.slopes(module.logits(ranked), ranking.count(ranked, weights))
    expected = fitted_by_statsmodels(truth[repeated], scores[repeated], weights[:, 0])[0]
    assert slopes[0] == pytest.approx(expected, abs=1e-7)
    assert slopes[0] < 0


def test_true_probabilities_have_slope_one_and_intercept_zero() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.02, 0.98, 100_000)
    truth = rng.random(100_000) < scores
    assert calibration_slope(truth, scores) == pytest.approx(1, abs=0.03)
    assert calibration_intercept(truth, scores) == pytest.approx(0, abs=0.03)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 5), st.floats(-3, 3))
def test_stretched_and_shifted_logits_move_slope_and_intercept_by_rule(
    seed: int, scale: float, shift: float
) -> None:
    truth, scores = binary_sample(60, seed, signal=0.5)
    logits = np.log(scores / (1 - scores))
    moved = 1 / (1 + np.exp(-(logits / scale)))
    assert calibration_slope(truth, moved) == pytest.approx(
        scale * calibration_slope(truth, scores), rel=1e-6, abs=1e-8
    )
    moved = 1 / (1 + np.exp(-(logits + shift)))
    assert calibration_intercept(truth, moved) == pytest.approx(
        calibration_intercept(truth, scores) - shift, abs=1e-6
    )


@pytest.mark.parametrize(
    ("truth", "scores"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.8]),
        ([0, 0, 1, 1], [0.9, 0.8, 0.2, 0.1]),
        ([0, 0, 1, 1], [0.1, 0.5, 0.5, 0.8]),
        ([0, 1, 1, 0], [0.4] * 4),
        ([0, 1, 1, 0], [0.0, 0.0, 1e-9, 1e-8]),
    ],
    ids=["separated", "turned round", "but for a tie", "constant", "equal as far as kept"],
)
def test_without_a_maximum_of_the_likelihood_there_is_no_slope(
    truth: list[int], scores: list[float]
) -> None:
    assert np.isnan(calibration_slope(truth, scores))
    assert np.isfinite(calibration_intercept(truth, scores))


@pytest.mark.parametrize("truth", [[1], [1, 1], [0, 0]])
def test_one_class_alone_has_neither(truth: list[int]) -> None:
    scores = [0.4, 0.6][: len(truth)]
    assert np.isnan([calibration_slope(truth, scores), calibration_intercept(truth, scores)]).all()


def test_probabilities_of_zero_and_one_are_kept_off_the_ends() -> None:
    truth, scores = np.array([0, 1, 0, 1, 1, 0]), np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    kept = np.clip(scores, module.LOGIT_EPSILON, 1 - module.LOGIT_EPSILON)
    expected = fitted_by_statsmodels(truth, kept, np.ones(6))
    assert calibration_slope(truth, scores) == pytest.approx(expected[0], rel=1e-6)
    # Two are right and one wrong at each end, so the slope is log 2 a logit of log(1 / 1e-7).
    assert calibration_slope(truth, scores) == pytest.approx(np.log(2) / np.log(1e7), rel=1e-6)
    assert calibration_intercept(truth, scores) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("slope_is_free", [True, False])
def test_a_step_over_a_curvature_of_almost_nothing_is_undefined(slope_is_free: bool) -> None:
    """As in a resample whose probabilities are all 0 or 1; the careful fit then takes over."""
    tiny = np.array([[1e-310], [0.0], [1.0]])
    step = module._step(
        np.array([[1.0], [1.0]]), np.zeros((3, 1)), tiny, slope_is_free=slope_is_free
    )
    assert np.isnan(step[0, 0])
