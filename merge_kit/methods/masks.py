"""Rules that tell, value by value, which sites a merged vector serves."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Block, ByValue, Method, Vectors
from merge_kit.methods.linear import weighted_sum
from merge_kit.schema import Document

Rescale = Literal["sums", "means"]


def tall_masks(vectors: Tensor, merged: Tensor, strictness: float) -> Tensor:
    """m_i = 1 where |tau_i| > lambda |tau_M - tau_i| (TALL masks, arXiv 2405.07813, section 4.1).

    (N, n) and (n,) float64 give (N, n) of True and False; theta_0 + m_i * tau_M is close to site
    i's own model. fusion_bench puts theta_0 where tau_i stands on the left; this is the paper's.
    """
    return torch.stack([tau.abs() > strictness * (merged - tau).abs_() for tau in vectors])


def consensus(vectors: Tensor, weights: Tensor, strictness: float, agree: int) -> Tensor:
    """tau_M where at least k of the masks are 1, else 0 (arXiv 2405.07813, section 4.2).

    tau_M = sum_i w_i tau_i. k = 2 removes what matters to one site only (the paper's selfish
    weights) or to none (catastrophic ones). (N, n), (N,) give (n,) float64.
    """
    merged = weighted_sum(vectors, weights)
    votes = tall_masks(vectors, merged, strictness).sum(dim=0)
    return merged * (votes >= agree)


def elect(vectors: Tensor) -> Tensor:
    """gamma = sign(sum_i tau_i), and -1 where the sum is 0, as in the authors' code of EMR.

    (N, n) float32 gives (n,) float32.
    """
    total = weighted_sum(vectors, torch.ones(len(vectors), dtype=torch.float64))
    return (total > 0).float().mul_(2).sub_(1)


def emr_masks(vectors: Tensor) -> Tensor:
    """M_i = 1 where tau_i gamma > 0 (EMR, arXiv 2405.17461).

    (N, n) gives (N, n) of True and False; theta_0 + lambda_i M_i * u is close to site i's own
    model.
    """
    return vectors * elect(vectors) > 0


def unify(vectors: Tensor) -> Tensor:
    """u = gamma max_i |tau_i| over the tau_i of the sign gamma, 0 where none has it.

    EMR, arXiv 2405.17461. Weights have no say. (N, n) float32 gives (n,) float64.
    """
    gamma = elect(vectors)
    return (vectors * gamma).relu_().amax(dim=0).mul_(gamma).double()


def lengths(vectors: Tensor) -> Tensor:
    """sum |tau_i| and sum |M_i * u| of every vector: (N, n) gives (2, N) float64."""
    kept = emr_masks(vectors) * unify(vectors).abs_()
    return torch.stack([vectors.abs().sum(dim=1, dtype=torch.float64), kept.sum(dim=1)])


def rescalers(found: Tensor) -> Tensor:
    """lambda_i = sum |tau_i| / sum |M_i * u| (EMR, arXiv 2405.17461).

    1 where M_i is empty and there is nothing to scale. (2, N) as `lengths` finds them, but of the
    whole vector, gives (N,) float64.
    """
    own, kept = found
    return torch.where(kept > 0, own / kept, 1.0)


class ConsensusOptions(Document):
    """Options of consensus task arithmetic."""

    strictness: float = Field(default=0.4, ge=0)
    """lambda of the masks; the paper chooses it from 0.2 to 0.6 on validation images."""
    agree: int = Field(default=2, ge=1)
    """k: number of sites to which a coordinate must matter."""


class EmrOptions(Document):
    """Options of EMR."""

    rescale: Rescale = "sums"
    """lambda_i of sums over the whole vector (the paper, and the authors' code for 30 ViTs), or of
    the sum of every tensor's mean (their code for 8 ViTs: a bias counts as much as a matrix)."""


def _too_few(size: int, options: Any) -> str | None:
    if options.agree > size:
        return f"'agree' is {options.agree} and the number of vectors {size}: lower it"
    return None


def _consensus(block: Block, weights: Tensor, options: ConsensusOptions, state: Any) -> Tensor:
    return consensus(block.values, weights, options.strictness, options.agree)


def _survey_emr(vectors: Vectors, options: EmrOptions) -> Tensor:
    def measure(block: Block) -> Tensor:
        found = lengths(block.values)
        return found / math.prod(block.shape) if options.rescale == "means" else found

    return rescalers(vectors.total(measure) if vectors.size else torch.zeros(2, len(vectors)))


METHODS: tuple[Method, ...] = (
    Method(
        name="consensus",
        family="masks",
        summary="the sum, where it matters to at least two sites (TALL masks)",
        paper="arXiv 2405.07813",
        rule=ByValue(combine=_consensus),
        options=ConsensusOptions,
        normalises=False,
        refusal=_too_few,
    ),
    Method(
        name="emr",
        family="masks",
        summary="the largest value of the elected sign, and masks that give each site's model back",
        paper="arXiv 2405.17461",
        rule=ByValue(
            combine=lambda block, weights, options, found: unify(block.values),
            survey=_survey_emr,
            masks=lambda block, options, found: emr_masks(block.values),
            rescalers=lambda found: found,
        ),
        options=EmrOptions,
    ),
)
