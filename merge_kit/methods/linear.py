"""Linear rules: every merged value is a weighted sum of the sites' values."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Linear, Method
from merge_kit.schema import Document


def weighted_sum(vectors: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i tau_i, accumulated in float64: (N, n) of any float dtype and (N,) give (n,)."""
    total = torch.zeros(vectors.shape[1:], dtype=torch.float64, device=vectors.device)
    for tau, weight in zip(vectors, weights.tolist(), strict=True):
        total.add_(tau, alpha=weight)
    return total


class InterpolateOptions(Document):
    """Options of the interpolation."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """0 is the base, 1 the mean of the fine-tuned models."""


METHODS: tuple[Method, ...] = (
    Method(
        name="mean",
        family="linear",
        summary="weighted mean of the task vectors, by examples unless told otherwise",
        paper="arXiv 2203.05482 (soups), 1602.05629 (weights by examples)",
        rule=Linear(factor=lambda options: 1.0, average=True),
        weights="examples",
    ),
    Method(
        name="sum",
        family="linear",
        summary="task arithmetic: the sum of the task vectors times a scale",
        paper="arXiv 2212.04089",
        rule=Linear(factor=lambda options: 1.0, average=False),
        normalises=False,
    ),
    Method(
        name="interpolate",
        family="linear",
        summary="a point between the base and the weighted mean (WiSE-FT)",
        paper="arXiv 2109.01903",
        rule=Linear(factor=lambda options: float(options.alpha), average=True),
        options=InterpolateOptions,
        weights="examples",
    ),
)
