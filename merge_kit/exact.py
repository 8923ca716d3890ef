"""Exact weighted sums: the same bytes in any order and on any number of threads.

A sum of floats depends on its order; the real number that it stands for does not. A merged value
is that number, rounded. It is first computed in float64. Where all terms are multiples of a unit
that is coarse enough nothing was rounded; elsewhere a bound on the error is kept, and the few
values whose rounding the bound leaves open are computed again in pairs and as fractions (Ziv 1991,
doi 10.1145/114697.116813).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WEIGHT_BITS = 29
"""Bits of a weight: with the 24 of a float32 value, every product is exact in float64."""
_ULP = 2.0**-52
_LAST = 2.0**-23
"""The last bit of a float32 value between 1 and 2."""
_BELOW_FLOAT32 = (1 << 29) - 1
_LIMIT = 2.0**52
"""One bit less than float64 has: the bounds below are rounded too."""
_FINITE, _FINITE_DOUBLE = 0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF
Doubles = NDArray[np.float64]
Pair = tuple[Doubles, Doubles]
_SPLIT = 2.0**27 + 1


class InexactSumError(ArithmeticError):
    """A sum has more digits than two float64 numbers hold."""


def round_weight(weight: float | Fraction) -> float:
    """The nearest number with 29 significant bits."""
    mantissa, exponent = math.frexp(float(weight))
    return math.ldexp(round(math.ldexp(mantissa, WEIGHT_BITS)), exponent - WEIGHT_BITS)


def affine(
    start: Tensor,
    values: Tensor,
    weights: Sequence[float],
    factor: Fraction,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """start + factor * sum_i weights_i values_i, such that rounding to `dtype` is exact.

    Rounding the result to `dtype` gives what rounding the exact number through float64 gives.

    Parameters
    ----------
    start
        (n,) float64, `values` (N, n) float32, `weights` N numbers of `round_weight`.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    if factor < 0:  # a sum of zeros times a negative factor would be -0
        weights, factor = [-weight for weight in weights], -factor
    result = _weighted(values, weights).mul_(float(factor)).add_(start)
    if _is_power_of_two(factor) and _adds_exactly(start, values, weights, float(factor)):
        return result
    reach = float(factor) * _largest(values) * sum(map(abs, weights))
    # N additions of at most `reach` each, the factor, its product and the last sum.
    error = _ULP * ((len(values) + 3) * reach + _largest(start))
    if not math.isfinite(error):
        return result
    at = ((result - error).to(dtype) != (result + error).to(dtype)).nonzero().flatten()
    if len(at):
        column = values[:, at].numpy(force=True)
        settled = affine_in_pairs(start[at].numpy(force=True), column, weights, factor)
        result[at] = torch.from_numpy(settled).to(result.device)
    return result


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for row, weight in zip(values, weights, strict=True):
        total.add_(row, alpha=weight)
    return total


def _adds_exactly(start: Tensor, values: Tensor, weights: Sequence[float], shift: float) -> bool:
    """Whether start + shift sum_i w_i values_i is never rounded in float64; shift is 2^k.

    Sums of multiples of one unit that stay below 2^53 units are exact.
    """
    if bool((start.view(torch.int64) & _BELOW_FLOAT32).any()):
        return False
    low, high = _magnitudes(values.view(torch.int32) & _FINITE, torch.float32)
    least, most = _magnitudes(start.view(torch.int64) & _FINITE_DOUBLE, torch.float64)
    unit = min(_power_below(low) * _unit(weights) * shift, _power_below(least))
    exact: bool = high * sum(map(abs, weights)) * shift + most < _LIMIT * unit * _LAST
    return exact


def _magnitudes(bits: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest magnitude that is not zero (infinity if all are) and the largest, of bits."""
    finite = torch.iinfo(bits.dtype).max
    most = bits.amax()
    # One less than zero is the largest number: masking zeros out would take several times as long.
    least = bits.sub_(1).bitwise_and_(finite).amin()
    if int(least) == finite:
        return math.inf, 0.0
    low, high = torch.stack([least + 1, most]).view(dtype).tolist()
    return low, high


def _largest(values: Tensor) -> float:
    """The largest magnitude."""
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _power_below(value: float) -> float:
    """The largest power of two that is not above a positive number."""
    return 2.0 ** (math.frexp(value)[1] - 1) if math.isfinite(value) else math.inf


def _unit(weights: Sequence[float]) -> float:
    """The largest power of two of which all weights are multiples."""
    ratios = [weight.as_integer_ratio() for weight in weights if weight]
    return min((top & -top) / bottom for top, bottom in ratios) if ratios else math.inf


def _is_power_of_two(factor: Fraction) -> bool:
    parts = factor.numerator, factor.denominator
    return parts[0] > 0 and all(part & (part - 1) == 0 for part in parts)


def affine_in_pairs(
    start: Doubles, values: NDArray[np.float32], weights: Sequence[float], factor: Fraction
) -> Doubles:
    """As `affine`, rounded once to float64: in pairs of float64, then where need be in fractions.

    Sums of float32 values have few digits, so many lie exactly between two float32 values; pairs
    settle those.
    """
    high, low, reach = _weighted_in_pairs(values, weights)

    def total(index: int) -> Fraction:
        column = values[:, index].tolist()
        return sum(
            (Fraction(w) * Fraction(v) for w, v in zip(weights, column, strict=True)), Fraction()
        )

    return _round_once(start, (high, low), (len(values) + 8) * reach, factor, total)


def _round_once(
    start: Doubles,
    pair: Pair,
    reach: Doubles,
    factor: Fraction,
    as_fraction: Callable[[int], Fraction],
) -> Doubles:
    """start + factor * (high + low), rounded to float64; `as_fraction` gives one sum exactly."""
    high, low = pair
    first = float(factor)
    second = float(factor - Fraction(first))
    scaled, rest = _two_product(high, first)
    rest += high * second + low * first
    total, error = _two_sum(start, scaled)
    result, left = _two_sum(total, error + rest)
    # Every term above was rounded at most once, in its second half: 2^-100 of the terms covers it.
    bound = 2.0**-100 * (reach * abs(first) + 8 * np.abs(start))
    # The rest is at most half a unit; only next to that could the bound turn the rounding.
    unsure = (result + (left + bound) != result) | (result + (left - bound) != result)
    for index in np.flatnonzero(unsure).tolist():
        result[index] = float(Fraction(start[index].item()) + factor * as_fraction(index))
    return result


def add_exactly(
    high: Doubles, low: Doubles, values: NDArray[np.float32], weights: Sequence[float]
) -> Pair:
    """The exact sum (high + low) + sum_i weights_i values_i, as a pair of float64.

    `high` is the sum rounded to float64 and `low` what is left, so a pair depends on the sum alone
    and not on the order in which it was made. (n,), (n,) and (N, n) give (n,) and (n,).

    Raises
    ------
    InexactSumError
        The sum has more digits than a pair holds.
    """
    if not high.any() and not low.any() and len(values):
        rows = torch.from_numpy(values)
        if _adds_exactly(torch.zeros(1, dtype=torch.float64), rows, weights, 1.0):
            return _weighted(rows, weights).numpy() + 0.0, low
    for row, weight in zip(values, weights, strict=True):
        high, rest = _two_sum(high, row.astype(np.float64) * weight)
        if low.any():
            rest, lost = _two_sum(low, rest)
            if lost.any():
                raise InexactSumError
            high, rest = _two_sum(high, rest)
        low = rest
    # Zero has two signs, and which one comes out depends on the way.
    return high + 0.0, low + 0.0


def affine_of_sum(
    start: Tensor, high: Doubles, low: Doubles, factor: Fraction, dtype: torch.dtype
) -> Tensor:
    """As `affine`, of a sum that is there already as a pair: the same bytes."""
    if factor < 0:
        high, low, factor = 0.0 - high, 0.0 - low, -factor
    begin = start.numpy(force=True)
    result = high * float(factor) + begin
    if _is_power_of_two(factor) and not low.any() and _fits(begin, high, float(factor)):
        return torch.from_numpy(result)
    reach = float(factor) * np.abs(high)
    error = _ULP * (4 * float(reach.max()) + float(np.abs(begin).max()))
    found = torch.from_numpy(result)
    if not math.isfinite(error):
        return found
    at = ((found - error).to(dtype) != (found + error).to(dtype)).nonzero().flatten().numpy()
    if len(at):
        pair = high[at], low[at]

        def total(index: int) -> Fraction:
            return Fraction(pair[0][index].item()) + Fraction(pair[1][index].item())

        result[at] = _round_once(begin[at], pair, 8 * np.abs(pair[0]), factor, total)
    return found


def _fits(start: Doubles, high: Doubles, shift: float) -> bool:
    """Whether start + shift * high is never rounded; shift is 2^k."""
    unit = min(_last_bit(start), _last_bit(high) * shift)
    return float(np.abs(start).max() + np.abs(high).max() * shift) < _LIMIT * unit


def _last_bit(values: Doubles) -> float:
    """The largest power of two of which all values are multiples."""
    values = values[values != 0]
    if not len(values):
        return math.inf
    mantissas, exponents = np.frexp(values)
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    return float(np.ldexp((whole & -whole).astype(np.float64), exponents - 53).min())


def _weighted_in_pairs(
    values: NDArray[np.float32], weights: Sequence[float]
) -> tuple[Doubles, Doubles, Doubles]:
    """sum_i w_i values_i as a pair, and sum_i |w_i values_i|."""
    high, low, reach = np.zeros((3, values.shape[1]))
    for row, weight in zip(values, weights, strict=True):
        product = row.astype(np.float64) * weight
        high, rest = _two_sum(high, product)
        low += rest
        reach += np.abs(product)
    return high, low, reach


def _two_sum(a: Doubles, b: Doubles) -> Pair:
    """s and e with s = fl(a + b) and s + e = a + b (Knuth, TAOCP volume 2, 4.2.2)."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


def _two_product(a: Doubles, b: float) -> Pair:
    """p and e with p = fl(a b) and p + e = a b (Dekker 1971, doi 10.1007/BF01397083)."""
    p = a * b
    upper_a = a * _SPLIT
    upper_a = upper_a - (upper_a - a)
    lower_a = a - upper_a
    upper_b = b * _SPLIT - (b * _SPLIT - b)
    lower_b = b - upper_b
    e = ((upper_a * upper_b - p) + upper_a * lower_b + lower_a * upper_b) + lower_a * lower_b
    return p, e
