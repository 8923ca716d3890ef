"""Rules on directions and angles: each follows from the inner products of the vectors.

Every function maps the matrix of inner products <v_i, v_j>, (N, N) float64, and weights, (N,)
float64 that average 1, to coefficients c, (N,) float64, of the merged sum_i c_i v_i. Where a vector
is zero it has no direction, and the weighted mean is taken instead.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit.methods.base import FromGram, Iterations, Method
from merge_kit.schema import Document

Space = Literal["weights", "vectors"]
_PARALLEL = 0.9995


def _mean(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms[None, :]).clamp(-1.0, 1.0)


def _has_directions(gram: Tensor) -> bool:
    return bool((gram.diagonal() > 0).all())


def _arc(cosine: float, t: float) -> tuple[float, float]:
    """s_0 = sin((1 - t) T) / sin T and s_1 = sin(t T) / sin T; the straight line when parallel."""
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(gram: Tensor, weights: Tensor) -> Tensor:
    """s_0 a + s_1 b along the arc from a to b, operands not normalised (Shoemake 1985).

    t = w_2 / (w_1 + w_2); above a cosine of 0.9995 it is the straight line. Implementations differ
    in what they do with the norms; this is mergekit's.
    """
    t = float(weights[1] / weights.sum())
    if not _has_directions(gram):
        return _mean(weights)
    first, second = _arc(float(_cosines(gram)[0, 1]), t)
    return torch.tensor([first, second], dtype=torch.float64)


def nuslerp(gram: Tensor, weights: Tensor) -> Tensor:
    """slerp of two task vectors' unit directions, times the interpolated norm (as sd-mecha).

    (s_0 a/|a| + s_1 b/|b|) ((1 - t) |a| + t |b|), t = w_2 / (w_1 + w_2).
    """
    t = float(weights[1] / weights.sum())
    if not _has_directions(gram):
        return _mean(weights)
    norms = gram.diagonal().sqrt()
    arc = torch.tensor(_arc(float(_cosines(gram)[0, 1]), t), dtype=torch.float64)
    return arc * ((1 - t) * norms[0] + t * norms[1]) / norms


def multislerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean on the sphere, one step from the normalised mean (mergekit's multislerp).

    u_i = tau_i / |tau_i|; m = sum w_i u_i / |sum w_i u_i|; v = sum w_i (u_i - (u_i m) m);
    (m cos|v| + v sin|v| / |v|) sum w_i |tau_i|, with weights that sum to 1.
    """
    shares = _mean(weights)
    if not _has_directions(gram):
        return shares
    norms = gram.diagonal().sqrt()
    found = _step(_cosines(gram), shares, shares, logarithm=False)
    if found is None:
        return shares
    return found[0] / norms * (shares * norms).sum()


def karcher(gram: Tensor, weights: Tensor, iterations: int = 10, tolerance: float = 1e-5) -> Tensor:
    """Riemannian centre of mass of the directions, times the mean norm (arXiv 2603.04972).

    m starts at the normalised mean; T = sum a_i (phi_i / sin phi_i)(u_i - cos phi_i m) with
    phi_i = acos(m u_i); m becomes cos|T| m + sin|T| T / |T| until |T| < tolerance.
    """
    shares = _mean(weights)
    if not _has_directions(gram):
        return shares
    norms, cosines = gram.diagonal().sqrt(), _cosines(gram)
    point = shares
    for _ in range(iterations):
        found = _step(cosines, point, shares, logarithm=True)
        if found is None:
            return shares
        point, length = found
        if length < tolerance:
            break
    return point / norms * (shares * norms).sum()


def _step(
    cosines: Tensor, point: Tensor, shares: Tensor, *, logarithm: bool
) -> tuple[Tensor, float] | None:
    """One step on the sphere, in coefficients of the unit vectors; None at the sphere's centre."""
    length = float((point @ cosines @ point).clamp(min=0).sqrt())
    if length < 1e-12:
        return None
    m = point / length
    along = (cosines @ m).clamp(-1.0, 1.0)
    stretch = torch.ones_like(along)
    if logarithm:
        angles = along.acos()
        curved = angles > 1e-8
        stretch[curved] = angles[curved] / angles[curved].sin()
    pull = shares * stretch
    tangent = pull - (pull * along).sum() * m
    size = float((tangent @ cosines @ tangent).clamp(min=0).sqrt())
    if size < 1e-15:
        return m, size
    return math.cos(size) * m + math.sin(size) / size * tangent, size


def model_stock(
    gram: Tensor, weights: Tensor, average: Literal["cosines", "angles"] = "cosines"
) -> Tensor:
    """t times the weighted mean, t = N cos / (1 + (N - 1) cos) (arXiv 2403.19522, equation 4).

    cos is the mean of all pairwise cosines (mergekit) or the cosine of the mean angle
    (fusion_bench). t is held in [0, 1]: vectors that point apart give the base.
    """
    size = len(weights)
    if not _has_directions(gram):
        return _mean(weights)
    first, second = torch.triu_indices(size, size, offset=1)
    pairs = _cosines(gram)[first, second]
    cosine = float(pairs.mean() if average == "cosines" else pairs.acos().mean().cos())
    bottom = 1 + (size - 1) * cosine
    ratio = size * cosine / bottom if bottom > 1e-6 else 0.0
    return _mean(weights) * min(max(ratio, 0.0), 1.0)


class SpaceOptions(Document):
    """Options of the rules that published code applies to the models themselves."""

    space: Space = "weights"
    """Angles between the models' weights (as published), or between the task vectors."""


class KarcherOptions(SpaceOptions):
    """Options of the Karcher mean."""

    iterations: Iterations = 10
    """Most steps towards the centre."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Length of a step, in radians, that ends them."""


class ModelStockOptions(Document):
    """Options of Model Stock."""

    average: Literal["cosines", "angles"] = "cosines"
    """Of the pairs: their cosines, or their angles."""


METHODS: tuple[Method, ...] = (
    Method(
        name="slerp",
        family="geometry",
        summary="along the arc between two models; weights say how far",
        paper="Shoemake 1985, doi 10.1145/325334.325242",
        rule=FromGram(
            coefficients=lambda gram, weights, options: slerp(gram, weights),
            scope=lambda options: "tensor",
            on_weights=lambda options: bool(options.space == "weights"),
        ),
        options=SpaceOptions,
        minimum=2,
        maximum=2,
        directions=True,
    ),
    Method(
        name="nuslerp",
        family="geometry",
        summary="along the arc between the directions of two task vectors",
        paper="mergekit's NuSLERP; no paper",
        rule=FromGram(
            coefficients=lambda gram, weights, options: nuslerp(gram, weights),
            scope=lambda options: "tensor",
        ),
        minimum=2,
        maximum=2,
        directions=True,
    ),
    Method(
        name="multislerp",
        family="geometry",
        summary="mean of the directions on the sphere, in one step",
        paper="mergekit's MultiSLERP; no paper",
        rule=FromGram(
            coefficients=lambda gram, weights, options: multislerp(gram, weights),
            scope=lambda options: "tensor",
        ),
        minimum=2,
        directions=True,
    ),
    Method(
        name="karcher",
        family="geometry",
        summary="Riemannian centre of mass of the directions",
        paper="arXiv 2603.04972",
        rule=FromGram(
            coefficients=lambda gram, weights, options: karcher(
                gram, weights, options.iterations, options.tolerance
            ),
            scope=lambda options: "tensor",
            on_weights=lambda options: bool(options.space == "weights"),
        ),
        options=KarcherOptions,
        minimum=2,
        directions=True,
    ),
    Method(
        name="model-stock",
        family="geometry",
        summary="the mean, drawn towards the base as far as the vectors point apart",
        paper="arXiv 2403.19522",
        rule=FromGram(
            coefficients=lambda gram, weights, options: model_stock(gram, weights, options.average),
            scope=lambda options: "tensor",
        ),
        options=ModelStockOptions,
        minimum=2,
        directions=True,
    ),
)
