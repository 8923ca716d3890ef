"""Net benefit against dcurves and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from dcurves import dca

from evaluate.metrics import decision_curve, net_benefit
from merge_kit.errors import DataError
from tests.evaluate.metrics.helpers import binary_sample

THRESHOLDS = np.arange(1, 100) / 100


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
def test_the_decision_curve_is_that_of_dcurves(decimals: int) -> None:
    truth, scores = binary_sample(150, 1, decimals=decimals)
    table = pd.DataFrame({"truth": truth, "model": scores})
    found = dca(data=table, outcome="truth", modelnames=["model"], thresholds=THRESHOLDS)
    curve = decision_curve(truth, scores, THRESHOLDS)
    for name, values in [
        ("model", curve.model),
        ("all", curve.treat_all),
        ("none", curve.treat_none),
    ]:
        expected = found[found["model"] == name].sort_values("threshold")["net_benefit"]
        assert values == pytest.approx(expected.to_numpy(), abs=1e-12)


def test_net_benefit_by_hand() -> None:
    truth, scores = [1, 1, 0, 0, 0], [0.9, 0.1, 0.2, 0.1, 0.05]
    assert net_benefit(truth, scores, 0.2) == pytest.approx(1 / 5 - 1 / 5 * 0.25)


def test_treating_by_a_constant_is_treating_all_or_none() -> None:
    curve = decision_curve([1, 0, 0], [0.3] * 3, [0.2, 0.4])
    assert curve.model.tolist() == [curve.treat_all[0], 0]


@pytest.mark.parametrize("truth", [[0], [1]])
def test_one_case_has_a_net_benefit(truth: list[int]) -> None:
    assert net_benefit(truth, [0.7], 0.5) == (1 if truth[0] else -1)


@pytest.mark.parametrize("thresholds", [[0.0], [1.0], [float("nan")], 0.5])
def test_impossible_thresholds_are_refused(thresholds: object) -> None:
    with pytest.raises(DataError, match="Expected a list of threshold probabilities between 0 and"):
        decision_curve([0, 1], [0.1, 0.2], thresholds)  # type: ignore[arg-type]
