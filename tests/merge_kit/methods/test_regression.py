"""Fisher and RegMean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.blocks import BLOCK, BlockReader
from merge_kit.errors import VectorError
from merge_kit.methods import METHODS
from merge_kit.methods.base import Block
from merge_kit.methods.regression import divide, fisher, regmean, shrink
from merge_kit.surveys import Survey
from tests.merge_kit.helpers import quick, says

EVEN = torch.ones(2, dtype=torch.float64)
seeds = st.integers(0, 999)


def randoms(seed):
    """A generator of float64 normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def shuffled(seed, sites):
    return torch.randperm(sites, generator=torch.Generator().manual_seed(seed))


def weights_of(seed, sites):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sites, generator=generator, dtype=torch.float64) + 0.1


def block(values, statistics, shape=None, name="fc.weight"):
    values = torch.as_tensor(values, dtype=torch.float32)
    sites = tuple(f"s{index}" for index in range(len(values)))
    start = torch.zeros(values.shape[1], dtype=torch.float64)
    return Block(name, shape or values.shape[1:], 0, values, start, sites, sites, 0, statistics)


def combine(name, block, weights=EVEN, state=None, **options):
    method = METHODS[name]
    return method.rule.combine(block, weights, method.options(**options), state)


def close(left, right, tolerance=1e-11):
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tolerance, atol=tolerance)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(0, 9))
def test_division_is_by_the_pseudo_inverse(seed, rows, size, rank):
    """Of full rank and less, none too."""
    randn = randoms(seed)
    root, top = randn(size, min(rank, size)), randn(rows, size)
    gram = root @ root.T
    wanted = (top @ gram).numpy() @ np.linalg.pinv(gram.numpy(), hermitian=True)
    close(divide(top @ gram, gram), wanted, 1e-6)


def test_division_does_not_depend_on_the_scales_of_the_inputs():
    """Diagonal entries from 1e-12 to 1e12: a cut-off by eigenvalue would lose most of them."""
    scales = torch.logspace(-6, 6, 5, dtype=torch.float64)
    root = randoms(0)(5, 9)
    gram = root @ root.T * scales[:, None] * scales
    wanted = torch.ones(2, 5, dtype=torch.float64) / scales
    close(divide(wanted @ gram, gram) * scales, np.ones((2, 5)), 1e-9)


def test_fisher_by_hand():
    """(1 * 1 + 3 * 5) / 4; nothing known: the mean; one known alone; (2 * 2 + 1 * 6) / 3."""
    vectors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [5.0, 5.0, 9.0, 6.0]])
    known = torch.tensor([[1.0, 0.0, 7.0, 0.5], [3.0, 0.0, 0.0, 0.25]])
    assert fisher(vectors, known, EVEN, EVEN, 0.0).tolist() == [4.0, 3.0, 2.0, (4 + 6) / 3]
    assert fisher(vectors, known, EVEN, EVEN, 1.0).tolist()[3] == 4.0
    # Added: 2 and 4 of 6, 1 and 1, 8 and 1 of 9, 1.5 and 1.25 of 2.75.
    added = fisher(vectors, known, EVEN, EVEN, 1.0, "add")
    close(added, [22 / 6, 3.0, 25 / 9, 10.5 / 2.75])


@quick
@given(seeds, st.integers(1, 5), st.sampled_from(["max", "add"]))
def test_fisher_is_its_formula_on_the_models_weights(seed, sites, floored):
    """The paper averages theta_i: value by value, in numpy."""
    randn = randoms(seed)
    start, tau, known = randn(7), randn(sites, 7), randn(sites, 7).square() * 1e-5
    weights, coefficients = weights_of(seed, sites), weights_of(seed + 1, sites)
    merged = fisher(tau, known, weights, coefficients, 1e-6, floored)
    for p in range(7):
        top = bottom = 0.0
        for i in range(sites):
            f = float(known[i, p])
            f = max(f, 1e-6) if floored == "max" else f + 1e-6
            top += float(coefficients[i]) * f * float(start[p] + tau[i, p])
            bottom += float(coefficients[i]) * f
        assert float(start[p] + merged[p]) == pytest.approx(top / bottom, rel=1e-12, abs=1e-12)


@quick
@given(seeds, st.integers(1, 5))
def test_equal_vectors_give_themselves_to_the_last_digit(seed, sites):
    randn = randoms(seed)
    tau = randn(3, 4).float()
    vectors, weights = tau.expand(sites, 3, 4), torch.ones(sites, dtype=torch.float64)
    roots = randn(sites, 4, 2)
    grams = roots @ roots.mT
    assert torch.equal(regmean(vectors, grams, weights), tau.double())
    assert torch.equal(regmean(vectors, grams, weights, 1.0, 0.0), tau.double())
    known = randn(sites, 12).square()
    merged = fisher(vectors.reshape(sites, 12), known, weights, weights)
    assert torch.equal(merged, tau.double().reshape(12))


@quick
@given(seeds, st.integers(2, 6))
def test_the_order_of_the_sites_and_the_unit_of_the_statistics_never_matter(seed, sites):
    randn = randoms(seed)
    tau, roots, known = randn(sites, 3, 4), randn(sites, 4, 9), randn(sites, 12).square()
    grams, weights = roots @ roots.mT, weights_of(seed, sites)
    flat, order = tau.reshape(sites, 12), shuffled(seed, sites)
    first = regmean(tau, grams, weights)
    close(regmean(tau[order], grams[order], weights[order]), first)
    close(regmean(tau, grams * 1e-9, weights), first)
    close(regmean(tau * 4, grams, weights), first * 4)
    first = fisher(flat, known, weights, weights)
    close(fisher(flat[order], known[order], weights[order], weights[order]), first)
    close(fisher(flat, known, weights, weights * 1e9), first)


def test_vectors_of_zeros_and_statistics_of_zeros():
    nothing, tau = torch.zeros(2, 2, 3), torch.tensor([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]])
    assert not regmean(nothing, torch.eye(3).expand(2, 3, 3), EVEN).any()
    assert regmean(tau, torch.zeros(2, 3, 3), EVEN).tolist() == [[2.0, 2.0, 2.0]]
    assert not fisher(nothing.reshape(2, 6), torch.ones(2, 6), EVEN, EVEN).any()


def test_regmean_by_hand():
    """Inputs 1 and 2 do not meet: (1 * 4 + 3 * 8) / 4 and, seen by nobody, the mean (2 + 6) / 2."""
    vectors = torch.tensor([[[4.0, 2.0]], [[8.0, 6.0]]])
    grams = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]])
    assert regmean(vectors, grams, EVEN, ridge=0.0).tolist() == [[7.0, 4.0]]
    # A ridge of 1 adds the mean diagonal, 2: from the mean 6 it is 4 / (4 + 2), not 4 / 4.
    assert regmean(vectors, grams, EVEN, ridge=1.0).tolist() == [[6 + 4 / 6, 4.0]]


def test_the_diagonal_is_not_shrunk():
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert shrink(gram, 0.5).tolist() == [[2.0, 0.5], [0.5, 3.0]]


@quick
@given(seeds, st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.9, 1.0]), st.sampled_from([0.0, 0.1]))
def test_regmean_is_its_formula_on_the_models_weights(seed, sites, alpha, ridge):
    """The paper's W_i^T (in, out), dense and inverted, with the ridge on each Gram matrix."""
    randn = randoms(seed)
    start, tau, weights = randn(3, 4), randn(sites, 3, 4), weights_of(seed, sites)
    inputs = randn(sites, 20, 4)
    grams = (inputs.mT @ inputs / 20).numpy()
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    w = weights.numpy()
    mean = sum(w[i] * shrunk[i] for i in range(sites)) / w.sum()
    reach = ridge * np.trace(mean) / 4 * np.eye(4)
    top = sum(w[i] * (shrunk[i] + reach) @ (start + tau[i]).numpy().T for i in range(sites))
    bottom = sum(w[i] * (shrunk[i] + reach) for i in range(sites))
    wanted = (np.linalg.inv(bottom) @ top).T
    merged = regmean(tau, torch.from_numpy(grams), weights, alpha, ridge)
    close(start + merged, wanted, 1e-9)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 12))
def test_regmean_is_the_least_squares_fit(seed, sites, rows):
    """No W maps the sites' inputs closer to their outputs, be there fewer rows than inputs."""
    randn = randoms(seed)
    tau, inputs = randn(sites, 3, 5), randn(sites, rows, 5)
    even = torch.ones(sites, dtype=torch.float64)
    merged = regmean(tau, inputs.mT @ inputs / rows, even, alpha=1.0, ridge=0.0)
    every = inputs.reshape(-1, 5).numpy()
    outputs = (inputs @ tau.mT).reshape(-1, 3).numpy()
    best = np.linalg.lstsq(every, outputs, rcond=None)[0]

    def misfit(matrix):
        return float(np.square(every @ matrix - outputs).sum())

    assert misfit(merged.T.numpy()) == pytest.approx(misfit(best), rel=1e-9, abs=1e-9)


def test_what_was_never_seen_is_the_mean_and_not_the_base():
    """One input direction of five is seen: along the others the merged layer is the mean."""
    randn = randoms(0)
    tau, direction = randn(2, 3, 5), randn(1, 5)
    unseen = randn(5, 1)
    unseen -= direction.T @ (direction @ unseen) / direction.square().sum()
    for ridge in (0.0, 1e-6):
        merged = regmean(tau, (direction.T @ direction).expand(2, 5, 5), EVEN, 1.0, ridge)
        close(merged @ unseen, tau.mean(dim=0) @ unseen, 1e-9)


def test_tensors_without_statistics_get_the_weighted_mean():
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    bias = block([[4.0, 0.0], [8.0, 1.0]], None, name="fc.bias")
    norms = torch.ones(2, dtype=torch.float64)
    assert combine("regmean", bias, weights).tolist() == [7.0, 0.75]
    assert combine("fisher", bias, weights, norms).tolist() == [7.0, 0.75]


def test_a_kernel_is_a_matrix_of_its_output_channels():
    randn = randoms(0)
    kernels, inputs = randn(2, 3, 2 * 2 * 2).float(), randn(2, 30, 8).float()
    grams = inputs.mT @ inputs / 30
    merged = combine("regmean", block(kernels.reshape(2, 24), grams, (3, 2, 2, 2), "conv.weight"))
    assert torch.equal(merged, regmean(kernels, grams, EVEN).reshape(24))


def test_options_reach_the_rules():
    randn = randoms(0)
    tau, inputs = randn(2, 3, 4).float(), randn(2, 30, 4).float()
    grams = inputs.mT @ inputs / 30
    layer = block(tau.reshape(2, 12), grams, (3, 4))
    merged = combine("regmean", layer, alpha=0.5, ridge=0.25)
    assert torch.equal(merged, regmean(tau, grams, EVEN, 0.5, 0.25).reshape(12))
    known, norms = randn(2, 12).square().float(), torch.tensor([2.0, 4.0], dtype=torch.float64)
    values = block(tau.reshape(2, 12), known)
    merged = combine("fisher", values, EVEN, norms, floor=0.5, floored="add")
    wanted = fisher(tau.reshape(2, 12), known, EVEN, EVEN / norms, 0.5, "add")
    assert torch.equal(merged, wanted)


@pytest.fixture
def survey(open_file):
    """The first pass over two sites' tensor of two blocks, and a tensor without statistics."""
    tensors = {"bias": torch.ones(2), "weight": torch.ones(BLOCK + 3)}
    file, rule = open_file(tensors), METHODS["fisher"]

    def run(known, **options):
        statistics = tuple(open_file({"weight": row.clone()}) for row in known)
        reader = BlockReader(
            file,
            (file, file),
            tuple(tensors),
            1,
            sites=("north", "south"),
            statistics=statistics,
            kind="fisher",
        )
        return rule.rule.survey(Survey(reader), rule.options(**options))

    return run


def test_each_sites_fisher_information_is_brought_to_length_1(survey):
    """3 in one block and 4 in the next; 8 and 6."""
    known = torch.zeros(2, BLOCK + 3)
    known[0, 7], known[0, -1], known[1, 5], known[1, -2] = 3.0, 4.0, 8.0, 6.0
    assert survey(known).tolist() == [5.0, 10.0]
    assert survey(known, normalise=False).tolist() == [1.0, 1.0]


def test_fisher_information_of_zeros_has_no_length(survey):
    known = torch.zeros(2, BLOCK + 3)
    known[0, 0] = 1.0
    with says(
        VectorError,
        "site 'south': its Fisher information is all zeros in what 'fisher' merges ('bias' and 1 "
        "more) and cannot be brought to length 1: leave it out with --exclude south, or set "
        "'normalise: false'.",
    ):
        survey(known)
    assert survey(known, normalise=False).tolist() == [1.0, 1.0]
