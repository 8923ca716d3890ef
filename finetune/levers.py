"""What keeps a site's vector mergeable: what is trained, how far, and to what kind of minimum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.normalization import LayerNorm

from finetune import network
from finetune.options import TrainingOptions
from merge_kit.depth import depths
from merge_kit.errors import UsageError


def freeze(model: nn.Module, options: TrainingOptions) -> None:
    """Leave as it is what the options say is not trained; the classifier is never touched.

    Raises
    ------
    UsageError
        Nothing is left to train.
    """
    head = {id(p) for p in network.head_of(model).parameters()}
    body = {n: p for n, p in model.named_parameters() if id(p) not in head}
    if options.blocks < 1:
        deep = depths(list(body))
        for name, parameter in body.items():
            depth = deep[name]
            parameter.requires_grad_(depth is not None and depth >= 1 - options.blocks)
    if options.norm == "fixed":
        for module in model.modules():
            if isinstance(module, _BatchNorm | LayerNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
    if options.steps and not any(p.requires_grad for p in model.parameters()):
        raise UsageError("nothing is left to train: give larger --blocks, or another --norm.")


def anchor_of(model: nn.Module) -> dict[str, Tensor]:
    """Where the trained weights of the body are now."""
    head = {id(p) for p in network.head_of(model).parameters()}
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in head
    }


@torch.no_grad()
def pull(model: nn.Module, anchor: Mapping[str, Tensor], distance: float) -> None:
    """Add the gradient of distance / 2 |theta - theta_0|^2 over the body.

    L2-SP, arXiv 1802.01483, equation 3; as the proximal term of FedProx, arXiv 1812.06127.
    """
    for name, parameter in model.named_parameters():
        if name in anchor and parameter.grad is not None:
            parameter.grad.add_(parameter - anchor[name], alpha=distance)


@torch.no_grad()
def climb(model: nn.Module, radius: float) -> Callable[[], None]:
    """Go `radius` up the gradient, whose values become those of the next pass back; gives the way
    back down.

    Sharpness-aware minimisation, arXiv 2010.01412, equation 2.
    """
    moved = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for _, gradient in moved]))
    steps = [(parameter, radius / (norm + 1e-12) * gradient) for parameter, gradient in moved]
    for parameter, step in steps:
        parameter.add_(step)
        parameter.grad = None

    @torch.no_grad()
    def descend() -> None:
        for parameter, step in steps:
            parameter.sub_(step)

    return descend


class Average:
    """The mean of the weights after several steps (arXiv 1803.05407), float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """One more."""
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = tensor.detach().cpu().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    @contextmanager
    def put(self, model: nn.Module) -> Iterator[None]:
        """The model with the mean weights; its own are back afterwards."""
        if not self.count:
            yield
            return
        before = {n: t.detach().clone() for n, t in model.state_dict().items()}
        mean = {n: (t / self.count).to(before[n].dtype) for n, t in self.sums.items()}
        model.load_state_dict({**before, **mean})
        try:
            yield
        finally:
            model.load_state_dict(before)
