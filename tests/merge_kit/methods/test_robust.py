"""Robust rules, against their formulas on the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.robust import (
    centred_clipping,
    geometric_median,
    median,
    multi_krum,
    norm_clipping,
    sort_rows,
    trimmed_mean,
)
from tests.merge_kit.helpers import quick

cases = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 12))


def draw(case):
    return np.random.default_rng(case[0]).normal(size=(case[1], case[2]))


def merged(rule, vectors, *options):
    v = torch.tensor(np.asarray(vectors), dtype=torch.float64)
    return (rule(v @ v.T, *options) @ v).numpy()


def even(size):
    return torch.ones(size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 31, 32, 33, 40])
def test_rows_are_sorted_at_each_coordinate(size):
    values = torch.randint(-9, 9, (size, 50), generator=torch.Generator().manual_seed(size))
    found = torch.stack(sort_rows(values.float()))
    assert torch.equal(found, values.float().sort(dim=0).values)


def test_median_by_hand():
    """1 2 9: 2; 1 2 4 9: 3, or the lower 2."""
    three = torch.tensor([[9.0], [1.0], [2.0]])
    four = torch.tensor([[9.0], [1.0], [2.0], [4.0]])
    assert median(three).tolist() == [2.0]
    assert median(four).tolist() == [3.0]
    assert median(four, "lower").tolist() == [2.0]


def test_trimmed_mean_by_hand():
    """Of -100 1 2 6 50 one falls at each end: (1 + 2 + 6) / 3 = 3; at 0.1 of 5 none does."""
    values = torch.tensor([[2.0], [50.0], [-100.0], [6.0], [1.0]])
    assert trimmed_mean(values, 0.2).tolist() == [3.0]
    assert trimmed_mean(values, 0.1).tolist() == [-8.2]


@quick
@given(cases, st.sampled_from([0.0, 0.1, 0.25, 0.49]))
def test_coordinate_wise_rules(case, trim):
    vectors = draw(case).astype(np.float32)
    cut = int(trim * case[1])
    expected = np.sort(vectors.astype(np.float64), axis=0)[cut : case[1] - cut].mean(axis=0)
    np.testing.assert_allclose(
        trimmed_mean(torch.tensor(vectors), trim), expected, rtol=1e-12, atol=1e-15
    )
    np.testing.assert_array_equal(
        median(torch.tensor(vectors)), np.median(vectors.astype(np.float64), axis=0)
    )
    lower = torch.tensor(vectors).median(dim=0).values.double()
    assert torch.equal(median(torch.tensor(vectors), "lower"), lower)


def test_geometric_median_by_hand():
    """Of three points on a line it is the middle one; the mean would be 34."""
    found = merged(geometric_median, [[0.0], [2.0], [100.0]], even(3))
    np.testing.assert_allclose(found, [2.0], atol=1e-4)


def test_half_of_the_weight_holds_the_geometric_median():
    weights = torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64)
    found = merged(geometric_median, [[0.0, 0.0], [9.0, 1.0], [3.0, 7.0]], weights)
    np.testing.assert_allclose(found, [0.0, 0.0], atol=1e-4)


@quick
@given(cases)
def test_weiszfeld_step_by_step(case):
    vectors = draw(case)
    centre = vectors.mean(axis=0)
    for _ in range(5):
        pull = 1 / np.maximum(np.linalg.norm(vectors - centre, axis=1), 1e-6)
        centre = (pull[:, None] * vectors).sum(axis=0) / pull.sum()
    found = merged(geometric_median, vectors, even(case[1]), 1e-6, 5)
    np.testing.assert_allclose(found, centre, rtol=1e-5, atol=1e-6)


def test_krum_by_hand():
    """0 1 2 3 50, f = 1: two nearest of each: 0: 1+4, 1: 1+1, 2: 1+1, 3: 1+4; the first of two."""
    points = [[0.0], [1.0], [2.0], [3.0], [50.0]]
    assert merged(multi_krum, points, 1, 1).tolist() == [1.0]
    assert merged(multi_krum, points, 1, 4).tolist() == [1.5]


@quick
@given(st.tuples(st.integers(0, 999), st.integers(5, 9), st.integers(1, 12)), st.integers(0, 1))
def test_krum_scores_one_by_one(case, attackers):
    vectors = draw(case)
    size, scores = case[1], []
    for i in range(size):
        others = sorted(
            float(((vectors[i] - v) ** 2).sum()) for j, v in enumerate(vectors) if j != i
        )
        scores.append(sum(others[: size - attackers - 2]))
    order = sorted(range(size), key=lambda i: scores[i])
    for keep in (1, size - attackers):
        expected = vectors[order[:keep]].mean(axis=0)
        np.testing.assert_allclose(merged(multi_krum, vectors, attackers, keep), expected)


def test_clipping_by_hand():
    """Norms 1, 2, 10; bound 2: (1 + 2 + 2) / 3; the median norm is 2 as well."""
    points = [[1.0], [2.0], [10.0]]
    np.testing.assert_allclose(merged(norm_clipping, points, even(3), 2.0), [5 / 3])
    np.testing.assert_allclose(merged(norm_clipping, points, even(3), None), [5 / 3])
    np.testing.assert_allclose(merged(norm_clipping, points, even(3), 99.0), [13 / 3])


@quick
@given(cases, st.sampled_from([None, 0.5, 2.0]), st.integers(1, 4))
def test_centred_clipping_step_by_step(case, radius, iterations):
    vectors = draw(case)
    centre = np.zeros(case[2])
    for _ in range(iterations):
        gaps = vectors - centre
        lengths = np.linalg.norm(gaps, axis=1)
        reach = np.sort(lengths)[(case[1] - 1) // 2] if radius is None else radius
        clip = np.minimum(1, reach / np.maximum(lengths, 1e-300))
        centre = centre + (clip[:, None] * gaps).mean(axis=0)
    found = merged(centred_clipping, vectors, radius, iterations)
    np.testing.assert_allclose(found, centre, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        lambda gram: geometric_median(gram, even(len(gram))),
        lambda gram: multi_krum(gram, 1, 4),
        lambda gram: centred_clipping(gram, None, 3),
        lambda gram: norm_clipping(gram, even(len(gram)), None),
    ],
)
def test_zero_and_equal_vectors_do_no_harm(rule):
    assert merged(rule, np.zeros((5, 3))).tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(merged(rule, np.ones((5, 3))), [1.0, 1.0, 1.0])


def test_one_wild_vector_moves_robust_rules_little():
    honest = np.random.default_rng(0).normal(size=(6, 20)) * 0.1 + 1
    wild = np.vstack([honest, np.full((1, 20), -1e6)])
    for rule in (
        lambda gram: geometric_median(gram, even(7)),
        lambda gram: multi_krum(gram, 1, 6),
        lambda gram: centred_clipping(gram, None, 20),
    ):
        assert np.abs(merged(rule, wild) - 1).max() < 0.5
    values = torch.tensor(wild, dtype=torch.float32)
    assert (median(values) - 1).abs().max() < 0.5
    assert (trimmed_mean(values, 0.2) - 1).abs().max() < 0.5


@pytest.mark.parametrize("columns", [1, 70])
def test_many_rows_are_sorted_in_a_copy(columns):
    values = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    before = values.clone()
    assert torch.equal(torch.stack(sort_rows(values)), values.sort(dim=0).values)
    assert torch.equal(values, before)
