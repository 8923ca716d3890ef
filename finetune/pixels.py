"""From cases to batches: images decoded once, augmented by the batch on the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from finetune.cases import Case, case_key, read_case
from merge_kit.errors import DataError, ImageError
from merge_kit.federation import Preprocessing
from merge_kit.files import canonical_json, partial_path, sha256_bytes, storage_errors

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DECODE_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Images:
    """Decoded images of cases, in their order.

    `pixels` is (n, S, S, 3) uint8, in memory or mapped from the cache, with S = floor(input size /
    crop_pct): the network's view at evaluation is the centre, training crops from the whole.
    """

    cases: tuple[Case, ...]
    pixels: NDArray[np.uint8]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.cases)

    def labels(self) -> Tensor:
        """(n,) int64."""
        return torch.tensor([case.label for case in self.cases], dtype=torch.int64)

    def targets(self) -> Tensor:
        """(n, C) int8 of cases that may have several classes: 1, 0, or -1 for not annotated."""
        return torch.tensor([case.targets for case in self.cases], dtype=torch.int8)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(b, 3, S, S) uint8, channels last in memory."""
        return torch.from_numpy(self.pixels[list(indices)]).permute(0, 3, 1, 2)

    def take(self, indices: Sequence[int]) -> Images:
        """Some of the images."""
        cases = tuple(self.cases[index] for index in indices)
        return Images(cases, np.asarray(self.pixels[list(indices)]), self.preprocessing)


def stored_size(preprocessing: Preprocessing) -> int:
    """Side of a decoded image in pixels, by timm's rule for the resize before the centre crop."""
    return math.floor(preprocessing.input_size[1] / preprocessing.crop_pct)


def resize(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side, then cut the centre square: (S, S, 3) uint8."""
    side = stored_size(preprocessing)
    width, height = image.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    resized = image.resize(size, _FILTERS[preprocessing.interpolation])
    # Placed so that the centre crop that follows lands where timm's single crop does.
    inner = preprocessing.input_size[1]
    border = round((side - inner) / 2)
    left, top = (
        min(max(round((length - inner) / 2) - border, 0), length - side) for length in size
    )
    return np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.uint8)


def decode(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    *,
    cache: Path | None = None,
    skip_unreadable: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Images, list[str]]:
    """Decode all images once.

    Parameters
    ----------
    cache
        Folder that keeps the decoded pixels for the next run; None keeps them in memory.
    skip_unreadable
        Leave unreadable images out instead of failing.
    progress
        Called with the number done and the number of all.

    Returns
    -------
    tuple
        The images, and a sentence for each that was left out.

    Raises
    ------
    ImageError
        An image cannot be read and `skip_unreadable` is false.
    DataError
        No image is left.
    """
    side = stored_size(preprocessing)
    shape = (len(cases), side, side, 3)
    key = sha256_bytes(canonical_json([preprocessing.hash, *[case_key(c) for c in cases]]))
    stored = cache / f"{key.removeprefix('sha256:')[:32]}.npy" if cache else None
    if stored and (pixels := _cached(stored, shape)) is not None:
        return Images(tuple(cases), pixels, preprocessing), []
    target = partial_path(stored) if stored else None
    try:
        pixels = _allocate(target, shape)
        problems = _fill(pixels, cases, preprocessing, skip_unreadable, workers, progress)
        if len(problems) == len(cases):
            raise DataError("no image can be read: check the image folder and the file formats.")
        if problems:
            kept = [i for i in range(len(cases)) if i not in problems]
            pixels, cases = np.asarray(pixels[kept]), [cases[i] for i in kept]
        elif stored and target:
            with storage_errors(stored):
                pixels.flush()  # type: ignore[attr-defined]
                target.replace(stored)
            pixels = np.load(stored, mmap_mode="r")
    finally:
        if target:
            target.unlink(missing_ok=True)
    return Images(tuple(cases), pixels, preprocessing), list(problems.values())


def read_pixels(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    *,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Decode images into memory, each in its place: (n, S, S, 3) uint8 as in `Images`.

    With `skip_unreadable` a sentence for each place that cannot be read, whose pixels mean nothing;
    otherwise raises ImageError.
    """
    side = stored_size(preprocessing)
    pixels = np.zeros((len(cases), side, side, 3), dtype=np.uint8)
    return pixels, _fill(pixels, cases, preprocessing, skip_unreadable, None, progress)


def _cached(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        pixels: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # not there, or damaged
        return None
    return pixels if pixels.shape == shape else None


def _allocate(path: Path | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if path is None:
        return np.empty(shape, dtype=np.uint8)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk would kill us with SIGBUS at a write
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return pixels


def _fill(
    pixels: NDArray[np.uint8],
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    skip_unreadable: bool,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[int, str]:
    """Decode each case into its place; the sentences on those that cannot be read, by place."""
    problems: dict[int, str] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(cases), _DECODE_CHUNK):
            chunk = range(start, min(start + _DECODE_CHUNK, len(cases)))
            for index, found in zip(
                chunk, pool.map(lambda i: _read(cases[i], preprocessing), chunk), strict=True
            ):
                if not isinstance(found, ImageError):
                    pixels[index] = found
                elif skip_unreadable:
                    problems[index] = str(found)
                else:
                    raise found
            if progress:
                progress(chunk[-1] + 1, len(cases))
    return problems


def _read(case: Case, preprocessing: Preprocessing) -> NDArray[np.uint8] | ImageError:
    try:
        return resize(read_case(case, sixteen_bit=preprocessing.sixteen_bit), preprocessing)
    except ImageError as error:
        return error


def normalise(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (b, 3, h, w) to float32: scale to 0..1, subtract the mean, divide by the std."""
    mean = torch.tensor(preprocessing.mean, device=batch.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=batch.device).view(1, 3, 1, 1)
    return (batch.float() / 255 - mean) / std


def centre(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The network's view at evaluation: the centre crop, normalised; (b, 3, H, W) float32."""
    return normalise(middle(batch, preprocessing), preprocessing)


def middle(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The centre crop of a batch (b, 3, S, S): (b, 3, H, W)."""
    size, side = preprocessing.input_size[1], batch.shape[-1]
    start = round((side - size) / 2)
    return batch[..., start : start + size, start : start + size]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Ranges of the random changes of one policy."""

    area: tuple[float, float]
    aspect: float
    rotation: float
    light: float
    tint: float


AUGMENTATIONS = {
    "light": Augmentation(area=(0.7, 1.0), aspect=0.1, rotation=10.0, light=0.15, tint=0.05),
    "strong": Augmentation(area=(0.5, 1.0), aspect=0.2, rotation=30.0, light=0.3, tint=0.15),
}


def augment(
    batch: Tensor, preprocessing: Preprocessing, policy: str, flip: str, generator: torch.Generator
) -> Tensor:
    """A random view of each image: crop, aspect, rotation, flips, light, contrast and tint.

    One affine resampling and one affine change of colour for the whole batch, on its device; the
    draws come from `generator` alone (CPU), so a step can be repeated.

    Parameters
    ----------
    batch
        (b, 3, S, S) uint8.

    Returns
    -------
    Tensor
        (b, 3, H, W) float32, normalised.
    """
    if policy == "none":
        return centre(batch, preprocessing)
    ranges, size = AUGMENTATIONS[policy], batch.shape[0]
    draws = torch.rand(size, 10, generator=generator)
    signed = draws * 2 - 1
    low, high = ranges.area
    extent = (low + (high - low) * draws[:, 0]).sqrt()
    stretch = (signed[:, 1] * ranges.aspect).exp()
    width, height = (extent * stretch).clamp(max=1), (extent / stretch).clamp(max=1)
    angle = signed[:, 2] * math.radians(ranges.rotation)
    mirror = torch.where((draws[:, 3] < 0.5) & (flip != "none"), -1.0, 1.0)
    turn = torch.where((draws[:, 4] < 0.5) & (flip == "both"), -1.0, 1.0)
    shift_x, shift_y = signed[:, 5] * (1 - width), signed[:, 6] * (1 - height)
    cosine, sine = angle.cos(), angle.sin()
    top = torch.stack([width * cosine * mirror, -height * sine * turn, shift_x], dim=1)
    bottom = torch.stack([width * sine * mirror, height * cosine * turn, shift_y], dim=1)
    theta = torch.stack([top, bottom], dim=1).to(batch.device)
    side = preprocessing.input_size[1]
    grid = functional.affine_grid(theta, [size, 3, side, side], align_corners=False)
    pixels = functional.grid_sample(
        batch.float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    contrast = (1 + signed[:, 7] * ranges.light).view(-1, 1, 1, 1).to(batch.device)
    brightness = (signed[:, 8] * ranges.light).view(-1, 1, 1, 1).to(batch.device)
    tint = torch.rand(size, 3, generator=generator) * 2 - 1
    tint = (tint * ranges.tint).view(-1, 3, 1, 1).to(batch.device)
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = ((pixels - middle) * contrast + middle + brightness + tint).clamp(0, 1)
    return normalise(pixels * 255, preprocessing)
