"""Blocks: stretches of the tensors of many vectors, read by several threads in a fixed order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from merge_kit.devices import BLOCK as BLOCK
from merge_kit.devices import CPU, Device
from merge_kit.methods.base import Block, Statistics
from merge_kit.order_statistics import Stretch
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec

T = TypeVar("T")
R = TypeVar("R")


class Values(Protocol):
    """One task vector, read stretch by stretch."""

    def read_into(self, name: str, begin: int, out: Tensor) -> None:
        """Fill `out`, flat float32, with values from index `begin` on."""


def stretches(
    specs: Mapping[str, TensorSpec],
    names: Iterable[str],
    *,
    block: int = BLOCK,
    whole: bool = False,
) -> list[Stretch]:
    """Cut tensors into blocks, or leave them whole; the cuts depend on the shapes alone."""
    found = []
    for name in names:
        size = specs[name].elements
        step = max(size, 1) if whole else block
        found += [Stretch(name, at, min(step, size - at)) for at in range(0, size, step)]
    return found


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Torch works with one thread in every worker; yields how many workers may run.

    Reductions and linear algebra depend on torch's number of threads; blocks do not.
    """
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        torch.set_num_threads(workers)


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = CPU.ahead
) -> Iterator[R]:
    """Results in the order of the items, at most a few for each worker ahead of the reader."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class BlockReader:
    """The weights of all vectors, block by block, read by several threads in a fixed order."""

    base: Tensors
    vectors: tuple[Values, ...]
    names: tuple[str, ...]
    """The tensors that are read."""
    workers: int
    ids: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    seed: int = 0
    whole: bool = False
    """Whether blocks are whole tensors."""
    change: Callable[[Block], Tensor] | None = None
    """What is done to the values of a block before anything else."""
    statistics: tuple[Tensors, ...] = ()
    """What the sites published beside their vectors, of the kind `kind`."""
    kind: Statistics | None = None
    device: Device = CPU
    """Where blocks are worked on."""
    _local: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def stretches(self) -> list[Stretch]:
        """Where the blocks lie."""
        size, whole = self.device.block, self.whole
        return stretches(self.base.specs, self.names, block=size, whole=whole)

    @cached_property
    def _longest(self) -> int:
        return max((self.device.block, *(stretch.size for stretch in self.stretches)))

    def only(self, chosen: Sequence[int]) -> BlockReader:
        """A reader of some of the vectors."""
        return replace(
            self,
            vectors=tuple(self.vectors[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen) if self.ids else (),
            sites=tuple(self.sites[i] for i in chosen) if self.sites else (),
            statistics=tuple(self.statistics[i] for i in chosen) if self.statistics else (),
        )

    def block(self, stretch: Stretch) -> Block:
        """Read one block; its values are overwritten by the same thread's next one."""
        values = self._kept("values", stretch.size, len(self.vectors), torch.float32)
        for row, vector in zip(values, self.vectors, strict=True):
            vector.read_into(stretch.tensor, stretch.begin, row)
        spec = self.base.specs[stretch.tensor]
        start = self._start(stretch)
        block = Block(
            tensor=stretch.tensor,
            shape=spec.shape,
            begin=stretch.begin,
            values=self._moved(values),
            start=self._moved(start),
            ids=self.ids,
            sites=self.sites,
            seed=self.seed,
            statistics=self._statistics_of(stretch),
        )
        if self.change is not None:
            # Vector by vector: what a change takes on the way, it takes for one of them.
            for row in range(len(values)):
                block.values[row] = self.change(_alone(block, row))[0]
        return block

    def _statistics_of(self, stretch: Stretch) -> Tensor | None:
        files = self.statistics
        if not files or any(stretch.tensor not in file.specs for file in files):
            return None
        if self.kind == "gram":
            return self._moved(torch.stack([file.read(stretch.tensor) for file in files]))
        found = torch.empty(len(files), stretch.size)
        for row, file in zip(found, files, strict=True):
            file.read_into(stretch.tensor, stretch.begin, row)
        return self._moved(found)

    def _start(self, stretch: Stretch) -> Tensor:
        dtype = self.base.specs[stretch.tensor].dtype
        start = self._kept("start", stretch.size, 1, torch.float64)[0]
        for at in range(0, stretch.size, BLOCK):
            read = self._kept("read", min(BLOCK, stretch.size - at), 1, dtype)[0]
            self.base.read_into(stretch.tensor, stretch.begin + at, read)
            start[at : at + BLOCK] = read
        return start

    def _kept(self, what: str, size: int, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, size) of memory that a thread uses again and again.

        New memory for each block, between small results that stay, would scatter the heap.
        """
        # A first pass that starts inside a block of another must not overwrite it.
        if getattr(self._local, "depth", 0) > 1:
            return torch.empty(rows, size, dtype=dtype)
        name = f"{what} {dtype}"
        if not hasattr(self._local, name):
            length = rows * self._longest
            # Pages that no block has reached yet take no memory. Whole tensors lie in plain memory:
            # what a device keeps for itself must stay small.
            plain = self._longest > self.device.block
            made = torch.empty(length, dtype=dtype) if plain else self.device.buffer(length, dtype)
            setattr(self._local, name, made)
        kept: Tensor = getattr(self._local, name)[: rows * size]
        return kept.view(rows, size)

    def _moved(self, values: Tensor) -> Tensor:
        # From plain memory this waits, from a device's buffers the lane does.
        return values.to(self.device.place, non_blocking=True)

    def each(
        self, function: Callable[[Block], R], parts: Sequence[Stretch] | None = None
    ) -> Iterator[tuple[Stretch, R]]:
        """A function's result for every block, or for some, in order.

        The function works on the reader's device; what it gives must lie on the CPU.
        """

        def work(stretch: Stretch) -> tuple[Stretch, R]:
            self._local.depth = getattr(self._local, "depth", 0) + 1
            try:
                with self.device.lane():
                    return stretch, function(self.block(stretch))
            finally:
                self._local.depth -= 1

        inside = getattr(self._local, "depth", 0) > 0
        chosen = self.stretches if parts is None else parts
        ahead = 1 if self.whole else self.device.ahead
        return in_order(work, chosen, 1 if inside else self.workers, ahead)


def _alone(block: Block, row: int) -> Block:
    """One vector of a block."""
    rows = slice(row, row + 1)
    return replace(block, values=block.values[rows], ids=block.ids[rows], sites=block.sites[rows])
