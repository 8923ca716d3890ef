"""Earlier reports: a newer one takes their place only if it is on the same models and images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from evaluate.labelled import LabelledSet
from evaluate.models import AnyModel, Imported
from merge_kit.checkpoints import Checkpoint
from merge_kit.errors import UsageError
from merge_kit.federation import FEDERATION_FILE
from merge_kit.files import canonical_json, sha256_bytes, sha256_file
from merge_kit.plain import Sound, sound
from merge_kit.remembered import look

REPORT, PAGE, TABLE = "report.json", "report.html", "predictions.csv"


def inputs_of(models: Sequence[AnyModel], labelled: LabelledSet) -> str:
    """Digest of what is evaluated: names and weights of the models, content and classes of images.

    Other options (subgroups, resamples, prevalences) are no other inputs.
    """
    named = [[model.name, model.role, _digest(model)] for model in models]
    cases = [list(labelled.keys), labelled.targets.tolist(), list(labelled.sites)]
    return sha256_bytes(canonical_json([named, cases]))


def _digest(model: AnyModel) -> str:
    if isinstance(model, Imported):
        return sha256_file(model.file)
    with Checkpoint(model.folder) as file:
        return look(file, Sound, sound)[0].fingerprint


def check_place(out: Path, inputs: str, *, replace: bool) -> None:
    """Refuse a folder with a report on other models or images, unless it may be replaced.

    Nor may a report lie in a federation: it names the files of patients, and sites read all there.

    Raises
    ------
    UsageError
        Names the file that would be lost, or the federation; or `out` is a file.
    """
    place = Path(os.path.realpath(out))
    if place.exists() and not place.is_dir():
        raise UsageError(f"{out} is a file: give the folder of the report with --out.")
    for root in (place, *place.parents):
        if (root / FEDERATION_FILE).is_file():
            raise UsageError(
                f"{out} lies in the federation in {root}, which all sites read, and a report names "
                "the files of patients: choose another --out."
            )
    there = [out / name for name in (REPORT, TABLE, PAGE) if (out / name).exists()]
    if replace or not there:
        return
    earlier = _inputs_in(out / REPORT)
    if earlier == inputs:
        return
    odd = "is damaged, or no report of this program"
    if earlier is not None or there[0] != out / REPORT:
        odd = "speaks of other models or images"
    raise UsageError(f"{there[0]} {odd}: choose another --out, or pass --replace.")


def _inputs_in(path: Path) -> object:
    """None where it is no report."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("inputs") if isinstance(found, dict) else None
