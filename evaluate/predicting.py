"""From models and labelled images to probabilities; what has been computed is kept and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from evaluate import kept
from evaluate.labelled import LabelledSet
from evaluate.models import AnyModel, Imported, Model
from evaluate.predictions import Predictions, read_imported
from evaluate.processes import Group
from finetune import network
from finetune.pixels import Images, read_pixels, stored_size
from merge_kit.checkpoints import Checkpoint
from merge_kit.configuration import CONFIG
from merge_kit.errors import DataError, MergeKitError, UsageError, VectorError
from merge_kit.files import sha256_file
from merge_kit.plain import Sound, sound
from merge_kit.remembered import check_unchanged, look

Batch: TypeAlias = Sequence[int]
"""Rows of the labelled set."""
Stage = Callable[[str, int, int], None]

BATCH = 64
"""Images of a batch: its composition may show in the last bits, so it never changes."""
HELD = 2**30
"""Bytes of decoded images that are in memory at once; a batch at least."""


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

    Batch i holds the cases from `BATCH` * i on. Its outputs are kept in `cache` as soon as they are
    there (see `evaluate.kept`), so that a killed call goes on where it was and a second one runs
    no model and decodes nothing. Cases that are added at the end leave the batches before them as
    they are. A batch with an unreadable image is not kept.

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
    run = _Run(labelled, device, cache, precision, skip_unreadable, progress)
    with group.together():
        if group.size > 1 and cache is None:
            raise UsageError("several processes need a folder to share their predictions in.")
        work = {place: run.work(one) for place, one in enumerate(models) if isinstance(one, Model)}
        run.complete(list(work.values()), group.share(run.batches))
    if not group.first:
        return None
    run.complete(list(work.values()), run.batches)
    rows = np.flatnonzero(run.readable)
    if not len(rows):
        raise DataError("no image can be read: check the image folder and the file formats.")
    found = []
    for place, one in enumerate(models):
        if isinstance(one, Imported):
            told = read_imported(
                one.file, labelled, model=one.name, role=one.role, listed=listed, restrict=True
            )
        else:
            told = work[place].predictions(labelled)
        found.append(told.take(rows))
    return Predicted(labelled.take(rows), tuple(found), tuple(run.problems.values()))


@dataclass(slots=True)
class _Work:
    """One model and its outputs by the first row of each batch, (b, C) float32."""

    model: Model
    fingerprint: str
    key: str
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def load(self) -> nn.Module:
        """The network, with the very weights of the fingerprint."""
        with Checkpoint(self.model.folder) as file:
            found, checked = look(file, Sound, sound)
            loaded = network.load(self.model.folder)
            check_unchanged(file, checked)
        if found.fingerprint != self.fingerprint:
            raise VectorError(
                f"{self.model.folder} changed while it was used: let whatever writes there finish, "
                "then run the same command again."
            )
        return loaded

    def predictions(self, labelled: LabelledSet) -> Predictions:
        """Of all rows; those of unreadable images mean nothing."""
        logits = torch.cat([self.outputs[start] for start in sorted(self.outputs)]).double()
        several = labelled.multi_label
        chances = logits.sigmoid() if several else logits.softmax(dim=1)
        found = Predictions(
            self.model.name,
            self.model.role,
            self.model.classes,
            chances.numpy(),
            self.fingerprint,
            several,
        )
        return found.fitted_to(labelled)


class _Run:
    """The images of one call, and what is known of them so far."""

    def __init__(
        self,
        labelled: LabelledSet,
        device: torch.device,
        cache: Path | None,
        precision: str,
        skip_unreadable: bool,
        progress: Stage | None,
    ) -> None:
        self._labelled, self._device, self._cache = labelled, device, cache
        self._precision = network.resolved(precision, device)
        self._skip = skip_unreadable
        self._report = progress or (lambda name, done, of: None)
        self.batches = list(network.chunks(len(labelled), BATCH))
        self._chunks = {
            batch[0]: kept.chunk_key(labelled.keys[batch[0] : batch[-1] + 1])
            for batch in self.batches
        }
        self.readable = np.ones(len(labelled), dtype=bool)
        self.problems: dict[int, str] = {}

    def work(self, model: Model) -> _Work:
        """What there is to do for a model."""
        if not self._labelled.cases or not self._labelled.keys:
            raise DataError("the labelled set has no images to predict: load it from a table.")
        with Checkpoint(model.folder) as file:
            fingerprint = look(file, Sound, sound)[0].fingerprint
        config = sha256_file(model.folder / CONFIG)
        key = kept.model_key(fingerprint, config, model.preprocessing.hash, self._precision)
        if self._cache:
            kept.tidy(self._cache, key)
        return _Work(model, fingerprint, key)

    def complete(self, works: Sequence[_Work], batches: Sequence[Batch]) -> None:
        """Read or compute the outputs of every model for these batches.

        Models that look at images alike share what is decoded.
        """
        alike: dict[str, list[_Work]] = {}
        for work in works:
            self._read(work, batches)
            alike.setdefault(work.model.preprocessing.hash, []).append(work)
        for group in alike.values():
            missing = [b for b in batches if any(b[0] not in work.outputs for work in group)]
            side = stored_size(group[0].model.preprocessing)
            held = max(1, HELD // (3 * side * side * BATCH))
            for places in network.chunks(len(missing), held):
                self._compute(group, [missing[place] for place in places])

    def _read(self, work: _Work, batches: Sequence[Batch]) -> None:
        for batch in batches:
            if self._cache and batch[0] not in work.outputs:
                shape = len(batch), len(work.model.classes)
                logits = kept.read(self._cache, work.key, self._chunks[batch[0]], shape)
                if logits is not None:
                    work.outputs[batch[0]] = logits

    def _compute(self, group: Sequence[_Work], batches: Sequence[Batch]) -> None:
        """Decode these batches once, and run each model on those that it lacks."""
        preprocessing = group[0].model.preprocessing
        rows = [row for batch in batches for row in batch]
        cases = [self._labelled.cases[row] for row in rows]
        pixels, problems = read_pixels(
            cases,
            preprocessing,
            skip_unreadable=self._skip,
            progress=lambda done, of: self._report("decoding", done, of),
        )
        self.problems |= {rows[place]: told for place, told in problems.items()}
        self.readable[[rows[place] for place in problems]] = False
        images = Images(tuple(cases), pixels, preprocessing)
        at = {row: place for place, row in enumerate(rows)}
        for work in group:
            missing = [batch for batch in batches if batch[0] not in work.outputs]
            if not missing:
                continue
            model = work.load().to(self._device)
            for done, batch in enumerate(missing, 1):
                self._run(work, model, batch, images.take([at[row] for row in batch]))
                self._report(work.model.name, done, len(missing))

    def _run(self, work: _Work, model: nn.Module, batch: Batch, images: Images) -> None:
        places = np.flatnonzero(self.readable[list(batch)])
        logits = torch.zeros(len(batch), len(work.model.classes))
        if len(places):
            try:
                found = network.logits(
                    model,
                    images.take(places.tolist()),
                    self._device,
                    batch_size=BATCH,
                    precision=self._precision,
                )
            except torch.OutOfMemoryError as error:
                raise MergeKitError(
                    f"{self._device} has too little memory for {BATCH} images of "
                    f"'{work.model.name}' at once: free some, or use --device cpu."
                ) from error
            if found.shape[1] != logits.shape[1]:
                raise VectorError(
                    f"{work.model.folder} gives {found.shape[1]} outputs for "
                    f"{logits.shape[1]} classes: correct its config.json."
                )
            logits[places] = found
        work.outputs[batch[0]] = logits
        if self._cache and len(places) == len(batch):
            kept.write(self._cache, work.key, self._chunks[batch[0]], logits)
