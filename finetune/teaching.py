"""What a merged model knows, taught to a private model of a site.

The way back of `finetune.mutual`: the merged model stays as it is, and a model of whatever backbone
learns from the site's labels and from what the merged one says of the same images, also of classes
that the site has no image of. The site's validation images choose how far it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune import network, private, training
from finetune.calibrating import backbone_at
from finetune.cases import Case
from finetune.labelling import Labelling
from finetune.losses import divergence
from finetune.objectives import Objective, Truth
from finetune.options import TrainingOptions
from finetune.own_head import check_place
from finetune.run import CHECKPOINT, alone, prepare
from finetune.tasks import Report, Task
from finetune.validating import Figures, validate
from merge_kit.checkpoints import WEIGHTS
from merge_kit.errors import TrainingError
from merge_kit.files import canonical_json, new_folder, sha256_bytes
from merge_kit.site import Site
from merge_kit.tensorfile import fingerprint_file


class TaughtObjective:
    """A site's own loss, and the divergence from what a fixed model says of its images."""

    def __init__(self, own: Objective, told: Tensor, *, multi_label: bool) -> None:
        self._own, self._told, self._several = own, told, multi_label
        self.chances = own.chances

    def masses(self, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        return self._own.masses(weighted=weighted)

    def loss(self, outputs: Tensor, indices: Sequence[int] | None, *, weighted: bool) -> Tensor:
        """See `Objective`. All classes of the fixed model count, also those that the site lacks."""
        told = self._told if indices is None else self._told[list(indices)]
        every = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        apart = divergence(outputs, told.to(outputs), every, multi_label=self._several)
        return self._own.loss(outputs, indices, weighted=weighted) + apart

    def validation_loss(self, outputs: Tensor) -> float:
        """See `Objective`: by the labels alone."""
        return self._own.validation_loss(outputs)

    def judged(self, outputs: Tensor) -> tuple[Truth, NDArray[np.float64]]:
        """See `Objective`: by the labels alone."""
        return self._own.judged(outputs)


@dataclass(frozen=True, slots=True)
class TaughtTask(Task):
    """A private model's training."""

    told: Tensor | None = None
    """(n, C) float32: what the merged model says of the training images."""

    def objective(self) -> Objective:
        """What is to be lowered."""
        assert self.told is not None
        # As it will be used: the classes that the site has no image of may be predicted, too.
        own = super(TaughtTask, self).objective()
        return TaughtObjective(own, self.told, multi_label=self.multi_label)


@dataclass(frozen=True, slots=True)
class Taught:
    """A model that has been written, and the figures on the site's validation images."""

    merged: Figures
    before: Figures | None
    """Of the private model as it was; None where it had no classifier of these classes."""
    after: Figures
    steps: int
    """After which its weights were kept."""
    validation_images: int
    skipped: tuple[str, ...]


def teach(
    site: Site,
    cases: Sequence[Case],
    model: Path,
    into: str,
    options: TrainingOptions,
    out: Path,
    device: torch.device,
    report: Report,
    *,
    skip_unreadable: bool = False,
    stage: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Taught:
    """Write the private model `into` (see `private.open_private`) as it is after its training.

    Called again alike, a training that was killed goes on where it stopped.

    Raises
    ------
    UsageError
        `out` exists or lies in a federation.
    ProvenanceError, BaseMismatchError
        The model is of no federation, or of another one.
    """
    check_place(out)
    backbone_at(site, model)
    labelling = Labelling(site.federation)
    found = private.open_private(into, labelling)
    material = prepare(
        site,
        cases,
        skip_unreadable=skip_unreadable,
        progress=lambda done, of: stage("decoding", done, of),
    )
    beside = private.teacher_of(
        found, material.train, material.validation, options.head_steps, site.root / "cache"
    )
    merged = network.load(model).to(device)
    told = network.logits(
        merged,
        material.train,
        device,
        progress=lambda done, of: stage("the merged model's answers", done, of),
    )
    if not torch.isfinite(told).all():
        raise TrainingError(f"{model} gives outputs that are not finite: give another model.")
    every = torch.ones(len(labelling.space.classes), dtype=torch.bool)
    plain = labelling.task(merged, material.train, material.validation, options, device)
    task = TaughtTask(
        found.model.to(device),
        beside.train,
        beside.validation,
        plain.seen if labelling.multi_label else every,
        options.model_copy(update={"head_steps": beside.head_steps}),
        device,
        plain.meaning,
        labelling.multi_label,
        told=told,
    )
    as_merged = TaughtTask(
        merged, material.train, material.validation, task.seen, options, device, plain.meaning,
        labelling.multi_label, told=told,
    )  # fmt: skip
    before = validate(found.model, task, report) if found.knows else None
    content = [
        private.identity(into), fingerprint_file(model / WEIGHTS),
        options.model_dump(mode="json"), device.type, training.task_identity(task),
    ]  # fmt: skip
    work = site.root / "cache" / f"taught-{sha256_bytes(canonical_json(content))[7:19]}"
    with alone(work):
        trained = training.train(task, work / CHECKPOINT, report)
        found.model.load_state_dict(trained.state)
        after = validate(found.model, task, report)
        with new_folder(out) as folder:
            private.write(folder, found, trained.state)
        (work / CHECKPOINT).unlink(missing_ok=True)
    return Taught(
        validate(merged, as_merged, report),
        before,
        after,
        trained.steps,
        len(material.validation),
        material.skipped,
    )
