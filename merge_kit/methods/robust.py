"""Rules that a few wrong or hostile vectors cannot move far.

Rules on distances take the matrix of inner products <tau_i, tau_j>, (N, N) float64, and give
coefficients, (N,) float64; rules on values take (N, n) float32 and give (n,) float64.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import ByValue, FromGram, Iterations, Method, Scope
from merge_kit.schema import Document

_NETWORK = 32
"""Up to so many sites a sorting network over the rows is faster than sorting each coordinate."""


def sort_rows(values: Tensor) -> list[Tensor]:
    """The rows of an (N, n) matrix, sorted at each coordinate; few by Batcher's network."""
    rows = list(values)
    size = len(rows)
    if size > _NETWORK:
        return list(_sorted_columns(values))
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(j, min(j + k, size - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        low = torch.minimum(rows[i], rows[i + k])
                        rows[i + k] = torch.maximum(rows[i], rows[i + k])
                        rows[i] = low
            k //= 2
        p *= 2
    return rows


def _sorted_columns(values: Tensor) -> Tensor:
    columns = values.t().clone(memory_format=torch.contiguous_format)
    if columns.device.type == "cpu":
        # In place: torch makes an int64 index of every value too, and takes several times as long.
        columns.numpy(force=True).sort(axis=1)
    else:
        columns = columns.sort(dim=1).values
    return columns.t().contiguous()


def median(values: Tensor, even: Literal["mean", "lower"] = "mean") -> Tensor:
    """Coordinate-wise median (arXiv 1803.01498, definition 1); weights play no part.

    Of an even number the mean of the two middle values (numpy) or the lower one (torch).
    """
    rows, size = sort_rows(values), len(values)
    lower = rows[(size - 1) // 2].double()
    if size % 2 or even == "lower":
        return lower
    return (lower + rows[size // 2]) / 2


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """Mean without the int(trim N) smallest and largest values (arXiv 1803.01498, definition 2)."""
    size = len(values)
    cut = int(trim * size)
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for row in sort_rows(values)[cut : size - cut]:
        total.add_(row)
    return total / (size - 2 * cut)


def _distances(gram: Tensor, centre: Tensor) -> Tensor:
    """|tau_i - sum_j c_j tau_j| of each i."""
    squares = gram.diagonal() - 2 * gram @ centre + centre @ gram @ centre
    return squares.clamp(min=0).sqrt()


def geometric_median(
    gram: Tensor,
    weights: Tensor,
    smoothing: float = 1e-6,
    iterations: int = 100,
    tolerance: float = 1e-12,
) -> Tensor:
    """Smoothed Weiszfeld iterations (RFA, arXiv 1912.13445, algorithm 2).

    m becomes sum_i b_i tau_i / sum_i b_i with b_i = w_i / max(|tau_i - m|, smoothing), from the
    weighted mean, until the coefficients move less than `tolerance`.
    """
    centre = weights / weights.sum()
    for _ in range(iterations):
        pull = weights / _distances(gram, centre).clamp(min=smoothing)
        moved = pull / pull.sum()
        if float((moved - centre).abs().max()) < tolerance:
            return moved
        centre = moved
    return centre


def multi_krum(gram: Tensor, attackers: int, keep: int) -> Tensor:
    """Mean of the `keep` vectors with the best scores (arXiv 1703.02757, section 4).

    The score is the sum of the squared distances to the N - f - 2 nearest other vectors; Krum keeps
    one. Of equal scores the first in order is kept.
    """
    size = len(gram)
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)
    squares.fill_diagonal_(float("inf"))
    nearest = squares.sort(dim=1).values[:, : size - attackers - 2]
    best = nearest.sum(dim=1).argsort(stable=True)[:keep]
    chosen = torch.zeros(size, dtype=torch.float64, device=gram.device)
    chosen[best] = 1.0 / keep
    return chosen


def centred_clipping(gram: Tensor, radius: float | None, iterations: int) -> Tensor:
    """v becomes v + mean_i (tau_i - v) min(1, radius / |tau_i - v|), from 0 (arXiv 2012.10333).

    v stays in the span of the vectors. Without a radius, the median distance of each iteration.
    """
    size = len(gram)
    centre = torch.zeros(size, dtype=torch.float64, device=gram.device)
    for _ in range(iterations):
        distances = _distances(gram, centre)
        reach = float(distances.median()) if radius is None else radius
        pull = _clips(distances, reach) / size
        centre = centre * (1 - pull.sum()) + pull
    return centre


def norm_clipping(gram: Tensor, weights: Tensor, bound: float | None) -> Tensor:
    """Weighted mean of tau_i min(1, bound / |tau_i|) (arXiv 2411.18607).

    Without a bound, the median norm.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    reach = float(norms.median()) if bound is None else bound
    return weights / weights.sum() * _clips(norms, reach)


def _clips(lengths: Tensor, bound: float) -> Tensor:
    return (bound / lengths.masked_fill(lengths == 0, 1.0)).where(lengths > bound, 1.0)


class MedianOptions(Document):
    """Options of the median."""

    even: Literal["mean", "lower"] = "mean"
    """Of an even number of sites: the mean of the two middle values, or the lower one."""


class TrimmedOptions(Document):
    """Options of the trimmed mean."""

    trim: float = Field(default=0.2, ge=0, lt=0.5)
    """Fraction of the sites dropped at each end, rounded down."""


class ScopeOptions(Document):
    """An option of all rules on distances."""

    scope: Scope = "vector"
    """Distances between whole vectors, or between the tensors of one name."""


class MedianPointOptions(ScopeOptions):
    """Options of the geometric median."""

    smoothing: float = Field(default=1e-6, gt=0)
    """Least distance that a vector counts as having from the median."""
    iterations: Iterations = 100
    """Most steps."""


class KrumOptions(Document):
    """Options of Krum; distances are those of whole vectors."""

    attackers: int = Field(default=1, ge=0)
    """Number of vectors that may be hostile: at least 2 f + 3 sites are needed."""


class MultiKrumOptions(KrumOptions):
    """Options of multi-Krum."""

    keep: int | None = Field(default=None, ge=1)
    """Number of vectors to average; null keeps all but the attackers."""


class CentredOptions(ScopeOptions):
    """Options of centred clipping."""

    radius: float | None = Field(default=None, gt=0)
    """Largest pull of one vector; null is the median distance."""
    iterations: Iterations = 3
    """Number of steps from the base."""


class ClipOptions(ScopeOptions):
    """Options of norm clipping."""

    bound: float | None = Field(default=None, gt=0)
    """Largest norm of a vector; null is the median norm."""


def _scope(options: Any) -> Scope:
    scope: Scope = options.scope
    return scope


def _too_many_attackers(size: int, options: Any) -> str | None:
    needed = 2 * options.attackers + 3
    if size < needed:
        lower = "lower 'attackers' or " if options.attackers else ""
        return (
            f"{options.attackers} attacker(s) among {size} cannot be told apart, at least {needed} "
            f"vectors are needed: {lower}wait for more sites"
        )
    keep = getattr(options, "keep", None)
    if keep is not None and keep > size:
        return f"'keep' is {keep} and there are {size} vectors: lower it"
    return None


METHODS: tuple[Method, ...] = (
    Method(
        name="median",
        family="robust",
        summary="median of the sites at each coordinate",
        paper="arXiv 1803.01498",
        rule=ByValue(
            combine=lambda block, weights, options, state: median(block.values, options.even)
        ),
        options=MedianOptions,
    ),
    Method(
        name="trimmed-mean",
        family="robust",
        summary="mean at each coordinate without the smallest and largest values",
        paper="arXiv 1803.01498",
        rule=ByValue(
            combine=lambda block, weights, options, state: trimmed_mean(block.values, options.trim)
        ),
        options=TrimmedOptions,
    ),
    Method(
        name="geometric-median",
        family="robust",
        summary="the point with the smallest sum of distances to the vectors",
        paper="arXiv 1912.13445",
        rule=FromGram(
            coefficients=lambda gram, weights, options: geometric_median(
                gram, weights, options.smoothing, options.iterations
            ),
            scope=_scope,
        ),
        options=MedianPointOptions,
    ),
    Method(
        name="krum",
        family="robust",
        summary="the one vector that is nearest to most others; of at least 2 attackers + 3",
        paper="arXiv 1703.02757",
        rule=FromGram(
            coefficients=lambda gram, weights, options: multi_krum(gram, options.attackers, 1),
            scope=lambda options: "vector",
            selects=True,
        ),
        options=KrumOptions,
        refusal=_too_many_attackers,
    ),
    Method(
        name="multi-krum",
        family="robust",
        summary="mean of those nearest to most others; of at least 2 attackers + 3",
        paper="arXiv 1703.02757",
        rule=FromGram(
            coefficients=lambda gram, weights, options: multi_krum(
                gram, options.attackers, options.keep or len(gram) - options.attackers
            ),
            scope=lambda options: "vector",
            selects=True,
        ),
        options=MultiKrumOptions,
        refusal=_too_many_attackers,
    ),
    Method(
        name="centred-clipping",
        family="robust",
        summary="repeated mean of pulls that are cut to a radius",
        paper="arXiv 2012.10333",
        rule=FromGram(
            coefficients=lambda gram, weights, options: centred_clipping(
                gram, options.radius, options.iterations
            ),
            scope=_scope,
        ),
        options=CentredOptions,
    ),
    Method(
        name="norm-clipping",
        family="robust",
        summary="weighted mean of vectors whose norm is cut to a bound",
        paper="arXiv 2411.18607",
        rule=FromGram(
            coefficients=lambda gram, weights, options: norm_clipping(gram, weights, options.bound),
            scope=_scope,
        ),
        options=ClipOptions,
        weights="examples",
    ),
)
