"""Small generated images for the tests of the site's training: a colour a class, and noise."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.cases import Case
from finetune.pixels import Images, stored_size
from merge_kit.federation import Preprocessing

SMALL = Preprocessing(input_size=(3, 32, 32), crop_pct=1.0)
_COLOURS = np.array([[170, 90, 110], [100, 150, 120], [110, 100, 170]])


def draw(labels: Sequence[int], side: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """(n, side, side, 3) uint8: easy to learn, but not so easy that nothing is left to learn."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 45, (len(labels), side, side, 3))
    light = generator.normal(0, 25, (len(labels), 1, 1, 1))
    colours = _COLOURS[list(labels)][:, None, None, :]
    return (colours + noise + light).clip(0, 255).astype(np.uint8)


def images(labels: Sequence[int], *, seed: int = 0, preprocessing: Preprocessing = SMALL) -> Images:
    """Decoded images as `decode` gives them, without files."""
    cases = tuple(Case(f"{i}.png", Path(f"{i}.png"), label) for i, label in enumerate(labels))
    pixels = draw(labels, stored_size(preprocessing), seed)
    return Images(cases, pixels, preprocessing)


def write_table(
    folder: Path, counts: Mapping[str, int], *, seed: int = 0, validation: int = 3
) -> Path:
    """PNG files and a labels.csv: `counts` training images a class, `validation` of each known."""
    rows = []
    for index, (name, count) in enumerate(counts.items()):
        for split, size in (("train", count), ("val", validation if count else 0)):
            for number, pixels in enumerate(draw([index] * size, seed=seed + index)):
                file = f"{name}_{split}_{number}.png"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / file)
                rows.append({"file": file, "label": name, "split": split})
    return write_csv(folder / "labels.csv", rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """A table with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
