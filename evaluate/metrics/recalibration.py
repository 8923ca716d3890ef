"""Calibration slope and intercept (Van Calster et al. 2019, doi:10.1186/s12916-019-1466-7).

With x = logit(p) and truth y, the slope is b of the logistic regression y ~ a + b x: 1 is right,
below 1 the probabilities are too extreme. The intercept is a of y ~ a + 1 · x, the slope fixed to
1 (calibration in the large): 0 is right, below 0 the probabilities are too high on the whole.

Both are found by Newton's method, for thousands of resamples at once: a resample is a column of
weights, every column starts at the sample's own estimate, and from there the first step needs
nothing but sums that are linear in the weights. The few columns that do not settle are fitted one
by one with halved steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.metrics import checks
from evaluate.metrics.temperature import logit, sigmoid
from finetune import ranking
from finetune.ranking import Counted, Floats, Ranking

# Probabilities are kept this far from 0 and 1: about the step of float32 below 1.
LOGIT_EPSILON = 1e-7
_TOLERANCE = 1e-5  # of the last step; Newton's error after it is of the order of its square
_STEPS = 8
_CAREFUL_STEPS = 200
_STRETCH = 1 << 15  # weights that are worked on at a time, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class Logits:
    """The cases of a ranking as a logistic regression sees them.

    Attributes:
        x: (m,) logits, in the order of the ranking.
        ranking: the ranking of these logits, whose order is that of the other: only ties differ.
        slope_start: (2,) a and b of the sample itself, nan where undefined.
        intercept_start: (2,) a and 1 of the sample itself, nan where undefined.
    """

    x: Floats
    ranking: Ranking
    slope_start: Floats
    intercept_start: Floats


def calibration_slope(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the slope of the logistic regression of the truth on logit(p); 1 is right.

    Args:
        truth: (n,) of 0 and 1.
        probabilities: (n,) in [0, 1], kept `LOGIT_EPSILON` away from both ends.

    nan where no finite slope exists: one class only, constant probabilities, or a threshold that
    separates the classes in full (the likelihood then has no maximum).

    Raises:
        DataError: arrays that do not fit.
    """
    return float(slopes(*_prepared(truth, probabilities))[0])


def calibration_intercept(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Return a of the logistic regression y ~ a + logit(p), the slope fixed to 1; 0 is right.

    Arguments and errors as `calibration_slope`. nan for one class only.
    """
    return float(intercepts(*_prepared(truth, probabilities))[0])


def logits(ranked: Ranking) -> Logits:
    """Fit the sample itself, for `slopes` and `intercepts` to start from."""
    x, truth, ones = logit(ranked.scores, LOGIT_EPSILON), ranked.truth, np.ones(len(ranked.scores))
    ties = ranking.rank(truth, x)
    slope, intercept = np.full(2, np.nan), np.full(2, np.nan)
    if 0 < len(ranked.positives) < len(x):
        intercept = _careful(x, truth, ones, slope_is_free=False)
        if ranking.overlap(ties, ranking.count(ties, ones[:, None]))[0]:
            slope = _careful(x, truth, ones, slope_is_free=True)
    return Logits(x, ties, slope, intercept)


def slopes(fitted: Logits, counted: Counted) -> Floats:
    """Return the calibration slope of each column of the counted ranking, (R,)."""
    defined = ranking.overlap(fitted.ranking, counted)
    return _where(defined, fitted, counted, slope_is_free=True)


def intercepts(fitted: Logits, counted: Counted) -> Floats:
    """Return the calibration intercept of each column of the counted ranking, (R,)."""
    positive, drawn = counted.hits[-1], counted.drawn[-1]
    return _where((positive > 0) & (positive < drawn), fitted, counted, slope_is_free=False)


def _prepared(truth: ArrayLike, probabilities: ArrayLike) -> tuple[Logits, Counted]:
    flags, values = checks.binary_probabilities(truth, probabilities)
    ranked = ranking.rank(flags, values)
    return logits(ranked), ranking.count(ranked, np.ones((len(flags), 1)))


def _where(
    defined: NDArray[np.bool_], fitted: Logits, counted: Counted, *, slope_is_free: bool
) -> Floats:
    """Fit the columns that have a solution, and leave nan in the others."""
    result = np.full(len(defined), np.nan)
    columns = np.flatnonzero(defined)
    if len(columns):
        weights = counted.weights[:, columns] if len(columns) < len(defined) else counted.weights
        result[columns] = _fit(fitted, weights, slope_is_free=slope_is_free)
    return result


def _fit(fitted: Logits, weights: Floats, *, slope_is_free: bool) -> Floats:
    """Return b of each column, (R,), where the slope is free, else a."""
    x, truth = fitted.x, fitted.ranking.truth
    start = fitted.slope_start if slope_is_free else fitted.intercept_start
    basis = np.stack([np.ones_like(x), x, x * x])
    of_positives = basis[:2, truth] @ weights[truth]
    theta = np.repeat(start[:, None], weights.shape[1], axis=1)
    mu = sigmoid(start[0] + start[1] * x)
    moments = (basis * mu) @ weights, (basis * (mu * (1 - mu))) @ weights
    theta += _step(of_positives, *moments, slope_is_free=slope_is_free)
    left = np.arange(weights.shape[1])
    for _ in range(_STEPS):
        moments = _moments(basis, weights, theta[:, left])
        step = _step(of_positives[:, left], *moments, slope_is_free=slope_is_free)
        theta[:, left] += step
        unsettled = ~(np.abs(step).max(axis=0) < _TOLERANCE)  # yes to nan
        if not unsettled.any():
            break
        left = left[unsettled]
        weights = weights[:, unsettled]
    else:
        for column, weight in zip(left, weights.T, strict=True):
            theta[:, column] = _careful(x, truth, weight, slope_is_free=slope_is_free)
    coefficients: Floats = theta[1 if slope_is_free else 0]
    return coefficients


def _moments(basis: Floats, weights: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """Return Σ w μ (1, x, x²) and Σ w μ (1 - μ) (1, x, x²) of each column, (3, R) both."""
    first, second = np.zeros((3, weights.shape[1])), np.zeros((3, weights.shape[1]))
    rows = max(1, _STRETCH // weights.shape[1])
    for start in range(0, len(weights), rows):
        stretch = slice(start, start + rows)
        x, weight = basis[:, stretch], weights[stretch]
        mu = np.multiply.outer(x[1], -theta[1])
        mu -= theta[0]
        with np.errstate(over="ignore"):  # infinity gives 0, as it should
            np.exp(mu, out=mu)
        mu += 1
        np.divide(1.0, mu, out=mu)
        part = weight * mu
        first += x @ part
        mu *= part
        part -= mu
        second += x @ part
    return first, second


def _step(of_positives: Floats, first: Floats, second: Floats, *, slope_is_free: bool) -> Floats:
    """Return Newton's step of each column, (2, R); nan where the curvature is gone."""
    gradient = of_positives - first[:2]
    step = np.zeros_like(gradient)
    with np.errstate(over="ignore"):  # a curvature of almost nothing counts as gone
        if slope_is_free:
            determinant = second[0] * second[2] - second[1] ** 2
            step[0] = ranking.ratio(second[2] * gradient[0] - second[1] * gradient[1], determinant)
            step[1] = ranking.ratio(second[0] * gradient[1] - second[1] * gradient[0], determinant)
        else:
            step[0] = ranking.ratio(gradient[0], second[0])
    step[np.isinf(step)] = np.nan
    return step


def _careful(
    x: Floats, truth: NDArray[np.bool_], weights: Floats, *, slope_is_free: bool
) -> Floats:
    """Fit one set of weights (m,) from afar, halving each step until the likelihood rises, (2,)."""
    share = float(weights[truth].sum() / weights.sum())
    theta = np.array([np.log(share / (1 - share)), 0.0] if slope_is_free else [0.0, 1.0])
    basis = np.stack([np.ones_like(x), x, x * x])
    of_positives = basis[:2, truth] @ weights[truth, None]

    def loss(theta: Floats) -> float:
        eta = theta[0] + theta[1] * x
        return float(weights @ (np.logaddexp(0, eta) - truth * eta))

    now = loss(theta)
    for _ in range(_CAREFUL_STEPS):
        moments = _moments(basis, weights[:, None], theta[:, None])
        step = _step(of_positives, *moments, slope_is_free=slope_is_free)[:, 0]
        if np.isnan(step).any():
            break
        while (then := loss(theta + step)) > now and np.abs(step).max() > _TOLERANCE:
            step /= 2
        theta, now = theta + step, min(now, then)
        if np.abs(step).max() < _TOLERANCE:
            return theta
    return np.full(2, np.nan)
