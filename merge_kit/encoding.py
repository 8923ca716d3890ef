"""How a vector's file stores a tensor: dense, or in a form that a reader makes dense again.

The header names each tensor that is not stored dense, with its form and the dtype and shape that it
has for the rest of the program; what the form keeps of it lies in the file under ``<name>@<part>``.
A part may be stored as smaller numbers itself (`PLAIN`), and its parts may not. Who does not know a
form refuses the file by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field, StringConstraints
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.forms import FORMS, PLAIN
from merge_kit.schema import Document
from merge_kit.tensorfile import StoredTensors
from merge_kit.tensorheader import DTYPE_NAMES, DTYPES, TensorSpec, is_safe


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
        for name, told in encoding.items():
            self._check_name(name, told)
        for name, told in encoding.items():
            self._parts[name] = self._checked(name, told)
        taken = {part_name(name, part) for name, parts in self._parts.items() for part in parts}
        there = {**stored.specs, **{name: told.spec for name, told in encoding.items()}}
        self.specs = {name: there[name] for name in sorted(there) if name not in taken}

    def _check_name(self, name: str, told: Encoded) -> None:
        path = self.stored.path
        if not is_safe(name):
            raise VectorError(
                f"{path} encodes a tensor of the unsafe name {name!r}: it is refused."
            )
        if name in self.stored.specs:
            raise VectorError(
                f"{path}: tensor '{name}' is stored twice, dense and as {told.form}: it is refused."
            )

    def _checked(self, name: str, told: Encoded) -> dict[str, TensorSpec]:
        path, specs = self.stored.path, self.stored.specs
        if (form := FORMS.get(told.form)) is None:
            raise VectorError(
                f"{path}: tensor '{name}' is stored as '{told.form}', which this version does not "
                f"read (known are {', '.join(FORMS)}): install a newer merge-kit."
            )
        parts = {}
        if told.form in PLAIN and (
            deeper := [p for p in form.parts if part_name(name, p) in self.encoding]
        ):
            raise VectorError(
                f"{path}: tensor '{part_name(name, deeper[0])}' is a part of numbers, which are "
                "dense: it is refused."
            )
        for part in form.parts:
            inner = part_name(name, part)
            if inner in self.encoding:
                # Deeper forms would let a small file ask for any amount of work.
                if (within := self.encoding[inner].form) not in PLAIN:
                    raise VectorError(
                        f"{path}: tensor '{inner}' is a part of another and stored as '{within}': "
                        f"parts are dense, {' or '.join(PLAIN)}; it is refused."
                    )
                parts[part] = self.encoding[inner].spec
            elif inner in specs:
                parts[part] = specs[inner]
            else:
                raise VectorError(
                    f"{path}: tensor '{name}' is stored as {told.form}, but its part "
                    f"'{inner}' is missing: it is refused."
                )
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
        spec = self.encoding[name].spec
        values = torch.empty(spec.elements, dtype=spec.dtype)
        self.read_into(name, 0, values)
        return values.reshape(spec.shape)

    def read_into(self, name: str, begin: int, out: Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with its values from index `begin` on."""
        if name not in self.encoding:
            self.stored.read_into(name, begin, out)
        elif out.numel():

            def read(part: str, at: int, values: Tensor) -> None:
                self.read_into(part_name(name, part), at, values)

            told = self.encoding[name]
            try:
                FORMS[told.form].fill(told.spec, self._parts[name], read, begin, out)
            except ValueError as error:
                raise VectorError(
                    f"{self.path}: tensor '{name}' {error}: it is refused."
                ) from error
