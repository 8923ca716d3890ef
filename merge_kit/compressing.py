"""Smaller vectors for the wire: what a site gives up of its vector, and what that costs, measured.

A way to compress is one or two words joined by ``+``. The first says what is left out: ``svd:0.95``
keeps so many singular values of each matrix that they hold 95 % of its energy (the sum of their
squares; FedKD, arXiv 2108.13323, "dynamic gradients approximation"), ``topk:0.1`` the
tenth of all values that is largest in size. The second, or the only one, says how the numbers that
are left are stored: ``bf16`` or ``int8``, else as float32.

Weights of the body alone are compressed: the head's rows, norm statistics and counters are small
and travel as they are. Whoever reads the file sees dense tensors again; see `merge_kit.encoding`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from merge_kit import forms, vector
from merge_kit.blocks import one_thread_each
from merge_kit.encoding import Decoded, Encoded, encoded, part_name
from merge_kit.errors import UsageError
from merge_kit.files import canonical_json
from merge_kit.forms import BF16, FACTORS, INT8, SPARSE, ZERO
from merge_kit.parameters import Role
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import TensorSpec

_WORDS = re.compile(r"(svd|topk):([0-9.]{1,12})(?:\+(bf16|int8))?|(bf16|int8)")
_EXAMPLES = "svd:0.95, topk:0.1, int8, bf16, svd:0.95+bf16, topk:0.1+int8 or none"


@dataclass(frozen=True, slots=True)
class Compression:
    """How a vector is made smaller."""

    text: str
    """As it is written on a command line and in the manifest."""
    keep: Literal["svd", "topk"] | None
    share: float
    """Of the energy of each matrix, or of all values; 1 keeps everything."""
    numbers: Literal["bf16", "int8"] | None


def parse_compression(text: str) -> Compression | None:
    """A way to compress from its words; None for ``none``.

    Raises
    ------
    UsageError
        It is no such way.
    """
    if text == "none":
        return None
    found = _WORDS.fullmatch(text)
    if found is None:
        raise UsageError(f"'{text}' is no way to compress a vector: {_EXAMPLES}.")
    keep, share, behind, alone = found.groups()
    try:
        part = float(share) if share else 1.0
    except ValueError:
        part = math.nan
    if not 0 < part <= 1:
        raise UsageError(f"'{text}': what is kept must lie above 0 and up to 1, as in {keep}:0.1.")
    return Compression(
        text,
        cast(Literal["svd", "topk"] | None, keep),
        part,
        cast(Literal["bf16", "int8"] | None, behind or alone),
    )


@dataclass(slots=True)
class _Kept:
    """What the new file will hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    encoding: dict[str, Encoded] = field(default_factory=dict)

    def dense(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor

    def in_form(self, name: str, tensor: TensorSpec, form: str) -> None:
        self.encoding[name] = encoded(form, tensor)

    def numbers(
        self,
        name: str,
        tensor: Tensor,
        kind: str | None,
        *,
        by_column: bool = False,
    ) -> None:
        """A float32 tensor by the numbers that are asked for."""
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if kind is None:
            self.dense(name, tensor.contiguous())
        elif kind == BF16:
            self.in_form(name, spec, BF16)
            self.dense(part_name(name, "values"), tensor.to(torch.bfloat16).contiguous())
        else:
            self.in_form(name, spec, INT8)
            for part, value in forms.rounded(tensor, by_column=by_column)._asdict().items():
                self.dense(part_name(name, part), value.contiguous())


def compress(source: Path, target: Path, roles: Mapping[str, Role], how: Compression) -> float:
    """Write a smaller file of a vector; gives its relative error, measured on what was written.

    The same vector gives the same bytes. Tensors without a change take no room. What is stored as
    factors already, as by LoRA, stays so, and its factors are stored by `how.numbers`.

    Parameters
    ----------
    roles
        Of every tensor of the vector.

    Returns
    -------
    float
        ``|tau' - tau| / |tau|`` over the weights of the body, float64; 0 where they are zeros. The
        head's rows are not compressed, and may be many times as long.

    Raises
    ------
    VectorError
        The file is no vector.
    NonFiniteError
        A value is NaN or infinite, or would be.
    """
    # Of one matrix LAPACK gives other last digits with other numbers of threads.
    with one_thread_each(), vector.opened(source) as file:
        header = vector.read_header(file)
        kept, threshold = _Kept(), _threshold(file, roles, how)
        for name, tensor in vector.read_checked(file):
            _keep(kept, file, name, tensor, roles[name], how, threshold)
        told = header.model_copy(update={"encoding": kept.encoding})
        metadata = (vector.METADATA_KEY, canonical_json(told.model_dump()).decode())
        write_tensors(target, kept.tensors, metadata)
        with vector.opened(target) as written:
            return _error(file, written, roles)


def _keep(
    kept: _Kept,
    file: Decoded[TensorFile],
    name: str,
    tensor: Tensor,
    role: Role,
    how: Compression,
    threshold: float,
) -> None:
    spec = file.specs[name]
    if not tensor.any():
        kept.in_form(name, spec, ZERO)
    elif role is not Role.WEIGHT:
        kept.dense(name, tensor)
    elif name in file.encoding and file.encoding[name].form == FACTORS:
        left, right = (file.stored.read(part_name(name, part)) for part in ("left", "right"))
        _as_factors(kept, name, spec, left, right, how)
    elif tensor.dim() < 2:
        # One number a channel: eight bits of one scale for all would be too coarse.
        kept.numbers(name, tensor, how.numbers and BF16)
    elif how.keep == "svd":
        _by_energy(kept, name, tensor, how)
    elif how.keep == "topk":
        _largest(kept, name, tensor, how, threshold)
    else:
        kept.numbers(name, tensor, how.numbers)


def _as_factors(
    kept: _Kept, name: str, spec: TensorSpec, left: Tensor, right: Tensor, how: Compression
) -> None:
    kept.in_form(name, spec, FACTORS)
    kept.numbers(part_name(name, "left"), left, how.numbers, by_column=True)
    kept.numbers(part_name(name, "right"), right, how.numbers)


def _by_energy(kept: _Kept, name: str, tensor: Tensor, how: Compression) -> None:
    matrix = tensor.reshape(tensor.shape[0], -1).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    energy = values.square().cumsum(0)
    rank = min(int((energy < how.share * energy[-1]).sum()) + 1, len(values))
    if rank * sum(matrix.shape) >= matrix.numel():
        kept.numbers(name, tensor, how.numbers)
        return
    roots = values[:rank].sqrt()
    spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
    first, second = left[:, :rank] * roots, roots[:, None] * right[:rank]
    _as_factors(kept, name, spec, first.float(), second.float(), how)


def _largest(kept: _Kept, name: str, tensor: Tensor, how: Compression, threshold: float) -> None:
    parts = forms.sparse(torch.where(tensor.abs() >= threshold, tensor, 0.0))
    spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
    size = {None: 4, "bf16": 2, "int8": 1}[how.numbers]
    if not len(parts.values):
        kept.in_form(name, spec, ZERO)
    elif len(parts.values) * (size + 2) >= tensor.numel() * size:
        # Places would take more room than the values that are left out.
        kept.numbers(name, tensor, how.numbers)
    else:
        kept.in_form(name, spec, SPARSE)
        kept.dense(part_name(name, "counts"), parts.counts)
        kept.dense(part_name(name, "places"), parts.places)
        # One scale for all: a row of its own for each value would be no saving.
        kept.numbers(part_name(name, "values"), parts.values, how.numbers, by_column=True)


def _threshold(file: Decoded[TensorFile], roles: Mapping[str, Role], how: Compression) -> float:
    """The size of the smallest value that is kept: the largest `share` of all that may go."""
    if how.keep != "topk":
        return 0.0
    names = [
        name
        for name, spec in file.specs.items()
        if roles[name] is Role.WEIGHT and len(spec.shape) > 1 and name not in file.encoding
    ]
    total = sum(file.specs[name].elements for name in names)
    if not total:
        return 0.0
    sizes = np.empty(total, dtype=np.float32)
    end = 0
    for name in names:
        values = file.read(name).reshape(-1).abs().numpy()
        sizes[end : end + len(values)], end = values, end + len(values)
    rank = total - math.ceil(how.share * total)
    sizes.partition(rank)
    return float(sizes[rank])


def _error(
    file: Decoded[TensorFile], written: Decoded[TensorFile], roles: Mapping[str, Role]
) -> float:
    lost = whole = 0.0
    for name, tensor in vector.read_checked(written):
        if roles[name] is Role.WEIGHT:
            full = file.read(name).double()
            lost += float((tensor.double() - full).square().sum())
            whole += float(full.square().sum())
    return math.sqrt(lost / whole) if whole else 0.0
