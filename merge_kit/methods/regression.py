"""Rules that weigh every value, or every input of a layer, by what it means to a site's model.

Fisher weighs single values. RegMean weighs the inputs of a linear layer: with a symmetric matrix
A_i (d, d) of each site it takes the M (out, d) that minimises sum_i w_i tr (M - tau_i) A_i
(M - tau_i)^T, which is (sum w_i tau_i A_i) (sum w_i A_i)^+. Both need what the sites publish beside
their vectors; WUDI and ACE, in `data_free`, put something in its place.

A result is computed as the weighted mean and a correction, which is 0 for equal vectors and
wherever nothing is known: no value is pulled towards the base for want of data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.methods.base import Block, ByValue, Method, Vectors, named
from merge_kit.methods.linear import weighted_sum
from merge_kit.schema import Document

Floored = Literal["max", "add"]
_TINY = torch.finfo(torch.float64).tiny
_EPSILON = torch.finfo(torch.float64).eps
_CONDITION = 1e-10
"""A pivot of Cholesky below this part of its diagonal entry: the matrix may well be singular."""


def weighted_mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i / sum_i w_i, float64: (N, ...) and (N,) give (...)."""
    # Weights that are divided first would not give back equal vectors to the last digit, nor would
    # a divisor on the CPU: a GPU multiplies by its inverse.
    return weighted_sum(vectors, weights).div_(weights.sum().to(vectors.device))


def divide(numerator: Tensor, gram: Tensor) -> Tensor:
    """B A^+ of B (rows, d) and a positive semi-definite A (d, d), both float64: (rows, d).

    By Cholesky. A matrix that is singular, or nearly so, by its eigenvectors: eigenvalues of at
    most d eps times the largest one (torch's and numpy's default) are taken for 0.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        # 1 - R^2 of each input given those before it: whatever the inputs' scales.
        left = factor.diagonal().square() / gram.diagonal()
        if float(left.min()) > _CONDITION:
            return torch.cholesky_solve(numerator.T, factor).T
    values, vectors = torch.linalg.eigh(gram)
    kept = values > len(values) * _EPSILON * values[-1]
    inverse = torch.zeros_like(values)
    inverse[kept] = 1 / values[kept]
    divided: Tensor = (numerator @ vectors).mul_(inverse) @ vectors.T
    return divided


@dataclass(frozen=True, slots=True)
class Quadratic:
    """sum_i w_i tr (M - tau_i) A_i (M - tau_i)^T, a function of M (out, d); all float64.

    Its gradient is 2 ((M - centre) gram - pull).
    """

    centre: Tensor
    """(out, d): the weighted mean."""
    gram: Tensor
    """(d, d): sum_i w_i A_i."""
    pull: Tensor
    """(out, d): sum_i w_i (tau_i - centre) A_i."""

    def minimum(self) -> Tensor:
        """Where it is smallest; of several such points the one that is nearest to the mean."""
        return self.centre + divide(self.pull, self.gram)


def quadratic(vectors: Tensor, grams: Iterable[Tensor], weights: Tensor) -> Quadratic:
    """The objective of vectors (N, out, d), N matrices A_i (d, d) float64, and weights (N,)."""
    centre = weighted_mean(vectors, weights)
    gram = centre.new_zeros(centre.shape[1], centre.shape[1])
    pull = torch.zeros_like(centre)
    for tau, own, weight in zip(vectors, grams, weights.tolist(), strict=True):
        gram.add_(own, alpha=weight)
        pull.addmm_(tau - centre, own, alpha=weight)
    return Quadratic(centre, gram, pull)


def fisher(
    vectors: Tensor,
    fishers: Tensor,
    weights: Tensor,
    coefficients: Tensor,
    floor: float = 1e-6,
    floored: Floored = "max",
) -> Tensor:
    """sum_i c_i F_i tau_i / sum_i c_i F_i at each value (arXiv 2111.09832, section 3).

    The paper averages theta_i. As the shares c_i F_i / sum_j c_j F_j add up to 1, the average of
    theta_0 + tau_i is theta_0 plus the average of tau_i. F_i is max(F_i, floor) as in the authors'
    code (there for the first model alone unless told otherwise; here sites are alike), or F_i +
    floor as in MergeLM and fusion_bench. Where all c_i F_i are 0 it is the weighted mean.

    Parameters
    ----------
    vectors, fishers
        (N, n); `weights` of that mean and `coefficients` c, (N,) float64.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    centre = weighted_mean(vectors, weights)
    pull, total = torch.zeros_like(centre), torch.zeros_like(centre)
    for tau, diagonal, coefficient in zip(vectors, fishers, coefficients.tolist(), strict=True):
        share = diagonal.to(torch.float64, copy=True)
        share = share.clamp_(min=floor) if floored == "max" else share.add_(floor)
        total.add_(share.mul_(coefficient))
        pull.addcmul_(share, tau - centre)
    return centre.addcdiv_(pull, total.clamp_(min=_TINY))


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """alpha G + (1 - alpha) diag G: (d, d) of any float dtype gives (d, d) float64."""
    shrunk = gram.double() * alpha
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def regmean(
    vectors: Tensor, grams: Tensor, weights: Tensor, alpha: float = 0.9, ridge: float = 1e-6
) -> Tensor:
    """RegMean, W^T = (sum G~_i)^-1 sum G~_i W_i^T (arXiv 2212.09849, section 3).

    The least squares fit to all sites' outputs on their own inputs X_i, with G_i = X_i^T X_i / rows
    and G~ = alpha G + (1 - alpha) diag G. As in published code sites count alike, however many rows
    they have; weights multiply the Gram matrices.

    The ridge adds lambda I to the mean of all G~_i, lambda being `ridge` times its mean diagonal:
    above the line and below, as if every site had so much more of every input. Below alone it would
    pull W_i towards 0 and tau_i towards the base, two different results. So it pulls both towards
    the weighted mean, and tau_i gives what W_i gives, with more digits. Inputs that no site has
    ever seen, and all of a singular matrix's null space, get the mean.

    Parameters
    ----------
    vectors
        (N, out, d): tau_i; `grams` (N, d, d); `weights` (N,) float64.

    Returns
    -------
    Tensor
        (out, d) float64.
    """
    problem = quadratic(vectors, (shrink(gram, alpha) for gram in grams), weights)
    diagonal = problem.gram.diagonal()
    diagonal.add_(ridge * float(diagonal.mean()))
    return problem.minimum()


class FisherOptions(Document):
    """Options of Fisher merging."""

    floor: float = Field(default=1e-6, ge=0)
    """Least Fisher information of a value: where all sites have less, c_i alone decides. Of many
    vision models most values have less than 1e-6."""
    floored: Floored = "max"
    """Raise lower values to the floor (the authors' code), or add it to all (MergeLM,
    fusion_bench)."""
    normalise: bool = True
    """Divide each site's Fisher information by its length over all values that the rule merges: the
    default of the authors' code, MergeLM and fusion_bench, not part of the paper's formula."""


class RegMeanOptions(Document):
    """Options of RegMean."""

    alpha: float = Field(default=0.9, ge=0, le=1)
    """Factor of the entries off the diagonal: 0.9 in the paper, 0.1 for its T5 models, 0.95 in
    fusion_bench; 1 is the plain least squares fit."""
    ridge: float = Field(default=1e-6, ge=0)
    """Part of the mean diagonal that is added to the diagonal; raise it where alpha is 1 and the
    sites had fewer rows than inputs."""


def _fisher(block: Block, weights: Tensor, options: FisherOptions, norms: Tensor) -> Tensor:
    if block.statistics is None:
        return weighted_mean(block.values, weights)
    return fisher(
        block.values, block.statistics, weights, weights / norms, options.floor, options.floored
    )


def _fisher_norms(vectors: Vectors, options: FisherOptions) -> Tensor:
    """|F_i| over all values of the rule, (N,) float64; 1 each where they are not asked for."""
    norms = torch.ones(len(vectors), dtype=torch.float64)
    if not options.normalise:
        return norms

    def squares(block: Block) -> Tensor:
        if block.statistics is None:
            return torch.zeros_like(norms)
        return block.statistics.double().square_().sum(dim=1)

    found = vectors.totals(squares)
    norms = sum(found.values(), torch.zeros_like(norms)).sqrt()
    for site, norm in zip(vectors.sites, norms.tolist(), strict=True):
        if norm == 0 and vectors.size:
            raise VectorError(
                f"site '{site}': its Fisher information is all zeros in what 'fisher' merges "
                f"({named(found)}) and cannot be brought to length 1: leave it out with "
                f"--exclude {site}, or set 'normalise: false'."
            )
    return norms


def _regmean(block: Block, weights: Tensor, options: RegMeanOptions, state: Any) -> Tensor:
    if block.statistics is None:
        return weighted_mean(block.values, weights)
    width = block.statistics.shape[-1]
    matrices = block.values.reshape(len(block.values), -1, width)
    return regmean(matrices, block.statistics, weights, options.alpha, options.ridge).reshape(-1)


METHODS: tuple[Method, ...] = (
    Method(
        name="fisher",
        family="regression",
        summary="mean of the sites at each value, weighted by its Fisher information",
        paper="arXiv 2111.09832",
        rule=ByValue(combine=_fisher, survey=_fisher_norms),
        options=FisherOptions,
        statistics="fisher",
    ),
    Method(
        name="regmean",
        family="regression",
        summary="least squares fit of each linear layer to the sites' outputs on their inputs",
        paper="arXiv 2212.09849",
        rule=ByValue(combine=_regmean, whole=lambda options: True),
        options=RegMeanOptions,
        statistics="gram",
    ),
)
