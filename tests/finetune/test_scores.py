"""The scores against scikit-learn and by hand, and what their intervals promise."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn

from finetune.scores import (
    Score,
    accuracy,
    balanced_accuracy,
    bootstrap_intervals,
    bootstrap_replicates,
    class_recalls,
    confusion,
    macro_auroc,
    mean_of_defined,
    per_class_auroc,
    percentile_bounds,
)
from merge_kit.errors import DataError

Cases = tuple[NDArray[np.int64], NDArray[np.float64]]
SCORES = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_auroc": macro_auroc,
}


def drawn(n: int, classes: int, seed: int, *, decimals: int = 15, signal: float = 0.3) -> Cases:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    probabilities = rng.dirichlet(np.ones(classes), n) * (1 - signal)
    probabilities[np.arange(n), labels] += signal * rng.random(n)
    return labels, probabilities.round(decimals)


@st.composite
def cases(draw: st.DrawFn) -> Cases:
    n, classes = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    decimals = draw(st.sampled_from([1, 15]))
    return drawn(n, classes, draw(st.integers(0, 2**32 - 1)), decimals=decimals)


@pytest.mark.parametrize("decimals", [1, 15], ids=["ties", "no ties"])
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_scikit_learn(seed: int, decimals: int) -> None:
    labels, probabilities = drawn(150, 4, seed, decimals=decimals)
    predicted = probabilities.argmax(axis=1)
    truth = np.eye(4)[labels]
    aurocs = sklearn.roc_auc_score(truth, probabilities, average=None)
    recalls = sklearn.recall_score(labels, predicted, average=None)
    assert accuracy(labels, probabilities) == sklearn.accuracy_score(labels, predicted)
    assert balanced_accuracy(labels, probabilities) == pytest.approx(recalls.mean(), abs=1e-12)
    assert class_recalls(labels, probabilities) == pytest.approx(recalls, abs=1e-12)
    assert per_class_auroc(labels, probabilities) == pytest.approx(aurocs, abs=1e-12)
    assert macro_auroc(labels, probabilities) == pytest.approx(aurocs.mean(), abs=1e-12)
    assert (confusion(labels, probabilities) == sklearn.confusion_matrix(labels, predicted)).all()


def test_scores_of_four_cases_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    assert accuracy(labels, probabilities) == 3 / 4
    assert balanced_accuracy(labels, probabilities) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_auroc(labels, probabilities) == pytest.approx(2 / 3)
    assert confusion(labels, probabilities).tolist() == [[2, 1], [0, 1]]


def test_a_tie_between_positive_and_negative_counts_one_half() -> None:
    labels = np.array([0, 1, 1])
    probabilities = np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])
    assert per_class_auroc(labels, probabilities) == pytest.approx([0.75, 0.75])


def test_an_absent_class_is_nan_by_itself_and_absent_from_the_means() -> None:
    labels, probabilities = drawn(60, 3, 0)
    probabilities = np.insert(probabilities, 1, 0.01, axis=1)
    labels = np.array([0, 2, 3])[labels]
    assert np.isnan(class_recalls(labels, probabilities)).tolist() == [False, True, False, False]
    assert np.isnan(per_class_auroc(labels, probabilities)).tolist() == [False, True, False, False]
    recalls = class_recalls(labels, probabilities)[[0, 2, 3]]
    assert balanced_accuracy(labels, probabilities) == pytest.approx(recalls.mean())


def test_a_set_of_one_class_has_a_recall_but_no_auroc() -> None:
    labels, probabilities = np.array([1, 1]), np.array([[0.2, 0.8], [0.7, 0.3]])
    assert balanced_accuracy(labels, probabilities) == 0.5
    assert np.isnan(macro_auroc(labels, probabilities))


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_no_case_gives_nan(score: Score) -> None:
    assert np.isnan(score(np.zeros(0, np.int64), np.zeros((0, 3))))


def test_half_precision_and_small_integers_are_accepted() -> None:
    labels, probabilities = drawn(50, 3, 0, decimals=2)
    narrow = (labels.astype(np.uint8), probabilities.astype(np.float16))
    assert macro_auroc(*narrow) == macro_auroc(labels, probabilities)
    assert confusion(*narrow).dtype == np.int64


@settings(deadline=None)
@given(cases())
def test_auroc_does_not_change_under_a_monotone_transform(sample: Cases) -> None:
    labels, probabilities = sample
    bent = 7 + np.searchsorted(np.unique(probabilities), probabilities) ** 3.0
    assert per_class_auroc(labels, bent) == pytest.approx(
        per_class_auroc(labels, probabilities), abs=1e-12, nan_ok=True
    )


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(sample: Cases, random: Random) -> None:
    labels, probabilities = sample
    order = random.sample(range(len(labels)), len(labels))
    for score in SCORES.values():
        expected = score(labels, probabilities)
        assert score(labels[order], probabilities[order]) == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(cases())
def test_negated_scores_turn_the_auroc_round(sample: Cases) -> None:
    labels, probabilities = sample
    expected = 1 - per_class_auroc(labels, probabilities)
    assert per_class_auroc(labels, -probabilities) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_vectorised_replicates_equal_the_score_of_each_resample(sample: Cases, seed: int) -> None:
    slow = {name: lambda y, p, score=score: score(y, p) for name, score in SCORES.items()}
    groups = [str(index % 7) for index in range(len(sample[0]))]
    options: dict[str, Any] = {"groups": groups, "resamples": 8, "seed": seed}
    fast = bootstrap_replicates(*sample, SCORES, **options)
    for name, replicates in bootstrap_replicates(*sample, slow, **options).items():
        assert fast[name] == pytest.approx(replicates, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_intervals_contain_the_value_and_know_their_n(seed: int) -> None:
    labels, probabilities = drawn(80, 4, seed)
    for name, interval in bootstrap_intervals(labels, probabilities, SCORES).items():
        assert interval.value == SCORES[name](labels, probabilities)
        assert interval.low < interval.value < interval.high
        assert interval.n == 80


def test_the_interval_of_a_proportion_has_the_width_that_theory_gives() -> None:
    labels = np.zeros(400, np.int64)
    probabilities = np.tile([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], (100, 1))
    interval = bootstrap_intervals(labels, probabilities, SCORES, resamples=4000)["accuracy"]
    margin = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.high - interval.low == pytest.approx(2 * margin, rel=0.1)
    assert interval.value == 0.75


def test_intervals_depend_on_the_seed_and_on_nothing_else() -> None:
    sample = drawn(60, 3, 1)
    first = bootstrap_intervals(*sample, SCORES, seed=3)
    assert first == bootstrap_intervals(*sample, SCORES, seed=3)
    assert first != bootstrap_intervals(*sample, SCORES, seed=4)


def test_patients_with_several_images_widen_the_interval() -> None:
    labels, probabilities = drawn(40, 3, 2)
    labels, probabilities = np.repeat(labels, 10), np.repeat(probabilities, 10, axis=0)
    groups = [f"patient {case // 10}" for case in range(400)]
    by_case = bootstrap_intervals(labels, probabilities, SCORES)
    by_patient = bootstrap_intervals(labels, probabilities, SCORES, groups=groups)
    for name in SCORES:
        widths = [i.high - i.low for i in (by_case[name], by_patient[name])]
        assert widths[1] > 2 * widths[0]


def test_a_case_without_a_patient_is_drawn_by_itself() -> None:
    sample = drawn(60, 3, 2)
    by_case = bootstrap_intervals(*sample, SCORES)
    assert bootstrap_intervals(*sample, SCORES, groups=[None] * 60) == by_case
    assert bootstrap_intervals(*sample, SCORES, groups=[""] * 60) == by_case
    assert bootstrap_intervals(*sample, SCORES, groups=[None] * 30 + ["p"] * 30) != by_case


@pytest.mark.parametrize("groups", [None, ["only", "only"]], ids=["one case", "one patient"])
def test_a_single_group_has_a_value_but_no_interval(groups: list[str] | None) -> None:
    n = len(groups or [0])
    sample = np.zeros(n, np.int64), np.tile([0.8, 0.2], (n, 1))
    interval = bootstrap_intervals(*sample, SCORES, groups=groups)["accuracy"]
    assert interval.value == 1
    assert np.isnan([interval.low, interval.high]).all()


def test_no_case_has_neither_value_nor_interval() -> None:
    interval = bootstrap_intervals(np.zeros(0, np.int64), np.zeros((0, 2)), SCORES)["macro_auroc"]
    assert np.isnan([interval.value, interval.low, interval.high]).all()
    assert interval.n == 0


def test_equal_probabilities_have_an_auroc_of_one_half_in_every_resample() -> None:
    labels = np.repeat([0, 1, 2], 5)
    found = bootstrap_intervals(labels, np.full((15, 3), 1 / 3), SCORES)
    assert (found["macro_auroc"].value, found["macro_auroc"].n) == (0.5, 15)
    # No resample differs: nothing is claimed of the truth.
    assert np.isnan([found["macro_auroc"].low, found["macro_auroc"].high]).all()
    assert found["accuracy"].low < 1 / 3 < found["accuracy"].high


def test_a_class_that_vanishes_from_a_resample_leaves_the_mean_of_the_others() -> None:
    labels, probabilities = np.array([0, 0, 1]), np.array([[0.9, 0.1]] * 3)
    replicates = bootstrap_replicates(labels, probabilities, SCORES)["balanced_accuracy"]
    assert set(replicates) == {0.0, 0.5, 1.0}


def test_a_thousand_resamples_of_a_thousand_cases_take_less_than_two_seconds() -> None:
    sample = drawn(1000, 5, 0)
    start = time.process_time()
    bootstrap_intervals(*sample, SCORES)
    assert time.process_time() - start < 2


def test_percentile_bounds_leave_undefined_replicates_out() -> None:
    assert percentile_bounds(np.array([np.nan, *range(101)]), 0.9) == pytest.approx((5, 95))
    assert np.isnan(percentile_bounds(np.array([np.nan]))).all()


def test_mean_of_defined_skips_nan_and_is_nan_for_nothing() -> None:
    means = mean_of_defined(np.array([[1.0, np.nan, 3.0], [np.nan] * 3]))
    assert means == pytest.approx([2.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("labels", "probabilities", "sentence"),
    [
        ([0], [0.5, 0.5], r"Expected labels of shape \(n,\) and .* got \(1,\) and \(2,\)\."),
        ([0, 1], [[0.5, 0.5]], r"Expected labels of shape .* got \(2,\) and \(1, 2\)\."),
        ([0.0], [[0.5, 0.5]], r"Expected labels of an integer type, but got float64\."),
        ([2, 0], [[0.5, 0.5]] * 2, r"between 0 and 1, but they run from 0 to 2\."),
        ([-1, 0], [[0.5, 0.5]] * 2, r"between 0 and 1, but they run from -1 to 0\."),
        ([0, 0], [[0.5, 0.5], [np.nan, 1]], r"finite probabilities, but those of case 1 are not"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(labels: Any, probabilities: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        balanced_accuracy(np.array(labels), np.array(probabilities))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": ["a"]}, "Expected one group a case, but got 1 for 9 cases"),
        ({"resamples": 0}, "Expected resamples to be an integer larger than 0, but got 0"),
        ({"level": 95}, "Expected level to lie between 0 and 1, but got 95"),
    ],
)
def test_an_impossible_bootstrap_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        bootstrap_intervals(*drawn(9, 2, 0), SCORES, **options)
