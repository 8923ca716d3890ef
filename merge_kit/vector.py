"""Task vectors: subtract, apply, and check against the base before anything else is done."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from merge_kit.encoding import Decoded, Encoded, S, encoded, part_name
from merge_kit.errors import BaseMismatchError, NonFiniteError, VectorError
from merge_kit.files import canonical_json
from merge_kit.forms import FACTORS, FORMS, ZERO, Factors, product
from merge_kit.parameters import Role, is_carried, role_of, vector_specs
from merge_kit.schema import Digest, Document, SiteName, parse
from merge_kit.strictjson import read_json
from merge_kit.tensorfile import StoredTensors, TensorFile, Tensors, TensorWriter, specs_of
from merge_kit.tensorheader import TensorSpec

METADATA_KEY = "merge-kit"
TRAIN_AGAIN = "the site must train again and publish a sound vector."
_STRETCH = 1 << 14  # values at a time; torch adds up so few in one thread, in a fixed order


class Origin(Document):
    """Where a file's tensors come from, in its one metadata key."""

    format: Literal[1] = 1
    base: Digest
    federation: Digest
    site: SiteName


class VectorHeader(Origin):
    """What a vector's file says of itself, in its one metadata key."""

    encoding: dict[str, Encoded] = Field(default_factory=dict)
    """Tensors that are not stored dense; see `merge_kit.encoding`."""

    @model_serializer(mode="wrap")
    def _without_an_empty_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A vector that is stored dense must keep the bytes that it had before there were forms.
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if key != "encoding" or value}


H = TypeVar("H", bound=Document)


class Measured(Document):
    """What one reading of a vector's file finds; it depends on the bytes alone."""

    sha256: Digest
    norm: float | None
    """As `norm` gives it; None when a value is NaN or infinite."""


def subtract(
    base: Tensors,
    tuned: Mapping[str, torch.Tensor],
    roles: Mapping[str, Role],
    header: VectorHeader,
    path: Path,
    factors: Mapping[str, Factors] | None = None,
) -> None:
    """Write the task vector tau = theta_k - theta_0 (arXiv 2212.04089, section 2).

    Differences are taken in float32, tensor by tensor.

    Parameters
    ----------
    factors
        Differences that are products, such as those of LoRA: they are stored as their factors, and
        tensors that did not change are not stored at all. None stores everything dense.

    Raises
    ------
    VectorError
        `tuned` lacks a tensor, has one too many or of another shape, or differs in a constant
        table.
    NonFiniteError
        A difference is NaN or infinite.
    """
    if odd := sorted(set(tuned) ^ set(base.specs)):
        raise VectorError(f"the tuned model and the base differ in the tensor '{odd[0]}'.")
    specs = vector_specs(base.specs, roles)
    stored, parts, encoding = dict(specs), dict[str, torch.Tensor](), dict[str, Encoded]()
    if factors is not None:
        still = [n for n, d in _differences(base, tuned, roles, path, factors) if not d.any()]
        for name, pair in factors.items():
            check_finite(product(pair), name, str(path))
            if not (pair.left.any() and pair.right.any()):
                still.append(name)
                continue
            encoding[name] = encoded(FACTORS, specs[name])
            parts.update(zip((part_name(name, p) for p in FORMS[FACTORS].parts), pair, strict=True))
        encoding.update({name: encoded(ZERO, specs[name]) for name in still})
        kept = {name: spec for name, spec in specs.items() if name not in encoding}
        stored = kept | specs_of(parts)
        header = header.model_copy(update={"encoding": encoding})
    metadata = (METADATA_KEY, canonical_json(header.model_dump()).decode())
    with TensorWriter(path, stored, metadata) as writer:
        for name, tensor in parts.items():
            writer.write(name, tensor)
        for name, difference in _differences(base, tuned, roles, path, encoding):
            writer.write(name, difference)


def _differences(
    base: Tensors,
    tuned: Mapping[str, torch.Tensor],
    roles: Mapping[str, Role],
    path: Path,
    but: Collection[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """theta_k - theta_0 of all tensors that a vector carries, but of some; all are checked."""
    specs = vector_specs(base.specs, roles)
    for name in base.specs:
        start, end = base.read(name), tuned[name].detach().cpu()
        if start.shape != end.shape:  # subtraction alone would broadcast
            raise VectorError(
                f"the tuned tensor '{name}' has the shape {list(end.shape)}, "
                f"the base's has {list(start.shape)}."
            )
        if not is_carried(base.specs[name], roles[name]):
            if not torch.equal(start, end):
                raise VectorError(f"the constant table '{name}' differs from the base's.")
        elif name not in but:
            difference = end.to(specs[name].dtype) - start.to(specs[name].dtype)
            check_finite(difference, name, str(path))
            yield name, difference


def apply(base: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """theta_0 + tau for one tensor, in the dtype of the difference."""
    return base.to(difference.dtype) + difference


def read_header(file: StoredTensors) -> VectorHeader:
    """The header of a vector file.

    Raises
    ------
    VectorError
        The file was not written by merge-kit, or its header breaks the format.
    """
    return parse_header(file, VectorHeader, "is no task vector")


def decoded(file: S) -> Decoded[S]:
    """A vector's file as the dense tensors that it stands for.

    Raises
    ------
    VectorError
        As `read_header`, or a tensor is stored in a form that is unknown or broken.
    """
    return Decoded(file, read_header(file).encoding)


@contextmanager
def opened(path: Path) -> Iterator[Decoded[TensorFile]]:
    """Open a vector's file; as `TensorFile` and `decoded`."""
    with TensorFile(path) as file:
        yield decoded(file)


def parse_header(file: StoredTensors, model: type[H], otherwise: str) -> H:
    """The one metadata key of a file; `otherwise` says in an error what a file without it is."""
    text = file.metadata.get(METADATA_KEY)
    if text is None or len(file.metadata) != 1:
        raise VectorError(
            f"{file.path} {otherwise}: its header lacks the metadata '{METADATA_KEY}'."
        )
    where = f"{file.path}: the metadata '{METADATA_KEY}'"
    data = read_json(text, where, VectorError, f"{where} is not JSON.")
    return parse(model, data, str(file.path), VectorError)


def check_header(header: Origin, base: str, federation: str, where: str) -> None:
    """Refuse a vector that was taken from other weights or for another contract.

    Raises
    ------
    BaseMismatchError
        Names both fingerprints.
    """
    if header.base != base:
        raise BaseMismatchError(
            f"{where} was taken from the base {header.base}, this federation's base is {base}: "
            "it cannot be merged here."
        )
    if header.federation != federation:
        raise BaseMismatchError(
            f"{where} was made for the federation {header.federation}, this one is {federation}: "
            "it cannot be merged here."
        )


def check_specs(file: StoredTensors, expected: Mapping[str, TensorSpec]) -> None:
    """Compare a vector's tensors with what the base asks for, before any value is read.

    Raises
    ------
    VectorError
        Names the first tensor that is missing, extra, or of another dtype or shape.
    """
    if missing := sorted(set(expected) - set(file.specs)):
        raise VectorError(f"{file.path} lacks the tensor '{missing[0]}' that the base has.")
    if extra := sorted(set(file.specs) - set(expected)):
        raise VectorError(f"{file.path} has the tensor '{extra[0]}' that the base does not have.")
    for name, spec in expected.items():
        if file.specs[name] != spec:
            raise VectorError(
                f"{file.path}: tensor '{name}' is {file.specs[name]}, the base asks for {spec}."
            )


def check_finite(
    tensor: torch.Tensor,
    name: str,
    where: str,
    remedy: str = TRAIN_AGAIN,
) -> None:
    """Refuse NaN and infinity; `remedy` ends the sentence.

    Raises
    ------
    NonFiniteError
        Names the tensor and how many values are bad.
    """
    if not tensor.is_floating_point():
        return
    # One bad value makes the sum bad: a cheap question first, the count only when it is needed.
    if math.isfinite(float(tensor.sum(dtype=torch.float64))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad == 0:
        return
    raise NonFiniteError(
        f"{where}: tensor '{name}' holds {bad} value(s) that are NaN or infinite: {remedy}"
    )


def read_checked(
    file: StoredTensors, remedy: str = TRAIN_AGAIN
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a file, refused when not finite."""
    for name in file.specs:
        tensor = file.read(name)
        check_finite(tensor, name, str(file.path), remedy)
        yield name, tensor


def norm(file: StoredTensors, roles: Mapping[str, Role]) -> float:
    """L2 norm of a vector over weights and heads, summed in float64; checks that all is finite.

    Norm statistics and counters are left out: they measure the images, not the training.
    """
    total = 0.0
    for name, tensor in read_checked(file):
        if roles[name] in (Role.WEIGHT, Role.HEAD):
            total += float(tensor.double().square().sum())
    return math.sqrt(total)


def measure(file: Decoded[TensorFile]) -> Measured:
    """Digest of the bytes and norm of the dense values from one pass over a file, in its own order.

    Whether a tensor counts follows from its name, as it does for `norm`: weights and heads.
    """
    stored = file.stored
    digest = hashlib.sha256(stored.start)
    squares = {name: _hash_and_square(stored, name, digest) for name in stored.in_file_order()}
    squares = {name: total for name, total in squares.items() if name in file.specs}
    squares |= {name: _square(file, name) for name in file.encoding if name in file.specs}
    if not all(map(math.isfinite, squares.values())):
        return Measured(sha256=f"sha256:{digest.hexdigest()}", norm=None)
    total = sum(squares[n] for n, spec in file.specs.items() if role_of(n, spec, ()) is Role.WEIGHT)
    return Measured(sha256=f"sha256:{digest.hexdigest()}", norm=math.sqrt(total))


def _hash_and_square(file: Tensors, name: str, digest: hashlib._Hash) -> float:
    total = 0.0
    for values in _stretches(file, name):
        digest.update(values.view(torch.uint8).numpy().data)
        if values.is_floating_point():
            total += float(values.double().square().sum())
    return total


def _square(file: Tensors, name: str) -> float:
    return sum(float(values.double().square().sum()) for values in _stretches(file, name))


def _stretches(file: Tensors, name: str) -> Iterator[torch.Tensor]:
    """A tensor's values, flat, a few at a time, in memory that is used again."""
    spec = file.specs[name]
    buffer = torch.empty(min(_STRETCH, spec.elements), dtype=spec.dtype)
    for begin in range(0, spec.elements, _STRETCH):
        values = buffer[: spec.elements - begin]
        file.read_into(name, begin, values)
        yield values
