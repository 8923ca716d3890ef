"""Local superior soups: several members trained one after another, whose mean is published.

arXiv 2410.23660, algorithm 1, as its authors' code has it: the members are those that were trained,
the start is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from finetune.feed import draw_seed
from finetune.options import TrainingOptions
from merge_kit.errors import UsageError

Weights = dict[str, Tensor]


class Soup:
    """The members so far; the model is the one that is being trained.

    Parameters
    ----------
    start
        The weights of the body that all sites start from.
    total
        Steps of all members together, shared alike.

    Raises
    ------
    UsageError
        There are fewer steps than members.
    """

    def __init__(self, start: Mapping[str, Tensor], options: TrainingOptions, total: int) -> None:
        if total < options.soup:
            raise UsageError(
                f"--soup {options.soup} takes a step for each member, and there are {total} in "
                "all: give more --steps or a smaller --soup."
            )
        self._start, self._options = start, options
        self._borders = [total * index // options.soup for index in range(options.soup + 1)]
        self.members: list[Weights] = []

    @property
    def longest(self) -> int:
        """Steps of the longest member."""
        return max(end - begin for begin, end in pairwise(self._borders))

    def begun(self, step: int) -> int:
        """The step at which the member began that is trained after so many steps."""
        return max(border for border in self._borders if border <= step)

    def is_border(self, step: int) -> bool:
        """Whether a member is complete after so many steps."""
        return step in self._borders[1:]

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """The model is a member; it becomes the mean of all, from which the next one starts."""
        self.members.append({n: p.detach().clone() for n, p in _trained(model).items()})
        for name, parameter in _trained(model).items():
            parameter.copy_(_mean([member[name] for member in self.members]))

    @contextmanager
    def put(self, model: nn.Module) -> Iterator[None]:
        """The model with the mean of the members and itself; its own weights are back afterwards.

        Between two members it is the mean already.
        """
        own = {n: p.detach().clone() for n, p in _trained(model).items()}
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(_mean([*(m[name] for m in self.members), own[name]]))
        try:
            yield
        finally:
            _set(model, own)

    @contextmanager
    def between(self, model: nn.Module, step: int) -> Iterator[None]:
        """The model at a random point between the members and itself, uniform on their simplex.

        Gradients that are found there become those of its own weights, which are back afterwards.
        """
        if not self.members:
            yield
            return
        seed = draw_seed(self._options.seed, "soup", step)
        drawn = torch.rand(
            len(self.members) + 1,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        logs = -torch.log1p(-drawn)
        shares: list[float] = (logs / logs.sum()).tolist()
        own = {n: p.detach().clone() for n, p in _trained(model).items()}
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.mul_(shares[-1])
                for member, share in zip(self.members, shares, strict=False):
                    parameter.add_(member[name], alpha=share)
        try:
            yield
        finally:
            _set(model, own)
            for parameter in _trained(model).values():
                if parameter.grad is not None:
                    parameter.grad.mul_(shares[-1])

    @torch.no_grad()
    def steer(self, model: nn.Module) -> None:
        """Add the gradient of affinity |theta - theta_0| - diversity mean_j |theta - theta_j|.

        Euclidean lengths over the body; where one is 0 it has no gradient.
        """
        count = max(len(self.members), 1)
        points = [(self._start, self._options.soup_affinity)]
        points += [(member, -self._options.soup_diversity / count) for member in self.members]
        body = {n: p for n, p in _trained(model).items() if n in self._start and p.grad is not None}
        for point, coefficient in points:
            gaps = {name: parameter - point[name] for name, parameter in body.items()}
            length = torch.linalg.vector_norm(torch.stack([gap.norm() for gap in gaps.values()]))
            if float(length):
                for name, gap in gaps.items():
                    gradient = body[name].grad
                    assert gradient is not None
                    gradient.add_(gap / length, alpha=coefficient)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _mean(weights: list[Tensor]) -> Tensor:
    # Over differences, so that what all have alike stays as it is to the bit.
    first = weights[0]
    return first + torch.stack([other - first for other in weights]).mean(dim=0)


@torch.no_grad()
def _set(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in _trained(model).items():
        parameter.copy_(weights[name])
