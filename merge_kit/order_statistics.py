"""The exact k-th largest of billions of values: no sort, no approximation, one reading.

Values are compared as 32-bit keys that sort as they do. A small sample says between which two keys
the k-th largest very probably lies; one pass over everything counts the keys above and those
between, in an exact histogram, or keeps them where they are few and far apart. For ranks near
either end that pass keeps the outermost keys and needs no sample. Only if the sample misled are two
more passes made, over the upper and the lower halves of the keys. The result is exact either way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from merge_kit.methods.base import Block

Keys = NDArray[np.uint32]
Counts = NDArray[np.int64]
_SMALL = 1 << 18
"""So many values are kept and partitioned directly; as many make a sample of more."""
_SAMPLED = 1024
"""Pieces that the sample is made of."""
_MARGIN = 0.003
"""What the sample may err by, as a fraction of the values."""
_WIDTH = 1 << 17
"""Keys between which a value may be sought: 1 MB for each vector and worker."""
_KEPT = 1 << 20
"""So many keys are kept where a histogram would be too wide: 4 MB for each vector and worker."""
_TAIL, _OUTERMOST = 0.02, 1 << 16
"""Ranks within this fraction and number from either end are found from the outermost keys: a
sample has few of them. They take at most 0.5 MB for each vector and worker."""
_HALF = 16
_SIGN = np.uint32(1 << 31)
R = TypeVar("R")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a block lies."""

    tensor: str
    begin: int
    size: int


class Reader(Protocol):
    """What is asked of the vectors."""

    def __len__(self) -> int:
        """Number of vectors."""

    def each(
        self, function: Callable[[Block], R], parts: Sequence[Stretch] | None = None
    ) -> Iterator[tuple[Stretch, R]]:
        """A function's result for some blocks, in order."""


def keys_of(values: Tensor) -> Keys:
    """Keys of float32 values that are not negative: their bits. (N, n) gives (N, n)."""
    bits: Keys = values.contiguous().numpy(force=True).view(np.uint32)
    return bits


def signed_keys_of(values: Tensor) -> Keys:
    """Keys of float32 values of any sign: those of negative ones upside down, below the others."""
    bits = keys_of(values)
    flips: Keys = (bits.view(np.int32) >> 31).view(np.uint32) | _SIGN
    return bits ^ flips


def values_of(keys: Keys) -> NDArray[np.float32]:
    """The values that have these `signed_keys_of`."""
    return np.where(keys >= _SIGN, keys ^ _SIGN, ~keys).view(np.float32)


def kth_largest(
    reader: Reader,
    keys: Callable[[Block], Keys],
    parts: Sequence[Stretch],
    ranks: Sequence[int],
    *,
    divisible: bool = True,
) -> Keys:
    """(len(ranks), N): the rank-th largest key of each vector, or 0 where there are not so many.

    `divisible` says whether a piece of a block may be read by itself, as the sample is.
    """
    total = sum(part.size for part in parts)
    found = np.zeros((len(ranks), len(reader)), dtype=np.uint32)
    within = [index for index, rank in enumerate(ranks) if rank <= total]
    wanted = [ranks[index] for index in within]
    if not wanted:
        return found
    if total <= _SMALL:
        copies = reader.each(lambda block: keys(block).copy(), parts)
        everything = np.concatenate([copy for _, copy in copies], axis=1)
        places = [total - rank for rank in wanted]
        found[within] = np.partition(everything, places, axis=1)[:, places].T
        return found
    chosen = _in_one_pass(reader, keys, parts, wanted, total) if divisible else None
    found[within] = _by_halves(reader, keys, parts, wanted) if chosen is None else chosen
    return found


class Seeker(Protocol):
    """What one worker does to find one key of one vector."""

    def add(self, keys: Keys) -> None:
        """Meet more keys."""

    def join(self, others: Sequence[Any]) -> int | None:
        """The key sought, with what the other workers have met; None when it was not met."""


class _Window:
    """Exact counts of the keys from `low` on, as many as `width`, and of those above."""

    def __init__(self, rank: int, low: np.uint32, width: int) -> None:
        self._rank, self._low, self._width = rank, low, np.uint32(width)
        self.above, self.inside = 0, np.zeros(width, dtype=np.int64)

    def add(self, keys: Keys) -> None:
        """Meet more keys."""
        # Keys below `low` wrap around and become larger than any width.
        offsets = keys - self._low
        near = offsets[np.flatnonzero(offsets < self._width)]
        np.add.at(self.inside, near, 1)
        self.above += int(np.count_nonzero(keys >= self._low)) - len(near)

    def join(self, others: Sequence[_Window]) -> int | None:
        """The key, or None when it lies elsewhere."""
        rank = self._rank - self.above - sum(other.above for other in others)
        cell, _ = _descend(_sum([self.inside, *(other.inside for other in others)]), rank)
        return None if rank < 1 or cell < 0 else int(self._low) + cell


class _Between:
    """The keys from `low` to `high`, and how many lie above."""

    def __init__(self, rank: int, low: np.uint32, high: np.uint32) -> None:
        self._rank, self._low, self._high = rank, low, high
        self.above, self.inside = 0, list[Keys]()

    def add(self, keys: Keys) -> None:
        """Meet more keys."""
        upper = keys[np.flatnonzero(keys >= self._low)]
        near = upper[upper <= self._high]
        self.above += len(upper) - len(near)
        self.inside.append(near)

    def join(self, others: Sequence[_Between]) -> int | None:
        """The key, or None when it lies elsewhere."""
        rank = self._rank - self.above - sum(other.above for other in others)
        inside = np.concatenate([near for each in (self, *others) for near in each.inside])
        if rank < 1 or rank > len(inside):
            return None
        return int(np.partition(inside, -rank)[-rank])


class _Outermost:
    """The outermost keys, as many as the rank; near the lower end all are turned upside down."""

    def __init__(self, rank: int, total: int) -> None:
        self._turned = 2 * rank > total
        self._count = total + 1 - rank if self._turned else rank
        self._least, self.keys = np.uint32(0), np.empty(0, dtype=np.uint32)

    def add(self, keys: Keys) -> None:
        """Meet more keys."""
        if self._turned:
            keys = ~keys
        # What equals the least of `count` keys changes nothing, nor does 0 while there are fewer.
        more = keys[np.flatnonzero(keys > self._least)]
        if len(more):
            self._keep(np.concatenate([self.keys, more]))

    def _keep(self, keys: Keys) -> None:
        if len(keys) >= 2 * self._count:
            keys = np.partition(keys, -self._count)[-self._count :]
            self._least = keys[0]
        self.keys = keys

    def join(self, others: Sequence[_Outermost]) -> int:
        """The key."""
        keys = np.concatenate([self.keys, *(other.keys for other in others)])
        found = np.uint32(0)
        if len(keys) >= self._count:
            found = np.partition(keys, -self._count)[-self._count]
        return int(~found if self._turned else found)


def _in_one_pass(
    reader: Reader,
    keys: Callable[[Block], Keys],
    parts: Sequence[Stretch],
    ranks: Sequence[int],
    total: int,
) -> Keys | None:
    """One pass, for the ranks in the middle between bounds that a sample gives; or None."""
    outer = min(int(_TAIL * total), _OUTERMOST)
    middle = [rank for rank in ranks if min(rank, total + 1 - rank) > outer]
    sample = _sample(reader, keys, parts) if middle else np.empty((len(reader), 0), np.uint32)
    bounds = {rank: _bounds(sample, rank / total) for rank in middle}

    def seek(row: int, rank: int) -> Seeker:
        if rank not in bounds:
            return _Outermost(rank, total)
        low, middle, high = bounds[rank][:, row].tolist()
        if high - low >= _WIDTH and 2 * _MARGIN * total <= _KEPT:
            return _Between(rank, np.uint32(low), np.uint32(high))
        low = max(low, middle - _WIDTH // 2)
        return _Window(rank, np.uint32(low), min(high + 1 - low, _WIDTH))

    def meet(block: Block, seekers: list[list[Seeker]]) -> None:
        for bits, row in zip(keys(block), seekers, strict=True):
            for seeker in row:
                seeker.add(bits)

    def begin() -> list[list[Seeker]]:
        return [[seek(row, rank) for rank in ranks] for row in range(len(reader))]

    found = np.zeros((len(ranks), len(reader)), dtype=np.uint32)
    first, *others = _by_worker(reader, parts, begin, meet)
    for row, column in np.ndindex(len(reader), len(ranks)):
        key = first[row][column].join([other[row][column] for other in others])
        if key is None:
            return None
        found[column, row] = key
    return found


def _sample(reader: Reader, keys: Callable[[Block], Keys], parts: Sequence[Stretch]) -> Keys:
    pieces = _pieces(parts)
    sample = np.empty((len(reader), sum(piece.size for piece in pieces)), dtype=np.uint32)
    at = 0
    for piece, found in reader.each(lambda block: keys(block).copy(), pieces):
        sample[:, at : at + piece.size] = found
        at += piece.size
    sample.sort(axis=1)
    return sample


def _pieces(parts: Sequence[Stretch]) -> list[Stretch]:
    """Equal pieces at equal distances along all values, so that small tensors count for little."""
    ends = np.cumsum([part.size for part in parts])
    places = np.arange(_SAMPLED) * int(ends[-1]) // _SAMPLED
    pieces = []
    for index, place in zip(np.searchsorted(ends, places, side="right"), places, strict=True):
        part = parts[index]
        offset = int(place - ends[index]) + part.size
        size = min(_SMALL // _SAMPLED, part.size - offset)
        pieces.append(Stretch(part.tensor, part.begin + offset, size))
    return pieces


def _bounds(sample: Keys, share: float) -> NDArray[np.int64]:
    """(3, N): between what the key lies, and where about, by each vector's sorted sample."""
    last = sample.shape[1] - 1
    places = [round((1 - share + shift) * last) for shift in (-_MARGIN, 0.0, _MARGIN)]
    found: NDArray[np.int64] = sample[:, np.clip(places, 0, last)].T.astype(np.int64)
    return found


def _by_halves(
    reader: Reader, keys: Callable[[Block], Keys], parts: Sequence[Stretch], ranks: Sequence[int]
) -> Keys:
    """Two passes: a histogram of the upper halves of the keys, then of the lower ones within."""

    def upper(block: Block, counts: Counts) -> None:
        for row, bits in enumerate(keys(block)):
            counts[row] += np.bincount(bits >> _HALF, minlength=1 << _HALF)

    coarse = _sum(_by_worker(reader, parts, lambda: _zeros(len(reader)), upper))
    places = [[_descend(counts, rank) for rank in ranks] for counts in coarse]

    def lower(block: Block, counts: Counts) -> None:
        for row, bits in enumerate(keys(block)):
            heads = bits >> _HALF
            for column, (cell, _left) in enumerate(places[row]):
                tails = bits[np.flatnonzero(heads == cell)] & ((1 << _HALF) - 1)
                np.add.at(counts[row, column], tails, 1)

    fine = _sum(_by_worker(reader, parts, lambda: _zeros(len(reader), len(ranks)), lower))
    found = np.zeros((len(ranks), len(reader)), dtype=np.uint32)
    for row, cells in enumerate(places):
        for column, (cell, left) in enumerate(cells):
            found[column, row] = (cell << _HALF) + _descend(fine[row, column], left)[0]
    return found


def _by_worker(
    reader: Reader,
    parts: Sequence[Stretch],
    begin: Callable[[], S],
    meet: Callable[[Block, S], None],
) -> list[S]:
    """Show all blocks to what `begin` makes: each worker has its own, all of them are given."""
    kept: list[S] = []
    mine = threading.local()

    def work(block: Block) -> None:
        if not hasattr(mine, "state"):
            mine.state = begin()
            kept.append(mine.state)
        meet(block, mine.state)

    for _ in reader.each(work, parts):
        pass
    return kept


def _sum(counts: Sequence[Counts]) -> Counts:
    # Counts are whole numbers: they may be added up in any order.
    return sum(counts[1:], counts[0])


def _zeros(*shape: int) -> Counts:
    return np.zeros((*shape, 1 << _HALF), dtype=np.int64)


def _descend(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The cell of the rank-th largest value and its rank within the cell; (-1, 0) when too few."""
    above = np.cumsum(histogram[::-1])
    if rank > above[-1]:
        return -1, 0
    at = int(np.searchsorted(above, rank))
    cell = len(histogram) - 1 - at
    return cell, rank - int(above[at] - histogram[cell])
