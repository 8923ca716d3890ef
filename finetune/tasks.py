"""A site's training task, and its own classifier on the frozen backbone, which comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune import network
from finetune.objectives import ClassObjective, FindingObjective, Objective
from finetune.options import TrainingOptions
from finetune.pixels import Images


@dataclass(frozen=True, slots=True)
class PrivateTeacher:
    """A network of the site's own choice, and the site's images as it sees them."""

    model: nn.Module
    train: Images
    validation: Images
    head_steps: int
    """As in the options; 0 where it brings its classifier along."""
    fingerprint: str
    """Of its first weights."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what."""

    model: nn.Module
    train: Images
    validation: Images
    seen: Tensor
    """(C,) bool: classes that the site has training images of; of findings those that some of them
    have and some do not."""
    options: TrainingOptions
    device: torch.device
    meaning: Tensor | None = None
    """(L, C) bool: the classes that each label stands for; None where every label is a class."""
    multi_label: bool = False
    """An image has any number of the classes, or none."""
    teacher: PrivateTeacher | None = None
    """What learns beside the model and teaches it (`finetune.mutual`)."""

    def objective(self) -> Objective:
        """What is to be lowered."""
        if self.multi_label:
            return FindingObjective(self.train, self.validation, self.seen)
        return ClassObjective(self.train, self.validation, self.seen, self.meaning)


Report = Callable[[Mapping[str, Any]], None]


def train_head(task: Task, report: Report) -> None:
    """Fit the classifier on the frozen backbone's features, in place, with the whole set a step.

    Features come from the centre view in evaluation mode and are computed once; the fit then costs
    seconds. Rows of classes that the site has not seen stay as they are.
    """
    options, head = task.options, network.head_of(task.model)
    if options.head_steps == 0:
        return
    inputs = network.features(
        task.model, task.train, task.device, progress=stage(report, "features")
    ).to(task.device)
    objective = task.objective()
    seen, weighted = task.seen.to(task.device), options.balance != "none"
    start = {name: p.detach().clone() for name, p in head.named_parameters()}
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=options.head_learning_rate, weight_decay=0.0
    )
    rows = next(p for n, p in head.named_parameters() if n == "weight")
    with torch.enable_grad():
        for step in range(options.head_steps):
            rate = 0.5 * (1 + math.cos(math.pi * step / options.head_steps))
            optimizer.param_groups[0]["lr"] = options.head_learning_rate * rate
            optimizer.zero_grad()
            loss = objective.loss(head(inputs).flatten(1), None, weighted=weighted)
            penalty = options.head_decay * rows[seen].square().sum()
            torch.autograd.backward(loss + penalty)
            optimizer.step()
            restore_rows(head, start, seen)
    optimizer.zero_grad()  # else the first step of the whole network would add to these gradients


def restore_rows(head: nn.Module, start: Mapping[str, Tensor], seen: Tensor) -> None:
    """Give the rows of unseen classes their values of `start` back.

    Their gradient is zero, but weight decay would still shrink them.
    """
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter[~seen] = start[name][~seen]


def stage(report: Report, name: str) -> Callable[[int, int], None]:
    """Reports how far one stage of the work is."""
    return lambda done, of: report({"event": "stage", "name": name, "done": done, "of": of})
