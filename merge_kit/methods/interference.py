"""Rules that resolve interference between task vectors before they are added."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "max"]


def trim_threshold(values: Tensor, density: float) -> float:
    """Magnitude from which a value is kept: the k-th smallest with k = d - int(density d).

    TIES, arXiv 2306.01708, section 4.1; like the authors' code, values equal to the threshold are
    all kept.

    Parameters
    ----------
    values
        (d,) the task vector, or one of its tensors.
    density
        Fraction to keep, in (0, 1].
    """
    size = values.numel()
    kth = size - int(density * size)
    if kth <= 0:
        return 0.0
    return float(values.abs().kthvalue(kth).values)


def trim(vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Set values below each vector's threshold to zero: (N, n) and (N,) give (N, n)."""
    return torch.where(vectors.abs() >= thresholds[:, None], vectors, 0.0)


def elect_signs(trimmed: Tensor, majority: float) -> Tensor:
    """gamma = sign(sum_i tau_i), with `majority` where the sum is zero: (N, n) gives (n,)."""
    signs = trimmed.double().sum(dim=0).sign()
    return torch.where(signs == 0, majority, signs)


def sign_balance(trimmed: Tensor) -> float:
    """Sum over the coordinates of sign(sum_i tau_i); its sign is the majority of all signs."""
    return float(trimmed.double().sum(dim=0).sign().sum())


def disjoint_merge(
    trimmed: Tensor, weights: Tensor, signs: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Combine at each coordinate only the values that agree with the elected sign.

    With A_p = {i: sign tau_ip = gamma_p, tau_ip not 0}: mean is sum_A w tau / sum_A w, sum is
    sum_A w tau, max is the value of largest magnitude. Where nobody agrees the result is 0.

    Parameters
    ----------
    trimmed
        (N, n); `weights` (N,) float64, not negative; `signs` (n,).

    Returns
    -------
    Tensor
        (n,) float64.
    """
    agrees = (trimmed.sign() == signs) & (trimmed != 0)
    if reduction == "max":
        return torch.where(agrees, trimmed.abs(), 0.0).amax(dim=0).double() * signs
    total = torch.zeros(trimmed.shape[1], dtype=torch.float64)
    votes = torch.zeros_like(total)
    for tau, agree, weight in zip(trimmed, agrees, weights.tolist(), strict=True):
        total += torch.where(agree, tau.double(), 0.0) * weight
        votes += agree.double() * weight
    if reduction == "sum":
        return total
    return torch.where(votes > 0, total / votes.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def ties(
    vectors: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    majority: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """TIES: trim, elect signs, disjoint merge (arXiv 2306.01708, algorithm 1).

    Defaults of the paper: density 0.2 over the whole vector, mean, scale 1. The signs are elected
    by the sum of the values without weights; published implementations differ in this.

    Parameters
    ----------
    vectors
        (N, n); `weights` (N,); `thresholds` (N,) of `trim_threshold`; `majority` the sign for
        coordinates whose sum is zero.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    trimmed = trim(vectors, thresholds)
    return disjoint_merge(trimmed, weights, elect_signs(trimmed, majority), reduction)
