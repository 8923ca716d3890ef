"""The training loop: the whole network at a low learning rate, resumable to the byte on the CPU."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune import levers, lora, network
from finetune.feed import Batch, Feed, draw_seed
from finetune.mutual import Companion
from finetune.objectives import told_of
from finetune.optimizing import optimization
from finetune.pixels import Images, augment
from finetune.soup import Soup
from finetune.tasks import Report, Task, restore_rows, train_head
from finetune.validating import Best, or_none, validate
from merge_kit.errors import TrainingError, UsageError
from merge_kit.files import canonical_json, sha256_bytes, write_atomic
from merge_kit.forms import Factors

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of a training: the weights that were kept and what led there."""

    state: dict[str, Tensor]
    steps: int
    """Steps after which they were kept; 0 is the head alone."""
    epochs: int
    teacher: dict[str, Tensor] | None = None
    """Weights of the private teacher that were kept."""
    factors: dict[str, Factors] | None = None
    """With LoRA: what each adapted weight has learnt; all else is as it was, or in the head."""


def train(task: Task, checkpoint: Path, report: Report) -> Trained:
    """Train from the state in `checkpoint` if it is there, else from the model as it is.

    The order of the images, the augmentation and every other draw depend only on the seed and the
    step, and the checkpoint holds the rest, so a run that was killed goes on to the same weights.

    Raises
    ------
    TrainingError
        The loss is not finite.
    """
    loop = _Loop(task, report)
    if checkpoint.is_file():
        loop.restore(checkpoint)
    else:
        train_head(task, report)
        loop.start()
        loop.save(checkpoint)
    loop.run(checkpoint)
    if loop.companion:
        loop.companion.close()
    state, factors, options = loop.best.state, None, task.options
    if options.lora:
        lora.remove(loop.model)
        state, factors = lora.plain(state, options.lora, options.lora_alpha)
    epochs = math.ceil(loop.best.step / loop.updates)
    teacher = loop.companion.best.state if loop.companion else None
    return Trained(state, loop.best.step, epochs, teacher, factors)


class _Loop:
    """The moving parts of a training: what a checkpoint has to hold."""

    def __init__(self, task: Task, report: Report) -> None:
        options = task.options
        if options.mutual and not task.teacher:
            raise UsageError("'mutual' is for 'merge-kit finetune' alone: leave it out here.")
        self.task, self.report = task, report
        self.model = task.model.to(task.device)
        levers.freeze(self.model, options)
        if options.lora:
            lora.attach(self.model, options.lora, options.lora_alpha, options.seed)
        wanted = options.soup or (options.distance and not options.lora)
        self.anchor = levers.anchor_of(self.model) if wanted else {}
        self.average = levers.Average()
        self.model.to(memory_format=torch.channels_last)
        per_step = options.batch_size * options.accumulate
        self.updates = max(1, math.ceil(len(task.train) / per_step))
        whole = options.epochs is not None
        self.total = round(self.updates * (options.epochs or 0)) if whole else options.steps
        self.interval = max(1, math.ceil(self.total / options.validations))
        self.soup = Soup(self.anchor, options, self.total) if options.soup else None
        span = self.soup.longest if self.soup else self.total
        self.optimizer, self.scheduler = optimization(
            self.model, options, options.learning_rate, span
        )
        self.ema = ModelEmaV3(self.model, decay=options.ema) if options.ema else None
        self.companion = Companion(task, self.total) if task.teacher else None
        self.step = 0
        self.best = Best(options.select)
        self.loss_sum, self.loss_count = 0.0, 0
        self.objective, self.weighted = task.objective(), options.balance == "weights"
        self.masses = self.objective.masses(weighted=self.weighted)
        self.identity = task_identity(task)
        self.feed = Feed(task.train, options, self.updates, self.total, self.objective.chances)
        head = network.head_of(self.model)
        self.head_start = {n: p.detach().clone() for n, p in head.named_parameters()}

    def start(self) -> None:
        """Step 0: the head alone is the first candidate."""
        if self.ema:
            self.ema.module.load_state_dict(self.model.state_dict())
        self.scheduler.step_update(0)
        if self.companion:
            self.companion.start(self.report)
        self._validate()

    def run(self, checkpoint: Path) -> None:
        """Train to the end, saving at each validation and every minute."""
        saved = time.monotonic()
        while self.step < self.total and self.best.stale < self.task.options.patience:
            try:
                self._update()
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"{self.task.device} has too little memory for batches of "
                    f"{self.task.options.batch_size}: give a smaller --batch-size and a larger "
                    "--accumulate."
                ) from error
            due = self.step % self.interval == 0 or self.step == self.total
            if due:
                self._validate()
            if due or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save(checkpoint)
                saved = time.monotonic()

    def _update(self) -> None:
        options = self.task.options
        batches = self.feed.step(self.step)
        # Dropout and stochastic depth draw from torch's global generator.
        torch.manual_seed(draw_seed(options.seed, "model", self.step))
        mass = sum(float(self.masses[indices].sum()) for indices, _ in batches)
        ready = self._views(batches, self.task.train)
        with self.soup.between(self.model, self.step) if self.soup else nullcontext():
            total = self._gradients(ready, mass)
            if options.sharpness:
                descend = levers.climb(self.model, options.sharpness)
                self._gradients(ready, mass)
                descend()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is not finite at step {self.step + 1}: "
                "lower --learning-rate, or use --precision float32."
            )
        if options.distance and options.lora:
            lora.pull(self.model, options.distance)
        elif options.distance:
            levers.pull(self.model, self.anchor, options.distance)
        if self.soup:
            self.soup.steer(self.model)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self._step()
        self.loss_sum, self.loss_count = self.loss_sum + total, self.loss_count + 1
        self.report(
            {"event": "step", "step": self.step, "of": self.total, "loss": total, "lr": rate}
        )

    def _views(self, batches: Sequence[Batch], images: Images) -> list[Batch]:
        """A step's batches as a network sees them, the same way each time."""
        options = self.task.options
        generator = torch.Generator().manual_seed(draw_seed(options.seed, "augment", self.step))
        return [
            (
                indices,
                augment(
                    pixels.to(self.task.device),
                    images.preprocessing,
                    options.augment,
                    options.flip,
                    generator,
                ).contiguous(memory_format=torch.channels_last),
            )
            for indices, pixels in batches
        ]

    def _gradients(self, batches: Sequence[Batch], mass: float) -> float:
        """Add the gradients of a step's batches up; gives the mean loss."""
        options, total = self.task.options, 0.0
        views: Sequence[Tensor | None] = [None] * len(batches)
        if self.companion:
            images = self.companion.task.train
            seen = [(indices, images.batch(indices)) for indices, _ in batches]
            views = [view for _, view in self._views(seen, images)]
        for (indices, batch), view in zip(batches, views, strict=True):
            # One image alone has no batch statistics: torch refuses it where a map is one pixel.
            network.training_mode(self.model, options.norm if len(indices) > 1 else "frozen")
            with network.autocast(self.task.device, options.precision):
                outputs = self.model(batch)
            loss = self.objective.loss(outputs.float(), indices, weighted=self.weighted)
            # As in the mean over the whole step, in which nothing may be known of any image.
            share = float(self.masses[indices].sum()) / mass if mass else 0.0
            total += float(loss.detach()) * share
            if self.companion and view is not None:
                loss = loss + self.companion.lesson(outputs.float(), loss, view, indices)
            torch.autograd.backward(loss * share)
        return total

    def _step(self) -> None:
        if self.task.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        restore_rows(
            network.head_of(self.model), self.head_start, self.task.seen.to(self.task.device)
        )
        self.step += 1
        if self.soup and self.soup.is_border(self.step):
            self.soup.add(self.model)
            self.optimizer.state.clear()  # the next member begins as the first one did
        self.scheduler.step_update(self.step - (self.soup.begun(self.step) if self.soup else 0))
        if self.companion:
            self.companion.step(self.step)
        if self.ema:
            self.ema.update(self.model)
        if self.step > self.total * (1 - self.task.options.average):
            self.average.add(self.model)

    def _validate(self) -> None:
        model = self.ema.module if self.ema else self.model
        with self.soup.put(model) if self.soup else self.average.put(model):
            figures = validate(model, self.task, self.report)
            self.best.offer(figures, self.step, model)
        more = self.companion.validate(self.step, self.report) if self.companion else {}
        mean_loss = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        self.report(
            {
                "event": "validation",
                "step": self.step,
                "epoch": self.step / self.updates,
                "train_loss": mean_loss,
                "validation_loss": figures.loss,
                "balanced_accuracy": or_none(figures.balanced_accuracy),
                "macro_auroc": or_none(figures.macro_auroc),
                "best_step": self.best.step,
                **more,
            }
        )

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "head_start": self.head_start,
            "average": [self.average.sums, self.average.count],
            "soup": self.soup.members if self.soup else [],
            "step": self.step,
            "loss": [self.loss_sum, self.loss_count],
            "best": self.best.state_dict(),
            "companion": self.companion.state_dict() if self.companion else None,
            "random": torch.get_rng_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())
        self.report({"event": "checkpoint", "step": self.step})

    def restore(self, path: Path) -> None:
        """Go back to where `save` was."""
        try:
            state = torch.load(path, map_location=self.task.device, weights_only=True)
            if state["identity"] != self.identity:
                raise TrainingError(
                    f"{path} was made from other images, labels or a teacher than can be read now: "
                    "restore them, or remove this file to start this run afresh."
                )
            self._take(state)
        except TrainingError:
            raise
        except Exception as error:  # torch raises nearly anything on a damaged file
            raise TrainingError(
                f"{path} cannot be read: remove it to start this run afresh."
            ) from error
        self.report({"event": "resumed", "step": self.step})

    def _take(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.head_start = state["head_start"]
        sums, self.average.count = state["average"]
        self.average.sums = {n: t.cpu() for n, t in sums.items()}
        if self.soup:
            self.soup.members = state["soup"]
        self.step = state["step"]
        self.loss_sum, self.loss_count = state["loss"]
        self.best.load_state_dict(state["best"])
        if self.companion:
            self.companion.load_state_dict(state["companion"])
        torch.set_rng_state(state["random"].cpu())


def task_identity(task: Task) -> str:
    """Digest of the images and labels in their order, and of a private teacher: what a checkpoint
    goes on with."""
    cases = (*task.train.cases, *task.validation.cases)
    told = [[case.file, *told_of(case)] for case in cases]
    beside = [task.teacher.fingerprint] if task.teacher else []
    return sha256_bytes(canonical_json([*told, *beside]))
