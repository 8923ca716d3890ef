"""Models that are no one network: ensembles of the sites' models, and one model for each site.

They are computed from the probabilities that `evaluate` has written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from merge_kit.files import write_atomic

_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class Outputs:
    """Probabilities of some models for the same cases."""

    files: list[str]
    sites: list[str]
    classes: tuple[str, ...]
    probabilities: dict[str, NDArray[np.float64]]
    """(n, C) by the model's name."""


def read_outputs(path: Path) -> Outputs:
    """The predictions.csv of an evaluation."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = tuple(name[2:] for name in rows[0] if name.startswith("p_"))
    by_model: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    first = next(iter(by_model.values()))
    return Outputs(
        [row["file"] for row in first],
        [row["site"] for row in first],
        classes,
        {
            name: np.array([[float(row[f"p_{c}"]) for c in classes] for row in found])
            for name, found in by_model.items()
        },
    )


def ensemble(
    outputs: Outputs, members: Sequence[str], weights: Sequence[float]
) -> NDArray[np.float64]:
    """The weighted mean of the members' logits, as probabilities (n, C).

    Logits are the logarithms of the probabilities but for a number that is the same for all
    classes, which the softmax takes out.
    """
    logs = np.stack([np.log(outputs.probabilities[m].clip(_LEAST)) for m in members])
    mean = np.tensordot(np.asarray(weights) / np.sum(weights), logs, axes=1)
    found: NDArray[np.float64] = torch.from_numpy(mean).softmax(dim=1).numpy()
    return found


def by_site(outputs: Outputs, models: Mapping[str, str]) -> NDArray[np.float64]:
    """Each case as the model of its own site sees it; `models` maps sites to models."""
    rows = [outputs.probabilities[models[s]][i] for i, s in enumerate(outputs.sites)]
    return np.stack(rows)


def write_outputs(path: Path, outputs: Outputs, probabilities: NDArray[np.float64]) -> None:
    """A CSV that `evaluate` takes for a model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "site", *[f"p_{name}" for name in outputs.classes]])
    for file, site, row in zip(outputs.files, outputs.sites, probabilities, strict=True):
        writer.writerow([file, site, *[f"{value:.9f}" for value in row]])
    write_atomic(path, text.getvalue())
