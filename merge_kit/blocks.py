"""Blocks: stretches of the tensors of many vectors, read by several threads in a fixed order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_kit.methods.base import Block, Scope, Statistics
from merge_kit.notes import Notes
from merge_kit.order_statistics import Stretch, keys_of, kth_largest, signed_keys_of, values_of
from merge_kit.tensorfile import Tensors, TensorSpec

BLOCK = 32768
"""Values of each vector in one block: with its float64 temporaries it stays in the cache."""
_AHEAD = 4
_ALONE = 32
"""Up to so many vectors inner products are computed pair by pair."""
T = TypeVar("T")
R = TypeVar("R")


class Values(Protocol):
    """One task vector, read stretch by stretch."""

    def read_into(self, name: str, begin: int, out: Tensor) -> None:
        """Fill `out`, flat float32, with values from index `begin` on."""


def stretches(
    specs: Mapping[str, TensorSpec], names: Iterable[str], *, whole: bool = False
) -> list[Stretch]:
    """Cut tensors into blocks, or leave them whole; the cuts depend on the shapes alone."""
    found = []
    for name in names:
        size = specs[name].elements
        step = max(size, 1) if whole else BLOCK
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
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = _AHEAD
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


class BlockReader:
    """The weights of all vectors, block by block; see `merge_kit.methods.base.Vectors`."""

    def __init__(
        self,
        base: Tensors,
        vectors: Sequence[Values],
        names: Sequence[str],
        workers: int,
        *,
        ids: tuple[str, ...] = (),
        sites: tuple[str, ...] = (),
        seed: int = 0,
        whole: bool = False,
        change: Callable[[Block], Tensor] | None = None,
        changed_by: Sequence[object] = (),
        notes: Notes | None = None,
        statistics: Sequence[Tensors] = (),
        kind: Statistics | None = None,
    ) -> None:
        self._base, self._vectors, self._names = base, vectors, names
        self._workers, self._ids, self._sites = workers, ids, sites
        self._seed, self._change, self.whole = seed, change, whole
        self._changed_by, self._notes = changed_by, notes
        self._statistics, self._kind = statistics, kind
        self.stretches = stretches(base.specs, names, whole=whole)
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def sites(self) -> tuple[str, ...]:
        """The site of each vector."""
        return self._sites

    @property
    def size(self) -> int:
        """Number of values of each vector."""
        return sum(stretch.size for stretch in self.stretches)

    def only(self, chosen: Sequence[int]) -> BlockReader:
        """A reader of some of the vectors."""
        return BlockReader(
            self._base,
            [self._vectors[i] for i in chosen],
            self._names,
            self._workers,
            ids=tuple(self._ids[i] for i in chosen),
            sites=tuple(self._sites[i] for i in chosen),
            seed=self._seed,
            whole=self.whole,
            change=self._change,
            statistics=[self._statistics[i] for i in chosen] if self._statistics else (),
            kind=self._kind,
        )

    def block(self, stretch: Stretch) -> Block:
        """Read one block; its values are overwritten by the same thread's next one."""
        values = self._buffer(stretch.size)
        for row, vector in zip(values, self._vectors, strict=True):
            vector.read_into(stretch.tensor, stretch.begin, row)
        spec = self._base.specs[stretch.tensor]
        start = torch.empty(stretch.size, dtype=spec.dtype)
        self._base.read_into(stretch.tensor, stretch.begin, start)
        block = Block(
            tensor=stretch.tensor,
            shape=spec.shape,
            begin=stretch.begin,
            values=values,
            start=start.double(),
            ids=self._ids,
            sites=self._sites,
            seed=self._seed,
            statistics=self._statistics_of(stretch),
        )
        return block if self._change is None else replace(block, values=self._change(block))

    def _statistics_of(self, stretch: Stretch) -> Tensor | None:
        files = self._statistics
        if not files or any(stretch.tensor not in file.specs for file in files):
            return None
        if self._kind == "gram":
            return torch.stack([file.read(stretch.tensor) for file in files])
        found = torch.empty(len(files), stretch.size)
        for row, file in zip(found, files, strict=True):
            file.read_into(stretch.tensor, stretch.begin, row)
        return found

    def _buffer(self, size: int) -> Tensor:
        # A first pass that starts inside a block of another must not overwrite it.
        if size > BLOCK or getattr(self._local, "depth", 0) > 1:
            return torch.empty(len(self._vectors), size)
        if not hasattr(self._local, "values"):
            self._local.values = torch.empty(len(self._vectors) * BLOCK)
        kept: Tensor = self._local.values[: len(self._vectors) * size]
        return kept.view(len(self._vectors), size)

    def each(
        self, function: Callable[[Block], R], parts: Sequence[Stretch] | None = None
    ) -> Iterator[tuple[Stretch, R]]:
        """A function's result for every block, or for some, in order."""

        def work(stretch: Stretch) -> tuple[Stretch, R]:
            self._local.depth = getattr(self._local, "depth", 0) + 1
            try:
                return stretch, function(self.block(stretch))
            finally:
                self._local.depth -= 1

        inside = getattr(self._local, "depth", 0) > 0
        chosen = self.stretches if parts is None else parts
        ahead = 1 if self.whole else _AHEAD
        return in_order(work, chosen, 1 if inside else self._workers, ahead)

    def total(self, measure: Callable[[Block], Tensor]) -> Tensor:
        """Sum of a measure over all blocks, added in their order."""
        return sum_in_order(self.totals(measure))

    def totals(self, measure: Callable[[Block], Tensor]) -> dict[str, Tensor]:
        """Sum of a measure over the blocks of each tensor."""
        found: dict[str, Tensor] = {}
        for stretch, part in self.each(measure):
            before = found.get(stretch.tensor)
            found[stretch.tensor] = part if before is None else before + part
        return found

    def extremes(self, measure: Callable[[Block], Tensor]) -> Tensor:
        """(2, N): smallest and largest value of each row of a measure (N, n), over all blocks."""
        low = high = None
        for _, part in self.each(lambda block: torch.stack(measure(block).aminmax(dim=1))):
            low = part[0] if low is None else torch.minimum(low, part[0])
            high = part[1] if high is None else torch.maximum(high, part[1])
        if low is None or high is None:
            return torch.zeros(2, len(self))
        return torch.stack([low, high])

    def kth_largest(
        self,
        measure: Callable[[Block], Tensor],
        fraction: float,
        scope: Scope,
        noted: str | None = None,
    ) -> dict[str, Tensor]:
        """The exact k-th largest of each row, k = int(fraction d) + 1, or 0 where k exceeds d.

        With `noted`, a name for the measure, vectors that were measured before are not read again.
        """
        subject = ["kth largest", noted, fraction, scope, *self._subject()]
        keys = list(dict.fromkeys(self._names)) if scope == "tensor" else [""]
        known = self._notes.read(subject) if self._notes and noted else {}
        missing = [index for index, name in enumerate(self._ids) if name not in known]
        if not self._notes or not noted or len(self._ids) != len(self):
            found = self._kth_largest(measure, fraction, scope)
        else:
            if missing:
                new = self.only(missing)._kth_largest(measure, fraction, scope)
                figures = {
                    self._ids[index]: [new[key][row].item() for key in keys]
                    for row, index in enumerate(missing)
                }
                self._notes.add(subject, figures)
                known = {**known, **figures}
            columns = zip(*(known[name] for name in self._ids), strict=True)
            found = {key: torch.tensor(column) for key, column in zip(keys, columns, strict=True)}
        return {name: found[name if scope == "tensor" else ""] for name in self._names}

    def _subject(self) -> list[object]:
        return [list(self._names), list(self._changed_by)]

    def _kth_largest(
        self, measure: Callable[[Block], Tensor], fraction: float, scope: Scope
    ) -> dict[str, Tensor]:
        groups: dict[str, list[Stretch]] = {}
        for stretch in self.stretches:
            groups.setdefault(stretch.tensor if scope == "tensor" else "", []).append(stretch)
        found = {}
        for group, parts in groups.items():
            rank = int(fraction * sum(part.size for part in parts)) + 1
            keys = kth_largest(
                self,
                lambda block: keys_of(measure(block)),
                parts,
                [rank],
                divisible=not self.whole,
            )
            found[group] = torch.from_numpy(keys[0].view(np.float32))
        return found

    def order_statistics(self, measure: Callable[[Block], Tensor], ranks: Sequence[int]) -> Tensor:
        """The exact k-th largest value of each row, of any sign, for every k of `ranks`."""
        if not self.stretches:
            return torch.zeros(len(ranks), len(self))
        keys = kth_largest(
            self,
            lambda block: signed_keys_of(measure(block)),
            self.stretches,
            ranks,
            divisible=not self.whole,
        )
        return torch.from_numpy(values_of(keys))

    def inner_products(self, *, on_weights: bool = False) -> dict[str, Tensor]:
        """<v_i, v_j> of each tensor, (N, N) float64; v is tau, or with `on_weights` theta.

        Up to 32 vectors every product is computed by itself, so that it does not depend on which
        other vectors there are; what was noted of a pair is not computed again.
        """
        size = len(self)
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        if not self._notes or size > _ALONE or len(self._ids) != size:
            return self.totals(lambda block: _products(block, pairs, on_weights))
        subject = ["inner products", on_weights, *self._subject()]
        known = self._notes.read(subject)
        missing = [(i, j) for i, j in pairs if self._pair(i, j) not in known]
        if missing:
            new = self.totals(lambda block: _products(block, missing, on_weights))
            figures = {
                self._pair(i, j): [new[name][i, j].item() for name in self._names]
                for i, j in missing
            }
            self._notes.add(subject, figures)
            known = {**known, **figures}
        found = {name: torch.zeros(size, size, dtype=torch.float64) for name in self._names}
        for i, j in pairs:
            for name, product in zip(self._names, known[self._pair(i, j)], strict=True):
                found[name][i, j] = found[name][j, i] = product
        return found

    def _pair(self, i: int, j: int) -> str:
        return " ".join(sorted((self._ids[i], self._ids[j])))


def _products(block: Block, pairs: Sequence[tuple[int, int]], on_weights: bool) -> Tensor:
    size, length = block.values.shape
    # BLAS may treat rows by their alignment: every row begins at a multiple of 64 bytes.
    values = torch.zeros(size, -(-length // 8) * 8, dtype=torch.float64, device=block.values.device)
    values[:, :length] = block.values
    if on_weights:
        values[:, :length] += block.start
    if size > _ALONE:
        return values @ values.T
    found = torch.zeros(size, size, dtype=torch.float64, device=values.device)
    for i, j in pairs:
        found[i, j] = found[j, i] = values[i].dot(values[j])
    return found


def sum_in_order(parts: Mapping[str, Tensor]) -> Tensor:
    """Sum of tensors, in the order of the mapping."""
    values = iter(parts.values())
    result = next(values)
    for value in values:
        result = result + value
    return result
