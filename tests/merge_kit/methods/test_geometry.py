"""Rules on directions, against their formulas on the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.geometry import karcher, model_stock, multislerp, nuslerp, slerp
from tests.merge_kit.helpers import quick

HALF = math.sqrt(0.5)
RIGHT = [[2.0, 0.0], [0.0, 4.0]]
EVEN = [1.0, 1.0]


def merged(rule, vectors, weights, *options):
    v = torch.tensor(np.asarray(vectors), dtype=torch.float64)
    c = rule(v @ v.T, torch.tensor(weights, dtype=torch.float64), *options)
    assert c.dtype == torch.float64
    return (c @ v).numpy()


def paper_slerp(a, b, t):
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = float(u @ v)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def paper_multislerp(vectors, weights):
    shares = np.asarray(weights) / np.sum(weights)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / norms[:, None]
    m = sum(w * u for w, u in zip(shares, units, strict=True))
    m = m / np.linalg.norm(m)
    tangent = sum(w * (u - (u @ m) * m) for w, u in zip(shares, units, strict=True))
    length = np.linalg.norm(tangent)
    point = m if length < 1e-15 else m * math.cos(length) + tangent * math.sin(length) / length
    return point * float(shares @ norms)


def paper_karcher(vectors, weights, iterations, tolerance):
    shares = np.asarray(weights) / np.sum(weights)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / norms[:, None]
    m = sum(w * u for w, u in zip(shares, units, strict=True))
    m = m / np.linalg.norm(m)
    for _ in range(iterations):
        tangent = np.zeros_like(m)
        for share, u in zip(shares, units, strict=True):
            angle = math.acos(min(1.0, max(-1.0, float(m @ u))))
            if angle > 1e-8:
                tangent += share * angle / math.sin(angle) * (u - math.cos(angle) * m)
        length = float(np.linalg.norm(tangent))
        if length < 1e-15:
            break
        m = m * math.cos(length) + tangent * math.sin(length) / length
        if length < tolerance:
            break
    return m * float(shares @ norms)


def paper_stock(vectors, weights, average):
    size = len(vectors)
    cosines = []
    for i in range(size):
        for j in range(i):
            a, b = vectors[i], vectors[j]
            cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    if average == "cosines":
        cosine = sum(cosines) / len(cosines)
    else:
        cosine = math.cos(sum(math.acos(c) for c in cosines) / len(cosines))
    ratio = size * cosine / (1 + (size - 1) * cosine)
    return min(max(ratio, 0), 1) * np.average(vectors, axis=0, weights=weights)


def test_half_way_along_a_right_angle():
    """s_0 = s_1 = sin 45 / sin 90 = 0.7071; nuslerp takes unit vectors and the mean norm 3."""
    np.testing.assert_allclose(merged(slerp, RIGHT, EVEN), [2 * HALF, 4 * HALF])
    np.testing.assert_allclose(merged(nuslerp, RIGHT, EVEN), [3 * HALF, 3 * HALF])
    np.testing.assert_allclose(merged(multislerp, RIGHT, EVEN), [3 * HALF, 3 * HALF])
    np.testing.assert_allclose(merged(karcher, RIGHT, EVEN), [3 * HALF, 3 * HALF])


def test_weights_say_how_far():
    """t = 3 / 4 of 90 degrees is 67.5: cos .3827, sin .9239; the norm is (2 + 3 * 4) / 4 = 3.5."""
    found = merged(nuslerp, RIGHT, [0.5, 1.5])
    np.testing.assert_allclose(found, 3.5 * np.array([0.38268343, 0.92387953]), rtol=1e-7)


def test_model_stock_by_hand():
    """cos 60 = 1/2 and N = 2: t = 1 / 1.5 = 2/3 of the mean (0.75, 0.433)."""
    found = merged(model_stock, [[1.0, 0.0], [0.5, math.sqrt(0.75)]], EVEN)
    np.testing.assert_allclose(found, [0.5, math.sqrt(0.75) / 3])


def test_model_stock_gives_the_base_where_vectors_point_apart():
    assert merged(model_stock, [[1.0, 0.0], [-1.0, 0.1]], EVEN).tolist() == [0.0, 0.0]
    assert merged(model_stock, RIGHT, EVEN).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rule", [slerp, nuslerp, multislerp, karcher, model_stock])
def test_a_vector_without_direction_gives_the_weighted_mean(rule):
    assert merged(rule, [[2.0, 4.0], [0.0, 0.0]], [0.5, 1.5]).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("rule", [multislerp, karcher])
def test_opposite_directions_have_no_centre(rule):
    assert merged(rule, [[2.0, 0.0], [-4.0, 0.0]], EVEN).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("rule", [slerp, nuslerp, multislerp, karcher, model_stock])
def test_equal_vectors_give_the_vector(rule):
    np.testing.assert_allclose(merged(rule, [[2.0, 4.0]] * 2, EVEN), [2.0, 4.0], rtol=1e-7)


cases = st.tuples(st.integers(0, 999), st.integers(2, 6), st.integers(3, 20))


def draw(case, spread=1.0):
    generator = np.random.default_rng(case[0])
    vectors = generator.normal(size=(case[1], case[2])) * spread + generator.normal(size=case[2])
    return vectors, (generator.random(case[1]) + 0.1).tolist()


@quick
@given(cases, st.sampled_from([1.0, 0.1]))
def test_the_formulas(case, spread):
    vectors, weights = draw(case, spread)
    close = {"rtol": 1e-7, "atol": 1e-9}
    np.testing.assert_allclose(
        merged(multislerp, vectors, weights), paper_multislerp(vectors, weights), **close
    )
    np.testing.assert_allclose(
        merged(karcher, vectors, weights, 10, 1e-5),
        paper_karcher(vectors, weights, 10, 1e-5),
        **close,
    )
    for average in ("cosines", "angles"):
        np.testing.assert_allclose(
            merged(model_stock, vectors, weights, average),
            paper_stock(vectors, weights, average),
            **close,
        )
    a, b = vectors[:2]
    t = weights[1] / (weights[0] + weights[1])
    np.testing.assert_allclose(
        merged(slerp, vectors[:2], weights[:2]), paper_slerp(a, b, t), **close
    )
    norms = np.linalg.norm(a), np.linalg.norm(b)
    arc = paper_slerp(a / norms[0], b / norms[1], t) * ((1 - t) * norms[0] + t * norms[1])
    np.testing.assert_allclose(merged(nuslerp, vectors[:2], weights[:2]), arc, **close)


@quick
@given(cases)
def test_they_scale_with_the_vectors(case):
    vectors, weights = draw(case)
    for rule in (multislerp, karcher, model_stock):
        once, thrice = merged(rule, vectors, weights), merged(rule, 3 * vectors, weights)
        np.testing.assert_allclose(thrice, 3 * once, rtol=1e-7, atol=1e-9)
