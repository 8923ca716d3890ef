"""Rules that make every vector sparse before another rule merges them.

Random numbers follow from the recipe's seed, the tensor, the contribution and the position alone:
not from the order of the vectors, nor from how tensors are cut into blocks.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from merge_kit.methods.base import Block, Method, Sparsify
from merge_kit.schema import Document

Rescale = Literal["inverse", "l1", "none"]
_STRIDE = 32768
"""How many numbers one key gives; part of the definition of every mask."""
_RANGE = 2.0**32
_PIECE = 1 << 18
"""About how many values are ranked at once."""


def uniform_bits(
    seed: int, tensor: str, identity: str, begin: int, size: int
) -> NDArray[np.uint32]:
    """Uniform 32-bit numbers for values `begin` to `begin + size` of one tensor of one vector.

    Numbers 32768 k to 32768 (k + 1) are the output of numpy's SFC64, lower halves first, seeded by
    the 128-bit BLAKE2b hash of the JSON list [seed, tensor, identity, k]. numpy promises that raw
    output stays the same in every version.
    """
    first, end = begin // _STRIDE, begin + size
    parts = [
        _stream([seed, tensor, identity, index], min(_STRIDE, end - index * _STRIDE))
        for index in range(first, -(-end // _STRIDE))
    ]
    numbers = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return numbers[begin - first * _STRIDE :]


def _stream(key: list[object], size: int) -> NDArray[np.uint32]:
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    raw = np.random.SFC64(int.from_bytes(digest, "little")).random_raw((size + 1) // 2)
    halves: NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")
    return halves[:size]


def drawn(bits: NDArray[np.uint32], probability: float | NDArray[np.float64]) -> Tensor:
    """True with this probability: where bits < round(probability 2^32), so that 1 keeps all."""
    if isinstance(probability, float) and probability < 1 - 1 / _RANGE:
        # Integers on both sides: numpy would make every one of the bits a float64.
        return torch.from_numpy(bits < np.uint32(round(probability * _RANGE)))
    return torch.from_numpy(bits < np.rint(np.multiply(probability, _RANGE)))


def _keep(tau: Tensor, kept: Tensor, out: Tensor) -> None:
    """Write tau where it is kept and 0 elsewhere; `kept` lies on the CPU."""
    if tau.device.type == "cpu":  # numpy multiplies numbers by booleans several times as fast
        np.multiply(tau.numpy(), kept.numpy(), out=out.numpy())
    else:
        torch.mul(tau, kept.to(tau.device), out=out)


def rescaled(masked: Tensor, tau: Tensor, probability: Tensor | float, rescale: Rescale) -> Tensor:
    """Make up for what a random mask removed from one vector, (n,) float32.

    ``inverse`` divides by the probability of each value to stay (DARE, DELLA: right on average),
    ``l1`` restores sum |tau| exactly (mergekit), ``none`` does nothing. A vector of which nothing
    is left stays zero.
    """
    if rescale == "inverse":
        return masked / probability
    if rescale == "none":
        return masked
    left = float(masked.abs().sum(dtype=torch.float64))
    return masked * (float(tau.abs().sum(dtype=torch.float64)) / left) if left else masked


def keep_probability(magnitudes: Tensor, density: float, window: float) -> Tensor:
    """q = (density - eps) + 2 eps (r - 1) / (n - 1) (MagPrune of DELLA, arXiv 2406.11617, 3.1).

    r is the rank of a value among the n of its row, 1 for the smallest, equal ones in order, and
    eps = window / 2: large values stay more often. A row of one value gets q = density. mergekit
    divides by 0 there. (rows, n) gives (rows, n) float64.
    """
    rows, size = magnitudes.shape
    if size == 1:
        return torch.full_like(magnitudes, density, dtype=torch.float64)
    order = magnitudes.argsort(dim=1, stable=True)
    # On the CPU: a GPU divides otherwise, and the same values would not stay.
    steps = (torch.arange(size, dtype=torch.float64) / (size - 1)).to(magnitudes.device)
    ranks = torch.empty_like(magnitudes, dtype=torch.float64)
    ranks.scatter_(1, order, steps.expand(rows, size))
    return ranks.mul_(window).add_(density - window / 2)


def largest(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Where the `count` largest values of each row are; of equal ones the first: (rows, n)."""
    rows, size = magnitudes.shape
    if count <= 0 or count >= size:
        return np.full((rows, size), count > 0)
    least = np.partition(magnitudes, size - count, axis=1)[:, size - count, None]
    above = magnitudes > least
    level = magnitudes == least
    missing = count - above.sum(axis=1, keepdims=True)
    if (level.sum(axis=1, keepdims=True) > missing).any():
        level &= level.cumsum(axis=1) <= missing
    found: NDArray[np.bool_] = above | level
    return found


def breadcrumbs(tau: Tensor, density: float, top: float) -> Tensor:
    """Drop the int(top n) largest values of each row, keep the next int(density n), drop the rest.

    Model Breadcrumbs, arXiv 2312.06795, section 3: beta is `density`, gamma is `top`, per layer in
    the paper and per row in the authors' code. At least one value of each row stays, where the code
    clears rows shorter than 1 / density. (rows, n) float32 gives the same.
    """
    size = tau.shape[1]
    magnitudes = tau.abs().numpy(force=True)
    cut = min(int(top * size), size - 1)
    keep = max(1, int(density * size))
    middle = largest(magnitudes, cut + keep) & ~largest(magnitudes, cut)
    return tau * torch.from_numpy(middle).to(tau.device)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: its last dimension, or all weights of a convolution's output channel.

    A vector or a single number is one row.
    """
    total = int(np.prod(shape, dtype=np.int64))
    width = total // shape[0] if len(shape) > 3 else shape[-1] if shape else 1
    return total // width, width


class ChangeOptions(Document):
    """What merges the changed vectors."""

    rule: str = "sum"
    """The method that merges the changed vectors."""
    rule_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that method."""


class SparseOptions(ChangeOptions):
    """What merges the sparse vectors."""

    rule_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that method. TIES does not trim the vectors again unless told to."""

    @model_validator(mode="before")
    @classmethod
    def _trim_once(cls, data: Any) -> Any:
        if (
            not isinstance(data, dict)
            or data.get("rule", cls.model_fields["rule"].default) != "ties"
        ):
            return data
        given = data.get("rule_options", {})
        if not isinstance(given, dict):
            return data
        return {**data, "rule_options": {"density": 1.0, **given}}


class DareOptions(SparseOptions):
    """Options of DARE."""

    density: float = Field(default=0.1, gt=0, le=1)
    """Probability of each value to stay; the paper drops 0.9."""
    rescale: Rescale = "inverse"
    """Divide by the density (the paper), restore each tensor's L1 norm (mergekit), or neither."""


class DellaOptions(SparseOptions):
    """Options of DELLA."""

    rule: str = "ties"
    """The method that merges the sparse vectors; the paper elects signs and fuses, as TIES does."""
    density: float = Field(default=0.5, gt=0, le=1)
    """Mean probability of a value to stay; 1 keeps all."""
    window: float = Field(default=0.14, ge=0, lt=1)
    """Width of the range of probabilities, 2 eps: the largest value of a row has density + eps."""
    rescale: Rescale = "inverse"
    """Divide by the probability (the paper), restore each tensor's L1 norm (mergekit), or
    neither."""


class BreadcrumbsOptions(SparseOptions):
    """Options of Model Breadcrumbs."""

    density: float = Field(default=0.2, gt=0, le=1)
    """beta: fraction of the values that stays, the largest after those that `top` removes. This
    default and the next are the example of the authors' code."""
    top: float = Field(default=0.1, ge=0, lt=1)
    """gamma: fraction of the largest values that is dropped."""
    scope: Literal["tensor", "row"] = "tensor"
    """Count within each tensor (the paper) or each of its rows (the authors' code)."""


def _dare(block: Block, options: DareOptions) -> Tensor:
    if options.density == 1:
        return block.values.clone()
    sparse = torch.empty_like(block.values)
    for out, tau, identity in zip(sparse, block.values, block.ids, strict=True):
        bits = uniform_bits(block.seed, block.tensor, identity, block.begin, len(tau))
        _keep(tau, drawn(bits, options.density), out)
        if options.rescale == "inverse":
            out.div_(options.density)
        elif options.rescale == "l1":
            out.copy_(rescaled(out, tau, options.density, "l1"))
    return sparse


def _della(block: Block, options: DellaOptions) -> Tensor:
    if options.density == 1:
        return block.values.clone()
    sparse = torch.empty_like(block.values)
    width = rows_of(block.shape)[1]
    # A few rows at a time: their order and probabilities take several times their memory.
    step = max(1, _PIECE // width) * width
    by_value: Rescale = "none" if options.rescale == "l1" else options.rescale
    for out, tau, identity in zip(sparse, block.values, block.ids, strict=True):
        for at in range(0, len(tau), step):
            part = tau[at : at + step]
            rows = part.reshape(-1, width).abs()
            chance = keep_probability(rows, options.density, options.window).reshape(-1)
            bits = uniform_bits(block.seed, block.tensor, identity, block.begin + at, len(part))
            into = out[at : at + step]
            _keep(part, drawn(bits, chance.numpy(force=True)), into)
            into.copy_(rescaled(into, part, chance, by_value))
        if options.rescale == "l1":
            out.copy_(rescaled(out, tau, options.density, "l1"))
    return sparse


def _breadcrumbs(block: Block, options: BreadcrumbsOptions) -> Tensor:
    size = block.values.shape[1]
    shape = rows_of(block.shape) if options.scope == "row" else (1, size)
    return torch.stack(
        [
            breadcrumbs(tau.reshape(shape), options.density, options.top).reshape(-1)
            for tau in block.values
        ]
    )


def _window_too_wide(size: int, options: DellaOptions) -> str | None:
    low, high = options.density - options.window / 2, options.density + options.window / 2
    if options.density == 1 or (low > 0 and high <= 1):
        return None
    return (
        f"with 'density' {options.density:g} and 'window' {options.window:g} the probabilities run "
        f"from {low:g} to {high:g}: choose a narrower window"
    )


METHODS: tuple[Method, ...] = (
    Method(
        name="dare",
        family="sparsify",
        random=True,
        summary="drop most values at random and scale the rest up, then merge by another rule",
        paper="arXiv 2311.03099",
        rule=Sparsify(change=_dare, whole=lambda options: bool(options.rescale == "l1")),
        options=DareOptions,
    ),
    Method(
        name="della",
        family="sparsify",
        random=True,
        summary="as DARE, but large values stay more often",
        paper="arXiv 2406.11617",
        rule=Sparsify(change=_della, whole=lambda options: True),
        options=DellaOptions,
        refusal=_window_too_wide,
    ),
    Method(
        name="breadcrumbs",
        family="sparsify",
        summary="drop the largest and the small values, then merge by another rule",
        paper="arXiv 2312.06795",
        rule=Sparsify(change=_breadcrumbs, whole=lambda options: True),
        options=BreadcrumbsOptions,
    ),
)
