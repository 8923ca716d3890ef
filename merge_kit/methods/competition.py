"""Rules by which the values of all sites compete, each by its own score, for the merged vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Block, ByValue, Method, Vectors
from merge_kit.methods.linear import weighted_sum
from merge_kit.schema import Document

Inter = Literal["sum", "normalised", "pairs"]
_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class PcbState:
    """What the first passes of PCB find of each vector, (N,) float32 each."""

    low: Tensor
    high: Tensor
    """The range that magnitudes are clamped to."""
    cut: Tensor
    top: Tensor
    """The largest score that does not count, and the largest of all."""


def min_max(tau: Tensor, low: float, high: float) -> Tensor:
    """norm01 of the clamped magnitudes of one vector; 0 when all are equal: (n,) float64."""
    clamped = tau.abs().double().clamp_(low, high).sub_(low)
    return clamped.div_(high - low) if high > low else clamped


def scores(vectors: Tensor, low: Tensor, high: Tensor, inter: Inter = "sum") -> Tensor:
    """beta_i / e^N, of which every min-max norm is that of beta_i (PCB, arXiv 2410.02396).

    beta_i = exp(N norm01(|tau_i|)^2) * inter_i; without the divisor it overflows from 89 vectors
    on. (N, n), (N,), (N,) give (N, n) float32.
    """
    found, size = torch.empty_like(vectors), len(vectors)
    agreements = _inter(vectors, low, high, inter)
    for beta, tau, least, most, agreement in zip(
        found, vectors, low.tolist(), high.tolist(), agreements, strict=True
    ):
        intra = min_max(tau, least, most).square_().sub_(1).mul_(size).exp_()
        beta.copy_(intra.mul_(agreement))
    return found


def _inter(vectors: Tensor, low: Tensor, high: Tensor, inter: Inter) -> Iterator[Tensor]:
    ones = torch.ones(len(vectors), dtype=torch.float64)
    if inter == "sum":
        whole = weighted_sum(vectors, ones)
        yield from (whole.mul(tau).tanh_() for tau in vectors)
        return
    bounds = zip(vectors, low.tolist(), high.tolist(), strict=True)
    signed = torch.stack([min_max(tau, *ends).mul_(tau.sign()) for tau, *ends in bounds])
    if inter == "normalised":
        whole = weighted_sum(signed, ones)
        yield from (whole.mul(tau).tanh_() for tau in vectors)
    else:
        yield from (weighted_sum((signed * own).tanh_(), ones) for own in signed)


def pcb(vectors: Tensor, weights: Tensor, state: PcbState, inter: Inter = "sum") -> Tensor:
    """PCB: a mean of the values, weighted by how each competes (arXiv 2410.02396).

    tau_M = sum_i s_i clamp(tau_i) / max(sum_i s_i, 1e-12), where s_i = norm01(max(beta_i, cut_i))
    is not 0 for the int(ratio d) largest scores of the vector. beta_i = intra_i * inter_i with
    intra_i = exp(N norm01(|clamp(tau_i)|)^2). The paper takes softmaxes over the vector for both
    factors; this is the authors' code, whose scripts disagree:

    ============  =========================================  ======  =====
    script        inter_i                                    clamp   ratio
    ============  =========================================  ======  =====
    stand-alone   ``sum``: tanh(tau_i sum_j tau_j)           0.0001  0.1
    language      ``sum``                                    0.01    0.1
    vision        ``normalised``: tanh(tau_i sum_j v_j)      0.01    0.05
    vision, with  ``pairs``: sum_j tanh(v_i v_j), where      0.01    0.05
    search        v_j = sign(tau_j) norm01(|clamp(tau_j)|)
    ============  =========================================  ======  =====

    The first is the default. All of them multiply the result by 1.2, or by one factor a vector
    found by search: here that is the recipe's `scale`, which a method leaves alone. `weights` count
    as in any weighted mean, with w_i s_i in the place of s_i. Ranks are counted from the ends such
    that exactly int(clamp d) values are clamped at each and int(ratio d) scores count; the scripts
    differ from that by one rank.

    Three passes over the data: both clamps, cut and top of the scores, and the merge; two more for
    either of the first when the samples of `merge_kit.order_statistics` mislead.

    Parameters
    ----------
    vectors
        (N, n); `weights` (N,) float64; `state` of the whole vectors.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    total = vectors.new_zeros(vectors.shape[1], dtype=torch.float64)
    shares = torch.zeros_like(total)
    beta = scores(vectors, state.low, state.high, inter)
    for index, (tau, weight) in enumerate(zip(vectors, weights.tolist(), strict=True)):
        cut, top = state.cut[index].item(), state.top[index].item()
        if top == cut:
            continue
        share = beta[index].double().sub_(cut).relu_().mul_(weight / (top - cut))
        shares += share
        low, high = state.low[index].item(), state.high[index].item()
        clamped = tau.abs().clamp_(low, high).mul_(tau.sign())
        total += share.mul_(clamped)
    return total.div_(shares.clamp_(min=_LEAST))


class PcbOptions(Document):
    """Options of PCB."""

    ratio: float = Field(default=0.1, gt=0, le=1)
    """Fraction of each vector's scores that counts; the authors' scripts for images take 0.05."""
    clamp: float = Field(default=0.0001, ge=0, lt=0.5)
    """Fraction of the magnitudes that is clamped at either end; 0.01 in the scripts of the
    experiments."""
    inter: Inter = "sum"
    """How a value agrees with the others: with the sum of the vectors (the authors' stand-alone
    code and that for language), with the sum of their signed norms (vision), or with each by itself
    (vision, with a search for the scale of each vector)."""


def _survey_pcb(vectors: Vectors, options: PcbOptions) -> PcbState:
    size = vectors.size
    spared, counting = int(options.clamp * size), int(options.ratio * size)
    high, low = vectors.order_statistics(
        lambda block: block.values.abs(), [spared + 1, size - spared]
    )
    top, cut = vectors.order_statistics(
        lambda block: scores(block.values, low, high, options.inter), [1, min(counting + 1, size)]
    )
    return PcbState(low, high, cut, top)


def _pcb(block: Block, weights: Tensor, options: PcbOptions, state: PcbState) -> Tensor:
    return pcb(block.values, weights, state, options.inter)


METHODS: tuple[Method, ...] = (
    Method(
        name="pcb",
        family="competition",
        summary="a mean weighted at each coordinate by how large and how agreed a value is",
        paper="arXiv 2410.02396",
        rule=ByValue(combine=_pcb, survey=_survey_pcb),
        options=PcbOptions,
    ),
)
