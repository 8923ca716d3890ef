"""Tensors that are kept on disk, keyed by what they follow from: no name of a file or path is in
them. What cannot be read whole and unchanged counts as not there.

Of outputs of models ``<folder>/<model>/<chunk>.safetensors`` holds float32 `logits` (b, C) of one
batch. `<model>` is a digest of weights, configuration, preprocessing and precision, `<chunk>` one
of the contents of the batch's images in their order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from merge_kit.errors import TensorFileError
from merge_kit.files import canonical_json, sha256_bytes, storage_errors
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import TensorSpec
from merge_kit.vector import METADATA_KEY

FORMAT = 1
_NAME = "logits"
_ABANDONED = 3600.0
"""Seconds after which an unfinished file is of a process that is gone."""


def model_key(fingerprint: str, config: str, preprocessing: str, precision: str) -> str:
    """What a model's outputs depend on but for the images, as 64 hexadecimal digits."""
    told = [FORMAT, fingerprint, config, preprocessing, precision]
    return sha256_bytes(canonical_json(told)).removeprefix("sha256:")


def chunk_key(keys: Sequence[str]) -> str:
    """Of the content keys of a batch's images, in their order."""
    return sha256_bytes(canonical_json(list(keys))).removeprefix("sha256:")


def read(folder: Path, model: str, chunk: str, shape: tuple[int, int]) -> Tensor | None:
    """The kept logits of a batch; None when they are not there, damaged, or of another shape."""
    specs = {_NAME: TensorSpec(torch.float32, shape)}
    found = recall(_path(folder, model, chunk), specs, _told(model, chunk))
    return None if found is None else found[_NAME]


def write(folder: Path, model: str, chunk: str, logits: Tensor) -> None:
    """Keep the logits of a batch, (b, C) float32: whole or not at all, also beside a second writer.

    Raises
    ------
    MergeKitError
        The storage is full, read-only or gone.
    """
    keep(_path(folder, model, chunk), {_NAME: logits}, _told(model, chunk))


def recall(
    path: Path, specs: Mapping[str, TensorSpec], told: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """What `keep` has kept under this path, with the same `told`; None when it is not there,
    damaged, or of other names, dtypes or shapes."""
    try:
        with TensorFile(path) as file:
            if dict(file.specs) != dict(specs):
                return None
            found = {name: file.read(name) for name in file.specs}
            stated = file.metadata.get(METADATA_KEY, "")
    except TensorFileError:
        return None
    return found if stated == _statement(told, found) else None


def keep(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Keep tensors with what they follow from, whole or not at all, also beside a second writer.

    Raises
    ------
    MergeKitError
        The storage is full, read-only or gone.
    """
    beside = path.with_name(f".{path.stem}.{uuid4().hex}")
    write_tensors(beside, tensors, (METADATA_KEY, _statement(told, tensors)))
    with storage_errors(path):
        beside.replace(path)


def tidy(folder: Path, model: str) -> None:
    """Remove what killed processes left unfinished."""
    with suppress(OSError), os.scandir(folder / model) as entries:
        for entry in entries:
            if entry.name.startswith(".") and time.time() - entry.stat().st_mtime > _ABANDONED:
                os.unlink(entry.path)


def _path(folder: Path, model: str, chunk: str) -> Path:
    return folder / model / f"{chunk}.safetensors"


def _told(model: str, chunk: str) -> dict[str, Any]:
    return {"format": FORMAT, "model": model, "images": chunk}


def _statement(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The header's text: a flipped bit of the values, or another file's, does not fit it."""
    digests = {name: sha256_bytes(values.numpy().tobytes()) for name, values in tensors.items()}
    return canonical_json({**told, **digests}).decode()
