"""How a vector's file stores a tensor: dense, or in a form that a reader makes dense again.

Everything that knows a form is here. The header names each tensor that is not stored dense, with
its form and the dtype and shape that it has for the rest of the program; what the form keeps of it
lies in the file under ``<name>@<part>``. A further form is one more entry of `FORMS`; who does not
know it refuses the file by the form's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field, StringConstraints
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.schema import Document
from merge_kit.tensorfile import StoredTensors
from merge_kit.tensorheader import DTYPE_NAMES, DTYPES, TensorSpec, is_safe

FACTORS, ZERO = "factors", "zero"


class Encoded(Document):
    """What a header says of one tensor that is not stored dense."""

    form: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,40}$")]
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**48)], ...],
        Field(max_length=16),
    ]

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of the dense tensor."""
        return TensorSpec(DTYPES[self.dtype], self.shape)


def encoded(form: str, spec: TensorSpec) -> Encoded:
    """What a header says of a tensor that is stored in a form."""
    return Encoded.model_validate(
        {"form": form, "dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape}
    )


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
    row."""


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


FORMS: dict[str, Form] = {
    FACTORS: Form(("left", "right"), _fault_of_factors, _fill_from_factors),
    ZERO: Form((), lambda spec, parts: None, _fill_with_zeros),
}


def part_name(name: str, part: str) -> str:
    """Under which name a part of a tensor lies in a file."""
    return f"{name}@{part}"


class Stored(StoredTensors, Protocol):
    """Tensors in an open file, or in several."""

    def identity(self) -> tuple[int, ...]:
        """As `TensorFile.identity`."""


S = TypeVar("S", bound=Stored)


class Decoded(Generic[S]):
    """A file read as if all its tensors were stored dense.

    Raises
    ------
    VectorError
        A tensor's form is not known, its parts are missing or do not fit, or it is there twice.
    """

    def __init__(self, stored: S, encoding: Mapping[str, Encoded]) -> None:
        self.stored = stored
        self.encoding = dict(encoding)
        self._parts: dict[str, dict[str, TensorSpec]] = {}
        taken: set[str] = set()
        for name, told in encoding.items():
            self._parts[name] = self._checked(name, told)
            taken |= {part_name(name, part) for part in self._parts[name]}
        dense = {name: spec for name, spec in stored.specs.items() if name not in taken}
        made = {name: told.spec for name, told in encoding.items()}
        self.specs = dict(sorted({**dense, **made}.items()))

    def _checked(self, name: str, told: Encoded) -> dict[str, TensorSpec]:
        path, specs = self.stored.path, self.stored.specs
        if not is_safe(name):
            raise VectorError(
                f"{path} encodes a tensor of the unsafe name {name!r}: it is refused."
            )
        if (form := FORMS.get(told.form)) is None:
            raise VectorError(
                f"{path}: tensor '{name}' is stored as '{told.form}', which this version does not "
                f"read (known are {', '.join(FORMS)}): install a newer merge-kit."
            )
        if name in specs:
            raise VectorError(
                f"{path}: tensor '{name}' is stored twice, dense and as {told.form}: it is refused."
            )
        for part in form.parts:
            if part_name(name, part) not in specs:
                raise VectorError(
                    f"{path}: tensor '{name}' is stored as {told.form}, but its part "
                    f"'{part_name(name, part)}' is missing: it is refused."
                )
        parts = {part: specs[part_name(name, part)] for part in form.parts}
        if fault := form.fault(told.spec, parts):
            raise VectorError(f"{path}: tensor '{name}' {fault}: it is refused.")
        return parts

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.stored.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's texts."""
        return self.stored.metadata

    def identity(self) -> tuple[int, ...]:
        """Of the file; see `TensorFile.identity`."""
        return self.stored.identity()

    def read(self, name: str) -> Tensor:
        """One dense tensor in fresh memory."""
        if name not in self.encoding:
            return self.stored.read(name)
        spec = self.specs[name]
        values = torch.empty(spec.elements, dtype=spec.dtype)
        self.read_into(name, 0, values)
        return values.reshape(spec.shape)

    def read_into(self, name: str, begin: int, out: Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""
        if name not in self.encoding:
            self.stored.read_into(name, begin, out)
        elif out.numel():

            def read(part: str, at: int, values: Tensor) -> None:
                self.stored.read_into(part_name(name, part), at, values)

            form = FORMS[self.encoding[name].form]
            form.fill(self.specs[name], self._parts[name], read, begin, out)
