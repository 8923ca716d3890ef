"""Exact weighted sums."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.exact import (
    InexactSumError,
    add_exactly,
    affine,
    affine_in_pairs,
    affine_of_sum,
    round_weight,
)
from tests.merge_kit.helpers import quick

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)


def test_worked_example():
    """2 + 1/2 (3 * 1 + 1 * 5) = 6 and 0 + 1/2 (3 * -2 + 1 * 0) = -3."""
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    values = torch.tensor([[1.0, -2.0], [5.0, 0.0]])
    assert affine(start, values, (3.0, 1.0), Fraction(1, 2)).tolist() == [6.0, -3.0]


@quick
@given(
    st.lists(st.tuples(numbers, st.floats(0.01, 1e6)), min_size=1, max_size=7),
    numbers,
    st.fractions(-3, 3, max_denominator=97),
    st.randoms(use_true_random=False),
)
def test_the_result_rounds_as_the_exact_number_does_in_any_order(terms, start, factor, random):
    terms = [(value, round_weight(weight)) for value, weight in terms]
    exact = Fraction(start) + factor * sum(Fraction(v) * Fraction(w) for v, w in terms)
    wanted = torch.tensor(float(exact), dtype=torch.float64).float()
    random.shuffle(terms)
    values = torch.tensor([[v] for v, _ in terms])
    weights = [w for _, w in terms]
    begin = torch.tensor([start], dtype=torch.float64)
    assert torch.equal(affine(begin, values, weights, factor).float()[0], wanted)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = torch.tensor(float(exact), dtype=torch.float64).to(dtype)
        assert torch.equal(affine(begin, values, weights, factor, dtype).to(dtype)[0], rounded)


def test_what_float64_leaves_open_is_found_exactly():
    """1 + 2^-24 is half way between two float32; 2^-77 decides, and float64 cannot see it."""
    start = torch.tensor([1.0], dtype=torch.float64)
    up = torch.tensor([[2.0**-24], [2.0**-50], [2.0**-77], [-(2.0**-50)]])
    # Through float64 the exact number is 1 + 2^-24 again, and half goes to even.
    assert affine(start, up, (1.0,) * 4, Fraction(1)).float().item() == 1.0
    up[2] = 2.0**-52
    assert affine(start, up, (1.0,) * 4, Fraction(1)).float().item() == 1.0 + 2.0**-23


def test_cancelling_values_leave_what_is_small():
    """1e30 - 1e30 + 1e-3 is 1e-3: a float64 sum in this order would lose it."""
    values = torch.tensor([[1e30], [1e-3], [-1e30]])
    found = affine(torch.zeros(1, dtype=torch.float64), values, (1.0,) * 3, Fraction(1))
    assert found.float().item() == torch.tensor(1e-3).item()


@given(st.floats(1e-30, 1e30))
def test_a_weight_keeps_29_bits(weight):
    rounded = round_weight(weight)
    assert abs(rounded - weight) <= weight * 2.0**-29
    numerator = Fraction(rounded).numerator
    while numerator % 2 == 0:
        numerator //= 2
    assert numerator < 2**29
    assert round_weight(rounded) == rounded


def test_small_whole_numbers_are_weights_as_they_are():
    assert [round_weight(n) for n in (0, 1, 3, 12345678, -7)] == [0, 1, 3, 12345678, -7]


@quick
@given(
    st.lists(st.tuples(st.integers(-(2**24), 2**24), st.integers(-30, 30)), min_size=1, max_size=6),
    st.integers(-(2**24), 2**24),
    st.sampled_from([Fraction(1), Fraction(1, 3), Fraction(2, 7), Fraction(-5, 4)]),
)
def test_pairs_of_float64_round_once(terms, start, factor):
    """What is rounded to float64 is the exact number itself."""
    numbers = [float(m) * 2.0**e for m, e in terms]
    weights = [float(i + 1) for i in range(len(numbers))]
    exact = Fraction(start) + factor * sum(
        (Fraction(w) * Fraction(n) for w, n in zip(weights, numbers, strict=True)), Fraction()
    )
    found = affine_in_pairs(
        np.array([float(start)]),
        np.array([[n] for n in numbers], dtype=np.float32),
        weights,
        factor,
    )
    assert found.item() == float(exact)


def test_values_between_two_float32_are_settled_without_fractions(monkeypatch):
    """Half of these sums lie exactly between two float32 values; pairs decide them all."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 5000, generator=generator)
    start = torch.randn(5000, generator=generator).double()
    weights = (1.0,) * 8
    exact = [
        float(Fraction(s) + sum(map(Fraction, column), Fraction()))
        for s, column in zip(start.tolist(), values.T.tolist(), strict=True)
    ]
    wanted = torch.tensor(exact, dtype=torch.float64).float()

    class Never:
        def __init__(self, *_):
            raise AssertionError("a fraction was needed")

    factor = Fraction(1)
    monkeypatch.setattr("merge_kit.exact.Fraction", lambda x: factor if x == 1.0 else Never())
    assert torch.equal(affine(start, values, weights, factor).float(), wanted)


def zeros(size=1):
    return np.zeros(size), np.zeros(size)


@quick
@given(
    st.lists(st.tuples(numbers, st.integers(1, 500)), min_size=2, max_size=7),
    numbers,
    st.fractions(-3, 3, max_denominator=97),
    st.randoms(use_true_random=False),
)
def test_a_running_sum_forgets_the_way_it_was_made(terms, start, factor, random):
    """Added in any order, with one added and taken away: one pair, and the bytes of `affine`."""
    values = np.array([[v] for v, _ in terms], dtype=np.float32)
    weights = [float(w) for _, w in terms]
    kept = slice(1, None)
    try:
        once = add_exactly(*zeros(), values[kept], weights[kept])
        pair = zeros()
        order = list(range(len(terms)))
        random.shuffle(order)
        for index in order:
            pair = add_exactly(*pair, values[index][None], [weights[index]])
        pair = add_exactly(*pair, values[:1], [-weights[0]])
    except InexactSumError:
        return
    assert [part.tobytes() for part in pair] == [part.tobytes() for part in once]
    exact = sum(
        (Fraction(w) * Fraction(v.item()) for w, v in zip(weights[1:], values[1:, 0], strict=True)),
        Fraction(),
    )
    assert Fraction(once[0].item()) + Fraction(once[1].item()) == exact
    begin = torch.tensor([start], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wanted = affine(begin, torch.from_numpy(values[kept]), weights[kept], factor, dtype)
        found = affine_of_sum(begin, *once, factor, dtype)
        assert torch.equal(found.to(dtype), wanted.to(dtype))


def test_a_sum_of_many_values_is_kept_exactly():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(5, 2000)).astype(np.float32)
    start = torch.from_numpy(generator.normal(size=2000).astype(np.float32)).double()
    weights = [3.0, 1.0, 4.0, 1.0, 5.0]
    pair = add_exactly(*zeros(2000), values, weights)
    assert not pair[1].any()
    for factor in (Fraction(1, 8), Fraction(1, 14)):
        wanted = affine(start, torch.from_numpy(values), weights, factor)
        found = affine_of_sum(start, *pair, factor, torch.float32)
        assert torch.equal(found.float(), wanted.float())


def test_a_sum_with_too_many_digits_is_refused():
    values = np.array([[1e30], [1.0], [1e-30]], dtype=np.float32)
    with pytest.raises(InexactSumError):
        add_exactly(*zeros(), values, [1.0, 1.0, 1.0])


def test_a_zero_has_the_same_sign_either_way():
    """-1 times a sum of zeros, from -0: float64 is exact for `affine_of_sum` alone."""
    start = torch.tensor([-0.0, 1.0], dtype=torch.float64)
    values = np.array([[0.0, 2.0**30], [0.0, -(2.0**30)], [0.0, 2.0**-20]], dtype=np.float32)
    once = affine(start, torch.from_numpy(values), (1.0,) * 3, Fraction(-1))
    pair = add_exactly(*zeros(2), values, (1.0,) * 3)
    kept = affine_of_sum(start, *pair, Fraction(-1), torch.float32)
    assert once.signbit().tolist() == kept.signbit().tolist() == [False, False]
