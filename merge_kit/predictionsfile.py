"""What a model that may not leave its site says of images that everybody has (FedMD, arXiv
1910.03581): logits by the content of each image.

A file holds `images`, uint8 (n, 32), the SHA-256 of each image's content, ascending; `logits`,
float32 (n, C), under the federation's classes; `known`, uint8 (C,), which of them the model has:
what it says of the others is 0. It speaks of the set of images whose digest its header and manifest
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.momentsfile import check_exactly
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec

_IMAGES, _KNOWN, _LOGITS = "images", "known", "logits"
_BYTES = 32


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one model says.

    Attributes
    ----------
    images
        The content of each image as 64 hexadecimal digits, ascending: see
        `finetune.cases.content_key`.
    logits
        (n, C) float32.
    known
        (C,) bool.
    """

    images: tuple[str, ...]
    logits: Tensor
    known: Tensor

    @property
    def about(self) -> str:
        """The digest of the set of images."""
        return digest_of(self.images)


def digest_of(images: Sequence[str]) -> str:
    """The digest of a set of images, by their contents, whatever their order."""
    return sha256_bytes(canonical_json(sorted(images)))


def specs(images: int, classes: int) -> dict[str, TensorSpec]:
    """What a file holds."""
    return {
        _IMAGES: TensorSpec(torch.uint8, (images, _BYTES)),
        _KNOWN: TensorSpec(torch.uint8, (classes,)),
        _LOGITS: TensorSpec(torch.float32, (images, classes)),
    }


def to_tensors(found: Predictions) -> dict[str, Tensor]:
    """The tensors of the file."""
    digits = b"".join(bytes.fromhex(image) for image in found.images)
    return {
        _IMAGES: torch.frombuffer(bytearray(digits), dtype=torch.uint8).view(-1, _BYTES),
        _KNOWN: found.known.to(torch.uint8),
        _LOGITS: found.logits.float(),
    }


def read(file: Tensors) -> Predictions:
    """What a file says whose tensors are as `specs` has them."""
    digits = file.read(_IMAGES).numpy().tobytes()
    images = tuple(digits[start : start + _BYTES].hex() for start in range(0, len(digits), _BYTES))
    return Predictions(images, file.read(_LOGITS), file.read(_KNOWN) != 0)


def looks_so(found: Mapping[str, TensorSpec]) -> bool:
    """Whether names, shapes and dtypes are such as a file of predictions can have."""
    logits = found.get(_LOGITS)
    if logits is None or len(logits.shape) != 2:
        return False
    images, classes = logits.shape
    return dict(found) == specs(images, classes)


def check_specs(found: Mapping[str, TensorSpec], classes: int, where: str) -> None:
    """Compare names, shapes and dtypes.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    told = found.get(_IMAGES)
    images = told.shape[0] if told and told.shape else 1
    check_exactly(found, specs(images, classes), where, "which predictions do not have")


def fault(file: Tensors) -> str | None:
    """What no model can have said, or None."""
    known = file.read(_KNOWN)
    found = read(file)
    if not found.images:
        return "is of no image"
    if not bool(found.logits.isfinite().all()):
        return "holds NaN or infinite values"
    if bool((known > 1).any()) or not bool(found.known.any()):
        return "says of no class that it is known, or not clearly"
    if bool((found.logits[:, ~found.known] != 0).any()):
        return "says something of classes that are not known"
    if any(first >= second for first, second in zip(found.images, found.images[1:], strict=False)):
        return "holds images that are not in ascending order, or one twice"
    return None
