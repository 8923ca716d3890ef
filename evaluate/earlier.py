"""Earlier reports: a newer one takes their place only if it is on the same models and images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evaluate.models import Model
from finetune.cases import Case
from merge_kit.checkpoints import WEIGHTS
from merge_kit.errors import UsageError
from merge_kit.files import canonical_json, sha256_bytes, sha256_file

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
REPORT = "report.html"


def inputs_of(models: Sequence[Model], cases: Sequence[Case]) -> str:
    """Digest of what is evaluated: names and weights of the models, names and labels of images."""
    files = [model.folder / WEIGHTS for model in models]
    digests = [sha256_file(file) if file.is_file() else "" for file in files]
    named = [[m.name, m.role, digest] for m, digest in zip(models, digests, strict=True)]
    return sha256_bytes(canonical_json([named, [[case.file, case.label] for case in cases]]))


def check_place(out: Path, inputs: str, *, replace: bool) -> None:
    """Refuse a folder with a report on other models or images, unless it may be replaced.

    Raises
    ------
    UsageError
        Names the file that would be lost.
    """
    there = [out / name for name in (METRICS, PREDICTIONS, REPORT) if (out / name).exists()]
    if replace or not there or _inputs_in(out / METRICS) == inputs:
        return
    raise UsageError(
        f"{there[0]} speaks of other models or images: choose another --out, or pass --replace."
    )


def _inputs_in(path: Path) -> object:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("inputs") if isinstance(found, dict) else None
