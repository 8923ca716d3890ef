"""PCB, against its formula on flattened vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from merge_kit.blocks import BLOCK, BlockReader
from merge_kit.methods import METHODS
from merge_kit.methods.competition import PcbOptions, PcbState, min_max, pcb, scores
from tests.merge_kit.helpers import quick

RULE = METHODS["pcb"].rule
INTER = ["sum", "normalised", "pairs"]
# Two vectors whose norms are 0 and 1: scores are then e^0 tanh(tau_i sum_j tau_j), or 0.
VECTORS = torch.tensor([[0.3, 0.3, 0.0], [0.1, 0.0, 0.1]])


def norm01(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def paper(vectors, weights, ratio, clamp, inter, kept=np.float64):
    """The authors' code with our ranks, vector by vector; scores are rounded to `kept`."""
    tau = np.asarray(vectors, dtype=np.float64)
    sites, size = tau.shape
    spared = int(clamp * size)
    clamped, norms = np.zeros_like(tau), np.zeros_like(tau)
    for i in range(sites):
        ordered = np.sort(np.abs(tau[i]))
        magnitudes = np.clip(np.abs(tau[i]), ordered[spared], ordered[size - 1 - spared])
        clamped[i], norms[i] = np.sign(tau[i]) * magnitudes, norm01(magnitudes)
    signed = np.sign(tau) * norms
    shares = np.zeros_like(tau)
    for i in range(sites):
        if inter == "sum":
            agreement = np.tanh(tau[i] * sum(tau))
        elif inter == "normalised":
            agreement = np.tanh(tau[i] * sum(signed))
        else:
            agreement = sum(np.tanh(signed[i] * signed[j]) for j in range(sites))
        beta = (np.exp(sites * (norms[i] ** 2 - 1)) * agreement).astype(kept).astype(np.float64)
        cut = np.sort(beta)[max(size - 1 - int(ratio * size), 0)]
        shares[i] = weights[i] * norm01(np.maximum(beta, cut))
    return sum(shares * clamped) / np.maximum(sum(shares), 1e-12)


def state_of(vectors, options):
    """What the first passes find, by sorting."""
    size = vectors.shape[1]
    spared, counting = int(options.clamp * size), int(options.ratio * size)
    ordered = vectors.abs().sort(dim=1).values
    low, high = ordered[:, spared], ordered[:, size - 1 - spared]
    ordered = scores(vectors, low, high, options.inter).sort(dim=1).values
    return PcbState(low, high, ordered[:, max(size - 1 - counting, 0)], ordered[:, -1])


def ours(vectors, weights=None, **options):
    checked = PcbOptions(**options)
    even = torch.ones(len(vectors), dtype=torch.float64)
    return pcb(
        vectors, even if weights is None else weights, state_of(vectors, checked), checked.inter
    )


def draw(seed, sites, size):
    return torch.randn(sites, size, generator=torch.Generator().manual_seed(seed))


def test_scores_by_hand():
    """Sums 0.4, 0.3, 0.1; of norms 0 the exponential is e^-2."""
    low, high = torch.tensor([0.0, 0.0]), torch.tensor([0.3, 0.1])
    found = scores(VECTORS, low, high)
    wanted = np.tanh([[0.12, 0.09, 0.0], [0.04, 0.0, 0.01]])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    half = scores(torch.tensor([[0.3, 0.15], [0.1, 0.0]]), low, high)
    # 2 (0.5^2 - 1) = -1.5
    np.testing.assert_allclose(half[0, 1], np.exp(-1.5) * np.tanh(0.15 * 0.15), rtol=1e-6)


def test_worked_example():
    """Two of three scores count: shares 1, a, 0 and 1, 0, b; where one counts its value stays."""
    found = ours(VECTORS, ratio=0.7, clamp=0)
    np.testing.assert_allclose(found, [(0.3 + 0.1) / 2, 0.3, 0.1], rtol=1e-6)
    found = ours(VECTORS, ratio=0.4, clamp=0)
    np.testing.assert_allclose(found, [(0.3 + 0.1) / 2, 0.0, 0.0], rtol=1e-6)


def test_weights_count_where_several_compete():
    """(1.5 * 0.3 + 0.5 * 0.1) / 2, and alone as without weights."""
    weights = torch.tensor([1.5, 0.5], dtype=torch.float64)
    found = ours(VECTORS, weights, ratio=0.7, clamp=0)
    np.testing.assert_allclose(found, [0.25, 0.3, 0.1], rtol=1e-6)


def test_magnitudes_are_clamped_at_both_ends():
    """Of 0.1 0.2 ... 1 one tenth at each end: 0.2 and 0.9, which are the norms 0 and 1."""
    tau = torch.arange(1, 11) / 10 * torch.tensor([1.0, -1.0]).repeat(5)
    found = state_of(tau[None], PcbOptions(clamp=0.1))
    assert (found.low, found.high) == (torch.tensor([0.2]), torch.tensor([0.9]))
    norms = min_max(tau, found.low.item(), found.high.item())
    np.testing.assert_allclose(norms[[0, 1, 8, 9]], [0.0, 0.0, 1.0, 1.0], atol=1e-12)
    merged = ours(tau[None], ratio=0.99, clamp=0.1)
    np.testing.assert_allclose(merged[[8, 9]], [0.9, -0.9], rtol=1e-6)


@pytest.mark.parametrize("inter", INTER)
@quick
@given(
    st.integers(0, 999),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_the_formula(inter, seed, sites, size, ratio, clamp):
    vectors = draw(seed, sites, size)
    weights = torch.rand(sites, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    expected = paper(vectors.numpy(), weights.numpy(), ratio, clamp, inter, np.float32)
    found = ours(vectors, weights, ratio=ratio, clamp=clamp, inter=inter)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("inter", INTER)
def test_scores_in_float32_are_enough(inter):
    """Against scores in float64: only values that hardly count may differ."""
    vectors = draw(0, 8, 5000) * 0.01
    expected = paper(vectors.numpy(), np.ones(8), 0.1, 1e-3, inter)
    found = ours(vectors, ratio=0.1, clamp=1e-3, inter=inter).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@quick
@given(st.integers(0, 999), st.sampled_from(INTER))
def test_the_order_of_the_sites_matters_to_the_last_digits_alone(seed, inter):
    vectors = draw(seed, 5, 60)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    options = {"ratio": 0.3, "clamp": 0.05, "inter": inter}
    torch.testing.assert_close(
        ours(vectors[order], **options), ours(vectors, **options), rtol=1e-6, atol=1e-9
    )


@quick
@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from(INTER))
def test_equal_vectors_keep_the_largest_values(seed, sites, inter):
    """All signs agree, so scores grow with the magnitude: 18 of 60 values stay as they are."""
    tau = draw(seed, 1, 60)
    merged = ours(tau.expand(sites, 60), ratio=0.3, clamp=0, inter=inter)
    largest = tau[0].abs() >= tau[0].abs().sort().values[-18]
    torch.testing.assert_close(merged, (tau[0] * largest).double(), rtol=1e-6, atol=0)


def test_a_value_that_fights_the_others_does_not_count():
    vectors = torch.tensor([[3.0, 1.0, 0.5, 0.1], [3.0, 1.0, 0.5, 0.1], [-3.0, 1.0, 0.5, 0.1]])
    assert ours(vectors, ratio=0.25, clamp=0)[0].item() == pytest.approx(3.0)


def test_vectors_without_a_spread_do_not_count():
    """Zeros, and equal magnitudes everywhere; nothing is divided by 0."""
    assert ours(torch.zeros(2, 6), ratio=0.5).tolist() == [0.0] * 6
    flat = torch.tensor([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert bool(ours(flat, ratio=0.5).isfinite().all())
    assert ours(torch.tensor([[5.0]])).tolist() == [0.0]


def test_many_vectors_do_not_overflow():
    """e^200 is beyond float32."""
    vectors = draw(1, 200, 50)
    found = ours(vectors, ratio=0.5, clamp=0)
    assert bool(found.isfinite().all())
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("inter", INTER)
def test_the_first_passes_see_the_whole_vector(survey, inter):
    generator = torch.Generator().manual_seed(3)
    sizes = {"bias": 30, "matrix": BLOCK + 5000, "other": 400}
    vectors = [
        {n: torch.randn(s, generator=generator) * 0.1 for n, s in sizes.items()} for _ in range(3)
    ]
    whole = torch.stack([torch.cat(list(vector.values())) for vector in vectors])
    options = PcbOptions(inter=inter, clamp=0.01)
    found, wanted = RULE.survey(survey(vectors), options), state_of(whole, options)
    assert torch.equal(found.low, wanted.low)
    assert torch.equal(found.high, wanted.high)
    torch.testing.assert_close(found.cut, wanted.cut, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.top, wanted.top, rtol=1e-6, atol=0)


def test_without_a_value_nothing_competes(survey):
    assert RULE.survey(survey([{}, {}]), PcbOptions()).top.tolist() == [0.0, 0.0]


def test_two_passes_come_before_the_merge(survey, monkeypatch):
    """And a sample of the scores."""
    generator = torch.Generator().manual_seed(0)
    blocks = 60
    vectors = [{"w": torch.randn(blocks * BLOCK, generator=generator)} for _ in range(2)]
    seen, plain = [], BlockReader.block
    monkeypatch.setattr(
        BlockReader,
        "block",
        lambda reader, stretch: seen.append(stretch.size) or plain(reader, stretch),
    )
    RULE.survey(survey(vectors), PcbOptions())
    assert 2 * blocks * BLOCK < sum(seen) < 2.2 * blocks * BLOCK


def test_the_defaults_are_those_of_the_stand_alone_code():
    assert PcbOptions() == PcbOptions(ratio=0.1, clamp=0.0001, inter="sum")
    with pytest.raises(ValidationError):
        PcbOptions(clamp=0.5)
