"""The forms in which a vector's file may store a tensor that is not stored dense.

Each form names its parts, checks them before any value is read, and gives any stretch of the dense
values, the same bits however the tensor is cut. A further form is one more entry of `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merge_kit.tensorheader import TensorSpec

FACTORS, ZERO, BF16, INT8, SPARSE = "factors", "zero", "bf16", "int8", "sparse"
PLAIN = (BF16, INT8)
"""Forms in which parts of other forms may be stored."""
STRETCH = 1 << 16
"""Values of a sparse tensor whose places are counted together: a place then takes 16 bits."""
_MIDDLE = 1 << 15
"""The place that is stored as 0: int16 has half its numbers below."""


class Factors(NamedTuple):
    """A matrix of low rank, left @ right; a tensor of more dimensions counts as (d_0, d_1 ...)."""

    left: Tensor
    """(m, r) float32."""
    right: Tensor
    """(r, n) float32."""


def product(factors: Factors) -> Tensor:
    """The dense (m, n) float32 matrix, bit for bit as a reader of the file makes it."""
    return _added_up(factors.left, factors.right).float()


def _added_up(left: Tensor, right: Iterable[Tensor]) -> Tensor:
    """(m, r) and r rows of n values, float32, give the float64 product.

    A product of two float32 is exact in float64 and the r of them are added in their order, so a
    value depends neither on the cut, nor on threads, nor on fused instructions.
    """
    columns = left.double().T[:, :, None]
    total: Tensor | None = None
    for column, row in zip(columns, right, strict=True):
        wide = row.double()
        total = column * wide if total is None else total.addcmul_(column, wide)
    assert total is not None  # a rank is at least 1
    return total


class Sparse(NamedTuple):
    """The values of a tensor that are not zero, by stretches of `STRETCH` values."""

    counts: Tensor
    """(stretches,) int32, how many there are in each."""
    places: Tensor
    """(k,) int16, rising within a stretch: the place in it less 32,768."""
    values: Tensor
    """(k,) float32."""


def sparse(tensor: Tensor) -> Sparse:
    """The form of a float32 tensor of any shape."""
    flat = tensor.reshape(-1)
    where = flat.nonzero().reshape(-1)
    stretches = -(-flat.numel() // STRETCH)
    counts = torch.bincount(where // STRETCH, minlength=stretches).int()
    return Sparse(counts, (where % STRETCH - _MIDDLE).short(), flat[where])


class Rounded(NamedTuple):
    """A float32 tensor as 8-bit numbers, each times the scale of its row or column."""

    values: Tensor
    """int8, in the tensor's shape."""
    scales: Tensor
    """float32, (rows, 1) or (1, columns) of the matrix (d_0, d_1 ...)."""


def rounded(tensor: Tensor, *, by_column: bool = False) -> Rounded:
    """Round to the nearest of 255 numbers between plus and minus the largest of each row."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    scales = matrix.abs().amax(0 if by_column else 1, keepdim=True) / 127
    # Where a row is too small for a scale in float32 its values are zero.
    steps = (matrix.double() / scales.double()).nan_to_num(0.0, 0.0, 0.0).round()
    return Rounded(steps.clamp_(-127, 127).to(torch.int8).reshape(tensor.shape), scales)


Parts = Mapping[str, TensorSpec]
ReadPart = Callable[[str, int, Tensor], None]
"""Fills a flat tensor with values of a part from an index on."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to store a tensor."""

    parts: tuple[str, ...]
    """What the file holds in the place of the dense values."""
    fault: Callable[[TensorSpec, Parts], str | None]
    """What is wrong with the specs of the parts of a dense tensor; read before any value."""
    fill: Callable[[TensorSpec, Parts, ReadPart, int, Tensor], None]
    """Give a stretch of the dense values from an index on, flat and not empty: the same bits
    however the tensor is cut, in memory of the stretch, the matrix row at its ends and a part's
    row. ValueError says what is wrong with the values of the parts."""


def _matrix(spec: TensorSpec) -> tuple[int, int]:
    rows = spec.shape[0]
    return rows, spec.elements // rows if rows else 0


def _fault_of_factors(spec: TensorSpec, parts: Parts) -> str | None:
    if spec.dtype != torch.float32 or len(spec.shape) < 2 or not spec.elements:
        return f"is {spec}, and only float32 matrices have factors"
    (rows, columns), left, right = _matrix(spec), parts["left"], parts["right"]
    rank = left.shape[-1] if left.shape else 0
    wanted = TensorSpec(torch.float32, (rows, rank)), TensorSpec(torch.float32, (rank, columns))
    if (left, right) != wanted:
        return (
            f"has the factors {left} and {right}, and needs F32 [{rows}, r] and F32 [r, {columns}] "
            "of one rank r"
        )
    if not 1 <= rank <= min(rows, columns):
        return f"has factors of the rank {rank}, and a rank is 1 to {min(rows, columns)} here"
    return None


def _fill_from_factors(
    spec: TensorSpec, parts: Parts, read: ReadPart, begin: int, out: Tensor
) -> None:
    _, columns = _matrix(spec)
    rank = parts["left"].shape[1]
    first, last = begin // columns, (begin + out.numel() - 1) // columns + 1
    left = torch.empty((last - first) * rank)
    read("left", first * rank, left)
    row = torch.empty(columns)

    def right() -> Iterable[Tensor]:
        for index in range(rank):
            read("right", index * columns, row)
            yield row

    whole_rows = _added_up(left.view(-1, rank), right()).view(-1)
    out.copy_(whole_rows[begin - first * columns :][: out.numel()])


def _fill_with_zeros(
    spec: TensorSpec, parts: Parts, read: ReadPart, begin: int, out: Tensor
) -> None:
    out.zero_()


def _fault_of_half(spec: TensorSpec, parts: Parts) -> str | None:
    if spec.dtype != torch.float32:
        return f"is {spec}, and only float32 is stored as bfloat16"
    if parts["values"] != (wanted := TensorSpec(torch.bfloat16, spec.shape)):
        return f"has the values {parts['values']}, and needs {wanted}"
    return None


def _fill_from_half(
    spec: TensorSpec, parts: Parts, read: ReadPart, begin: int, out: Tensor
) -> None:
    values = torch.empty(out.numel(), dtype=torch.bfloat16)
    read("values", begin, values)
    out.copy_(values)


def _fault_of_bytes(spec: TensorSpec, parts: Parts) -> str | None:
    if spec.dtype != torch.float32 or not spec.shape:
        return f"is {spec}, and only float32 tensors with rows are stored as int8"
    (rows, columns), values, scales = _matrix(spec), parts["values"], parts["scales"]
    by_row, by_column = (TensorSpec(torch.float32, shape) for shape in ((rows, 1), (1, columns)))
    if values != (wanted := TensorSpec(torch.int8, spec.shape)) or scales not in (
        by_row,
        by_column,
    ):
        return (
            f"has the values {values} and the scales {scales}, and needs {wanted} and {by_row} or "
            f"{by_column}"
        )
    return None


def _fill_from_bytes(
    spec: TensorSpec, parts: Parts, read: ReadPart, begin: int, out: Tensor
) -> None:
    rows, columns = _matrix(spec)
    first, last = begin // columns, (begin + out.numel() - 1) // columns + 1
    values = torch.empty(out.numel(), dtype=torch.int8)
    read("values", begin, values)
    if parts["scales"].shape == (rows, 1):
        scales = torch.empty(last - first)
        read("scales", first, scales)
        each = scales.repeat_interleave(columns)
    else:
        scales = torch.empty(columns)
        read("scales", 0, scales)
        each = scales.repeat(last - first)
    # One product of two float32, rounded once: the same bits everywhere.
    torch.mul(values.float(), each[begin - first * columns :][: out.numel()], out=out)


def _fault_of_sparse(spec: TensorSpec, parts: Parts) -> str | None:
    if spec.dtype != torch.float32 or not spec.elements:
        return f"is {spec}, and only float32 tensors with values are stored sparse"
    counts, places, values = parts["counts"], parts["places"], parts["values"]
    kept = values.elements
    wanted = (
        TensorSpec(torch.int32, (-(-spec.elements // STRETCH),)),
        TensorSpec(torch.int16, (kept,)),
        TensorSpec(torch.float32, (kept,)),
    )
    if (counts, places, values) != wanted or kept > spec.elements:
        return (
            f"has the counts {counts}, the places {places} and the values {values}, and needs "
            f"{wanted[0]}, I16 [k] and F32 [k] of one k up to {spec.elements}"
        )
    return None


def _fill_from_sparse(
    spec: TensorSpec, parts: Parts, read: ReadPart, begin: int, out: Tensor
) -> None:
    counts = torch.empty(parts["counts"].elements, dtype=torch.int32)
    read("counts", 0, counts)
    if int(counts.min()) < 0 or int(counts.sum(dtype=torch.int64)) != parts["values"].elements:
        raise ValueError("has counts that do not add up to its values")
    ends = counts.long().cumsum(0)
    end = begin + out.numel()
    out.zero_()
    for stretch in range(begin // STRETCH, (end - 1) // STRETCH + 1):
        count = int(counts[stretch])
        places = torch.empty(count, dtype=torch.int16)
        values = torch.empty(count)
        if count:
            at = int(ends[stretch]) - count
            read("places", at, places)
            read("values", at, values)
        where = places.long() + _MIDDLE + stretch * STRETCH
        if bool((where[1:] <= where[:-1]).any()) or (count and int(where[-1]) >= spec.elements):
            raise ValueError("has places that do not rise, or lie outside of it")
        inside = (where >= begin) & (where < end)
        out[where[inside] - begin] = values[inside]


FORMS: dict[str, Form] = {
    FACTORS: Form(("left", "right"), _fault_of_factors, _fill_from_factors),
    ZERO: Form((), lambda spec, parts: None, _fill_with_zeros),
    BF16: Form(("values",), _fault_of_half, _fill_from_half),
    INT8: Form(("values", "scales"), _fault_of_bytes, _fill_from_bytes),
    SPARSE: Form(("counts", "places", "values"), _fault_of_sparse, _fill_from_sparse),
}
