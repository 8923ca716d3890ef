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


def draw_findings(marks: NDArray[np.bool_], side: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """(n, side, side, 3) uint8 of images with any of three findings, (n, 3): a brighter channel."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 40, (len(marks), side, side, 3))
    light = generator.normal(0, 12, (len(marks), 1, 1, 1))
    levels = 90 + 55 * marks[:, None, None, :]
    return (levels + noise + light).clip(0, 255).astype(np.uint8)


def write_findings(
    folder: Path,
    names: Sequence[str],
    count: int,
    *,
    columns: Sequence[str],
    seed: int = 0,
    validation: int = 16,
) -> tuple[Path, NDArray[np.bool_]]:
    """PNG files, and a labels.csv with a column for each of `columns`, all but the last of which
    is left empty in every third row; and what there is to see in the training images, (n, 3)."""
    generator = np.random.default_rng(seed)
    marks = generator.random((count + validation, 3)) < 0.4
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, pixels in enumerate(draw_findings(marks, seed=seed)):
        file = f"{number:03}.png"
        Image.fromarray(pixels).save(folder / file)
        told = {name: str(int(marks[number, names.index(name)])) for name in columns}
        if number % 3 == 0:
            told |= dict.fromkeys(columns[:-1], "")
        rows.append({"file": file, **told, "split": "train" if number < count else "val"})
    return write_csv(folder / "labels.csv", rows), marks[:count]
