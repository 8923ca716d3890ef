"""WUDI and ACE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.methods.data_free import ace, adam, isotropic, matrices_of, wudi, wudi_objective
from tests.merge_kit.helpers import quick
from tests.merge_kit.methods.test_regression import (
    EVEN,
    block,
    close,
    combine,
    randoms,
    seeds,
    shuffled,
    weights_of,
)


def disturbance(merged, vectors, weights):
    """The paper's loss, with torch's own derivatives."""
    loss = torch.zeros((), dtype=torch.float64)
    for tau, weight in zip(vectors.double(), weights, strict=True):
        loss = loss + weight * ((merged - tau) @ tau.T).square().sum() / tau.square().sum()
    return loss


def gradient(merged, vectors, weights):
    merged = merged.clone().requires_grad_()
    disturbance(merged, vectors, weights).backward()
    return merged.grad


def test_wudi_by_hand():
    """A_1 = diag(1, 0), A_2 = diag(16, 9) / 25 plus 12 / 25 off it: M A = (2, 0) + (4, 3)."""
    vectors = torch.tensor([[[2.0, 0.0]], [[4.0, 3.0]]])
    merged = wudi(vectors, EVEN, "closed")
    inverse = np.linalg.inv(np.array([[41.0, 12.0], [12.0, 9.0]]) / 25)
    close(merged, np.array([[6.0, 3.0]]) @ inverse, 1e-12)
    close(merged, [[2.0, 17 / 3]], 1e-12)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_the_closed_form_is_the_papers(seed, sites, out, width):
    """(sum w tau A) (sum w A)^+ in numpy; with more inputs than rows it is singular."""
    tau, weights = randoms(seed)(sites, out, width), weights_of(seed, sites)
    top, bottom = np.zeros((out, width)), np.zeros((width, width))
    for t, w in zip(tau.numpy(), weights.numpy(), strict=True):
        own = w * t.T @ t / np.square(t).sum()
        top, bottom = top + t @ own, bottom + own
    merged = wudi(tau, weights, "closed")
    close(merged, top @ np.linalg.pinv(bottom, rcond=1e-12, hermitian=True), 1e-6)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_the_gradient_is_the_papers_and_0_at_the_closed_form(seed, sites, out, width):
    randn = randoms(seed)
    tau, weights, other = randn(sites, out, width), weights_of(seed, sites), randn(out, width)
    problem = wudi_objective(tau, weights)
    slope = 2 * ((other - problem.centre) @ problem.gram - problem.pull)
    close(slope, gradient(other, tau, weights))
    close(gradient(wudi(tau, weights, "closed"), tau, weights), np.zeros((out, width)), 1e-9)


@pytest.mark.parametrize(("out", "width"), [(6, 4), (4, 6)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_adam_is_torchs_on_the_papers_loss(out, width, size):
    tau, weights = randoms(0)(3, out, width) * size, weights_of(0, 3)
    merged = torch.nn.Parameter(torch.einsum("n,nij->ij", weights, tau))
    optimiser = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        optimiser.zero_grad()
        disturbance(merged, tau, weights).backward()
        optimiser.step()
    ours, start = wudi(tau, weights), torch.einsum("n,nij->ij", weights, tau)
    assert 1e-4 < float((ours - start).abs().max()) < 4e-3
    np.testing.assert_allclose(ours, merged.detach(), rtol=0, atol=1e-10)


def test_adam_ends_at_the_minimum_when_it_is_let():
    tau = randoms(1)(2, 5, 4)
    problem = wudi_objective(tau, EVEN)
    close(adam(problem, tau.sum(dim=0), 6000, 1e-2), wudi(tau, EVEN, "closed"), 1e-4)


def test_without_steps_adam_stays_at_the_sum():
    tau, weights = randoms(0)(3, 2, 4), weights_of(0, 3)
    close(wudi(tau, weights, iterations=0), torch.einsum("n,nij->ij", weights, tau))


@quick
@given(seeds, st.integers(1, 5))
def test_equal_vectors_give_themselves_to_the_last_digit(seed, sites):
    tau, even = randoms(seed)(3, 5).float(), torch.ones(sites, dtype=torch.float64)
    assert torch.equal(wudi(tau.expand(sites, 3, 5), even, "closed"), tau.double())


def test_one_vector_gives_itself_to_the_last_digit():
    tau = randoms(0)(1, 3, 5).float()
    for merged in (wudi(tau, EVEN[:1]), wudi(tau, EVEN[:1], "closed"), ace(tau, EVEN[:1])):
        assert torch.equal(merged, tau[0].double())


def test_vectors_of_zeros_have_no_say():
    tau = torch.zeros(3, 4, 5)
    three = torch.ones(3, dtype=torch.float64)
    for merged in (wudi(tau, three), wudi(tau, three, "closed"), ace(tau, three)):
        assert not merged.any()
    tau[1] = randoms(0)(4, 5)
    close(wudi(tau, three, "closed"), tau[1])
    close(ace(tau, three), tau[1])
    tau[2] = randoms(1)(4, 5)
    close(wudi(tau, three, "closed"), wudi(tau[1:], EVEN, "closed"))
    close(ace(tau, three), ace(tau[1:], EVEN))


def test_a_weight_of_zero_has_no_say():
    """Nor whether the sites differ: the third is much larger."""
    tau = randoms(0)(3, 4, 5) * torch.tensor([1.0, 1.0, 1e3])[:, None, None]
    weights = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    close(wudi(tau, weights), wudi(tau[:2], EVEN))
    close(wudi(tau, weights, "closed"), wudi(tau[:2], EVEN, "closed"), 1e-9)
    close(ace(tau, weights), ace(tau[:2], EVEN), 1e-9)


@quick
@given(seeds, st.integers(2, 5))
def test_the_order_of_the_sites_never_matters(seed, sites):
    tau, weights, order = randoms(seed)(sites, 4, 6), weights_of(seed, sites), shuffled(seed, sites)
    for rule in (wudi, lambda v, w: wudi(v, w, "closed"), ace, lambda v, w: ace(v, w, threshold=0)):
        close(rule(tau[order], weights[order]), rule(tau, weights), 1e-9)


@quick
@given(seeds, st.sampled_from([1e-6, 0.5, 1e3]))
def test_the_minimum_scales_with_the_vectors(seed, factor):
    tau, weights = randoms(seed)(3, 4, 6), weights_of(seed, 3)
    again = wudi(tau * factor, weights, "closed")
    close(again / factor, wudi(tau, weights, "closed"), 1e-6)


def paper(tau, weights, epsilon, threshold, fraction, prior, numerator):
    """Equations 5 to 19 of arXiv 2603.02945, dense, in numpy; weights multiply the covariances."""
    count, out, width = tau.shape
    w = weights / weights.mean()
    logs = np.array([np.log(np.square(t).sum()) for t in tau])
    differ = logs.var(ddof=1) > threshold * logs.mean() ** 2
    centred = [t - np.ones((out, 1)) @ t.mean(axis=0)[None] for t in tau]
    raw = [c.T @ c for c in centred]
    scaled = [s / np.trace(s) if differ else s for s in raw]
    ridges = [epsilon / np.trace(s) if differ else epsilon for s in raw]
    regular = [s + r * np.eye(width) for s, r in zip(scaled, ridges, strict=True)]
    row = np.ones((1, width)) @ sum(w[i] * scaled[i] for i in range(count)) / width
    if differ:
        row = row / np.mean([np.square(t).sum() for t in tau])
    common = np.ones((width, 1)) @ row * prior
    upper = centred if numerator == "centred" else tau
    top = sum(w[i] * upper[i] @ regular[i] for i in range(count))
    pre = top @ np.linalg.inv(sum(w[i] * regular[i] for i in range(count)) + common)
    if not differ:
        return pre
    mean = sum(w[i] * regular[i] for i in range(count)) / count
    u, s, vt = np.linalg.svd(pre + sum(w[i] * tau[i] @ (scaled[i] - mean) for i in range(count)))
    k = int(fraction * min(out, width))
    return pre + (s[:k].mean() * u[:, :k] @ vt[:k] if k else 0)


@quick
@given(
    seeds,
    st.sampled_from([(6, 4), (4, 6), (2, 5)]),
    st.sampled_from([0.0, 0.3, 1e9]),
    st.sampled_from([1e-5, 0.1]),
    st.booleans(),
    st.sampled_from(["centred", "plain"]),
)
def test_ace_is_its_equations(seed, shape, threshold, epsilon, prior, numerator):
    """Threshold 0: the sites differ; 1e9: they do not."""
    randn = randoms(seed)
    tau, weights = randn(4, *shape) * torch.logspace(-1, 1, 4)[:, None, None], weights_of(seed, 4)
    wanted = paper(tau.numpy(), weights.numpy(), epsilon, threshold, 0.5, prior, numerator)
    merged = ace(tau, weights, epsilon, threshold, 0.5, prior=prior, numerator=numerator)
    close(merged, wanted, 1e-7)


def test_ace_by_hand():
    """Mean rows (0, 1) and (1, 0) go; the second moments left are diag(2, 0) and diag(0, 8).

    Without prior and ridge each site gives the input that it alone has: (1, 2), (-1, -2).
    With the prior c = (1, 4) the columns are divided by A = [[3, 4], [1, 12]].
    """
    vectors = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]], [[1.0, 2.0], [1.0, -2.0]]])
    plain = ace(vectors, EVEN, 1e-12, 1e9, prior=False)
    close(plain, [[1.0, 2.0], [-1.0, -2.0]], 1e-9)
    top = np.array([[2.0, 16.0], [-2.0, -16.0]])
    close(ace(vectors, EVEN, 1e-12, 1e9), top @ np.linalg.inv([[3.0, 4.0], [1.0, 12.0]]), 1e-9)


def test_sites_differ_by_the_variance_over_one_less_than_their_number():
    """Logarithms 2 and 4: mean 3, variance 2 and not 1, so the limit is 2 / 9."""
    tau = randoms(0)(2, 5, 4)
    wanted = torch.tensor([2.0, 4.0], dtype=torch.float64).exp()
    tau *= (wanted / tau.square().sum(dim=(1, 2))).sqrt()[:, None, None]
    for threshold, differ in ((0.22, 0.0), (0.23, 1e9)):
        torch.testing.assert_close(ace(tau, EVEN, 0.1, threshold), ace(tau, EVEN, 0.1, differ))
    assert not torch.allclose(ace(tau, EVEN, 0.1, 0.0), ace(tau, EVEN, 0.1, 1e9))


def test_equal_vectors_give_themselves_only_without_prior_and_centring():
    tau = randoms(0)(5, 3).expand(3, 5, 3)
    three = torch.ones(3, dtype=torch.float64)
    close(ace(tau, three, prior=False, numerator="plain"), tau[0], 1e-9)
    assert float((ace(tau, three) - tau[0]).abs().max()) > 0.1


def test_a_single_row_is_averaged():
    """Less its mean it is nothing."""
    tau = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    assert ace(tau, EVEN).tolist() == [[2.0, 4.0]]
    alike = torch.tensor([0.1, 0.7, 0.3]).expand(2, 3, 3)
    assert torch.equal(ace(alike, EVEN), alike[0].double())


@quick
@given(seeds, st.sampled_from([(6, 4), (4, 6), (5, 5)]), st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_the_spectrum_is_made_even(seed, shape, fraction):
    matrix = randoms(seed)(*shape)
    u, s, vt = np.linalg.svd(matrix.numpy())
    k = int(fraction * min(shape))
    wanted = s[:k].mean() * u[:, :k] @ vt[:k] if k else np.zeros(shape)
    close(isotropic(matrix, fraction), wanted, 1e-6)


def test_directions_that_are_not_there_are_not_made_up():
    """Singular values 4 and 0: their mean along the first direction alone."""
    matrix = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    close(isotropic(matrix, 1.0), [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert not isotropic(torch.zeros(2, 3, dtype=torch.float64), 1.0).any()


@pytest.mark.parametrize(
    ("name", "shape", "linear", "kernels"),
    [
        ("blocks.0.attn.qkv.weight", (6, 4), (6, 4), (6, 4)),
        ("attn.in_proj_weight", (6, 4), (6, 4), (6, 4)),
        ("conv.weight", (2, 3, 2, 2), None, (2, 12)),
        ("conv_dw.weight", (6, 1, 2, 2), None, None),
        ("norm.weight", (24,), None, None),
        ("fc.bias", (24,), None, None),
        ("pos_embed", (1, 4, 6), None, None),
        ("relative_position_bias_table", (6, 4), None, None),
    ],
)
def test_weights_of_linear_layers_are_matrices_and_kernels_if_wanted(name, shape, linear, kernels):
    found = block(torch.ones(3, 24), None, shape, name)
    for tensors, wanted in (("linear", linear), ("kernels", kernels)):
        matrices = matrices_of(found, tensors)
        assert (None if matrices is None else tuple(matrices.shape[1:])) == wanted


@pytest.mark.parametrize("method", ["ace", "wudi"])
def test_all_other_tensors_get_the_mean_or_stay(method):
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    bias = block([[4.0, 0.0], [8.0, 1.0]], None, name="fc.bias")
    assert combine(method, bias, weights).tolist() == [7.0, 0.75]
    assert combine(method, bias, weights, others="base").tolist() == [0.0, 0.0]


def test_options_reach_the_rules():
    tau, weights = randoms(0)(2, 6, 4).float(), weights_of(0, 2)
    layer = block(tau.reshape(2, 24), None, (6, 2, 2), "conv.weight")
    merged = combine("wudi", layer, weights, tensors="kernels", iterations=7, rate=0.5)
    assert torch.equal(merged, wudi(tau, weights, "adam", 7, 0.5).reshape(24))
    merged = combine("wudi", layer, weights, tensors="kernels", solver="closed")
    assert torch.equal(merged, wudi(tau, weights, "closed").reshape(24))
    options = {"epsilon": 0.25, "threshold": 0.0, "fraction": 0.5}
    more = {"prior": False, "numerator": "plain"}
    merged = combine("ace", layer, weights, tensors="kernels", **options, **more)
    assert torch.equal(merged, ace(tau, weights, *options.values(), **more).reshape(24))
