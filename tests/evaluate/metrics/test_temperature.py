"""Temperature scaling against a plain minimiser of scikit-learn's log loss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn import metrics as sklearn

from evaluate.metrics import (
    apply_multilabel_temperature,
    apply_temperature,
    fit_multilabel_temperature,
    fit_temperature,
    log_loss,
)
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import multiclass_sample


@pytest.mark.parametrize("signal", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_minimises_the_log_loss(seed: int, signal: float) -> None:
    labels, probabilities = multiclass_sample(200, 4, seed, signal=signal)

    def loss(temperature: float) -> float:
        powers = probabilities ** (1 / temperature)
        return float(sklearn.log_loss(labels, powers / powers.sum(axis=1, keepdims=True)))

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7})
    assert fit_temperature(labels, probabilities) == pytest.approx(best.x, rel=1e-4)


def test_scaling_undoes_a_temperature() -> None:
    labels, probabilities = multiclass_sample(300, 3, 0)
    fitted = fit_temperature(labels, probabilities)
    sharp = apply_temperature(probabilities, 0.4)
    assert fit_temperature(labels, sharp) == pytest.approx(fitted / 0.4)
    assert apply_temperature(sharp, 1 / 0.4) == pytest.approx(probabilities)
    calmed = apply_temperature(sharp, fit_temperature(labels, sharp))
    assert log_loss(labels, calmed) < log_loss(labels, sharp)
    assert calmed.sum(axis=1) == pytest.approx(1)


def test_several_labels_have_one_temperature_and_skip_what_is_not_annotated() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 3))
    targets = (rng.random((400, 3)) < 1 / (1 + np.exp(-logits))).astype(int)
    sharp = 1 / (1 + np.exp(-3 * logits))
    targets[:100, 1] = -1

    def loss(temperature: float) -> float:
        known = targets >= 0
        scaled = 1 / (1 + np.exp(-3 * logits[known] / temperature))
        return float(sklearn.log_loss(targets[known], scaled))

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7})
    fitted = fit_multilabel_temperature(targets, sharp)
    assert fitted == pytest.approx(best.x, rel=1e-4)
    assert apply_multilabel_temperature(sharp, 3) == pytest.approx(1 / (1 + np.exp(-logits)))


def test_where_no_case_is_wrong_the_temperature_stops_at_its_bound() -> None:
    assert fit_temperature([0, 1], [[0.9, 0.1], [0.2, 0.8]]) == pytest.approx(0.01)
    assert fit_temperature([1, 0], [[0.9, 0.1], [0.2, 0.8]]) == pytest.approx(100)


def test_equal_probabilities_say_nothing_of_the_temperature() -> None:
    assert fit_temperature([0, 1, 1], [[0.5, 0.5]] * 3) == 1


def test_zeros_stay_zeros() -> None:
    assert apply_temperature([[1.0, 0.0]], 2.0)[0, 1] < 1e-150
    assert apply_multilabel_temperature([0.0, 1.0], 1.0) == pytest.approx([0, 1], abs=1e-12)


def test_nothing_annotated_gives_nan() -> None:
    assert np.isnan(fit_multilabel_temperature([[-1, -1]], [[0.5, 0.5]]))


def test_impossible_temperatures_and_targets_are_refused() -> None:
    with pytest.raises(DataError, match="Expected temperature to be larger than 0, but got 0"):
        apply_temperature([[0.5, 0.5]], 0)
    with pytest.raises(DataError, match=r"same shape \(n, classes\), but got \(2,\) and \(1, 2\)"):
        fit_multilabel_temperature([0, 1], [[0.5, 0.5]])
