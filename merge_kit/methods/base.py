"""What a merge method is: its defaults, its needs, and the pure functions of tensors that do it.

Blocks may lie on a GPU. What has a value for each of theirs is on their device and stays there.
What has one for each vector, or each pair (weights, inner products, all that a survey finds), is on
the CPU: a method reads it as numbers, or takes it to the block's device where it meets a block.
Random numbers are drawn on the CPU, the same for every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from merge_kit.schema import Document

WeightScheme = Literal["uniform", "examples", "sqrt-examples", "steps", "validation", "agreement"]
Scope = Literal["vector", "tensor"]
Statistics = Literal["fisher", "gram"]
Iterations = Annotated[int, Field(ge=1, le=10_000)]
"""Most steps of a method; many times what any of them takes to settle."""


def named(tensors: Iterable[str]) -> str:
    """The tensors that a rule merges, for a message: the first, and how many others."""
    first, *others = tensors
    return f"'{first}' and {len(others)} more" if others else f"'{first}'"


class NoOptions(Document):
    """A method without options."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same values of every task vector: a stretch of one tensor, or all of it.

    All its tensors are on one device.
    """

    tensor: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    """Index of the first value within the flattened tensor."""
    values: Tensor
    """(N, n) float32; n is the size of the tensor for methods that ask for whole tensors."""
    start: Tensor
    """(n,) float64: the base's values."""
    ids: tuple[str, ...]
    """What each vector is known by, in the order of `values`; seeds random numbers."""
    sites: tuple[str, ...]
    seed: int
    statistics: Tensor | None = None
    """What the sites published beside their vectors, for methods that ask for it: ``fisher`` is
    (N, n) float32, the diagonal for these very values; ``gram`` is (N, d, d) float32, X^T X / rows
    of the inputs X (rows, d) of this tensor's linear layer. None where this tensor has none."""


class Vectors(Protocol):
    """All weights that a method merges, as its first pass sees them: blocks, never all at once.

    Blocks are cut the same way whatever the number of sites and threads, and partial results are
    added in the order of the blocks, so every figure is the same on every run.
    """

    def __len__(self) -> int:
        """Number of vectors."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The site of each vector."""

    @property
    def size(self) -> int:
        """Number of values of each vector."""

    def total(self, measure: Callable[[Block], Tensor]) -> Tensor:
        """Sum of a measure over all blocks, on the CPU like all that follows."""

    def totals(self, measure: Callable[[Block], Tensor]) -> dict[str, Tensor]:
        """Sum of a measure over the blocks of each tensor."""

    def kth_largest(
        self,
        measure: Callable[[Block], Tensor],
        fraction: float,
        scope: Scope,
        noted: str | None = None,
    ) -> dict[str, Tensor]:
        """The exact k-th largest value of each row of a measure (N, n) >= 0.

        k = int(fraction d) + 1, of the d values of the whole vector or of each tensor; 0 when there
        are not so many. (N,) float32 by tensor name. `noted` names a measure of one vector that
        does not depend on the others, so that it need not be found twice.
        """

    def order_statistics(self, measure: Callable[[Block], Tensor], ranks: Sequence[int]) -> Tensor:
        """The exact k-th largest value of each row of a measure (N, n), of any sign, for several k.

        Ranks run from 1, the largest, to `size`, the smallest. (len(ranks), N) float32, mostly in
        one pass however many ranks there are.
        """


@dataclass(frozen=True, slots=True)
class Linear:
    """merged = factor * sum_i w_i tau_i, exactly rounded and kept up to date exactly."""

    factor: Callable[[Any], float]
    """Of the options."""
    average: bool
    """Divide by the sum of the weights."""


@dataclass(frozen=True, slots=True)
class FromGram:
    """A combination sum_i c_i v_i whose coefficients follow from the inner products <v_i, v_j>."""

    coefficients: Callable[[Tensor, Tensor, Any], Tensor]
    """(N, N) float64 inner products, (N,) weights that average 1, options: (N,) float64."""
    scope: Callable[[Any], Scope]
    """Whether the inner products are those of each tensor or of the whole vector."""
    on_weights: Callable[[Any], bool] = lambda options: False
    """Whether v_i is theta_i rather than tau_i."""
    selects: bool = False
    """Whether a coefficient of 0 means that the site is refused, its head and statistics too."""


@dataclass(frozen=True, slots=True)
class ByValue:
    """Each merged value follows from the sites' values of one block and a first pass over all."""

    combine: Callable[[Block, Tensor, Any, Any], Tensor]
    """Block, (N,) weights that average 1, options, what `survey` found: (n,) float64, there."""
    survey: Callable[[Vectors, Any], Any] | None = None
    whole: Callable[[Any], bool] = lambda options: False
    """Whether blocks must be whole tensors."""
    masks: Callable[[Block, Any, Any], Tensor] | None = None
    """For methods that keep something of each site: block, options, what `survey` found give
    (N, n) of True and False, the values of the merged vector that are this site's too."""
    rescalers: Callable[[Any], Tensor] | None = None
    """With `masks`: what `survey` found gives (N,) float64, the factor of each site's values."""
    takes: Callable[[str, tuple[int, ...], Any], bool] = lambda name, shape, options: True
    """Whether the method itself merges a tensor: name, shape, options. `others` says what becomes
    of those that it does not take."""
    others: Callable[[Any], Literal["mean", "base"]] = lambda options: "mean"


@dataclass(frozen=True, slots=True)
class Sparsify:
    """Change every vector first, then merge by another rule, named in the options as `rule`."""

    change: Callable[[Block, Any], Tensor]
    """Block and options: (N, n) float32. Each vector is changed by itself: N is 1 in a merge."""
    whole: Callable[[Any], bool]
    """Whether blocks must be whole tensors."""


@dataclass(frozen=True, slots=True)
class Method:
    """One merge rule."""

    name: str
    family: str
    summary: str
    paper: str
    rule: Linear | FromGram | ByValue | Sparsify
    options: type[Document] = NoOptions
    weights: WeightScheme = "uniform"
    normalises: bool = True
    """Whether explicit weights are scaled to average 1; task arithmetic takes them as they are."""
    minimum: int = 1
    """Fewest vectors."""
    maximum: int | None = None
    """Most vectors."""
    statistics: Statistics | None = None
    """What each site must have published beside its vector."""
    random: bool = False
    """Whether it draws random numbers, from the recipe's seed."""
    directions: bool = False
    """Whether a vector of zeros has no meaning, because angles are measured."""
    refusal: Callable[[int, Any], str | None] = lambda size, options: None
    """Number of vectors and options: why they cannot be merged, or None."""
