"""Regression without statistics: the task vectors themselves stand for the sites' inputs.

The step of a linear layer in training is a sum of error times input, so the rows of tau_i (out, d)
lie among the layer's inputs (rows, d). WUDI and ACE put a matrix made of them where RegMean has the
Gram matrix of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Block, ByValue, Method
from merge_kit.methods.linear import weighted_sum
from merge_kit.methods.regression import Quadratic, divide, quadratic, weighted_mean
from merge_kit.schema import Document

Solver = Literal["adam", "closed"]
Numerator = Literal["centred", "plain"]
Tensors = Literal["linear", "kernels"]
Others = Literal["mean", "base"]
_TINY = torch.finfo(torch.float64).tiny
_EPSILON = torch.finfo(torch.float64).eps


def _energy(matrix: Tensor) -> Tensor:
    return matrix.square().sum()


def _centred(tau: Tensor) -> Tensor:
    matrix = tau.double()
    return matrix - matrix.mean(dim=0, keepdim=True)


def wudi_objective(vectors: Tensor, weights: Tensor) -> Quadratic:
    """sum_i w_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2, that is A_i = tau_i^T tau_i / |tau_i|^2.

    A vector of zeros has no say. (N, out, d) and (N,).
    """

    def own(tau: Tensor) -> Tensor:
        matrix = tau.double()
        return (matrix.T @ matrix).div_(_energy(matrix).clamp_(min=_TINY))

    return quadratic(vectors, map(own, vectors), weights)


def adam(problem: Quadratic, start: Tensor, iterations: int, rate: float) -> Tensor:
    """Where Adam stands after some steps (arXiv 1412.6980; beta 0.9 and 0.999, eps 1e-8)."""
    moved = start - problem.centre
    first, second = torch.zeros_like(moved), torch.zeros_like(moved)
    gradient, scale = torch.empty_like(moved), torch.empty_like(moved)
    for step in range(1, iterations + 1):
        torch.addmm(problem.pull, moved, problem.gram, beta=-2, alpha=2, out=gradient)
        first.lerp_(gradient, 1 - 0.9)
        second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        torch.sqrt(second, out=scale).div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        moved.addcdiv_(first, scale, value=-rate / (1 - 0.9**step))
    return moved.add_(problem.centre)


def wudi(
    vectors: Tensor,
    weights: Tensor,
    solver: Solver = "adam",
    iterations: int = 300,
    rate: float = 1e-5,
) -> Tensor:
    """WUDI (arXiv 2503.08099): the M with the least `wudi_objective`, or a point on the way to it.

    ``adam`` is the paper: 300 steps of 1e-5 from sum_i w_i tau_i. No value moves much further than
    0.003, so the minimum is not reached unless the vectors are as small; the published figures are
    those of this early stop. ``closed`` is the minimum, (sum w_i tau_i A_i) (sum w_i A_i)^+. The
    authors' coef.py divides by |tau_i| where the paper and their other code divide by |tau_i|^2.
    The paper has no weights.

    (N, out, d) and (N,) give (out, d) float64.
    """
    problem = wudi_objective(vectors, weights)
    if solver == "closed":
        return problem.minimum()
    return adam(problem, weighted_sum(vectors, weights), iterations, rate)


def isotropic(matrix: Tensor, fraction: float) -> Tensor:
    """s U_k V_k^T, where the matrix is U S V^T and s the mean of its k largest singular values.

    k = int(fraction min(out, d)). A singular value of 0 has no directions. (out, d) float64.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    squares, directions = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    first = len(squares) - int(fraction * len(squares))
    largest = squares[first:].clamp(min=0)
    real = largest > len(squares) * _EPSILON * squares[-1]
    values, basis = largest.sqrt(), directions[:, first:][:, real]
    level = values.sum() / max(len(values), 1)
    turned: Tensor = (basis * (level / values[real])) @ basis.T
    return matrix @ turned if tall else turned @ matrix


def ace(
    vectors: Tensor,
    weights: Tensor,
    epsilon: float = 1e-5,
    threshold: float = 0.3,
    fraction: float = 0.3,
    *,
    prior: bool = True,
    numerator: Numerator = "centred",
) -> Tensor:
    """ACE (arXiv 2603.02945, equations 5 to 19, with which the authors' code agrees).

    W_i is tau_i less the mean of its rows, and S_i = W_i^T W_i stands for the second moments of the
    site's inputs; R_i = S_i + epsilon I. The sites differ if Var_i l_i > threshold (mean_i l_i)^2
    with l_i = log |tau_i|^2 (Var over N - 1, as in the code); S_i and R_i are then divided by tr
    S_i.

    pre = (sum W_i R_i) (sum R_i + 1 c^T)^-1, where c^T is the mean row of sum S_i, divided by
    mean_i |tau_i|^2 if the sites differ. If they do, the result is pre plus `isotropic` of pre +
    sum tau_i (S_i - sum_j R_j / N).

    The numerator loses the mean row and the prior 1 c^T shrinks, so equal vectors do not give
    themselves; with numerator ``plain`` (tau_i in the place of W_i, as in equation 3) and without
    prior they do. Ours are the weights, which multiply S_i and R_i, and the edges: a vector whose
    W_i is 0 is left out, and what is left alone is returned as it is.

    Parameters
    ----------
    vectors
        (N, out, d); `weights` (N,) float64.

    Returns
    -------
    Tensor
        (out, d) float64.
    """
    energies = torch.stack([_energy(tau.double()) for tau in vectors]).cpu()
    traces = torch.stack([_energy(_centred(tau)) for tau in vectors]).cpu()
    kept = (traces > 0) & (weights > 0)
    if int(kept.sum()) < 2:
        return weighted_mean(vectors, weights * kept if bool(kept.any()) else weights)
    logs = energies[kept].log()
    differ = bool(logs.var() > threshold * logs.mean().square())
    shares = torch.where(kept, weights / weights[kept].mean(), 0.0)
    factors = torch.where(kept, shares / traces, 0.0) if differ else shares
    width = vectors.shape[2]
    total = vectors.new_zeros(width, width, dtype=torch.float64)
    top = vectors.new_zeros(vectors.shape[1:], dtype=torch.float64)
    residual = torch.zeros_like(top)
    for tau, factor in zip(vectors, factors.tolist(), strict=True):
        centred = _centred(tau)
        moments = (centred.T @ centred).mul_(factor)
        total += moments
        upper = centred if numerator == "centred" else tau.double()
        top.addmm_(upper, moments).add_(upper, alpha=epsilon * factor)
        if differ:
            residual.addmm_(tau.double(), moments)
    row = total.mean(dim=0, keepdim=True) if prior else torch.zeros_like(total[:1])
    if differ:
        row /= energies[kept].mean()
    total.diagonal().add_(epsilon * float(factors.sum()))
    pre = _divide_with_prior(top, total, row)
    if not differ:
        return pre
    residual -= weighted_sum(vectors, shares) @ total / shares.sum()
    return pre + isotropic(pre + residual, fraction)


def _divide_with_prior(numerator: Tensor, gram: Tensor, row: Tensor) -> Tensor:
    """B (A + 1 c^T)^-1 by the formula of Sherman and Morrison; c^T (1, d)."""
    both = divide(torch.cat([numerator, row]), gram)
    plain, row = both[:-1], both[-1:]
    return plain - plain.sum(dim=1, keepdim=True) @ row / (1 + row.sum())


class MatrixOptions(Document):
    """What the rules are applied to."""

    tensors: Tensors = "linear"
    """Weights of linear layers (as published), or also kernels of convolutions, as matrices (out,
    in k k), except depthwise ones (ours)."""
    others: Others = "mean"
    """What becomes of all other tensors: the weighted mean (fusion_bench's WUDI, the code of ACE),
    or the base's (the code of WUDI), which leaves a network of convolutions as it was."""


class WudiOptions(MatrixOptions):
    """Options of WUDI."""

    solver: Solver = "adam"
    """Some steps of Adam (the paper), or the minimum itself."""
    iterations: int = Field(default=300, ge=0, le=10_000)
    """Steps of Adam."""
    rate: float = Field(default=1e-5, gt=0)
    """Length of a step of Adam, in units of the weights."""


class AceOptions(MatrixOptions):
    """Options of ACE."""

    epsilon: float = Field(default=1e-5, gt=0)
    """Ridge: 1e-5 for the paper's vision models, 2e-4 and 4e-2 for language; 1e-2 in the code."""
    threshold: float = Field(default=0.3, ge=0)
    """Variation of the vectors' lengths above which they are scaled and the spectrum refined."""
    fraction: float = Field(default=0.3, ge=0, le=1)
    """Part of the singular directions that the refinement takes."""
    prior: bool = True
    """Whether the mean row of all second moments is added to each of their rows."""
    numerator: Numerator = "centred"
    """Vectors above the line: less the mean of their rows (the paper), or as they are."""


def matrices_of(block: Block, tensors: Tensors) -> Tensor | None:
    """(N, out, d) where the block is the weight of a linear layer, or a kernel if wanted."""
    if not _is_taken(block.tensor, block.shape, tensors):
        return None
    return block.values.reshape(len(block.values), block.shape[0], -1)


def _is_taken(name: str, shape: tuple[int, ...], tensors: Tensors) -> bool:
    if len(shape) < 2 or not name.endswith("weight"):
        return False
    return len(shape) == 2 or (tensors == "kernels" and shape[1] != 1)


def _other(block: Block, weights: Tensor, others: Others) -> Tensor:
    mean = weighted_mean(block.values, weights)
    return mean if others == "mean" else torch.zeros_like(mean)


def _wudi(block: Block, weights: Tensor, options: WudiOptions, state: Any) -> Tensor:
    matrices = matrices_of(block, options.tensors)
    if matrices is None:
        return _other(block, weights, options.others)
    return wudi(matrices, weights, options.solver, options.iterations, options.rate).reshape(-1)


def _ace(block: Block, weights: Tensor, options: AceOptions, state: Any) -> Tensor:
    matrices = matrices_of(block, options.tensors)
    if matrices is None:
        return _other(block, weights, options.others)
    return ace(
        matrices,
        weights,
        options.epsilon,
        options.threshold,
        options.fraction,
        prior=options.prior,
        numerator=options.numerator,
    ).reshape(-1)


def _by_matrix(combine: Callable[[Block, Tensor, Any, Any], Tensor]) -> ByValue:
    return ByValue(
        combine=combine,
        whole=lambda options: True,
        takes=lambda name, shape, options: _is_taken(name, shape, options.tensors),
        others=lambda options: options.others,
    )


METHODS: tuple[Method, ...] = (
    Method(
        name="ace",
        family="regression",
        summary="RegMean without data: second moments of the inputs from rows of the task vectors",
        paper="arXiv 2603.02945",
        rule=_by_matrix(_ace),
        options=AceOptions,
    ),
    Method(
        name="wudi",
        family="regression",
        summary="the vector that interferes least with each site's own, by steps from the sum",
        paper="arXiv 2503.08099",
        rule=_by_matrix(_wudi),
        options=WudiOptions,
    ),
)
