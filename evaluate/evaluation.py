"""The whole job of evaluate and compare: models and labelled tables -> a folder with the report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from evaluate import processes
from evaluate.cards import read_card, write_results
from evaluate.document import Report, Similarity
from evaluate.earlier import PAGE, REPORT, TABLE, check_place, inputs_of
from evaluate.fitting import Validation
from evaluate.labelled import LabelledSet
from evaluate.loading import Loaded
from evaluate.mistakes import worst_mistakes
from evaluate.models import AnyModel, Imported, Model
from evaluate.page import render
from evaluate.predicting import Predicted, predict
from evaluate.predictions import speaks_of, to_csv
from evaluate.scopes import check_external
from evaluate.scoring import Settings
from evaluate.similarity import similarity
from evaluate.summary import Facts, summarise
from evaluate.verdict import leader
from finetune.network import choose_device
from finetune.outputs import Stage
from finetune.progress import Progress
from merge_kit.files import in_turn, write_atomic

KEPT = "predictions"
"""Folder of outputs that are there already."""
_SOFTWARE = ("merge-kit", "torch", "timm", "numpy")
MISTAKES = 24


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user asks for beside models and images."""

    out: Path
    title: str
    settings: Settings
    device: str = "auto"
    precision: str = "auto"
    skip_unreadable: bool = False
    calibrate: bool = False
    with_images: bool = False
    cards: bool = False
    replace: bool = False
    """Whether a report on other models or images may be overwritten."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it, written to the folder."""

    report: Report
    left_out: tuple[str, ...]
    """A sentence for each image that could not be read."""
    remarks: tuple[str, ...]
    """Notes of the report, and what names files and is therefore not in it."""


def run(
    models: Sequence[AnyModel],
    load: Callable[[], Loaded],
    wishes: Wishes,
    *,
    notes: Sequence[str] = (),
    announce: Callable[[str], None] = lambda text: None,
) -> Outcome | None:
    """Evaluate models and write report.json, report.html and predictions.csv.

    Parameters
    ----------
    load
        Reads the labelled tables; every process of the command does so.
    notes
        Sentences for the report, before those on the data.

    Returns
    -------
    Outcome or None
        None in every process but the first.

    Raises
    ------
    UsageError
        The folder has a report on other models or images.
    MergeKitError
        As `loading.load`, `predict` and `summarise`.
    """
    with processes.joined() as group:
        device = group.device(choose_device(wishes.device))
        with group.together():
            loaded = load().fitted_without_external()
            check_external(loaded.external, loaded.chosen)
            settings = replace(wishes.settings, external=loaded.external)
            inputs = inputs_of(models, loaded.chosen)
            check_place(wishes.out, inputs, replace=wishes.replace)
            for model in _with_cards(models, wishes):
                read_card(model.folder)  # before hours of computing, not after
        if group.first:
            plural = "s" * (len(models) > 1)
            announce(f"{len(models)} model{plural} on {len(loaded.chosen)} images, on {device}")
        with Progress() as progress:
            stage = progress.stage if group.first else None
            found = _predict(models, loaded.chosen, loaded, device, wishes, group, stage)
            fitted, silent = None, []
            if loaded.validation is not None:
                silent = _silent(models, loaded.validation)
                asked = [model for model in models if model.name not in silent]
                if asked:
                    held = loaded.validation
                    fitted = _predict(asked, held, loaded, device, wishes, group, stage)
    if found is None:
        return None
    left_out = dict.fromkeys((*loaded.left_out, *found.left_out))
    if fitted is not None:
        left_out |= dict.fromkeys(fitted.left_out)
    said = [*notes, *loaded.notes]
    said += [
        f"The predictions of '{name}' hold none of the validation images: it has no thresholds and "
        "no temperature."
        for name in silent
    ]
    if left_out:
        said.insert(0, f"{len(left_out)} unreadable images were left out.")
    facts = Facts(
        title=wishes.title,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
        notes=tuple(said),
        similarity=_similarity(models),
        inputs=inputs,
    )
    validation = (
        None
        if fitted is None
        else Validation(fitted.labelled, fitted.predictions, wishes.calibrate)
    )
    with Progress() as progress:
        report = summarise(
            found.labelled,
            found.predictions,
            facts,
            settings,
            validation,
            progress=lambda done, of: progress.stage("figures", done, of),
        )
    _write(report, found, models, wishes)
    copies = [f"One image: {', '.join(files)}" for files in loaded.copies]
    return Outcome(report, tuple(left_out), (*said, *copies))


def _predict(
    models: Sequence[AnyModel],
    labelled: LabelledSet,
    loaded: Loaded,
    device: torch.device,
    wishes: Wishes,
    group: processes.Group,
    stage: Stage | None,
) -> Predicted | None:
    return predict(
        models,
        labelled,
        device,
        cache=wishes.out / KEPT,
        precision=wishes.precision,
        skip_unreadable=wishes.skip_unreadable,
        listed=loaded.listed,
        group=group,
        progress=stage,
    )


def _silent(models: Sequence[AnyModel], validation: LabelledSet) -> list[str]:
    """Names of imported models that say nothing of the validation cases."""
    imported = [model for model in models if isinstance(model, Imported)]
    return [m.name for m in imported if not speaks_of(m.file, validation, m.name)]


def _similarity(models: Sequence[AnyModel]) -> Similarity | None:
    """Needs the base among the models."""
    folders = {model.name: model for model in models if isinstance(model, Model)}
    base = next((name for name, model in folders.items() if model.role == "base"), None)
    if base is None:
        return None
    others = {name: model.folder for name, model in folders.items() if name != base}
    return similarity(folders[base].folder, others)


def _write(report: Report, found: Predicted, models: Sequence[AnyModel], wishes: Wishes) -> None:
    mistakes, shown = [], shown_model(report)
    if wishes.with_images:
        own = next(p for p in found.predictions if p.model == shown)
        mistakes = worst_mistakes(found.labelled, own, MISTAKES)
    page = render(report, mistakes, shown)
    # The same command side by side must not mix its files with these.
    with in_turn(wishes.out / REPORT):
        # First what says of which inputs the files are: who was killed here can be repeated.
        write_atomic(wishes.out / REPORT, report.model_dump_json(indent=1) + "\n")
        write_atomic(wishes.out / TABLE, to_csv(found.predictions, found.labelled))
        write_atomic(wishes.out / PAGE, page)
    for model in _with_cards(models, wishes):
        write_results(report, model.name, model.folder)


def _with_cards(models: Sequence[AnyModel], wishes: Wishes) -> list[Model]:
    """The models whose cards get figures."""
    merged = [m for m in models if isinstance(m, Model) and m.role == "merged"]
    return merged if wishes.cards else []


def shown_model(report: Report) -> str:
    """Whose mistakes are shown: the reference, or the merged model that is best, or the best."""
    if report.reference is not None:
        return report.reference
    if found := leader(report, "union"):
        return found
    # None has a defined score.
    merged = (model.name for model in report.models if model.role == "merged")
    return next(merged, report.models[0].name)
