"""From models and labelled images to probabilities; what has been computed is kept and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evaluate.labelled import LabelledSet
from evaluate.models import AnyModel, Imported, Model
from evaluate.predictions import Predictions, read_imported
from evaluate.processes import Group
from finetune import kept
from finetune.outputs import Network, Outputs, Stage, load_exactly
from merge_kit.checkpoints import Checkpoint
from merge_kit.configuration import CONFIG
from merge_kit.errors import DataError, UsageError
from merge_kit.files import sha256_file
from merge_kit.plain import Sound, sound
from merge_kit.remembered import look


@dataclass(frozen=True, slots=True)
class Predicted:
    """What all models say about the same cases."""

    labelled: LabelledSet
    """The cases whose image can be read."""
    predictions: tuple[Predictions, ...]
    """One for each model, in their order, on the classes of the labelled set."""
    left_out: tuple[str, ...]
    """A sentence for each image that was left out."""


def predict(
    models: Sequence[AnyModel],
    labelled: LabelledSet,
    device: torch.device,
    *,
    cache: Path | None = None,
    precision: str = "auto",
    skip_unreadable: bool = False,
    listed: frozenset[str] = frozenset(),
    group: Group | None = None,
    progress: Stage | None = None,
) -> Predicted | None:
    """Probabilities of every model for every case of a labelled set with images.

    Outputs are kept batch by batch in `cache`: see `finetune.outputs`.

    Parameters
    ----------
    cache
        None keeps nothing; several processes need a folder that they share.
    precision
        float32, bfloat16, or auto: bfloat16 on a GPU that computes in it.
    listed
        Files that imported predictions may hold beside the set's; see `read_imported`.
    group
        The processes that share the work; with the same number of threads their outputs have the
        bytes of one process.

    Returns
    -------
    Predicted or None
        None in every process but the first.

    Raises
    ------
    MergeKitError
        An image cannot be read and `skip_unreadable` is false, a model cannot be loaded, memory
        or storage are too small, or another process failed.
    """
    group = group or Group()
    run = Outputs(
        labelled.cases,
        labelled.keys,
        device,
        cache,
        precision=precision,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    with group.together():
        if group.size > 1 and cache is None:
            raise UsageError("several processes need a folder to share their predictions in.")
        own = {place: one for place, one in enumerate(models) if isinstance(one, Model)}
        if own and not (labelled.cases and labelled.keys):
            raise DataError("the labelled set has no images to predict: load it from a table.")
        work = {place: _network(one, run.precision) for place, one in own.items()}
        networks = [one for one, _ in work.values()]
        run.complete(networks, group.share(run.batches))
    if not group.first:
        return None
    run.complete(networks, run.batches)
    rows = np.flatnonzero(run.readable) if own else np.arange(len(labelled))
    if not len(rows):
        raise DataError("no image can be read: check the image folder and the file formats.")
    found = []
    for place, one in enumerate(models):
        if isinstance(one, Imported):
            told = read_imported(
                one.file, labelled, model=one.name, role=one.role, listed=listed, restrict=True
            )
        else:
            told = _predictions(own[place], *work[place], labelled)
        found.append(told.take(rows))
    return Predicted(labelled.take(rows), tuple(found), tuple(run.problems.values()))


def _network(model: Model, precision: str) -> tuple[Network, str]:
    """What computes for a model, of the very weights that are in its folder now, and their
    fingerprint."""
    with Checkpoint(model.folder) as file:
        fingerprint = look(file, Sound, sound)[0].fingerprint
    config = sha256_file(model.folder / CONFIG)
    key = kept.model_key(fingerprint, config, model.preprocessing.hash, precision)
    load = partial(load_exactly, model.folder, fingerprint)
    size = len(model.classes)
    return Network(model.name, model.folder, key, size, model.preprocessing, load), fingerprint


def _predictions(
    model: Model, found: Network, fingerprint: str, labelled: LabelledSet
) -> Predictions:
    """Of all rows; those of unreadable images mean nothing."""
    logits, several = found.logits().double(), labelled.multi_label
    chances = (logits.sigmoid() if several else logits.softmax(dim=1)).numpy()
    told = Predictions(model.name, model.role, model.classes, chances, fingerprint, several)
    return told.fitted_to(labelled)
