"""Which images a step sees, and reading them while the step before is computed.

Everything here depends only on the seed and the number of the step, so a run can go on anywhere.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from finetune.network import chunks
from finetune.options import TrainingOptions
from finetune.pixels import Images

Batch = tuple[list[int], Tensor]
"""Indices of the images, and their pixels: (b, 3, S, S) uint8."""


def draw_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step; no two streams of a run share one."""
    mixed = seed * 1_000_003 + step
    return (mixed * 31 + sum(purpose.encode()) * 2_654_435_761) % (2**63)


def epoch_order(chances: Tensor, epoch: int, options: TrainingOptions) -> Tensor:
    """Indices of one epoch: a permutation, or with ``sampling`` draws by chances (n,) that favour
    no class (`finetune.objectives`)."""
    generator = torch.Generator().manual_seed(draw_seed(options.seed, "order", epoch))
    if options.balance != "sampling":
        return torch.randperm(len(chances), generator=generator)
    return torch.multinomial(chances, len(chances), replacement=True, generator=generator)


class Feed:
    """The batches of each step.

    `updates` is the number of steps in an epoch, `total` the number of steps of the run; `chances`
    are as for `epoch_order`.
    """

    def __init__(
        self,
        images: Images,
        options: TrainingOptions,
        updates: int,
        total: int,
        chances: Tensor,
    ) -> None:
        self._images, self._options, self._chances = images, options, chances
        self._updates, self._total = updates, total
        self._order: tuple[int, Tensor] | None = None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The batches whose gradients are added in one step; those of the next are read ahead."""
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1].result()
        else:
            batches = self._read(self._indices(step))
        if step + 1 < self._total:
            self._ahead = (step + 1, self._reader.submit(self._read, self._indices(step + 1)))
        return batches

    def _read(self, parts: list[list[int]]) -> list[Batch]:
        return [(indices, self._images.batch(indices)) for indices in parts]

    def _indices(self, step: int) -> list[list[int]]:
        epoch, position = divmod(step, self._updates)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._chances, epoch, self._options))
        size = self._options.batch_size * self._options.accumulate
        chosen: list[int] = self._order[1][position * size : (position + 1) * size].tolist()
        parts = chunks(len(chosen), self._options.batch_size)
        return [chosen[part[0] : part[-1] + 1] for part in parts]
