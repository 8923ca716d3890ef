"""The role of each entry of a state dict: it decides how the entry is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import torch

from merge_kit.errors import VectorError
from merge_kit.tensorheader import TensorSpec


class Role(Enum):
    """How an entry is merged."""

    WEIGHT = "weight"
    """Weights and biases: by the method."""
    HEAD = "head"
    """Rows of the classifier: only from sites that have seen the class."""
    NORM_MEAN = "norm mean"
    """Running mean of batch norm: pooled over sites."""
    NORM_VARIANCE = "norm variance"
    """Running variance of batch norm: pooled with the law of total variance."""
    COUNTER = "counter"
    """Number of batches that batch norm has seen: the largest."""
    CONSTANT = "constant"
    """Index tables and masks: the same at every site."""


_SUFFIXES = {
    "running_mean": Role.NORM_MEAN,
    "running_var": Role.NORM_VARIANCE,
    "num_batches_tracked": Role.COUNTER,
}


def role_of(name: str, spec: TensorSpec, head: Sequence[str]) -> Role:
    """Role of one state-dict entry; `head` holds the module names of the classifiers."""
    module, _, leaf = name.rpartition(".")
    if leaf in _SUFFIXES:
        return _SUFFIXES[leaf]
    if not spec.dtype.is_floating_point:
        return Role.CONSTANT
    return Role.HEAD if module in head else Role.WEIGHT


def roles_of(specs: Mapping[str, TensorSpec], head: Sequence[str]) -> dict[str, Role]:
    """Role of every entry of a state dict, sorted by name.

    Raises
    ------
    VectorError
        `head` names a module that the state dict does not have.
    """
    roles = {name: role_of(name, specs[name], head) for name in sorted(specs)}
    for module in head:
        if f"{module}.weight" not in specs:
            raise VectorError(
                f"the classifier '{module}' has no tensor '{module}.weight': "
                "correct 'classifier' in the base's config.json."
            )
    return roles


def variance_of(mean_name: str) -> str:
    """Name of the running variance that belongs to a running mean."""
    return mean_name.removesuffix("running_mean") + "running_var"


def is_carried(spec: TensorSpec, role: Role) -> bool:
    """Whether a task vector holds this entry: all floats, and the counters of batch norm."""
    return spec.dtype.is_floating_point or role is Role.COUNTER


def vector_specs(
    base: Mapping[str, TensorSpec], roles: Mapping[str, Role]
) -> dict[str, TensorSpec]:
    """What a task vector of this base holds: float32 differences, and int64 ones of counters."""
    return {
        name: TensorSpec(torch.float32 if spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in base.items()
        if is_carried(spec, roles[name])
    }
