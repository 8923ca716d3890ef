"""Linear rules: every merged value is a weighted sum of the sites' values."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(vectors: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i, accumulated in float64.

    Parameters
    ----------
    vectors
        (N, n), any float dtype: the same n values of N task vectors.
    weights
        (N,) float64.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    total = torch.zeros(vectors.shape[1:], dtype=torch.float64)
    for tau, weight in zip(vectors, weights.tolist(), strict=True):
        total.add_(tau.double(), alpha=weight)
    return total


def mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean (1/N) sum_i w_i tau_i with weights that average 1.

    Model soups, arXiv 2203.05482, section 2 (uniform weights); federated averaging weights by
    examples, arXiv 1602.05629, algorithm 1. Shapes as in `weighted_sum`.
    """
    return weighted_sum(vectors, weights) / len(vectors)


def task_arithmetic(vectors: Tensor, weights: Tensor) -> Tensor:
    """Sum of the task vectors, sum_i w_i tau_i: arXiv 2212.04089, section 2.

    With weights of 1 and scale 1 it is the data-vector rule. Shapes as in `weighted_sum`.
    """
    return weighted_sum(vectors, weights)
