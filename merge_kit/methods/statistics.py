"""Pooling of the statistics of normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_moments(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the union of the sites' samples, by the law of total variance.

    mu = sum n_i mu_i / n and s = sum n_i (s_i + (mu_i - mu)^2) / n, which equals
    sum n_i (s_i + mu_i^2) / n - mu^2 without its cancellation.

    Parameters
    ----------
    means, variances
        (N, c): running statistics of each site.
    counts
        (N,) float64: samples of each site.

    Returns
    -------
    tuple of Tensor
        (c,) and (c,), float64.
    """
    shares = (counts / counts.sum())[:, None]
    mean = (shares * means.double()).sum(dim=0)
    variance = (shares * (variances.double() + (means.double() - mean).square())).sum(dim=0)
    return mean, variance


def largest(counters: Tensor) -> Tensor:
    """The largest of the sites' counters: (N, ...) gives (...)."""
    return torch.amax(counters, dim=0)
