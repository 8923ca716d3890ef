"""Figures on a site's validation images, and the weights that are kept by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune import network, scores
from finetune.tasks import Report, Task, stage
from merge_kit.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one validation."""

    loss: float
    balanced_accuracy: float
    macro_auroc: float


class Best:
    """The weights that are kept: the last ones, or the best by a figure."""

    def __init__(self, select: str) -> None:
        self._select = select
        self._figures: Figures | None = None
        self.state: dict[str, Tensor] = {}
        self.step = 0
        """After which they were there; 0 is the head alone."""
        self.stale = 0
        """Validations since then without better ones."""

    def offer(self, figures: Figures, step: int, model: nn.Module) -> None:
        """Keep the model's weights if they are better."""
        if self._is_better(figures):
            self._figures, self.step, self.stale = figures, step, 0
            self.state = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
        else:
            self.stale += 1

    def _is_better(self, figures: Figures) -> bool:
        if self._figures is None or self._select == "last":
            return True
        new, old = getattr(figures, self._select), getattr(self._figures, self._select)
        if math.isnan(new) or new == old:  # small validation sets tie often: the loss decides
            return figures.loss < self._figures.loss
        return bool(new > old) or math.isnan(old)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        figures = astuple(self._figures) if self._figures else None
        return {
            "figures": figures, "state": self.state, "step": self.step, "stale": self.stale
        }  # fmt: skip

    def load_state_dict(self, told: Mapping[str, Any]) -> None:
        """Back to where `state_dict` was."""
        self._figures = Figures(*told["figures"]) if told["figures"] else None
        self.state = {name: tensor.cpu() for name, tensor in told["state"].items()}
        self.step, self.stale = told["step"], told["stale"]


def validate(model: nn.Module, task: Task, report: Report, name: str = "validation") -> Figures:
    """Figures on the site's validation images: see `finetune.objectives`.

    Raises
    ------
    TrainingError
        The outputs are not finite.
    """
    objective = task.objective()
    outputs = network.logits(model, task.validation, task.device, progress=stage(report, name))
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


def or_none(value: float) -> float | None:
    """A figure as JSON has it: NaN is null."""
    return None if math.isnan(value) else value
