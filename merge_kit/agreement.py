"""Whether a base and the checkpoints that were made from it speak of the same model and classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from merge_kit.configuration import ModelConfig
from merge_kit.errors import VectorError
from merge_kit.parameters import Role
from merge_kit.tensorfile import StoredTensors, Tensors
from merge_kit.tensorheader import TensorSpec

_LEAST_LENGTH = 0.25
"""Of a checkpoint, in lengths of its base; a task vector seldom has a tenth."""
_SAMPLE = 4096


def check_heads(base: Tensors, roles: Mapping[str, Role]) -> None:
    """Refuse heads of different numbers of rows.

    Raises
    ------
    VectorError
        Names two of them.
    """
    heads = [name for name, role in roles.items() if role is Role.HEAD]
    for name in heads[1:]:
        one, other = base.specs[heads[0]], base.specs[name]
        if one.shape[:1] != other.shape[:1]:
            raise VectorError(
                f"the heads '{heads[0]}' ({one}) and '{name}' ({other}) are not of the same "
                "classes: correct 'classifier' in config.json."
            )


def check_labels(configs: Sequence[ModelConfig]) -> None:
    """Refuse configurations that name other classes, or the same in another order.

    Raises
    ------
    VectorError
        Names the first class that differs.
    """
    named = [config for config in configs if config.label_names]
    for config in named[1:]:
        ours, theirs = named[0].label_names, config.label_names
        if len(ours) != len(theirs):
            raise VectorError(
                f"{config.path} names {len(theirs)} classes, {named[0].path} names {len(ours)}: "
                "only checkpoints of the same classes can be merged."
            )
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            if our != their:
                raise VectorError(
                    f"class {number} is '{their}' in {config.path} and '{our}' in "
                    f"{named[0].path}: only checkpoints with the same classes in the same order "
                    "can be merged."
                )


def check_architectures(configs: Sequence[ModelConfig]) -> None:
    """Refuse models of different architectures, whose tensors may still have the same shapes.

    Raises
    ------
    VectorError
        Names two of them.
    """
    named = [config for config in configs if config.architecture]
    for config in named[1:]:
        if config.architecture != named[0].architecture:
            raise VectorError(
                f"{config.path} is of a '{config.architecture}', {named[0].path} of a "
                f"'{named[0].architecture}': only checkpoints of one architecture can be merged; "
                "correct the file that is wrong."
            )


def check_classes(config: ModelConfig, head: Mapping[str, TensorSpec]) -> None:
    """Compare the classes that a configuration states with the head beside it.

    Raises
    ------
    VectorError
        The head has another number of rows.
    """
    name = next((name for name, spec in head.items() if spec.shape), None)
    if name is None:
        return
    rows = head[name].shape[0]
    if config.num_classes is not None and config.num_classes != rows:
        raise VectorError(
            f"{config.path}: 'num_classes' is {config.num_classes}, but the head '{name}' beside "
            f"it has {rows} rows: copy both again, or correct it."
        )
    if config.label_names and len(config.label_names) != rows:
        raise VectorError(
            f"{config.path} names {len(config.label_names)} classes, but the head '{name}' beside "
            f"it has {rows} rows: copy both again, or correct it."
        )


def check_length(tuned: StoredTensors, base: Tensors, roles: Mapping[str, Role]) -> None:
    """Refuse a task vector that lost its metadata, and so looks like a checkpoint.

    Taken for one it would pull the merged model towards zero. A checkpoint is about as long as its
    base, a task vector much shorter; the first values of each tensor tell.

    Raises
    ------
    VectorError
        Names the file.
    """
    names = [name for name, role in roles.items() if role is Role.WEIGHT]
    own, start = (math.hypot(*(_length(file, n) for n in names)) for file in (tuned, base))
    if own < _LEAST_LENGTH * start:
        raise VectorError(
            f"{tuned.path} is no checkpoint of this base: its weights have {own / start:.2g} times "
            "the base's length, as a task vector without its metadata would; give the checkpoint, "
            "or the vector's file as merge-kit wrote it."
        )


def _length(file: Tensors, name: str) -> float:
    spec = file.specs[name]
    values = torch.empty(min(spec.elements, _SAMPLE), dtype=spec.dtype)
    file.read_into(name, 0, values)
    return float(values.double().norm())
