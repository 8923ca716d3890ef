"""The table of merge methods: their defaults, needs and papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods import interference, linear
from merge_kit.schema import Document

WeightScheme = Literal["uniform", "examples", "sqrt-examples", "steps"]


class Vectors(Protocol):
    """The task vectors as a method that needs a first pass sees them: weights only, no heads."""

    def flat(self, index: int) -> Tensor:
        """(d,) float32: all weights of one vector."""

    def stacks(self) -> Iterator[Tensor]:
        """(N, n) float32 of each tensor in turn."""

    def __len__(self) -> int:
        """Number of vectors."""


class NoOptions(Document):
    """A method without options."""


class TiesOptions(Document):
    """Options of TIES."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Fraction of values that is kept of each vector."""
    scope: Literal["vector", "tensor"] = "vector"
    """Trim over the whole vector (the paper) or each tensor by itself (mergekit, peft)."""
    reduction: interference.Reduction = "mean"
    """How agreeing values are combined; the paper takes the mean."""


@dataclass(frozen=True, slots=True)
class TiesState:
    """What the first pass of TIES finds."""

    thresholds: Tensor | None
    majority: float


@dataclass(frozen=True, slots=True)
class Method:
    """One merge rule.

    `prepare` makes a first pass over all vectors for rules that need one; `combine` merges the
    values of one tensor: (N, n), (N,), the options and what `prepare` returned give (n,).
    """

    name: str
    summary: str
    paper: str
    weights: WeightScheme
    options: type[Document]
    combine: Callable[[Tensor, Tensor, Any, Any], Tensor]
    prepare: Callable[[Vectors, Any], Any] | None = None
    normalises: bool = True
    """Whether explicit weights are scaled to average 1; task arithmetic takes them as they are."""


def _prepare_ties(vectors: Vectors, options: TiesOptions) -> TiesState:
    thresholds = None
    if options.scope == "vector":
        found = [
            interference.trim_threshold(vectors.flat(index), options.density)
            for index in range(len(vectors))
        ]
        thresholds = torch.tensor(found)
    balance = sum(
        interference.sign_balance(interference.trim(stack, _thresholds(stack, thresholds, options)))
        for stack in vectors.stacks()
    )
    return TiesState(thresholds, float((balance > 0) - (balance < 0)))


def _thresholds(stack: Tensor, thresholds: Tensor | None, options: TiesOptions) -> Tensor:
    if thresholds is not None:
        return thresholds
    return torch.tensor([interference.trim_threshold(tau, options.density) for tau in stack])


def _ties(vectors: Tensor, weights: Tensor, options: TiesOptions, state: TiesState) -> Tensor:
    thresholds = _thresholds(vectors, state.thresholds, options)
    return interference.ties(vectors, weights, thresholds, state.majority, options.reduction)


METHODS = {
    method.name: method
    for method in (
        Method(
            name="mean",
            summary="weighted mean of the task vectors, by examples unless told otherwise",
            paper="arXiv 2203.05482 (soups), 1602.05629 (weights by examples)",
            weights="examples",
            options=NoOptions,
            combine=lambda vectors, weights, options, state: linear.mean(vectors, weights),
        ),
        Method(
            name="sum",
            summary="task arithmetic: the sum of the task vectors times a scale",
            paper="arXiv 2212.04089",
            weights="uniform",
            options=NoOptions,
            combine=lambda vectors, weights, options, state: linear.task_arithmetic(
                vectors, weights
            ),
            normalises=False,
        ),
        Method(
            name="ties",
            summary="keep the largest values, elect a sign, take the mean of those that agree",
            paper="arXiv 2306.01708",
            weights="uniform",
            options=TiesOptions,
            combine=_ties,
            prepare=_prepare_ties,
        ),
    )
}
