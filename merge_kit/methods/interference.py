"""Rules that resolve interference between task vectors before they are added."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Block, ByValue, Method, Scope, Vectors
from merge_kit.methods.linear import weighted_sum
from merge_kit.schema import Document

Reduction = Literal["mean", "sum", "max"]
Vote = Literal["values", "weighted", "counts"]
_TINY = torch.finfo(torch.float64).tiny


def trim(vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Set values below each vector's threshold to zero: (N, n) and (N,) give (N, n).

    TIES, arXiv 2306.01708, section 4.1. As in the authors' code the threshold is the k-th smallest
    magnitude with k = d - int(density d), and values equal to it are all kept.
    """
    # A product with zeros and ones: torch.where takes several times as long.
    return vectors.abs().ge_(thresholds[:, None]).mul_(vectors)


def elect(trimmed: Tensor, weights: Tensor, vote: Vote = "values") -> Tensor:
    """What the sign is elected by, (n,) float64: its sign is gamma, 0 is a tie.

    ``values`` is sum_i tau_i (the paper), ``weighted`` is sum_i w_i tau_i (mergekit), ``counts`` is
    sum_i sign tau_i (sd-mecha; the method "frequency" of peft).
    """
    if vote == "weighted":
        return weighted_sum(trimmed, weights)
    voices = trimmed if vote == "values" else trimmed.sign()
    return weighted_sum(voices, torch.ones_like(weights))


def disjoint_merge(
    trimmed: Tensor, weights: Tensor, signs: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Combine at each coordinate only the values that agree with the elected sign.

    With A_p = {i: sign tau_ip = gamma_p, tau_ip not 0}: mean is sum_A w tau / sum_A w, sum is
    sum_A w tau, max is the value of largest magnitude. Where nobody agrees the result is 0.

    Parameters
    ----------
    trimmed
        (N, n); `weights` (N,) float64, not negative; `signs` (n,) of -1, 0 and 1.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    gamma = signs.to(trimmed.dtype)
    total, count = torch.zeros_like(signs), torch.zeros_like(signs)
    for tau, weight in zip(trimmed, weights.tolist(), strict=True):
        # tau * gamma is |tau| where they agree, and not positive elsewhere.
        aligned = (tau * gamma).relu_()
        if reduction == "max":
            torch.maximum(total, aligned.double(), out=total)
            continue
        total.add_(aligned, alpha=weight)
        if reduction == "mean":
            count.add_(aligned.sign_(), alpha=weight)
    if reduction == "mean":
        total /= count.clamp_(min=_TINY)
    return total * signs


def ties(
    vectors: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    majority: Callable[[Tensor], float],
    reduction: Reduction = "mean",
    vote: Vote = "values",
) -> Tensor:
    """TIES: trim, elect signs, disjoint merge (arXiv 2306.01708, algorithm 1).

    Defaults of the paper: density 0.2 over the whole vector, mean, scale 1, and a vote by the sum
    of the values without weights; published implementations differ in all of these.

    Parameters
    ----------
    vectors
        (N, n); `weights` (N,); `thresholds` (N,) of magnitudes; `majority` maps the weights to the
        sign for coordinates that are not all zero and whose vote is a tie.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    trimmed = trim(vectors, thresholds)
    signs = elect(trimmed, weights, vote).sign_()
    tied = signs == 0
    if bool(tied.any()):
        # Where a tie is not all zeros some value is positive, or has no weight.
        tied &= trimmed.amax(dim=0) > 0
        if bool(tied.any()):
            signs[tied] = majority(weights)
    return disjoint_merge(trimmed, weights, signs, reduction)


def magmax(vectors: Tensor) -> Tensor:
    """The value of the largest magnitude at each coordinate (arXiv 2407.06322, equation 2).

    (N, n) gives (n,) float64. Of two values of equal magnitude the later one counts, as in the
    authors' code. Weights have no say.
    """
    high, low = vectors.amax(dim=0), vectors.amin(dim=0)
    largest = torch.where(high > -low, high, low)
    tied = torch.nonzero((high == -low) & (high > 0)).squeeze(1)
    if len(tied):
        fought = vectors[:, tied]
        last = len(vectors) - 1 - fought.abs().flip(0).argmax(dim=0)
        largest[tied] = fought.gather(0, last[None]).squeeze(0)
    return largest.double()


def fedgma(
    vectors: Tensor,
    weights: Tensor,
    threshold: float,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The weighted mean, damped where signs disagree (arXiv 2201.11986, section 3).

    a = |sum_i sign tau_i| / N, weights aside; the mean is multiplied by 1 where a >= threshold and
    by a elsewhere. arXiv 2411.18607 does the same to the sum. (N, n), (N,) give (n,) float64.
    """
    size = len(vectors)
    agreement = weighted_sum(vectors.sign(), torch.ones_like(weights)).abs_() / size
    mask = agreement.masked_fill_(agreement >= threshold, 1.0)
    return mask * weighted_sum(vectors, weights / size if reduction == "mean" else weights)


class TiesOptions(Document):
    """Options of TIES."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Fraction of values that is kept of each vector."""
    scope: Scope = "vector"
    """Trim over the whole vector (the paper) or each tensor by itself (mergekit, peft)."""
    reduction: Reduction = "mean"
    """How agreeing values are combined; the paper takes the mean."""
    vote: Vote = "values"
    """Signs by the sum of the values (the paper), by weighted values, or by counting."""


@dataclass(frozen=True, slots=True)
class TiesState:
    """What the first pass of TIES finds."""

    thresholds: Mapping[str, Tensor]
    majority: Callable[[Tensor], float]


def _survey_ties(vectors: Vectors, options: TiesOptions) -> TiesState:
    thresholds: Mapping[str, Tensor] = {}
    if options.density < 1:
        thresholds = vectors.kth_largest(
            lambda block: block.values.abs(), options.density, options.scope, "magnitude"
        )
    # Ties of trained values are rare: the pass that settles them is made when the first one turns
    # up, once, whichever thread meets it.
    lock, known = threading.Lock(), list[float]()

    def majority(weights: Tensor) -> float:
        def balance(block: Block) -> Tensor:
            trimmed = trim(block.values, _thresholds(thresholds, block))
            return elect(trimmed, weights, options.vote).sign_().sum()

        with lock:
            if not known:
                known.append(float(vectors.total(balance).sign()))
            return known[0]

    return TiesState(thresholds, majority)


def _thresholds(found: Mapping[str, Tensor], block: Block) -> Tensor:
    if block.tensor in found:
        return found[block.tensor].to(block.values.device)
    return block.values.new_zeros(len(block.values))


def _ties(block: Block, weights: Tensor, options: TiesOptions, state: TiesState) -> Tensor:
    return ties(
        block.values,
        weights,
        _thresholds(state.thresholds, block),
        state.majority,
        options.reduction,
        options.vote,
    )


class FedGmaOptions(Document):
    """Options of FedGMA."""

    threshold: float = Field(default=0.8, ge=0, le=1)
    """Agreement of signs from which a coordinate counts in full; 0 is the plain mean. There is no
    published value: the code of arXiv 2411.18607 searches 0.1 to 0.9 on validation images."""
    reduction: Literal["mean", "sum"] = "mean"
    """Damp the mean (arXiv 2201.11986) or the sum (arXiv 2411.18607)."""


def _fedgma(block: Block, weights: Tensor, options: FedGmaOptions, state: Any) -> Tensor:
    return fedgma(block.values, weights, options.threshold, options.reduction)


METHODS: tuple[Method, ...] = (
    Method(
        name="ties",
        family="interference",
        summary="keep the largest values, elect a sign, take the mean of those that agree",
        paper="arXiv 2306.01708",
        rule=ByValue(combine=_ties, survey=_survey_ties),
        options=TiesOptions,
    ),
    Method(
        name="magmax",
        family="interference",
        summary="at each coordinate the value of the largest magnitude",
        paper="arXiv 2407.06322",
        rule=ByValue(combine=lambda block, weights, options, state: magmax(block.values)),
    ),
    Method(
        name="fedgma",
        family="interference",
        summary="the mean, damped where the signs of the sites disagree",
        paper="arXiv 2201.11986, 2411.18607",
        rule=ByValue(combine=_fedgma),
        options=FedGmaOptions,
    ),
)
