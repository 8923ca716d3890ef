"""DARE, DELLA and Breadcrumbs: what they leave of each vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import RecipeError
from merge_kit.methods import METHODS
from merge_kit.methods.base import Block
from merge_kit.methods.sparsify import (
    breadcrumbs,
    drawn,
    keep_probability,
    rescaled,
    rows_of,
    uniform_bits,
)
from merge_kit.recipe import make_recipe
from tests.merge_kit.helpers import quick, says


def block(values, begin=0, shape=None, ids=("a",), name="w", seed=0):
    values = torch.as_tensor(values, dtype=torch.float32)
    start = torch.zeros(values.shape[1], dtype=torch.float64)
    shape = shape or (values.shape[1],)
    return Block(name, shape, begin, values, start, ids, tuple(ids), seed)


def change(name, block, **options):
    method = METHODS[name]
    return method.rule.change(block, method.options(**options))


def test_the_numbers_of_a_seed_never_change():
    """Golden: a mask is part of what a recipe means."""
    assert uniform_bits(0, "w", "a", 0, 4).tolist() == [
        3032767161,
        2888833101,
        988461312,
        1589526051,
    ]


def test_numbers_do_not_depend_on_how_a_tensor_is_cut():
    whole = uniform_bits(3, "w", "a", 0, 100_000)
    for begin, end in ((0, 32768), (32768, 65536), (65536, 100_000), (40_000, 70_000)):
        assert np.array_equal(uniform_bits(3, "w", "a", begin, end - begin), whole[begin:end])


def test_numbers_differ_by_seed_tensor_and_vector():
    first = uniform_bits(0, "w", "a", 0, 64)
    for other in ((1, "w", "a"), (0, "v", "a"), (0, "w", "b")):
        assert not np.array_equal(first, uniform_bits(*other, 0, 64))


def test_a_probability_is_kept_on_average():
    """One million draws: five standard errors of 0.3 are 0.0023."""
    kept = drawn(uniform_bits(1, "w", "a", 0, 1_000_000), 0.3).double().mean().item()
    assert abs(kept - 0.3) < 0.0023
    assert drawn(uniform_bits(1, "w", "a", 0, 1000), 1.0).all()


def test_dare_by_hand():
    """Half stays, doubled; with l1 the sum 10 of magnitudes is restored: 4 becomes 10."""
    tau, mask = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert rescaled(tau * mask, tau, 0.5, "inverse").tolist() == [0.0, -4.0, 0.0, 8.0]
    only = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert rescaled(only, tau, 0.5, "l1").tolist() == [0.0, 0.0, 0.0, 10.0]
    assert rescaled(only, tau, 0.5, "none").tolist() == [0.0, 0.0, 0.0, 4.0]
    assert rescaled(only * 0, tau, 0.5, "l1").tolist() == [0.0] * 4


@quick
@given(st.integers(0, 999), st.sampled_from([0.1, 0.5, 0.9]))
def test_dare_is_its_formula_with_the_mask(seed, density):
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed))
    found = change("dare", block(values, ids=("a", "b"), seed=seed), density=density)
    for row, tau, identity in zip(found, values, ("a", "b"), strict=True):
        mask = uniform_bits(seed, "w", identity, 0, 50) < round(density * 2**32)
        expected = np.where(mask, tau.double().numpy() / density, 0.0)
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_density_1_changes_nothing():
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for name in ("dare", "della"):
        assert torch.equal(change(name, block(values, ids=("a", "b")), density=1.0), values)


def test_large_values_stay_more_often():
    """Ranks 2 1 3 of 3: 0.5 -+ 0.1 are 0.5, 0.4, 0.6; a row of one value has the density."""
    found = keep_probability(torch.tensor([[2.0, 1.0, 3.0]]), 0.5, 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.4, 0.6]], dtype=torch.float64))
    assert keep_probability(torch.ones(4, 1), 0.5, 0.2).tolist() == [[0.5]] * 4


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_della_on_more_rows_than_are_ranked_at_once(rescale):
    rows, columns, seed = 700, 600, 5  # more than 2^18 values
    tau = torch.randn(rows * columns, generator=torch.Generator().manual_seed(0))
    chance = keep_probability(tau.reshape(rows, columns).abs(), 0.5, 0.2).reshape(-1)
    kept = drawn(uniform_bits(seed, "w", "a", 0, len(tau)), chance.numpy())
    expected = rescaled(tau * kept, tau, chance, rescale).float()
    given = block(tau[None], shape=(rows, columns), seed=seed)
    found = change("della", given, density=0.5, window=0.2, rescale=rescale)[0]
    assert torch.equal(found, expected)


@quick
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 9))
def test_della_row_by_row(seed, rows, columns):
    values = torch.randn(1, rows * columns, generator=torch.Generator().manual_seed(seed))
    found = change("della", block(values, shape=(rows, columns)), density=0.5, window=0.2)
    bits = uniform_bits(0, "w", "a", 0, rows * columns).reshape(rows, columns)
    tau = values.double().numpy().reshape(rows, columns)
    expected = np.zeros_like(tau)
    for i in range(rows):
        order = sorted(range(columns), key=lambda j: abs(tau[i, j]))
        for rank, j in enumerate(order):
            q = 0.5 if columns == 1 else 0.4 + 0.2 * rank / (columns - 1)
            expected[i, j] = tau[i, j] / q if bits[i, j] < round(q * 2**32) else 0.0
    np.testing.assert_allclose(found.reshape(rows, columns), expected, rtol=1e-6)


def test_breadcrumbs_by_hand():
    """Of 1 .. 10 the top tenth (10) falls, the next 3 stay."""
    tau = torch.arange(1.0, 11.0)[None]
    assert breadcrumbs(tau, 0.3, 0.1).tolist() == [[0, 0, 0, 0, 0, 0, 7.0, 8.0, 9.0, 0]]


@quick
@given(
    st.integers(0, 999),
    st.integers(2, 40),
    st.sampled_from([0.1, 0.3, 0.6]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_breadcrumbs_by_sorting(seed, size, density, top):
    tau = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(size), key=lambda i: -abs(float(tau[0, i])))
    cut = int(top * size)
    kept = set(order[cut : cut + max(1, int(density * size))])
    expected = [float(tau[0, i]) if i in kept else 0.0 for i in range(size)]
    assert breadcrumbs(tau, density, top)[0].tolist() == expected


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((), (1, 1)), ((5,), (1, 5)), ((3, 4), (3, 4)), ((1, 1, 7), (1, 7)), ((8, 3, 2, 2), (8, 12))],
)
def test_tensors_as_matrices(shape, rows):
    assert rows_of(shape) == rows


def test_the_rule_behind_is_checked_and_spelled_out():
    della = make_recipe({"method": "della"}, "here")
    assert della.options["rule"] == "ties"
    assert della.options["rule_options"]["density"] == 1.0
    ties = {"rule": "ties", "rule_options": {"density": 0.3, "scope": "tensor"}}
    dare = make_recipe({"method": "dare", "options": ties}, "here")
    assert dare.options["rule_options"]["scope"] == "tensor"
    assert dare.options["rule_options"]["reduction"] == "mean"
    assert make_recipe(dare.model_dump(mode="json"), "here") == dare
    with says(RecipeError, "here, options of dare: unknown method 'meen'; did you mean 'mean'?"):
        make_recipe({"method": "dare", "options": {"rule": "meen"}}, "here")
    with pytest.raises(RecipeError, match="unknown method 'della'"):
        make_recipe({"method": "dare", "options": {"rule": "della"}}, "here")
    wrong = {"rule": "ties", "rule_options": {"dense": 1}}
    with pytest.raises(RecipeError, match="options of ties: unknown key 'dense'"):
        make_recipe({"method": "dare", "options": wrong}, "here")
