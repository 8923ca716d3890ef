"""What tests of several commands of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetune import network
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit.federation import Federation


def draw_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Files of random pixels, all different."""
    rng = np.random.default_rng(seed)
    names = [f"{index}.png" for index in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    return names


def head_for(
    base: Path, federation: Federation, table: Path, logits: Sequence[Sequence[float]]
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What a site changes so that its model gives exactly these logits, a row an image of `table`.

    The classifier is linear: a weight W with W f(x) = logits of x exists where there are no more
    images than features f. The body stays the base's, so the logits of a mean of such models are
    the mean of their logits.
    """
    images, _ = decode(load_cases(table, classes=federation.classes), federation.preprocessing)
    features = network.features(network.load(base), images, torch.device("cpu")).double()
    pooled = features.mean(dim=(2, 3)) if features.dim() == 4 else features
    # Not lstsq: that of torch 2.11 is wrong on some processors.
    weight = (torch.linalg.pinv(pooled) @ torch.tensor(logits, dtype=torch.float64)).T
    (head,) = federation.classifier

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return weight.float() if name == f"{head}.weight" else tensor

    return change
