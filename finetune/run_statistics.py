"""Statistics of a finished run: found images give a payload and a manifest draft in its folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import network, statistics
from finetune.cases import Case
from finetune.pixels import Images, decode
from finetune.run import CASES, MODEL, RECORD, alone, software
from finetune.tables import ArrayItem, read_table
from merge_kit import statistics as formats
from merge_kit.errors import DataError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.files import canonical_json, sha256_file, write_atomic
from merge_kit.manifest import Draft, Payload, read_draft
from merge_kit.methods.base import Statistics
from merge_kit.parameters import roles_of, vector_specs
from merge_kit.publishing import DRAFT, check_origin, draft_file, payload_file
from merge_kit.runs import SUMMARY
from merge_kit.schema import now
from merge_kit.site import COPY, Site
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.vector import METADATA_KEY, check_finite

EXAMPLES = 256
MAX_WIDTH = 4608


@dataclass(frozen=True, slots=True)
class Made:
    """Statistics that have been written."""

    path: Path
    size: int
    left_out: tuple[str, ...]
    """A sentence for each layer without a Gram matrix."""
    few_rows: tuple[str, ...] = ()
    """Layers whose Gram matrix was made of fewer rows than it has columns."""


def is_made(run: Path, kind: Statistics) -> bool:
    """Whether a run has these statistics, whole and about its vector."""
    path, told = run / payload_file(kind), run / draft_file(kind)
    if not (path.is_file() and told.is_file()):
        return False
    draft = read_draft(told, "statistics")
    about = read_draft(run / DRAFT).payload.sha256
    return draft.about == about and draft.payload.sha256 == sha256_file(path)


def find_images(
    site: Site,
    run: Path,
    examples: int,
    *,
    data: Path | None = None,
    images: Path | None = None,
    progress: statistics.Report | None = None,
) -> tuple[Images, list[str]]:
    """At most `examples` training images of a finished run, drawn by its seed.

    They are looked for where the run found them, or in `data` and `images` if that is given; images
    that cannot be read are left out, with a sentence, where the run has left some out.

    Raises
    ------
    DataError
        The images are not there any more, or too few for the federation's policy.
    """
    if not (run / SUMMARY).is_file():
        raise DataError(f"{run} is no finished run: run 'merge-kit finetune' first.")
    draft = read_draft(run / DRAFT)
    check_origin(site, run, draft)
    assert draft.training is not None  # every vector's draft tells it
    files = _training_files(run)
    files = [files[i] for i in statistics.draw(len(files), examples, draft.training.seed)]
    found, skipped = decode(
        _locate(run, files, data, images, several=site.federation.multi_label),
        site.federation.preprocessing,
        cache=site.root / "cache",
        skip_unreadable=bool(_read_json(run / SUMMARY).get("skipped")),
        progress=progress,
    )
    minimum = site.federation.policy.minimum_class_count
    if len(found) < minimum:
        raise DataError(
            f"statistics of {len(found)} images would give them away: the federation's policy "
            f"hides counts below {minimum}; take at least as many images."
        )
    return found, skipped


def _training_files(run: Path) -> list[str]:
    """The training images of a run by the names in its table, sorted."""
    try:
        with (run / CASES).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        files = sorted(row["file"] for row in rows if row["split"] == "train")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise _damaged(run / CASES) from error
    if not files:
        raise _damaged(run / CASES)
    return files


def _locate(
    run: Path, files: Sequence[str], data: Path | None, images: Path | None, *, several: bool
) -> list[Case]:
    """Where the images lie now; labels are not needed, but `several` may be in a MedMNIST file."""
    if data is None:
        record = _read_json(run / RECORD)
        if not record.get("data"):
            raise DataError(
                f"{run} does not say where its images lie: give --data as for 'merge-kit finetune'."
            )
        data = Path(record["data"])
        images = Path(record["images"]) if record.get("images") else None
        if not data.exists() or (images and not images.is_dir()):
            raise DataError(
                f"the images of {run} were in {images or data}, which is not there: say with "
                "--data where they are now."
            )
    sources = {
        row.fields["file"]: row.source for row in read_table(data, images, multi_label=several).rows
    }
    for file in files:
        source = sources.get(file)
        if source is None or not (isinstance(source, ArrayItem) or os.path.isfile(source)):
            raise DataError(
                f"{file}, an image of {run}, is not in {images or data}: say with --data where the "
                "images of this run are now."
            )
    return [Case(file, sources[file], label=-1) for file in files]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path) from error
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is not as the run left it: run 'merge-kit finetune' again.")


def make(
    site: Site,
    run: Path,
    kind: Statistics,
    images: Images,
    device: torch.device,
    progress: statistics.Report,
    *,
    max_width: int = MAX_WIDTH,
) -> Made:
    """Compute statistics of the run's own model, and write their payload and then their draft.

    Raises
    ------
    NonFiniteError
        The model's outputs or gradients are not finite.
    """
    with alone(run):
        draft, model = read_draft(run / DRAFT), network.load(run / MODEL)
        left_out: list[str] = []
        few: list[str] = []
        if kind == "fisher":
            seen = _seen(site, draft)
            if draft.other_images:
                rows = next(network.head_of(model).parameters())  # of classes of its own
                seen = torch.ones(len(rows), dtype=torch.bool)
            tensors = statistics.fisher(model, images, seen, device, progress)
            if draft.other_images:  # a classifier of the site's own is in no vector
                heads = tuple(f"{module}." for module in site.federation.classifier)
                tensors = {n: t for n, t in tensors.items() if not n.startswith(heads)}
        else:
            tensors, left_out, few = statistics.grams(model, images, device, max_width, progress)
        path = run / payload_file(kind)
        norm = _write(site, path, kind, draft.payload.sha256, tensors)
        payload = Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm)
        told = {
            "kind": kind,
            "about": draft.payload.sha256,
            "payload": payload,
            "privacy": None,  # what the training spent says nothing of these figures
            "software": software(),
            "created_at": now(),
        }
        beside = Draft(**{**draft.model_dump(), **told})
        write_atomic(run / draft_file(kind), beside.model_dump_json(indent=2))
    return Made(path, payload.size, tuple(left_out), tuple(few))


def _seen(site: Site, draft: Draft) -> torch.Tensor:
    """(C,) bool: the classes that the site has trained, also within groups."""
    space = site.federation.labels
    counted = {**draft.class_counts, **(draft.group_counts or {})}
    rows = [row for row, name in enumerate(space.names) if counted.get(name, 0) != 0]
    return space.meaning[rows].any(dim=0)


def _write(
    site: Site, path: Path, kind: Statistics, about: str, tensors: dict[str, torch.Tensor]
) -> float:
    federation = site.federation
    header = formats.StatisticsHeader(
        base=federation.base_fingerprint,
        federation=federation.contract_hash,
        site=site.name,
        kind=kind,
        about=about,
    )
    with TensorFile(site.root / COPY / BASE_WEIGHTS) as base:
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)
    if kind == "fisher":  # what is no parameter is not trained
        specs = formats.fisher_specs(expected, roles)
        tensors = {name: tensors.get(name, torch.zeros(specs[name].shape)) for name in specs}
    for name, tensor in tensors.items():
        remedy = "the run's model is not sound; run 'merge-kit finetune' again."
        check_finite(tensor, name, str(path), remedy)
    write_tensors(path, tensors, (METADATA_KEY, canonical_json(header.model_dump()).decode()))
    with TensorFile(path) as written:
        return formats.check(written, kind, expected, roles)
