"""Norm statistics of a merged model, from sums over images that sites can add up.

Merged weights send other values into the batch norm layers than the weights that their running
statistics were measured with (REPAIR, arXiv 2211.08403). Of each such layer's inputs a site needs
to tell the sum, the sum of squares and the number for every channel; added up these are the sums
over all sites' images, so the statistics do not depend on who came first, and a site's can be taken
out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.momentsfile import check_exactly
from merge_kit.parameters import Role, variance_of
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec

_COUNT, _SUM, _SQUARES = "count", "sum", "squares"
_MEAN = "running_mean"
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class NormSums:
    """What one batch norm layer was given."""

    count: int
    """Values of each channel: images times positions."""
    sums: Tensor
    """(C,) float64: sum over them."""
    squares: Tensor
    """(C,) float64: sum of their squares."""


def add(parts: Sequence[Mapping[str, NormSums]]) -> dict[str, NormSums]:
    """The sums over all sites' images, layer by layer, in the order given: sort the sites by id.

    Raises
    ------
    VectorError
        None is given, or they are of other layers.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        raise VectorError("norm statistics of other layers cannot be added: take those of a model.")
    return {
        layer: NormSums(
            sum(part[layer].count for part in parts),
            torch.stack([part[layer].sums for part in parts]).sum(dim=0),
            torch.stack([part[layer].squares for part in parts]).sum(dim=0),
        )
        for layer in parts[0]
    }


def statistics(found: NormSums) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, as torch keeps them: two times (C,) float64."""
    mean = found.sums / found.count
    variance = (found.squares - found.count * mean.square()) / max(found.count - 1, 1)
    return mean, variance.clamp(min=0)


def running_statistics(
    found: Mapping[str, NormSums], specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """The running means and variances, under their names and in the dtypes of a model's."""
    tensors = {}
    for layer, sums in found.items():
        name = f"{layer}.{_MEAN}"
        for key, values in zip((name, variance_of(name)), statistics(sums), strict=True):
            tensors[key] = values.to(specs[key].dtype)
    return tensors


def layers_of(roles: Mapping[str, Role]) -> list[str]:
    """The batch norm layers of a model, by the names of its tensors."""
    means = [name for name, role in roles.items() if role is Role.NORM_MEAN]
    return [name.removesuffix(f".{_MEAN}") for name in means]


def specs(expected: Mapping[str, TensorSpec], roles: Mapping[str, Role]) -> dict[str, TensorSpec]:
    """What a file of norm statistics holds for each batch norm layer of a model: the count, int64
    (1,); the sums and the sums of squares, float64 (C,).
    """
    found = {}
    for layer in layers_of(roles):
        shape = expected[f"{layer}.{_MEAN}"].shape
        found[f"{layer}.{_COUNT}"] = TensorSpec(torch.int64, (1,))
        found[f"{layer}.{_SUM}"] = TensorSpec(torch.float64, shape)
        found[f"{layer}.{_SQUARES}"] = TensorSpec(torch.float64, shape)
    return found


def to_tensors(found: Mapping[str, NormSums]) -> dict[str, Tensor]:
    """The tensors of the file."""
    tensors = {}
    for layer, sums in found.items():
        tensors[f"{layer}.{_COUNT}"] = torch.tensor([sums.count])
        tensors[f"{layer}.{_SUM}"] = sums.sums
        tensors[f"{layer}.{_SQUARES}"] = sums.squares
    return tensors


def read(file: Tensors) -> dict[str, NormSums]:
    """The sums in a file whose tensors are as `specs` has them."""
    return {
        layer: NormSums(
            int(file.read(f"{layer}.{_COUNT}")),
            file.read(f"{layer}.{_SUM}"),
            file.read(f"{layer}.{_SQUARES}"),
        )
        for layer in _layers_in(file)
    }


def _layers_in(file: Tensors) -> list[str]:
    return [n.removesuffix(f".{_COUNT}") for n in file.specs if n.endswith(f".{_COUNT}")]


def check_specs(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    where: str,
) -> None:
    """Compare names, shapes and dtypes with what the model has.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    wanted = specs(expected, roles)
    check_exactly(found, wanted, where, "which this backbone does not ask")


def fault(found: Mapping[str, NormSums]) -> str | None:
    """What no images can have given, or None; a square of a sum is at most n times the squares."""
    if not found:
        return "holds no norm statistics"
    for layer, one in found.items():
        if not bool(one.sums.isfinite().all() and one.squares.isfinite().all()):
            return f"holds NaN or infinite values for '{layer}'"
        if one.count < 2:
            return f"is of fewer than two values for '{layer}'"
        least = one.sums.square() / one.count
        if bool((one.squares < least - _ROUNDING * one.squares.abs().clamp(min=1)).any()):
            return f"holds sums of squares that are too small for its sums, for '{layer}'"
    return None


def looks_so(file: Tensors) -> bool:
    """Whether names, shapes and dtypes are such as a file of norm statistics can have."""
    layers = _layers_in(file)
    if not layers or len(file.specs) != 3 * len(layers):
        return False
    for layer in layers:
        sums, squares = (file.specs.get(f"{layer}.{key}") for key in (_SUM, _SQUARES))
        count = file.specs[f"{layer}.{_COUNT}"]
        if count != TensorSpec(torch.int64, (1,)) or sums is None or sums != squares:
            return False
        if sums.dtype is not torch.float64 or len(sums.shape) != 1:
            return False
    return True
