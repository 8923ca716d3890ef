"""A student learns what an ensemble of teachers says of images without labels (FedDF)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from finetune import ensembling, network
from finetune.cases import Case, content_key
from finetune.distillation import Distillation, Weighting
from finetune.feed import draw_seed
from finetune.losses import rarity
from finetune.objectives import Objective, Truth
from finetune.outputs import Outputs, Stage, check_outputs
from finetune.pixels import Images
from finetune.tasks import Report, Task
from finetune.teachers import Teacher
from finetune.training import train
from merge_kit.backbone import NO_WEIGHTS, PRETRAINED
from merge_kit.errors import DataError, UsageError
from merge_kit.files import sha256_bytes, sha256_file


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the teachers together say of n images."""

    logits: Tensor
    """(n, C) float64; minus infinity of a class that nobody knows."""
    features: Tensor | None
    """(n, d) float32, their mean features where they are asked for."""
    shares: tuple[float, ...]
    """How much each teacher had to say, over all images and classes; they sum to 1."""
    cases: tuple[Case, ...]
    """The images that can be read."""
    keys: tuple[str, ...]
    """Their contents, as `finetune.cases.content_key` gives them."""
    left_out: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> Lesson:
        """Of some of the images."""
        chosen = list(rows)
        return Lesson(
            self.logits[chosen],
            None if self.features is None else self.features[chosen],
            self.shares,
            tuple(self.cases[row] for row in chosen),
            tuple(self.keys[row] for row in chosen),
            self.left_out,
        )


def lesson(
    teachers: Sequence[Teacher],
    cases: Sequence[Case],
    keys: Sequence[str],
    recipe: Distillation,
    device: torch.device,
    cache: Path | None,
    *,
    labelled: Sequence[Case] | None = None,
    skip_unreadable: bool = False,
    progress: Stage | None = None,
) -> Lesson:
    """Ask every teacher about every image, once: what they say is kept in `cache`.

    Parameters
    ----------
    keys
        Content of each image, as `finetune.cases.content_key` gives it.
    labelled
        A few labelled images, by which it is learnt how much each teacher counts.

    Raises
    ------
    MergeKitError
        An image cannot be read and `skip_unreadable` is false; no image can be read; or none is of
        a class that a teacher knows.
    """
    _check(teachers, recipe, labelled)
    said, run = _asked(teachers, cases, keys, device, cache, skip_unreadable, progress)
    rows = np.flatnonzero(run.readable).tolist()
    if not rows:
        raise DataError("no image can be read: check the image folder and the file formats.")
    known = torch.stack([teacher.known for teacher in teachers])
    classes = known.shape[1]
    heard = _heard(teachers, [found[rows] for found in said], known)
    weights = _weights(
        teachers, heard, known, recipe.teachers, device, cache, labelled, skip_unreadable, progress
    )
    given = weights.expand(len(teachers), len(rows), classes).where(known[:, None, :], 0.0)
    total = given.sum(dim=(1, 2))
    shares = (total / total.sum()).tolist() if total.sum() else [1 / len(teachers)] * len(teachers)
    features = None
    if recipe.features:
        # Features are of an image and not of a class.
        each = given.mean(dim=2, keepdim=True)
        each = each / each.sum(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        told = [
            found[rows, len(teacher.rows) :] for teacher, found in zip(teachers, said, strict=True)
        ]
        features = sum(part * share for part, share in zip(told, each, strict=True))
        assert isinstance(features, Tensor)  # of one teacher at least
        features = features.float()
    mixed = ensembling.combined(heard, known, weights)
    return Lesson(
        mixed,
        features,
        tuple(shares),
        tuple(cases[row] for row in rows),
        tuple(keys[row] for row in rows),
        tuple(run.problems.values()),
    )


def _check(
    teachers: Sequence[Teacher], recipe: Distillation, labelled: Sequence[Case] | None
) -> None:
    """Refuse what does not go together, before anybody is asked."""
    if (recipe.teachers == "stacking") != (labelled is not None):
        raise UsageError(
            "'teachers: stacking' learns from a few labelled images, and nothing else does: give "
            "--labelled with it, and only with it."
        )
    if not recipe.features:
        return
    if any(teacher.network is None for teacher in teachers):
        raise UsageError(
            "'features' are of models that are here: leave it at 0 where predictions teach."
        )
    if len(widths := {teacher.features for teacher in teachers}) > 1:
        told = " and ".join(map(str, sorted(widths)))
        raise DataError(
            f"the teachers' features have {told} numbers, and cannot be one: leave 'features' at 0."
        )


def _heard(teachers: Sequence[Teacher], said: Sequence[Tensor], known: Tensor) -> Tensor:
    """(N, n, C) float64: what each teacher says of each class of the federation."""
    parts = [
        ensembling.spread(found[:, : len(teacher.rows)], teacher.rows, known.shape[1])
        for teacher, found in zip(teachers, said, strict=True)
    ]
    return ensembling.bounded(torch.stack(parts), known)


def _asked(
    teachers: Sequence[Teacher],
    cases: Sequence[Case],
    keys: Sequence[str],
    device: torch.device,
    cache: Path | None,
    skip_unreadable: bool,
    progress: Stage | None,
) -> tuple[list[Tensor], Outputs]:
    for teacher in teachers:
        if teacher.network is None and (gone := [k for k in keys if k not in teacher.answers]):
            raise DataError(
                f"{len(gone)} of the {len(keys)} images are not among those that "
                f"'{teacher.name}' have been made of: the set has changed since; let the site "
                "label it again with 'merge-kit predict-proxy', give the images as they were, or "
                "leave the site out."
            )
    run = Outputs(
        cases,
        keys,
        device,
        cache,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    # The same networks may be asked about other images, too.
    networks = [one.network and replace(one.network, outputs={}) for one in teachers]
    run.complete([one for one in networks if one], run.batches)
    said = [
        torch.stack([teacher.answers[key] for key in keys]) if one is None else one.logits()
        for teacher, one in zip(teachers, networks, strict=True)
    ]
    for teacher, found in zip(teachers, said, strict=True):
        check_outputs(found, f"'{teacher.name}'")
    return said, run


def _weights(
    teachers: Sequence[Teacher],
    heard: Tensor,
    known: Tensor,
    rule: Weighting,
    device: torch.device,
    cache: Path | None,
    labelled: Sequence[Case] | None,
    skip_unreadable: bool,
    progress: Stage | None,
) -> Tensor:
    """How much each teacher counts, for `ensembling.combined`: (N, 1 or n, 1 or C) float64."""
    if labelled is not None:
        keys = [content_key(case) for case in labelled]
        said, run = _asked(teachers, labelled, keys, device, cache, skip_unreadable, progress)
        rows = np.flatnonzero(run.readable).tolist()
        told = _heard(teachers, [found[rows] for found in said], known)
        labels = torch.tensor([labelled[row].label for row in rows])
        return ensembling.stacked(told, known, labels)
    if rule == "confidence":
        return ensembling.certainty(heard, known)
    return counted(teachers, rule)


def counted(teachers: Sequence[Teacher], rule: Weighting) -> Tensor:
    """How much each teacher counts by the images that it has seen, (N, 1, 1 or C) float64; alike by
    a rule that does not go by them."""
    if rule not in ("classes", "examples", "sqrt-examples"):
        return torch.ones(len(teachers), 1, 1, dtype=torch.float64)
    counts = torch.stack([teacher.counts for teacher in teachers])
    # A model that does not tell its images counts like the mean of those that do.
    own = counts.nanmean(dim=0).nan_to_num(1.0)
    counts = torch.where(counts.isnan(), own, counts)
    if rule == "classes":
        return counts[:, None, :]
    sizes = counts.sum(dim=1)
    return (sizes.sqrt() if rule == "sqrt-examples" else sizes)[:, None, None]


class DistilledObjective:
    """Kullback-Leibler divergence from the teachers' probabilities to the student's, both at a
    temperature T, times T^2 (arXiv 1503.02531, section 2); and, where it is asked for, the squared
    distance of the features over the mean squared length of the teachers'.

    Validation is on what the teachers find most probable: how often the student agrees.
    """

    def __init__(
        self, model: nn.Module, train: Lesson, validation: Lesson, recipe: Distillation
    ) -> None:
        self._train, self._held, self._temperature = train, validation, recipe.temperature
        parts = (train.logits, validation.logits)
        self._targets, self._told = ((p / recipe.temperature).softmax(dim=1).float() for p in parts)
        self._labels = train.logits.argmax(dim=1)
        self.chances = rarity(self._labels)[self._labels]
        self._share = recipe.features
        self._features = torch.empty(0)
        if self._share:
            assert train.features is not None  # the teachers were asked for them
            self._length = train.features.square().sum(dim=1).mean()
            network.head_of(model).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].flatten(1).float()

    def masses(self, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        return self.chances if weighted else torch.ones(len(self._labels), dtype=torch.float64)

    def loss(self, outputs: Tensor, indices: Sequence[int] | None, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        chosen = list(range(len(self._labels)) if indices is None else indices)
        losses = self._divergence(outputs, self._targets[chosen])
        if self._share and indices is not None:
            assert self._train.features is not None
            theirs = self._train.features[chosen].to(outputs.device)
            distance = (self._features - theirs).square().sum(dim=1) / self._length
            losses = losses + self._share * distance
        if not weighted:
            return losses.mean()
        weights = self.chances[chosen].to(losses)
        return (weights * losses).sum() / weights.sum()

    def _divergence(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logs = (outputs / self._temperature).log_softmax(dim=1)
        found = functional.kl_div(logs, targets.to(logs), reduction="none").sum(dim=1)
        return found * self._temperature**2

    def validation_loss(self, outputs: Tensor) -> float:
        """Of the images that nothing is learnt from."""
        return float(self._divergence(outputs, self._told).mean())

    def judged(self, outputs: Tensor) -> tuple[Truth, NDArray[np.float64]]:
        """What the teachers find most probable (n,), and the student's probabilities (n, C)."""
        return self._held.logits.argmax(dim=1).numpy(), outputs.double().softmax(dim=1).numpy()


@dataclass(frozen=True, slots=True)
class DistilledTask(Task):
    """A student's training."""

    lesson: DistilledObjective | None = None

    def objective(self) -> Objective:
        """What is to be lowered."""
        assert self.lesson is not None
        return self.lesson


def digest_of(found: Lesson) -> str:
    """Of all that the teachers say: what a student's training goes on with."""
    parts = [found.logits, *([found.features] if found.features is not None else [])]
    return sha256_bytes(b"".join(part.contiguous().numpy().tobytes() for part in parts))


def split(
    found: Lesson, share: float, seed: int, kin: Sequence[object] | None = None
) -> tuple[Lesson, Lesson]:
    """Images to learn from and images to hold back, drawn by the seed; at least one of each.

    Parameters
    ----------
    kin
        Images with the same one of these stay together; None where each is by itself.

    Raises
    ------
    DataError
        There are fewer than two.
    """
    apart: dict[object, list[int]] = {}
    for row, one in enumerate(kin or range(len(found.cases))):
        apart.setdefault(one, []).append(row)
    parts, count = list(apart.values()), len(apart)
    if count < 2:
        raise DataError("one image is not enough to learn from and to check by: give more.")
    held = min(max(1, round(share * count)), count - 1)
    generator = torch.Generator().manual_seed(draw_seed(seed, "transfer", 0))
    order = torch.randperm(count, generator=generator).tolist()
    kept, back = (
        sorted(row for place in places for row in parts[place])
        for places in (order[held:], order[:held])
    )
    return found.take(kept), found.take(back)


def distil(
    model: nn.Module,
    images: tuple[Images, Images],
    lessons: tuple[Lesson, Lesson],
    recipe: Distillation,
    device: torch.device,
    checkpoint: Path,
    report: Report,
) -> dict[str, Tensor]:
    """The student's weights after its training, which goes on where a killed one stopped.

    Parameters
    ----------
    images
        As the student sees them: those of `lessons`.

    Raises
    ------
    TrainingError
        The loss is not finite, or the checkpoint is damaged.
    DataError
        Features of the teachers have another width than the student's.
    """
    width = network.width_of(model)
    theirs = lessons[0].features
    if theirs is not None and width != theirs.shape[1]:
        raise DataError(
            f"the student's features have {width} numbers, the teachers' {theirs.shape[1]}: leave "
            "'features' at 0."
        )
    seen = lessons[0].logits.isfinite().any(dim=0)
    lesson = DistilledObjective(model, *lessons, recipe)
    task = DistilledTask(model, *images, seen, recipe.options(), device, lesson=lesson)
    return train(task, checkpoint, report).state


def told_of(recipe: Distillation, *, given: bool = False) -> Mapping[str, Any]:
    """A recipe as a provenance states it: with every default, and without a path; where the student
    was `given`, nothing was merged to start from."""
    told = {**recipe.model_dump(mode="json"), "training": recipe.options().model_dump(mode="json")}
    if given:
        told["start"] = None
    student = recipe.student
    if student and student.weights not in (PRETRAINED, NO_WEIGHTS):
        told["student"]["weights"] = f"local file {sha256_file(Path(student.weights))}"
    return told
