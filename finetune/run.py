"""A site's whole job: images and options give a run folder with model, vector and manifest."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import curves, network, private, scores, training
from finetune.cases import Case, case_key
from finetune.labelling import Labelling
from finetune.objectives import told_of
from finetune.options import TrainingOptions
from finetune.pixels import Images, decode
from finetune.runlog import RunLog
from finetune.splits import split_of
from finetune.starting import HEAD, StartingHead, put, starting_head
from finetune.tasks import PrivateTeacher, Report, Task
from merge_kit import vector
from merge_kit.errors import TrainingError
from merge_kit.federation import BASE_WEIGHTS, check_base
from merge_kit.files import canonical_json, sha256_bytes, sha256_file, storage_errors, write_atomic
from merge_kit.manifest import (
    Draft,
    Estimate,
    Payload,
    Software,
    Training,
    Validation,
)
from merge_kit.parameters import roles_of
from merge_kit.publishing import DRAFT, VECTOR
from merge_kit.runs import RUNS, SUMMARY
from merge_kit.schema import now
from merge_kit.site import COPY, Site
from merge_kit.tensorfile import TensorFile, write_tensors

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
CASES = "cases.csv"
MODEL = "model"
TEACHER = "teacher"
"""Folder of the private teacher, beside the model that has learnt with it."""
RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]
    was_finished: bool


@dataclass(frozen=True, slots=True)
class Material:
    """The site's images, decoded, and what was left out."""

    train: Images
    validation: Images
    cases: tuple[Case, ...]
    skipped: tuple[str, ...]


def run_folder(
    site: Site,
    cases: Sequence[Case],
    options: TrainingOptions,
    device: torch.device,
    own_classes: Sequence[str] = (),
) -> Path:
    """Where a run lives: its name is a hash of all that shapes the vector.

    The same command finds its own run again, whether it was killed or has finished.
    """
    chosen = options.identity()
    if options.mutual:
        chosen["mutual"] = private.identity(options.mutual)
    told = {
        "federation": site.config.federation,
        "options": chosen,
        "device": device.type,
        "cases": sorted([c.file, *told_of(c), c.split, c.patient, case_key(c)] for c in cases),
        **({"own_classes": list(own_classes)} if own_classes else {}),
    }
    return site.root / RUNS / sha256_bytes(canonical_json(told)).removeprefix("sha256:")[:12]


def prepare(
    site: Site,
    cases: Sequence[Case],
    *,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Material:
    """Decode the training and validation images, once for all runs of the site.

    Raises
    ------
    DataError
        An image cannot be read and `skip_unreadable` is false.
    """
    # The order of a table's rows must not matter to the vector.
    cases = sorted(cases, key=lambda case: case.file)
    train, validation = split_of(cases, "train"), split_of(cases, "val")
    images, skipped = decode(
        [*train, *validation],
        site.federation.preprocessing,
        cache=site.root / "cache",
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    kept = {id(case) for case in images.cases}
    border = sum(id(case) in kept for case in train)
    parts = [
        Images(images.cases[part], images.pixels[part], images.preprocessing)
        for part in (slice(None, border), slice(border, None))
    ]
    if not all(len(part) for part in parts):
        raise TrainingError("no readable image is left for training or for validation.")
    return Material(parts[0], parts[1], tuple(cases), tuple(skipped))


def finetune(
    site: Site,
    material: Material,
    options: TrainingOptions,
    folder: Path,
    device: torch.device,
    report: Report,
    *,
    data: Path | None = None,
    images: Path | None = None,
    labelling: Labelling | None = None,
) -> Run:
    """Train, or go on where a killed run stopped, and write everything that the run gives.

    `summary.json` comes last: a folder without it is unfinished. `data` and `images` say where the
    cases were found, for whoever looks at them again (see `finetune.statistics`); `labelling` what
    their labels mean, if not the federation's classes and groups.

    Raises
    ------
    TrainingError
        The loss is not finite, or the checkpoint is damaged.
    BaseMismatchError
        The site's copy of the base is not what the contract says.
    """
    with alone(folder):
        if (folder / SUMMARY).is_file():
            return Run(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8")), True)
        check_base(site.federation, site.root / COPY / BASE_WEIGHTS, str(site.base_folder))
        record = _record(site, options, device, data, images)
        write_atomic(folder / RECORD, json.dumps(record, indent=2))
        log = RunLog(folder / METRICS, report)
        labelling = labelling or Labelling(site.federation)
        model = labelling.base(site)
        teacher = private.open_private(options.mutual, labelling) if options.mutual else None
        head_steps = options.head_steps
        head = _starting_head(site, folder, options, labelling)
        if isinstance(head, StartingHead):
            put(head, model)
            options = options.model_copy(update={"head_steps": 0})
        report({"event": "head", "text": head if isinstance(head, str) else head.told})
        task = labelling.task(model, material.train, material.validation, options, device)
        if teacher:
            beside = private.teacher_of(
                teacher, material.train, material.validation, head_steps, site.root / "cache"
            )
            task = replace(task, teacher=beside)
        trained = training.train(task, folder / CHECKPOINT, log)
        model.load_state_dict(trained.state)
        figures = _figures(task)
        write_tensors(folder / MODEL / "model.safetensors", trained.state, ("format", "pt"))
        write_atomic(folder / MODEL / "config.json", labelling.config)
        published = replace(trained, state=labelling.shared(site, trained.state))
        norm = _write_vector(site, published, folder / VECTOR)
        digest = head.digest if isinstance(head, StartingHead) else None
        counts = labelling.counts(labelling.truth(material.train))
        draft = _draft(site, folder / VECTOR, norm, task, trained, figures, digest, counts)
        write_atomic(folder / DRAFT, draft.model_dump_json(indent=2))
        write_atomic(folder / CASES, _case_table(material.cases, labelling.space.names))
        write_atomic(folder / CURVES, curves.draw(log.lines()))
        summary = _summary(site, draft, material, trained, figures)
        if teacher and trained.teacher and task.teacher:
            private.write(folder / TEACHER, teacher, trained.teacher)
            summary["teacher"] = _teacher_figures(task, task.teacher, trained.teacher)
        write_atomic(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False))
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return Run(folder, summary, False)


def _figures(task: Task) -> dict[str, scores.Interval]:
    """Of a task's model as it is now, on the validation images."""
    outputs = network.logits(task.model, task.validation, task.device)
    told, chances = task.objective().judged(outputs)
    return scores.bootstrap_intervals(
        told,
        chances,
        {"balanced_accuracy": scores.balanced_accuracy, "macro_auroc": scores.macro_auroc},
        groups=_groups(task.validation),
        seed=task.options.seed,
    )


def _teacher_figures(
    task: Task, teacher: PrivateTeacher, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    teacher.model.load_state_dict(state)
    own = replace(task, model=teacher.model, validation=teacher.validation)
    return {name: _estimate(figure).model_dump() for name, figure in _figures(own).items()}


def _starting_head(
    site: Site, folder: Path, options: TrainingOptions, labelling: Labelling
) -> StartingHead | str:
    if labelling.own_classes:
        return "the site's own classifier, of its own classes."
    if (folder / CHECKPOINT).is_file() and not (folder / HEAD).is_file():
        return "the site's own classifier, as it was."
    return starting_head(site, folder, options.head)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run; the lock ends with the process that holds it."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrainingError(
            f"{folder} is being worked on by another process: wait for it, or stop it."
        ) from None
    else:
        yield
    finally:
        os.close(handle)


def _record(
    site: Site,
    options: TrainingOptions,
    device: torch.device,
    data: Path | None,
    images: Path | None,
) -> dict[str, Any]:
    return {
        "federation": site.config.federation,
        "options": options.model_dump(mode="json"),
        "device": device.type,
        "data": os.path.abspath(data) if data else None,
        "images": os.path.abspath(images) if images else None,
    }


def _groups(images: Images) -> list[str | None] | None:
    groups = [case.patient or case.group for case in images.cases]
    return groups if any(groups) else None


def _write_vector(site: Site, trained: training.Trained, path: Path) -> float:
    federation = site.federation
    header = vector.VectorHeader(
        base=federation.base_fingerprint, federation=federation.contract_hash, site=site.name
    )
    with TensorFile(site.root / COPY / BASE_WEIGHTS) as base:
        roles = roles_of(base.specs, federation.classifier)
        vector.subtract(base, trained.state, roles, header, path, trained.factors)
    with vector.opened(path) as written:
        return vector.norm(written, roles)


def _draft(
    site: Site,
    path: Path,
    norm: float,
    task: Task,
    trained: training.Trained,
    figures: Mapping[str, scores.Interval],
    head: str | None,
    counts: Mapping[str, Any],
) -> Draft:
    federation = site.federation
    return Draft(
        site=site.name,
        federation=federation.contract_hash,
        base=federation.base_fingerprint,
        payload=Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm),
        **counts,
        training=Training(
            steps=trained.steps,
            epochs=trained.epochs,
            optimizer=task.options.optimizer,
            learning_rate=task.options.learning_rate,
            seed=task.options.seed,
            head=head,
        ),
        preprocessing=federation.preprocessing.hash,
        validation=Validation(
            balanced_accuracy=_estimate(figures["balanced_accuracy"]),
            macro_auroc=_estimate(figures["macro_auroc"]),
        ),
        software=software(),
        created_at=now(),
    )


def software() -> Software:
    """The versions that a manifest names."""
    return Software(
        merge_kit=importlib.metadata.version("merge-kit"),
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        timm=importlib.metadata.version("timm"),
    )


def _estimate(interval: scores.Interval) -> Estimate:
    values = [
        round(v, 6) if math.isfinite(v) else None
        for v in (interval.value, interval.low, interval.high)
    ]
    return Estimate(value=values[0], low=values[1], high=values[2])


def _case_table(cases: Sequence[Case], names: Sequence[str]) -> str:
    """One class a case, or a column for each class as in a table that is read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    several = any(case.targets is not None for case in cases)
    writer.writerow(["file", *(names if several else ["label"]), "patient", "group", "split"])
    for case in cases:
        marks = ["" if target < 0 else target for target in case.targets or ()]
        told = marks if several else [names[case.label]]
        writer.writerow([case.file, *told, case.patient or "", case.group or "", case.split])
    return text.getvalue()


def _summary(
    site: Site,
    draft: Draft,
    material: Material,
    trained: training.Trained,
    figures: Mapping[str, scores.Interval],
) -> dict[str, Any]:
    return {
        "site": site.name,
        "train_images": len(material.train),
        "validation_images": len(material.validation),
        "skipped": list(material.skipped),
        "steps": trained.steps,
        "epochs": trained.epochs,
        "balanced_accuracy": _estimate(figures["balanced_accuracy"]).model_dump(),
        "macro_auroc": _estimate(figures["macro_auroc"]).model_dump(),
        "vector_bytes": draft.payload.size,
        "vector_norm": draft.payload.norm,
        "vector_sha256": draft.payload.sha256,
    }
