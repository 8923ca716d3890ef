"""How far models moved from the base, and in which directions: cosines and norms by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from evaluate.document import Similarity
from merge_kit.checkpoints import Checkpoint
from merge_kit.depth import block_of
from merge_kit.parameters import Role, role_of

_STEP = 1 << 18
_STEM, _HEAD = "stem", "head"


def similarity(base: Path, models: Mapping[str, Path]) -> Similarity | None:
    """Compare the task vectors theta_i - theta_0 of the models that have the base's tensors.

    Only weights and biases count, no statistics of normalisation layers. Sums run in float64. Parts
    of the network are its blocks; what stands before them is the stem, what stands behind the head.
    A part whose base is all zeros has no relative norm and is not listed.

    Returns
    -------
    Similarity or None
        None when fewer than two models have the base's tensors.

    Raises
    ------
    TensorFileError
        A checkpoint cannot be read.
    """
    with ExitStack() as stack:
        start = stack.enter_context(Checkpoint(base))
        opened = {name: stack.enter_context(Checkpoint(path)) for name, path in models.items()}
        weights = [n for n, s in start.specs.items() if role_of(n, s, ()) is Role.WEIGHT]
        fitting = {name: file for name, file in opened.items() if _fits(file, start, weights)}
        if len(fitting) < 2:
            return None
        parts = _parts(weights)
        grams, bases = {}, {}
        for part, names in parts.items():
            grams[part], bases[part] = _gram(start, list(fitting.values()), names)
    cosine = _cosines(torch.stack(list(grams.values())).sum(dim=0))
    norms = {p: (gram.diagonal() / bases[p]).sqrt() for p, gram in grams.items() if bases[p]}
    relative = torch.stack(list(norms.values()), dim=1) if norms else cosine[:, :0]
    return Similarity(
        models=tuple(fitting),
        cosine=tuple(tuple(None if math.isnan(v) else v for v in row) for row in cosine.tolist()),
        groups=tuple(norms),
        norms=tuple(map(tuple, relative.tolist())),
    )


def _fits(file: Checkpoint, start: Checkpoint, names: Sequence[str]) -> bool:
    return all(
        name in file.specs
        and file.specs[name].shape == start.specs[name].shape
        and file.specs[name].dtype.is_floating_point
        for name in names
    )


def _parts(names: Sequence[str]) -> dict[str, list[str]]:
    """Tensors by part of the network, from the input to the head."""
    blocks = {name: block_of(name) for name in names}
    order = sorted({block for block in blocks.values() if block is not None})
    titles = {block: f"block {'.'.join(map(str, block))}" for block in order}
    found: dict[str, list[str]] = {part: [] for part in (_STEM, *titles.values(), _HEAD)}
    for name, block in blocks.items():
        found[titles[block] if block is not None else _outside(name)].append(name)
    return {part: members for part, members in found.items() if members}


def _outside(name: str) -> str:
    """Classifiers and what stands before them are named alike in all of timm."""
    first = name.split(".")[0]
    behind = ("head", "fc", "classifier", "conv_head", "bn2", "norm", "pre_logits", "last_linear")
    return _HEAD if first.startswith(behind) else _STEM


def _gram(
    start: Checkpoint, files: Sequence[Checkpoint], names: Sequence[str]
) -> tuple[Tensor, float]:
    """<tau_i, tau_j>, (N, N) float64, and |theta_0|^2, over some tensors."""
    gram, base = torch.zeros(len(files), len(files), dtype=torch.float64), 0.0
    for name in names:
        size = start.specs[name].elements
        for begin in range(0, size, _STEP):
            length = min(_STEP, size - begin)
            origin = _read(start, name, begin, length)
            rows = torch.stack([_read(file, name, begin, length) - origin for file in files])
            gram += rows @ rows.T
            base += float(origin.square().sum())
    return gram, base


def _read(file: Checkpoint, name: str, begin: int, length: int) -> Tensor:
    values = torch.empty(length, dtype=file.specs[name].dtype)
    file.read_into(name, begin, values)
    return values.double()


def _cosines(gram: Tensor) -> Tensor:
    """(N, N), nan for a vector of zeros."""
    lengths = gram.diagonal().sqrt()
    cosines = gram / (lengths[:, None] * lengths)
    return cosines.where(cosines.isnan(), cosines.clamp(-1, 1))
