"""Moments as they travel: three tensors in a safetensors file, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.moments import Moments
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec

_GRAM, _SUMS, _COUNTS = "gram", "sums", "counts"
NAMES = {_GRAM, _SUMS, _COUNTS}
_ROUNDING = 1e-9


def specs(features: int, classes: int) -> dict[str, TensorSpec]:
    """What a file of moments holds: the lower triangle of the Gram matrix row by row, float64
    (d (d + 1) / 2,); the sums, float64 (C, d); the counts, int64 (C,).
    """
    return {
        _COUNTS: TensorSpec(torch.int64, (classes,)),
        _GRAM: TensorSpec(torch.float64, (features * (features + 1) // 2,)),
        _SUMS: TensorSpec(torch.float64, (classes, features)),
    }


def to_tensors(moments: Moments) -> dict[str, Tensor]:
    """The tensors of the file."""
    rows, columns = _triangle(moments.sums.shape[1])
    return {
        _COUNTS: moments.counts.long(),
        _GRAM: moments.gram[rows, columns],
        _SUMS: moments.sums,
    }


def read(file: Tensors) -> Moments:
    """The moments in a file whose tensors are as `specs` has them."""
    sums, packed = file.read(_SUMS), file.read(_GRAM)
    rows, columns = _triangle(sums.shape[1])
    gram = sums.new_empty(sums.shape[1], sums.shape[1])
    gram[rows, columns] = gram[columns, rows] = packed
    return Moments(gram, sums, file.read(_COUNTS).double())


def check_specs(found: Mapping[str, TensorSpec], features: int, classes: int, where: str) -> None:
    """Compare names, shapes and dtypes.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    check_exactly(found, specs(features, classes), where, "which moments do not have")


def check_exactly(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, TensorSpec],
    where: str,
    of_others: str,
) -> None:
    """Compare what a site has measured of a model with what it has to be; `of_others` says in an
    error what is wrong with a tensor that should not be there.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise VectorError(f"{where} lacks the tensor '{name}': the site must calibrate again.")
        if name not in expected:
            raise VectorError(f"{where} has the tensor '{name}', {of_others}.")
        if found[name] != expected[name]:
            raise VectorError(
                f"{where}: tensor '{name}' is {found[name]}, for this backbone it is "
                f"{expected[name]}."
            )


def fault(moments: Moments) -> str | None:
    """What no images can have given, or None.

    By the Cauchy-Schwarz inequality each feature's sum of squares is at least that of its classes'
    means; were it less, a head could be made to say anything.
    """
    counts, sums, squares = moments.counts, moments.sums, moments.gram.diagonal()
    if not all(bool(t.isfinite().all()) for t in (sums, moments.gram)):
        return "holds NaN or infinite values"
    if bool((counts < 0).any()) or bool((sums[counts <= 0] != 0).any()):
        return "holds counts that do not fit its sums"
    if not moments.size:
        return "is of no image"
    explained = (sums.square() / counts.clamp(min=1)[:, None]).sum(dim=0)
    if bool((squares < explained - _ROUNDING * squares.abs().clamp(min=1)).any()):
        return "holds sums of squares that are too small for its sums"
    return None


def _triangle(features: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(features, features)
    return rows, columns
