"""TSV-M, Iso-C, Iso-CTS, singular value calibration, low rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods import METHODS
from merge_kit.methods.base import Block
from merge_kit.methods.spectral import (
    as_matrix,
    iso_c,
    iso_cts,
    leading,
    low_rank,
    polar_factor,
    svc,
    tsv_m,
)
from merge_kit.recipe import make_recipe
from tests.merge_kit.helpers import quick

RULES = {
    "tsv-m": tsv_m,
    "iso-c": iso_c,
    "iso-cts": lambda vectors, weights: iso_cts(vectors, weights, 0.5),
    "svc": svc,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def ones(size):
    return torch.ones(size, dtype=torch.float64)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed, size):
    return torch.linalg.qr(draw(seed, size, size).double()).Q


def stack(*matrices):
    return torch.tensor(matrices, dtype=torch.float32)


def near(found, expected, rtol=1e-9):
    """Entries equal to a part of the largest one."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


# The papers' formulas, in float64 numpy, with full SVDs.


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def scaled(vectors, weights):
    return [w * tau for w, tau in zip(weights.numpy(), vectors.double().numpy(), strict=True)]


def orthogonalised(columns):
    u, _, vt = svd(columns)
    return u @ vt


def paper_tsv_m(vectors, weights):
    rank = min(vectors.shape[1:]) // len(vectors)
    parts = [svd(tau) for tau in scaled(vectors, weights)]
    left = orthogonalised(np.hstack([u[:, :rank] for u, _, _ in parts]))
    right = orthogonalised(np.vstack([vt[:rank] for _, _, vt in parts]))
    return left @ np.diag(np.hstack([s[:rank] for _, s, _ in parts])) @ right


def paper_iso_c(vectors, weights):
    u, s, vt = svd(sum(scaled(vectors, weights)))
    return u @ np.diag(np.full_like(s, s.mean())) @ vt


def paper_iso_cts(vectors, weights, fraction=0.5):
    size, d = len(vectors), min(vectors.shape[1:])
    own = round((d - int(fraction * d)) / size)
    common = d - own * size
    u, s, vt = svd(sum(scaled(vectors, weights)))
    lefts, values, rights = [u[:, :common]], [s[:common]], [vt[:common]]
    for tau in scaled(vectors, weights):
        ui, si, vti = svd(tau - u[:, :common] @ u[:, :common].T @ tau)
        lefts.append(ui[:, :own])
        values.append(si[:own])
        rights.append(vti[:own])
    left, right = orthogonalised(np.hstack(lefts)), orthogonalised(np.vstack(rights))
    return np.hstack(values).mean() * left @ right


def paper_svc(vectors, weights):
    taus = scaled(vectors, weights)
    size, total = len(taus), sum(taus)
    u, s, vt = svd(total)
    for r in range(len(s)):
        merged, counted = u[:, r] @ total, 0.0
        for tau in taus:
            own = u[:, r] @ tau
            counted += max(1 / size, merged @ own / (own @ own))
        s[r] *= size / counted
    return u @ np.diag(s) @ vt


PAPERS = {
    "tsv-m": paper_tsv_m,
    "iso-c": paper_iso_c,
    "iso-cts": paper_iso_cts,
    "svc": paper_svc,
}


@pytest.mark.parametrize("name", RULES)
@quick
@given(st.integers(0, 999), st.integers(1, 4), st.integers(4, 12), st.integers(4, 12))
def test_the_formula_of_the_paper(name, seed, sites, rows, columns):
    vectors = draw(seed, sites, rows, columns)
    weights = torch.rand(sites, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    near(RULES[name](vectors, weights), PAPERS[name](vectors, weights), rtol=1e-7)


def test_overlapping_directions_are_turned_apart():
    """Left vectors at 0 and 60 degrees become -15 and 75; the right ones are orthogonal."""
    half, c, s = math.sqrt(0.75), math.cos(math.pi / 12), math.sin(math.pi / 12)
    found = tsv_m(stack([[2, 0], [0, 0]], [[0, 0.5], [0, half]]), ones(2))
    near(found, [[2 * c, s], [-2 * s, c]], rtol=1e-7)


def test_each_vector_keeps_its_largest_values():
    """Rank int(3 / 2) = 1 of each: 5 and 4."""
    vectors = torch.stack([torch.diag(torch.tensor(d)) for d in ([5.0, 0, 1], [0, 4.0, 2])])
    near(tsv_m(vectors, ones(2)), np.diag([5.0, 4.0, 0.0]))


def test_all_singular_values_become_their_mean():
    """The sum [[0, -3], [1, 0]] has 3 and 1."""
    found = iso_c(stack([[0, -1], [1, 0]], [[0, -2], [0, 0]]), ones(2))
    near(found, [[0, -2], [2, 0]])


def test_own_directions_replace_the_weakest_common_ones():
    """10 and 6 of the sum stay; beside them are 2 of the first, 1 of the second: mean 19 / 4.

    The sum of the third directions is 0: Iso-C has 17 / 3 in the other three and nothing there.
    """
    first = torch.diag(torch.tensor([5.0, 3, 0, 0]))
    second = torch.diag(torch.tensor([5.0, 3, 1, 0]))
    first[2, 3] = 2.0
    found = iso_cts(torch.stack([first, second]), ones(2), 0.5)
    # The left vectors are the same, the right ones are not: e3 / sqrt(2) belongs to both.
    both = 4.75 / math.sqrt(2)
    near(found, [[4.75, 0, 0, 0], [0, 4.75, 0, 0], [0, 0, both, both], [0, 0, 0, 0]])


def test_what_is_shared_counts_once():
    """Shares 4 / 2 and 4 / 2 give 4 / 2 = 2; 1 / 1 and, for nothing, 1 / 2 give 1 / 0.75."""
    vectors = stack([[2, 0], [0, 1]], [[2, 0], [0, 0]])
    near(svc(vectors, ones(2)), np.diag([2, 4 / 3]))
    near(svc(vectors, ones(2), alpha=1.0), np.diag([2, 1]))


def test_weights_scale_the_vectors():
    vectors, weights = draw(0, 3, 7, 6), torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    for rule in RULES.values():
        near(rule(vectors, weights), rule(vectors * weights[:, None, None], ones(3)))


@every_rule
def test_a_weight_of_zero_has_no_say_in_the_directions(rule):
    vectors, weights = draw(0, 2, 7, 6), torch.tensor([2.0, 0.0], dtype=torch.float64)
    silent = torch.stack([vectors[0], torch.zeros(7, 6)])
    near(rule(vectors, weights), rule(silent, weights))


@every_rule
@quick
@given(st.integers(0, 999), st.integers(1, 5))
def test_the_order_of_the_sites_does_not_matter(rule, seed, sites):
    vectors, weights = draw(seed, sites, 7, 6), draw(seed, sites).abs().double() + 0.1
    order = torch.randperm(sites, generator=torch.Generator().manual_seed(seed))
    near(rule(vectors[order], weights[order]), rule(vectors, weights), rtol=1e-7)


@every_rule
@pytest.mark.parametrize("factor", [-1.0, 3.0, 1e-30, 1e30])
def test_it_scales_with_the_vectors(rule, factor):
    vectors = draw(0, 3, 7, 6)
    factor = float(np.float32(factor))
    scaled = rule(vectors * factor, ones(3)) / factor
    near(scaled, rule(vectors, ones(3)), rtol=1e-4)


def with_values(seed, values, rows=6, columns=5):
    left, right = rotation(seed, rows), rotation(seed + 1, columns)
    return left[:, : len(values)] * torch.tensor(values) @ right[:, : len(values)].T


REPEATED = {
    "distinct": ([5.0, 4.0, 3.0, 2.0, 1.0], [6.0, 3.5, 2.5, 1.5, 0.5]),
    "repeated": ([3.0, 3.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.5, 0.5, 0.5]),
    "deficient": ([3.0], [2.0]),
    "one is zero": ([3.0, 2.0, 1.0], []),
}


@pytest.mark.parametrize("values", REPEATED.values(), ids=REPEATED)
@every_rule
def test_the_basis_does_not_matter(rule, values):
    """Turned vectors give the turned result, whatever singular vectors LAPACK finds for them."""
    vectors = torch.stack([with_values(10 * i, v) for i, v in enumerate(values)])
    left, right = rotation(90, 6), rotation(91, 5)
    near(rule(left @ vectors @ right, ones(2)), left @ rule(vectors, ones(2)) @ right)


@every_rule
@pytest.mark.parametrize("sites", [1, 2, 9])
def test_zeros_give_zeros(rule, sites):
    assert not rule(torch.zeros(sites, 4, 3), ones(sites)).any()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_one_vector(shape):
    """TSV-M and calibration leave it; the isotropic rules flatten it."""
    tau = draw(0, 1, *shape)
    for rule in (tsv_m, svc):
        near(rule(tau, ones(1)), tau[0])
    u, s, vt = svd(tau[0].double().numpy())
    near(iso_c(tau, ones(1)), s.mean() * u @ vt)
    near(iso_cts(tau, ones(1), 0.8), s.mean() * u @ vt)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 0.6, 2.1]])
def test_equal_vectors(weights):
    """Calibration gives the vector, TSV-M its largest values; Iso-C has the mean of their sum."""
    tau = draw(0, 7, 6)
    u, s, vt = svd(tau.double().numpy())
    vectors, weights = tau.expand(3, 7, 6), torch.tensor(weights, dtype=torch.float64)
    near(tsv_m(vectors, weights), u[:, :2] * s[:2] @ vt[:2])
    near(iso_c(vectors, weights), 3 * s.mean() * u @ vt)
    # c = 3 common directions and the same next one of all three sites
    mean = 3 * s[:4].sum() / 6
    near(iso_cts(vectors, weights, 0.5), mean * u[:, :4] @ vt[:4])


def test_calibrated_equal_vectors_are_the_vector():
    tau = draw(0, 7, 6)
    near(svc(tau.expand(3, 7, 6), ones(3)), tau)


def test_more_vectors_than_directions():
    """TSV-M keeps one direction of each, where int(2 / 3) would be none."""
    vectors = stack([[3, 0], [0, 1]], [[3, 0], [0, 1]], [[3, 0], [0, 1]])
    near(tsv_m(vectors, ones(3)), np.diag([3.0, 0.0]))
    many = draw(0, 13, 10, 10)
    near(iso_cts(many, ones(13), 0.3), iso_c(many, ones(13)))


def test_iso_cts_without_own_directions_is_iso_c():
    vectors = draw(0, 3, 7, 6)
    near(iso_cts(vectors, ones(3), 1.0), iso_c(vectors, ones(3)))


def test_iso_cts_without_common_directions():
    vectors = draw(0, 3, 7, 6)
    near(iso_cts(vectors, ones(3), 0.0), paper_iso_cts(vectors, ones(3), 0.0))


def test_what_a_projection_leaves_is_no_direction():
    """Both vectors lie in the 3 common directions: 4 + 1 and 2 + 1, mean 4, and nothing else."""
    vectors = torch.stack([with_values(0, values, 8, 7) for values in ([4.0, 2.0], [1.0, 1.0])])
    found = torch.linalg.svdvals(iso_cts(vectors.float(), ones(2), 0.6))
    near(found, [4, 4, 0, 0, 0, 0, 0], rtol=1e-6)


def test_directions_that_differ_by_rounding_are_one():
    """The common one has 4 + 1; the other is the own one of both, 2 and 1: mean 8 / 3."""
    vectors = torch.stack([with_values(0, values) for values in ([4.0, 2.0], [1.0, 1.0])])
    found = torch.linalg.svdvals(iso_cts(vectors.float(), ones(2), 0.5))
    near(found, [8 / 3, 8 / 3, 0, 0, 0], rtol=1e-6)


def test_singular_values_that_are_not_zero():
    found = leading(torch.diag(torch.tensor([1.0, 3.0, 0.0, 1e-9], dtype=torch.float64)), 3)
    near(found.values, [3.0, 1.0])
    near(found.left * found.values @ found.right.T, np.diag([1.0, 3.0, 0.0, 0.0]))


def test_the_polar_factor_of_dependent_columns():
    columns = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    near(polar_factor(columns), [[math.sqrt(0.5), math.sqrt(0.5), 0.0], [0.0, 0.0, 1.0]])


def test_energy_by_hand():
    """Squares 16, 4, 1 of 21: 0.75 is 15.75, 0.95 is 19.95."""
    tau = torch.diag(torch.tensor([2.0, 1.0, 4.0]))
    near(low_rank(tau, 0.75), np.diag([0.0, 0.0, 4.0]))
    near(low_rank(tau, 0.95), np.diag([2.0, 0.0, 4.0]))
    near(low_rank(tau, 0.96), np.diag([2.0, 1.0, 4.0]), rtol=1e-6)
    assert not low_rank(tau * 0, 0.5).any()
    assert torch.linalg.matrix_rank(low_rank(torch.eye(4), 0.5)) == 2


def test_all_energy_changes_nothing():
    tau = draw(0, 5, 8) * 1e-12 ** torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(low_rank(tau, 1.0), tau)


@quick
@given(st.integers(0, 999), st.integers(2, 9), st.integers(2, 9), st.sampled_from([0.3, 0.8, 0.95]))
def test_the_largest_singular_values_are_kept(seed, rows, columns, energy):
    tau = draw(seed, rows, columns)
    u, s, vt = svd(tau.double().numpy())
    rank = 1
    while (s[:rank] ** 2).sum() < energy * (s**2).sum():
        rank += 1
    near(low_rank(tau, energy), u[:, :rank] * s[:rank] @ vt[:rank], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((), None),
        ((5,), None),
        ((3, 4), (3, 4)),
        ((1, 4), None),
        ((4, 1), None),
        ((1, 1, 8), None),
        ((1, 5, 8), None),
        ((8, 4, 3, 3), (8, 36)),
        ((8, 4, 1, 1), (8, 4)),
        ((1, 4, 3, 3), None),
        ((8, 1, 3, 3), None),
        ((8, 4, 3), (8, 12)),
    ],
)
def test_tensors_as_matrices(shape, found):
    assert as_matrix(shape) == found


def block(values, shape):
    start = torch.zeros(values.shape[1], dtype=torch.float64)
    ids = tuple(map(str, range(len(values))))
    return Block("w", shape, 0, values, start, ids, ids, 0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(24,), (1, 2, 12), (6, 1, 2, 2)])
def test_what_is_no_matrix_is_averaged(name, shape):
    values, weights = draw(0, 2, 24), torch.tensor([0.5, 1.5], dtype=torch.float64)
    method = METHODS[name]
    found = method.rule.combine(block(values, shape), weights, method.options(), None)
    near(found, (0.5 * values[0] + 1.5 * values[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_kernels_are_reshaped(name):
    values, method = draw(0, 2, 6 * 3 * 2 * 2), METHODS[name]
    options = method.options.model_validate({"common": 0.5} if name == "iso-cts" else {})
    found = method.rule.combine(block(values, (6, 3, 2, 2)), ones(2), options, None)
    near(found.reshape(6, 12), PAPERS[name](values.reshape(2, 6, 12), ones(2)), rtol=1e-7)
    assert method.rule.whole(options)


def test_low_rank_changes_matrices_only():
    values, method = draw(0, 2, 24), METHODS["low-rank"]
    options = method.options(energy=0.5)
    for shape in ((24,), (1, 1, 24), (6, 1, 2, 2)):
        assert torch.equal(method.rule.change(block(values, shape), options), values)
    found = method.rule.change(block(values, (2, 3, 2, 2)), options)
    for row, tau in zip(found, values, strict=True):
        assert torch.equal(row.reshape(2, 12), low_rank(tau.reshape(2, 12), 0.5))


def test_the_defaults_are_the_papers():
    assert METHODS["iso-cts"].options().common == 0.8
    assert METHODS["svc"].options().alpha is None
    assert METHODS["low-rank"].options().energy == 0.95


def test_ties_behind_low_rank_trims_as_ever():
    recipe = make_recipe({"method": "low-rank", "options": {"rule": "ties"}}, "here")
    assert recipe.options["rule_options"]["density"] == 0.2
