"""Exact weighted sums: the same bytes in any order and on any number of threads.

A sum of floats depends on its order; the real number that it stands for does not. A merged value
is that number, rounded. It is first computed in float64 together with a bound on the error; the
few values whose rounding the bound leaves open are computed again as fractions (Ziv 1991,
doi 10.1145/114697.116813).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

WEIGHT_BITS = 29
"""Bits of a weight: with the 24 of a float32 value, every product is exact in float64."""
_ULP = 2.0**-52
_SPLIT = 2.0**27 + 1


def round_weight(weight: float | Fraction) -> float:
    """The nearest number with 29 significant bits."""
    mantissa, exponent = math.frexp(float(weight))
    return math.ldexp(round(math.ldexp(mantissa, WEIGHT_BITS)), exponent - WEIGHT_BITS)


def affine(start: Tensor, values: Tensor, weights: Sequence[float], factor: Fraction) -> Tensor:
    """start + factor * sum_i weights_i values_i, such that rounding to float32 is exact.

    Rounding the result to float32 gives what rounding the exact number through float64 gives.

    Parameters
    ----------
    start
        (n,) float64, `values` (N, n) float32, `weights` N numbers of `round_weight`.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    total = torch.zeros_like(start)
    bound = 0.0
    for row, weight in zip(values, weights, strict=True):
        total.add_(row, alpha=weight)
        bound += abs(weight) * float(row.abs().amax())
    scaled = total.mul_(float(factor))
    # N additions of at most `bound` each, the factor, its product and the last sum.
    reach = abs(float(factor)) * bound
    error = _ULP * ((len(values) + 3) * reach + float(start.abs().amax()))
    result = scaled.add_(start)
    unsure = (result - error).float() != (result + error).float()
    unsure &= result.isfinite()
    if bool(unsure.any()):
        at = unsure.nonzero().flatten()
        result[at] = affine_in_pairs(start[at], values[:, at], weights, factor)
    return result


def affine_in_pairs(
    start: Tensor, values: Tensor, weights: Sequence[float], factor: Fraction
) -> Tensor:
    """As `affine`, rounded once to float64: in pairs of float64, then where need be in fractions.

    Sums of float32 values have few digits, so many lie exactly between two float32 values; pairs
    settle those.
    """
    high, low = torch.zeros_like(start), torch.zeros_like(start)
    reach = torch.zeros_like(start)
    for row, weight in zip(values, weights, strict=True):
        product = row.double() * weight
        high, rest = _two_sum(high, product)
        low += rest
        reach += product.abs()
    first = float(factor)
    second = float(factor - Fraction(first))
    scaled, rest = _two_product(high, first)
    rest += high * second + low * first
    total, error = _two_sum(start, scaled)
    result, left = _two_sum(total, error + rest)
    # Every term above was rounded at most once, in its second half: 2^-100 of the terms covers it.
    bound = 2.0**-100 * (len(values) + 8) * (reach * abs(first) + start.abs())
    # The rest is at most half a unit; only next to that could the bound turn the rounding.
    unsure = (result + (left + bound) != result) | (result + (left - bound) != result)
    for index in unsure.nonzero().flatten().tolist():
        column = values[:, index].tolist()
        terms = (Fraction(w) * Fraction(v) for w, v in zip(weights, column, strict=True))
        result[index] = float(Fraction(start[index].item()) + factor * sum(terms, Fraction()))
    return result


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """s and e with s = fl(a + b) and s + e = a + b (Knuth, TAOCP volume 2, 4.2.2)."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


def _two_product(a: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """p and e with p = fl(a b) and p + e = a b (Dekker 1971, doi 10.1007/BF01397083)."""
    p = a * b
    upper_a = a * _SPLIT
    upper_a = upper_a - (upper_a - a)
    lower_a = a - upper_a
    upper_b = b * _SPLIT - (b * _SPLIT - b)
    lower_b = b - upper_b
    e = ((upper_a * upper_b - p) + upper_a * lower_b + lower_a * upper_b) + lower_a * lower_b
    return p, e
