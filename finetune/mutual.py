"""A private teacher that learns beside the federation's network, each from the other.

FedKD (arXiv 2108.13323, section "Mutual distillation"), and FedMIC (arXiv 2407.02261) after it:
what travels is the small network's vector, the teacher stays at the site and may be of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from finetune import network
from finetune.feed import draw_seed
from finetune.losses import divergence
from finetune.optimizing import optimization
from finetune.tasks import Report, Task, restore_rows, train_head
from finetune.validating import Best, or_none, validate

_SMALLEST = 1e-2
"""Of the two task losses together: what they scale must not grow without bound as they vanish."""
VALIDATION = "teacher validation"


class Companion:
    """The moving parts of a private teacher's training: what a checkpoint has to hold of it.

    For logits z, features h and task losses L of the teacher (t) and the student (s), both learn
    from each other by

        (KL(t || s) + KL(s || t) + w |h_t - W h_s|^2 / d) / (L_t + L_s)

    where W is learnt too, and what one says is no parameter of the other's KL term; so are the task
    losses below the line none: they only say how far either is to be trusted.
    """

    def __init__(self, task: Task, total: int) -> None:
        assert task.teacher is not None  # or there is no companion
        found, options = task.teacher, task.options
        self.model = found.model.to(task.device)
        self.model.to(memory_format=torch.channels_last)
        self.task = replace(
            task,
            model=self.model,
            train=found.train,
            validation=found.validation,
            options=options.model_copy(update={"head_steps": found.head_steps}),
            teacher=None,
        )
        self._weight = options.mutual_features
        # Drawn apart from all else, and small, as torch's own linear layers are.
        generator = torch.Generator().manual_seed(draw_seed(options.seed, "mutual", 0))
        wide, narrow = network.width_of(self.model), network.width_of(task.model)
        drawn = torch.rand(wide, narrow, generator=generator) * 2 - 1
        self.map = nn.Parameter((drawn / math.sqrt(narrow)).to(task.device))
        self.optimizer, self.scheduler = optimization(
            self.model, options, options.mutual_rate, total, [self.map]
        )
        self.best = Best(options.select)
        self.objective, self.weighted = self.task.objective(), options.balance == "weights"
        self.head_start: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._listen("teacher", self.model)
        self._listen("student", task.model)

    def _listen(self, who: str, model: nn.Module) -> None:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._features[who] = inputs[0].flatten(1).float()

        self._handles.append(network.head_of(model).register_forward_pre_hook(keep))

    def close(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()

    def start(self, report: Report) -> None:
        """Its own classifier on its frozen backbone comes first, as the student's does."""
        train_head(self.task, report)
        head = network.head_of(self.model)
        self.head_start = {n: p.detach().clone() for n, p in head.named_parameters()}
        self.scheduler.step_update(0)

    def lesson(self, outputs: Tensor, loss: Tensor, view: Tensor, indices: Sequence[int]) -> Tensor:
        """What the loss of a batch gains by the teacher: its own, and what passes between both.

        Parameters
        ----------
        outputs
            The student's, (b, C) float32; it has just computed them.
        loss
            The student's task loss, a scalar.
        view
            (b, 3, H, W): the images as the teacher sees them.
        """
        options = self.task.options
        network.training_mode(self.model, options.norm if len(indices) > 1 else "frozen")
        with network.autocast(self.task.device, options.precision):
            said = self.model(view)
        said = said.float()
        own = self.objective.loss(said, indices, weighted=self.weighted)
        seen, several = self.task.seen.to(outputs.device), self.task.multi_label
        apart = divergence(outputs, said, seen, multi_label=several)
        apart = apart + divergence(said, outputs, seen, multi_label=several)
        if self._weight:
            mapped = self._features["student"] @ self.map.T
            distance = functional.mse_loss(mapped, self._features["teacher"])
            apart = apart + self._weight * distance
        return own + apart / (loss + own).detach().clamp(min=_SMALLEST)

    def step(self, step: int) -> None:
        """One step of the optimizer; `step` steps have then been done."""
        if self.task.options.clip_norm:
            nn.utils.clip_grad_norm_([*self.model.parameters(), self.map],
                                     self.task.options.clip_norm)  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad()
        restore_rows(
            network.head_of(self.model), self.head_start, self.task.seen.to(self.task.device)
        )
        self.scheduler.step_update(step)

    def validate(self, step: int, report: Report) -> dict[str, float | None]:
        """Figures of the teacher; it is kept if it is better."""
        figures = validate(self.model, self.task, report, VALIDATION)
        self.best.offer(figures, step, self.model)
        return {
            "teacher_loss": figures.loss,
            "teacher_balanced_accuracy": or_none(figures.balanced_accuracy),
            "teacher_macro_auroc": or_none(figures.macro_auroc),
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "map": self.map.detach(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "head_start": self.head_start,
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, told: Mapping[str, Any]) -> None:
        """Back to where `state_dict` was."""
        self.model.load_state_dict(told["model"])
        with torch.no_grad():
            self.map.copy_(told["map"])
        self.optimizer.load_state_dict(told["optimizer"])
        self.scheduler.load_state_dict(told["scheduler"])
        self.head_start = told["head_start"]
        self.best.load_state_dict(told["best"])
