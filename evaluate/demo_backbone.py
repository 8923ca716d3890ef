"""A small backbone for the demo, pretrained from scratch on its public set of made-up cells.

It stands where a backbone pretrained on public images stands in a real federation: it has seen
neither the federation's classes nor any hospital's images.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from evaluate.demo_images import PUBLIC_CLASSES, SIDE
from merge_kit.errors import ImageError, LabelError
from merge_kit.tensorfile import write_tensors

ARCHITECTURE = "test_resnet"  # timm: 0.37 million parameters, batch norm, 96 features
INPUT_SIZE = 64  # px
MEAN = STD = (0.5, 0.5, 0.5)

_LEARNING_RATE = 4e-3
_WEIGHT_DECAY = 0.05
_LABEL_SMOOTHING = 0.1
_JITTER = 0.25  # how far contrast and brightness of a channel move, up or down


def prepare_backbone(
    public: Path,
    out: Path,
    *,
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train `ARCHITECTURE` on the public set and write its state dict to `out` (safetensors).

    The file holds float32 tensors (int64 for batch-norm counters) under timm's names, with a head
    for `PUBLIC_CLASSES`, and no metadata. The weights are a function of the images, `seed`,
    `epochs` and `batch_size`, for one CPU type, torch version and number of threads; torch's own
    random state is left as it was. `progress(step, steps)` is called after each step.

    `public` is a folder that `demo_images.generate_public` wrote. Returns `out`. Raises
    `LabelError` or `ImageError` when the public set is not as it was written.
    """
    images, labels = _read_public(public)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # timm draws initial weights from torch's global generator
        model = timm.create_model(ARCHITECTURE, num_classes=len(PUBLIC_CLASSES))
    model.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
    _train(model, images, labels, seed, epochs, batch_size, progress)
    write_tensors(out, model.state_dict())
    return out


def _read_public(public: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 (n, 3, 72, 72) in -1..1, labels int64 (n,)."""
    table = public / "labels.csv"
    if not table.is_file():
        raise LabelError(f"{table} does not exist: generate the demo's public images first.")
    images, labels = [], []
    with table.open(encoding="utf-8", newline="") as stream:
        for line, row in enumerate(csv.DictReader(stream), start=2):
            if row.get("label") not in PUBLIC_CLASSES:
                raise LabelError(
                    f"{table}, line {line}: '{row.get('label')}' is not a class of the demo's "
                    f"public set: generate the public images again."
                )
            images.append(_read_image(public / row["file"]))
            labels.append(PUBLIC_CLASSES.index(row["label"]))
    if not images:
        raise LabelError(f"{table} lists no image: generate the demo's public images again.")
    return torch.stack(images), torch.tensor(labels)


def _read_image(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read as an image: generate the demo's public images again."
        ) from error
    return torch.from_numpy((pixels - np.float32(MEAN[0])) / np.float32(STD[0])).permute(2, 0, 1)


def _train(
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    epochs: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = max(1, len(images) // batch_size)
    steps = epochs * batches
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=_LEARNING_RATE, total_steps=steps
    )
    model.train()
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(images), generator=generator)
        batch = order[step % batches * batch_size :][:batch_size]
        logits = model(_augment(images[batch], generator))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=_LABEL_SMOOTHING)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)


def _augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch cropped, turned and mirrored as a whole, and coloured image by image.

    x: float32 (n, 3, 72, 72). Returns float32 (n, 3, 64, 64).
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def jitter() -> torch.Tensor:
        return _JITTER * (2 * torch.rand(len(x), 3, 1, 1, generator=generator) - 1)

    side = draw(round(0.8 * SIDE), SIDE)
    top, left = draw(0, SIDE - side), draw(0, SIDE - side)
    crop = x[:, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
    crop = torch.rot90(crop, draw(0, 3), dims=(2, 3))
    crop = crop.flip(3) if draw(0, 1) else crop
    return (crop * (1 + jitter()) + jitter()).contiguous(memory_format=torch.channels_last)
