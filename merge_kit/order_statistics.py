"""The exact k-th largest of billions of values: no sort, no approximation, one reading.

Values are compared as 32-bit keys that sort as they do. A small sample says between which two keys
the k-th largest very probably lies; one pass over everything counts the keys above and makes an
exact histogram of those between. Only if the sample misled are two more passes made, over the upper
and the lower halves of the keys. The result is exact either way.
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
_SAMPLED = 512
"""Blocks that the sample is taken from."""
_MARGIN = 0.003
"""What the sample may err by, as a fraction of the values."""
_WIDTH = 1 << 17
"""Keys between which a value may be sought: 1 MB for each vector and worker."""
_HALF = 16
R = TypeVar("R")


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
    chosen = _between(reader, keys, parts, wanted, total) if divisible else None
    found[within] = _by_halves(reader, keys, parts, wanted) if chosen is None else chosen
    return found


def _between(
    reader: Reader,
    keys: Callable[[Block], Keys],
    parts: Sequence[Stretch],
    ranks: Sequence[int],
    total: int,
) -> Keys | None:
    """One pass, between bounds that a sample gives; None when a value lies outside of them."""
    lows, widths = _bounds(_sample(reader, keys, parts), [rank / total for rank in ranks])

    def count(block: Block, above: Counts, inside: Counts) -> None:
        for row, bits in enumerate(keys(block)):
            for column in range(len(ranks)):
                low, width = lows[row, column], widths[row, column]
                # Keys below `low` wrap around and become larger than any width.
                offsets = bits - low
                near = offsets[np.flatnonzero(offsets < width)]
                np.add.at(inside[row, column], near, 1)
                above[row, column] += np.count_nonzero(bits >= low) - len(near)

    above, inside = _counted(
        reader, parts, count, lambda: _zeros(lows.shape), lambda: _zeros((*lows.shape, _WIDTH))
    )
    found = np.zeros(lows.shape, dtype=np.uint32)
    for row, column in np.ndindex(*lows.shape):
        rank = ranks[column] - int(above[row, column])
        cell, _ = _descend(inside[row, column], rank)
        if rank < 1 or cell < 0:
            return None
        found[row, column] = lows[row, column] + np.uint32(cell)
    return np.ascontiguousarray(found.T)


def _sample(reader: Reader, keys: Callable[[Block], Keys], parts: Sequence[Stretch]) -> Keys:
    step = max(1, len(parts) // _SAMPLED)
    taken = _SMALL // len(parts[::step])
    pieces = [Stretch(part.tensor, part.begin, min(taken, part.size)) for part in parts[::step]]
    sample = np.empty((len(reader), sum(piece.size for piece in pieces)), dtype=np.uint32)
    at = 0
    for piece, found in reader.each(lambda block: keys(block).copy(), pieces):
        sample[:, at : at + piece.size] = found
        at += piece.size
    return sample


def _bounds(sample: Keys, shares: Sequence[float]) -> tuple[Keys, Keys]:
    """(N, len(shares)): the smallest key, and how many from there on are looked at."""
    sample.sort(axis=1)
    last = sample.shape[1] - 1
    lows, widths = [], []
    for share in shares:
        low, middle, high = (
            sample[:, min(max(round((1 - share + shift) * last), 0), last)].astype(np.int64)
            for shift in (-_MARGIN, 0.0, _MARGIN)
        )
        low = np.maximum(low, middle - _WIDTH // 2).clip(min=0)
        lows.append(low)
        widths.append(np.minimum(high + 1 - low, _WIDTH))
    return (
        np.stack(lows, axis=1).astype(np.uint32),
        np.stack(widths, axis=1).astype(np.uint32),
    )


def _by_halves(
    reader: Reader, keys: Callable[[Block], Keys], parts: Sequence[Stretch], ranks: Sequence[int]
) -> Keys:
    """Two passes: a histogram of the upper halves of the keys, then of the lower ones within."""
    shape = (len(reader), len(ranks))

    def upper(block: Block, counts: Counts, _: Counts) -> None:
        for row, bits in enumerate(keys(block)):
            counts[row] += np.bincount(bits >> _HALF, minlength=1 << _HALF)

    coarse, _ = _counted(
        reader, parts, upper, lambda: _zeros((len(reader), 1 << _HALF)), lambda: _zeros(())
    )
    places = [[_descend(counts, rank) for rank in ranks] for counts in coarse]

    def lower(block: Block, counts: Counts, _: Counts) -> None:
        for row, bits in enumerate(keys(block)):
            heads = bits >> _HALF
            for column, (cell, _left) in enumerate(places[row]):
                tails = bits[np.flatnonzero(heads == cell)] & ((1 << _HALF) - 1)
                np.add.at(counts[row, column], tails, 1)

    fine, _ = _counted(
        reader, parts, lower, lambda: _zeros((*shape, 1 << _HALF)), lambda: _zeros(())
    )
    found = np.zeros((len(ranks), len(reader)), dtype=np.uint32)
    for row, cells in enumerate(places):
        for column, (cell, left) in enumerate(cells):
            found[column, row] = (cell << _HALF) + _descend(fine[row, column], left)[0]
    return found


def _counted(
    reader: Reader,
    parts: Sequence[Stretch],
    count: Callable[[Block, Counts, Counts], None],
    *make: Callable[[], Counts],
) -> tuple[Counts, Counts]:
    """Run `count` over all blocks; each worker has counts of its own, and they are added up."""
    kept: list[list[Counts]] = []
    mine = threading.local()

    def work(block: Block) -> None:
        if not hasattr(mine, "counts"):
            mine.counts = [new() for new in make]
            kept.append(mine.counts)
        count(block, *mine.counts)

    for _ in reader.each(work, parts):
        pass
    # Counts are whole numbers: workers may add them up in any order.
    first, second = (sum(columns[1:], columns[0]) for columns in zip(*kept, strict=True))
    return first, second


def _zeros(shape: tuple[int, ...]) -> Counts:
    return np.zeros(shape, dtype=np.int64)


def _descend(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The cell of the rank-th largest value and its rank within the cell; (-1, 0) when too few."""
    above = np.cumsum(histogram[::-1])
    if rank > above[-1]:
        return -1, 0
    at = int(np.searchsorted(above, rank))
    cell = len(histogram) - 1 - at
    return cell, rank - int(above[at] - histogram[cell])
