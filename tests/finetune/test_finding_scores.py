"""Scores of findings of which not all were annotated, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from finetune import scores
from merge_kit.errors import DataError
from tests.merge_kit.helpers import quick


def drawn(seed, size=40):
    rng = np.random.default_rng(seed)
    return rng.integers(-1, 2, (size, 3)), rng.integers(0, 8, (size, 3)) / 7


def by_sklearn(targets, chances, score):
    found = []
    for truth, values in zip(targets.T, chances.T, strict=True):
        rows = truth >= 0
        if len(set(truth[rows])) == 2:
            found.append(score(truth[rows], values[rows]))
    return np.mean(found) if found else np.nan


@quick
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_both_scores_are_means_over_findings_of_the_cases_that_know_them(seed, size):
    targets, chances = drawn(seed, size)
    found = scores.macro_auroc(targets, chances)
    np.testing.assert_allclose(found, by_sklearn(targets, chances, roc_auc_score))
    balanced = by_sklearn(targets, chances, lambda t, p: balanced_accuracy_score(t, p >= 0.5))
    np.testing.assert_allclose(scores.balanced_accuracy(targets, chances), balanced)


def test_replicates_are_the_scores_of_drawn_cases():
    targets, chances = drawn(1)
    named = {"auroc": scores.macro_auroc, "balanced": scores.balanced_accuracy}
    found = scores.bootstrap_replicates(targets, chances, named, resamples=20, seed=3)
    blind = {name: lambda t, p, s=score: s(t, p) for name, score in named.items()}
    expected = scores.bootstrap_replicates(targets, chances, blind, resamples=20, seed=3)
    for name in named:
        np.testing.assert_allclose(found[name], expected[name])


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            np.zeros((4, 2), int),
            "Expected targets and probabilities of one shape (n, classes), but got (4, 2) and "
            "(4, 3).",
        ),
        (np.full((4, 3), 2), "Expected targets of 1, 0 or -1, but some are others."),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, sentence):
    with pytest.raises(DataError) as caught:
        scores.macro_auroc(targets, np.zeros((4, 3)))
    assert str(caught.value) == sentence
