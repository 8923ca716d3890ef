"""The optimizer of a network and the course of its learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from finetune.options import TrainingOptions


def optimization(
    model: nn.Module,
    options: TrainingOptions,
    rate: float,
    span: int,
    beside: Sequence[nn.Parameter] = (),
) -> tuple[Optimizer, Scheduler]:
    """Both, for a training of `span` steps whose largest learning rate is `rate`.

    It rises over the share `warmup` of the steps and then falls as a cosine; blocks nearer to the
    input have a smaller one. What is trained `beside` the network never decays.
    """
    optimizer: Optimizer = create_optimizer_v2(
        model,
        opt=options.optimizer,
        lr=rate,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay if options.layer_decay < 1 else None,
    )
    if beside:
        optimizer.add_param_group({"params": list(beside), "lr": rate, "weight_decay": 0.0})
    warmup = round(options.warmup * span)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=max(1, span - warmup),  # timm counts it without a warmup prefix
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=rate / 100,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert scheduler is not None  # there is one called "cosine"
    return optimizer, scheduler
