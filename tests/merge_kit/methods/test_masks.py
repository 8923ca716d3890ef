"""Consensus and EMR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.blocks import BLOCK
from merge_kit.methods import METHODS
from merge_kit.methods.base import Block
from merge_kit.methods.masks import (
    EmrOptions,
    consensus,
    emr_masks,
    lengths,
    rescalers,
    unify,
)
from tests.merge_kit.helpers import quick

ONES = torch.ones(3, dtype=torch.float64)
# Two agree and one does not; all agree; a tie, which is elected negative; nothing.
VECTORS = torch.tensor([[1.0, -2.0, 3.0, 0.0], [4.0, -1.0, -3.0, 0.0], [-2.0, -3.0, 0.0, 0.0]])
EMR = METHODS["emr"].rule


def paper(vectors):
    """arXiv 2405.17461 and the authors' code, coordinate by coordinate: u, masks, rescalers."""
    tau = np.asarray(vectors, dtype=np.float64)
    sites, size = tau.shape
    unified, masks = np.zeros(size), np.zeros((sites, size), dtype=bool)
    for p in range(size):
        gamma = 1 if tau[:, p].sum() > 0 else -1
        for i in range(sites):
            masks[i, p] = tau[i, p] * gamma > 0
            if masks[i, p]:
                unified[p] = gamma * max(abs(unified[p]), abs(tau[i, p]))
    factors = []
    for i in range(sites):
        kept = np.abs(unified[masks[i]]).sum()
        factors.append(np.abs(tau[i]).sum() / kept if kept else 1.0)
    return unified, masks, factors


def test_consensus_keeps_what_matters_to_two():
    """tau_M = 3, 6; |tau| > 0.4 |tau_M - tau|: 1 > .8, 2 > .4, 0 > 1.2 no; 6 > 0, 0, 0."""
    vectors = torch.tensor([[1.0, 6.0], [2.0, 0.0], [0.0, 0.0]])
    assert consensus(vectors, ONES, 0.4, 2).tolist() == [3.0, 0.0]
    assert consensus(vectors, ONES, 0.4, 1).tolist() == [3.0, 6.0]


@quick
@given(st.integers(0, 999), st.integers(1, 6))
def test_consensus_element_by_element(seed, sites):
    vectors = torch.randn(sites, 12, generator=torch.Generator().manual_seed(seed))
    even = torch.ones(sites, dtype=torch.float64)
    tau = vectors.double().numpy()
    for p in range(12):
        column = [float(v) for v in tau[:, p]]
        total = sum(column)
        votes = sum(abs(v) > 0.4 * abs(total - v) for v in column)
        wanted = total if votes >= 2 else 0.0
        assert consensus(vectors, even, 0.4, 2)[p] == pytest.approx(wanted, abs=1e-12)


def test_emr_by_hand():
    """Sums 3, -6, 0, 0: the largest positive value, then the largest negative ones."""
    assert unify(VECTORS).tolist() == [4.0, -3.0, -3.0, 0.0]
    assert emr_masks(VECTORS).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, True, False, False],
    ]


def test_rescalers_by_hand():
    """Own lengths 6, 8, 5; of u the masks keep 4 + 3, 4 + 3 + 3, 3."""
    found = lengths(VECTORS)
    assert found.tolist() == [[6.0, 8.0, 5.0], [7.0, 10.0, 3.0]]
    assert rescalers(found).tolist() == [6 / 7, 8 / 10, 5 / 3]


def test_a_site_of_which_nothing_is_kept_has_nothing_to_scale():
    """The third vector never has the elected sign, the fourth is zero."""
    vectors = torch.tensor([[2.0, -2.0], [2.0, -2.0], [-1.0, 1.0], [0.0, 0.0]])
    assert rescalers(lengths(vectors)).tolist() == [1.0, 1.0, 1.0, 1.0]


@quick
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 30))
def test_the_formulas_of_the_paper(seed, sites, size):
    """Values in steps of 1/4, so that sums cancel."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-6, 7, (sites, size), generator=generator) / 4.0
    unified, masks, factors = paper(vectors)
    np.testing.assert_array_equal(unify(vectors), unified)
    np.testing.assert_array_equal(emr_masks(vectors), masks)
    np.testing.assert_allclose(rescalers(lengths(vectors)), factors, rtol=1e-14)


@quick
@given(st.integers(0, 999), st.integers(2, 6))
def test_the_order_of_the_sites_changes_no_value(seed, sites):
    vectors = torch.randn(sites, 40, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(sites, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unify(vectors[order]), unify(vectors))
    assert torch.equal(emr_masks(vectors[order]), emr_masks(vectors)[order])


@quick
@given(st.integers(0, 999), st.integers(1, 5))
def test_equal_vectors_come_back_unchanged(seed, sites):
    tau = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    vectors = tau.expand(sites, 40)
    assert torch.equal(unify(vectors), tau.double())
    assert bool(emr_masks(vectors).all())
    assert rescalers(lengths(vectors)).tolist() == pytest.approx([1.0] * sites, rel=1e-15)


@quick
@given(st.integers(0, 999), st.sampled_from([0.25, 2.0]))
def test_the_unified_vector_scales_and_the_rest_does_not(seed, factor):
    vectors = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unify(vectors * factor), unify(vectors) * factor)
    assert torch.equal(emr_masks(vectors * factor), emr_masks(vectors))
    assert torch.equal(rescalers(lengths(vectors * factor)), rescalers(lengths(vectors)))


@pytest.mark.parametrize("rescale", ["sums", "means"])
def test_the_first_pass_measures_the_whole_vector(survey, rescale):
    """A matrix of several blocks beside a bias: the means let the bias count as much."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"bias": 3, "matrix": BLOCK + 5000}
    vectors = [{n: torch.randn(s, generator=generator) for n, s in sizes.items()} for _ in range(3)]
    own, kept = np.zeros(3), np.zeros(3)
    for name, size in sizes.items():
        tau = torch.stack([vector[name] for vector in vectors]).double().numpy()
        unified, masks, _ = paper(tau)
        share = size if rescale == "means" else 1
        own += np.abs(tau).sum(axis=1) / share
        kept += np.abs(unified * masks).sum(axis=1) / share
    found = EMR.rescalers(EMR.survey(survey(vectors), EmrOptions(rescale=rescale)))
    np.testing.assert_allclose(found, own / kept, rtol=1e-12)


def test_without_a_value_there_is_nothing_to_scale(survey):
    assert EMR.rescalers(EMR.survey(survey([{}, {}]), EmrOptions())).tolist() == [1.0, 1.0]


def test_the_site_behind_a_mask_is_closer_than_the_unified_model():
    """What EMR is for: theta_0 + lambda_i M_i * u stands nearer to theta_i than theta_0 + u."""
    vectors = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    block = Block("w", (4000,), 0, vectors, torch.zeros(4000).double(), (), (), 0)
    unified, factors = EMR.combine(block, None, EmrOptions(), None), rescalers(lengths(vectors))
    masked = EMR.masks(block, EmrOptions(), None) * unified * factors[:, None]
    for tau, own in zip(vectors, masked, strict=True):
        assert (own - tau).norm() < 0.6 * (unified - tau).norm()
