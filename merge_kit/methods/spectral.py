"""Rules on the singular vectors of the weights.

A weight is a matrix with a row for each output: a kernel of a convolution (out, in, k, k) is
(out, in k k), where the papers take kernels for no matrices. No matrix is what has less than two
rows or columns (biases, class tokens, position embeddings), nor a depthwise kernel (c, 1, k, k),
each of whose rows has an input of its own: there the merged vector is the weighted mean, as the
papers do with everything that is no matrix, and the low-rank change changes nothing.

Weights scale each vector first: w_i tau_i takes the place of tau_i, and a vector of weight 0 adds
no direction. In `tsv_m`, and for the own directions of `iso_cts`, a weight says how much the
directions of a site count, not which ones they are.

Signs of singular vectors, and their choice where singular values repeat, are LAPACK's. Every result
but that of `svc` is the same for any choice, unless a rank cuts between two equal singular values.
Where a singular value is 0 the vectors are arbitrary; published code takes what comes, and lets it
push the others about when they are made orthogonal. Here there are none: see `leading`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import Block, ByValue, Method, Sparsify
from merge_kit.methods.linear import weighted_sum
from merge_kit.methods.sparsify import ChangeOptions
from merge_kit.schema import Document

_ZERO = 2.0**-20
"""Singular values below this part of a matrix's norm count as 0: float32 values hold nothing there
but their own rounding errors."""


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a weight; None where it is no matrix."""
    if len(shape) < 2 or (len(shape) > 2 and shape[1] == 1):
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if min(rows, columns) > 1 else None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The largest singular values of a matrix (m, n) and their vectors."""

    left: Tensor
    """(m, k): U, orthonormal columns."""
    values: Tensor
    """(k,), the largest first, none of them 0."""
    right: Tensor
    """(n, k): V, orthonormal columns."""

    def times(self, weight: float) -> Spectrum:
        """The same of the matrix times a number above 0."""
        return Spectrum(self.left, weight * self.values, self.right)


def leading(matrix: Tensor, rank: int, norm: float | None = None) -> Spectrum:
    """The `rank` largest singular values that are not 0.

    From the eigenvectors V of A^T A, of the smaller side: sigma = |A v|, u = A v / sigma. Squaring
    costs float64 digits that float32 values do not have, and takes a third of the time of an SVD.

    Parameters
    ----------
    matrix
        (m, n) float64.
    norm
        What 2^-20 of counts as 0; by default the matrix's Frobenius norm.
    """
    if matrix.shape[0] < matrix.shape[1]:
        turned = leading(matrix.T, rank, norm)
        return Spectrum(turned.right, turned.values, turned.left)
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    right = vectors[:, len(vectors) - rank :].flip(1)
    along = matrix @ right
    values = along.norm(dim=0)
    kept = values > _ZERO * (float(matrix.norm()) if norm is None else norm)
    if not kept.all():
        along, values, right = along[:, kept], values[kept], right[:, kept]
    return Spectrum(along.div_(values), values, right)


def side_by_side(parts: Iterable[Spectrum]) -> tuple[Tensor, Tensor, Tensor]:
    """[U_1 ... U_N], all singular values in a row, and [V_1 ... V_N]."""
    lefts, values, rights = [], [], []
    for part in parts:
        lefts.append(part.left)
        values.append(part.values)
        rights.append(part.right)
    return torch.cat(lefts, dim=1), torch.cat(values), torch.cat(rights, dim=1)


def orthogonal_sum(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """U' diag(values) V'^T with U' nearest to (m, k) `left` and orthonormal, V' alike: (m, n).

    Overwrites `left` and `right`.
    """
    return polar_factor(left).mul_(values) @ polar_factor(right).T


def polar_factor(columns: Tensor) -> Tensor:
    """X (X^T X)^(-1/2), the nearest matrix with orthonormal columns: U V^T where X = U S V^T.

    Where columns depend on each other it is not unique, and the smallest is taken, without the
    directions in which S is 0: of N equal columns each is divided by sqrt(N). Columns that differ
    by the rounding errors of float32 are equal; published code makes a direction of the errors.
    (m, k) float64, overwritten by the result.
    """
    u, s, vh = torch.linalg.svd(columns, full_matrices=False)
    rank = int((s > _ZERO * s[:1]).sum())
    return torch.mm(u[:, :rank], vh[:rank], out=columns)


def _weighed(vectors: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, float]]:
    """The vectors that have a weight, in float64, with it; each one overwrites the last."""
    exact = torch.empty_like(vectors[0], dtype=torch.float64)
    for tau, weight in zip(vectors, weights.tolist(), strict=True):
        if weight:
            yield exact.copy_(tau), weight


def tsv_m(vectors: Tensor, weights: Tensor) -> Tensor:
    """Task Singular Vectors (TSV-Merge, arXiv 2412.00081).

    tau_i = U_i S_i V_i^T is cut to its r = int(min(m, n) / N) largest singular values; then all
    [U_1 ... U_N] and all [V_1 ... V_N] are made orthogonal and give U' diag(S_1 ... S_N) V'^T.
    With more vectors than min(m, n) the authors' r is 0 and so is their result; here it is 1.

    (N, m, n) and (N,) weights give (m, n) float64.
    """
    rank = max(1, min(vectors.shape[1:]) // len(vectors))
    return orthogonal_sum(
        *side_by_side(
            leading(tau, rank).times(weight) for tau, weight in _weighed(vectors, weights)
        )
    )


def iso_c(vectors: Tensor, weights: Tensor) -> Tensor:
    """Isotropic merging in the common subspace (Iso-C, arXiv 2502.04959).

    With sum_i w_i tau_i = U S V^T it is mean(S) U V^T. Singular values of 0 are not counted in the
    mean: in the authors' code they are, and get vectors of no meaning.

    (N, m, n) and (N,) weights give (m, n) float64.
    """
    common = leading(weighted_sum(vectors, weights), min(vectors.shape[1:]))
    return common.left.mul_(common.values.mean()) @ common.right.T


def iso_cts(vectors: Tensor, weights: Tensor, fraction: float) -> Tensor:
    """Isotropic merging in common and task-specific subspaces (Iso-CTS, arXiv 2502.04959).

    With U, S, V the c largest of sum_i w_i tau_i and U_i, S_i, V_i the k largest of
    (I - U U^T) tau_i, all vectors are made orthogonal and get the mean of all singular values.
    k = round((d - int(fraction d)) / N) as in the authors' code, d = min(m, n), and c = d - N k.
    With so many vectors that k is 0 this is Iso-C; k is never so large that c is negative.

    (N, m, n) and (N,) weights give (m, n) float64.
    """
    left, values, right = side_by_side(_subspaces(vectors, weights, fraction))
    return orthogonal_sum(left, values.mean().expand_as(values), right)


def _subspaces(vectors: Tensor, weights: Tensor, fraction: float) -> Iterator[Spectrum]:
    """Of Iso-CTS: the common one, then what each vector has outside of it."""
    size, smaller = len(vectors), min(vectors.shape[1:])
    own = min(round((smaller - int(fraction * smaller)) / size), smaller // size)
    common = leading(weighted_sum(vectors, weights), smaller - size * own)
    yield common
    if not own:
        return
    # U of small singular values is orthonormal to few digits; a projection needs them all.
    basis = torch.linalg.qr(common.left).Q
    for tau, weight in _weighed(vectors, weights):
        norm = float(tau.norm())
        tau.addmm_(basis, basis.T @ tau, alpha=-1)
        yield leading(tau, own, norm).times(weight)


def svc(vectors: Tensor, weights: Tensor, alpha: float | None = None) -> Tensor:
    """Singular value calibration of the sum (SVC, arXiv 2602.05536).

    With sum_i w_i tau_i = U S V^T, a_r = u_r^T sum_i w_i tau_i and a_ir = u_r^T w_i tau_i, the
    singular value s_r is divided by the mean over i of max(alpha, <a_r, a_ir> / |a_ir|^2), alpha
    being 1 / N unless given: what all sites share is counted once. Where a_ir is 0 it is alpha.
    Calibrating lambda times the sum, as published, is to take alpha / lambda.

    (N, m, n) and (N,) weights give (m, n) float64.
    """
    size = len(vectors)
    least = 1 / size if alpha is None else alpha
    total = weighted_sum(vectors, weights)
    left = leading(total, min(total.shape)).left
    merged = left.T @ total
    del total
    counted = torch.full((len(merged),), size * least, dtype=torch.float64, device=merged.device)
    for tau, weight in _weighed(vectors, weights):
        response = left.T @ tau
        squares = response.square().sum(dim=1)
        there = squares > (_ZERO * tau.norm()).square()
        share = (response * merged).sum(dim=1) / (weight * squares.where(there, 1.0))
        counted += (share.where(there, 0.0) - least).clamp(min=0)
    return left.mul_(size / counted) @ merged


def low_rank(matrix: Tensor, energy: float) -> Tensor:
    """The nearest matrix of the smallest rank that keeps this part of the sum of squares.

    The largest singular values are kept until their squares reach `energy` times the sum of all
    (Eckart and Young 1936): A V V^T with V the eigenvectors of A^T A. (m, n) float32 gives the
    same.
    """
    if energy == 1:
        return matrix.clone()
    if matrix.shape[0] < matrix.shape[1]:
        return low_rank(matrix.T, energy).T
    exact = matrix.to(torch.float64, copy=True)
    squares, vectors = torch.linalg.eigh(exact.T @ exact)
    reached = squares.flip(0).clamp(min=0).cumsum(dim=0)
    rank = int((reached < energy * reached[-1]).sum()) + 1
    chosen = vectors[:, len(vectors) - rank :]
    return torch.mm(exact @ chosen, chosen.T, out=exact).to(matrix.dtype)


class IsoCtsOptions(Document):
    """Options of Iso-CTS."""

    common: float = Field(default=0.8, ge=0, le=1)
    """Fraction of the directions that is common; the others are shared out among the sites."""


class SvcOptions(Document):
    """Options of singular value calibration."""

    alpha: float | None = Field(default=None, gt=0)
    """Least share of a site in a direction: the larger, the less is calibrated up. null is 1 / N
    (the paper)."""


class LowRankOptions(ChangeOptions):
    """Options of the low-rank change."""

    energy: float = Field(default=0.95, gt=0, le=1)
    """Part of the sum of squares that each matrix keeps; 1 changes nothing."""


def _by_matrix(rule: Callable[[Tensor, Tensor, Any], Tensor]) -> ByValue:
    def combine(block: Block, weights: Tensor, options: Any, state: Any) -> Tensor:
        shape = as_matrix(block.shape)
        if shape is None:
            return weighted_sum(block.values, weights) / len(weights)
        return rule(block.values.reshape(-1, *shape), weights, options).reshape(-1)

    return ByValue(
        combine=combine,
        whole=lambda options: True,
        takes=lambda name, shape, options: as_matrix(shape) is not None,
    )


def _low_rank(block: Block, options: LowRankOptions) -> Tensor:
    shape = as_matrix(block.shape)
    if shape is None:
        return block.values.clone()
    matrices = block.values.reshape(-1, *shape)
    return torch.stack([low_rank(tau, options.energy).reshape(-1) for tau in matrices])


METHODS: tuple[Method, ...] = (
    Method(
        name="tsv-m",
        family="spectral",
        summary="sum of the largest singular values, each site's directions made orthogonal",
        paper="arXiv 2412.00081",
        rule=_by_matrix(lambda vectors, weights, options: tsv_m(vectors, weights)),
    ),
    Method(
        name="iso-c",
        family="spectral",
        summary="the sum with all singular values of a matrix set to their mean",
        paper="arXiv 2502.04959",
        rule=_by_matrix(lambda vectors, weights, options: iso_c(vectors, weights)),
    ),
    Method(
        name="iso-cts",
        family="spectral",
        summary="as Iso-C, the weakest directions replaced by those of single sites",
        paper="arXiv 2502.04959",
        rule=_by_matrix(
            lambda vectors, weights, options: iso_cts(vectors, weights, options.common)
        ),
        options=IsoCtsOptions,
    ),
    Method(
        name="svc",
        family="spectral",
        summary="the sum with what several sites share counted once in each direction",
        paper="arXiv 2602.05536",
        rule=_by_matrix(lambda vectors, weights, options: svc(vectors, weights, options.alpha)),
        options=SvcOptions,
    ),
    Method(
        name="low-rank",
        family="spectral",
        summary="drop the small singular values of every vector, then merge by another rule",
        paper="Eckart and Young 1936, doi 10.1007/BF02288367",
        rule=Sparsify(change=_low_rank, whole=lambda options: True),
        options=LowRankOptions,
    ),
)
