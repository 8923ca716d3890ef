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
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune import levers, lora, network, scores
from finetune.feed import Feed, draw_seed
from finetune.objectives import told_of
from finetune.pixels import augment
from finetune.soup import Soup
from finetune.tasks import Report, Task, restore_rows, stage, train_head
from merge_kit.errors import TrainingError
from merge_kit.files import canonical_json, sha256_bytes, write_atomic
from merge_kit.forms import Factors

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one validation."""

    loss: float
    balanced_accuracy: float
    macro_auroc: float


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of a training: the weights that were kept and what led there."""

    state: dict[str, Tensor]
    steps: int
    """Steps after which they were kept; 0 is the head alone."""
    epochs: int
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
    state, factors, options = loop.best_state, None, task.options
    if options.lora:
        lora.remove(loop.model)
        state, factors = lora.plain(state, options.lora, options.lora_alpha)
    return Trained(state, loop.best_step, math.ceil(loop.best_step / loop.updates), factors)


class _Loop:
    """The moving parts of a training: what a checkpoint has to hold."""

    def __init__(self, task: Task, report: Report) -> None:
        options = task.options
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
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=options.optimizer,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            layer_decay=options.layer_decay if options.layer_decay < 1 else None,
        )
        span = self.soup.longest if self.soup else self.total
        warmup = round(options.warmup * span)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=max(1, span - warmup),  # timm counts it without a warmup prefix
            warmup_epochs=warmup,
            warmup_prefix=True,
            warmup_lr=options.learning_rate / 100,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        self.ema = ModelEmaV3(self.model, decay=options.ema) if options.ema else None
        self.step = 0
        self.stale = 0
        self.best: Figures | None = None
        self.best_state: dict[str, Tensor] = {}
        self.best_step = 0
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
        self._validate()

    def run(self, checkpoint: Path) -> None:
        """Train to the end, saving at each validation and every minute."""
        saved = time.monotonic()
        while self.step < self.total and self.stale < self.task.options.patience:
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
        generator = torch.Generator().manual_seed(draw_seed(options.seed, "augment", self.step))
        # Dropout and stochastic depth draw from torch's global generator.
        torch.manual_seed(draw_seed(options.seed, "model", self.step))
        mass = sum(float(self.masses[indices].sum()) for indices, _ in batches)
        ready = [
            (
                augment(
                    pixels.to(self.task.device),
                    self.task.train.preprocessing,
                    options.augment,
                    options.flip,
                    generator,
                ).contiguous(memory_format=torch.channels_last),
                indices,
            )
            for indices, pixels in batches
        ]
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

    def _gradients(self, batches: Sequence[tuple[Tensor, list[int]]], mass: float) -> float:
        """Add the gradients of a step's batches up; gives the mean loss."""
        options, total = self.task.options, 0.0
        for batch, indices in batches:
            # One image alone has no batch statistics: torch refuses it where a map is one pixel.
            network.training_mode(self.model, options.norm if len(indices) > 1 else "frozen")
            with network.autocast(self.task.device, options.precision):
                outputs = self.model(batch)
            loss = self.objective.loss(outputs.float(), indices, weighted=self.weighted)
            # As in the mean over the whole step, in which nothing may be known of any image.
            share = float(self.masses[indices].sum()) / mass if mass else 0.0
            torch.autograd.backward(loss * share)
            total += float(loss.detach()) * share
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
        if self.ema:
            self.ema.update(self.model)
        if self.step > self.total * (1 - self.task.options.average):
            self.average.add(self.model)

    def _validate(self) -> None:
        model = self.ema.module if self.ema else self.model
        with self.soup.put(model) if self.soup else self.average.put(model):
            figures = validate(model, self.task, self.report)
            if self._is_better(figures):
                self.best, self.best_step = figures, self.step
                state = model.state_dict()
                self.best_state = {n: t.detach().cpu().clone() for n, t in state.items()}
                self.stale = 0
            else:
                self.stale += 1
        mean_loss = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        self.report(
            {
                "event": "validation",
                "step": self.step,
                "epoch": self.step / self.updates,
                "train_loss": mean_loss,
                "validation_loss": figures.loss,
                "balanced_accuracy": _or_none(figures.balanced_accuracy),
                "macro_auroc": _or_none(figures.macro_auroc),
                "best_step": self.best_step,
            }
        )

    def _is_better(self, figures: Figures) -> bool:
        select = self.task.options.select
        if self.best is None or select == "last":
            return True
        new, old = getattr(figures, select), getattr(self.best, select)
        if math.isnan(new) or new == old:  # small validation sets tie often: the loss decides
            return figures.loss < self.best.loss
        return bool(new > old) or math.isnan(old)

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
            "stale": self.stale,
            "loss": [self.loss_sum, self.loss_count],
            "best": [self.best.loss, self.best.balanced_accuracy, self.best.macro_auroc]
            if self.best
            else None,
            "best_state": self.best_state,
            "best_step": self.best_step,
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
                    f"{path} was made from other images or labels than can be read now: restore "
                    "them, or remove this file to start this run afresh."
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
        self.step, self.stale = state["step"], state["stale"]
        self.loss_sum, self.loss_count = state["loss"]
        self.best = Figures(*state["best"]) if state["best"] else None
        self.best_state = {n: t.cpu() for n, t in state["best_state"].items()}
        self.best_step = state["best_step"]
        torch.set_rng_state(state["random"].cpu())


def task_identity(task: Task) -> str:
    """Digest of the images and labels in their order: what a checkpoint goes on with."""
    cases = (*task.train.cases, *task.validation.cases)
    return sha256_bytes(canonical_json([[case.file, *told_of(case)] for case in cases]))


def validate(model: nn.Module, task: Task, report: Report) -> Figures:
    """Figures on the site's validation images: see `finetune.objectives`."""
    objective = task.objective()
    outputs = network.logits(
        model, task.validation, task.device, progress=stage(report, "validation")
    )
    if not torch.isfinite(outputs).all():
        raise TrainingError(
            "the outputs on the validation images are not finite: "
            "lower --learning-rate, or use --precision float32."
        )
    truth, probabilities = objective.judged(outputs)
    return Figures(
        objective.validation_loss(outputs),
        scores.balanced_accuracy(truth, probabilities),
        scores.macro_auroc(truth, probabilities),
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
