"""First passes over all vectors: sums, extremes, order statistics, inner products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merge_kit.blocks import BlockReader
from merge_kit.methods.base import Block, Scope
from merge_kit.notes import Notes
from merge_kit.order_statistics import Stretch, keys_of, kth_largest, signed_keys_of, values_of

_FORMAT = 1
"""Raised whenever a figure is computed in another way, so that older notes are not used."""
_ALONE = 32
"""Up to so many vectors inner products are computed pair by pair."""
_TOGETHER = 16
"""So many vectors are sought through at once for what each of them has by itself."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is asked of a reader's vectors before they are merged; see `methods.base.Vectors`."""

    reader: BlockReader
    notes: Notes | None = None
    changed_by: tuple[object, ...] = ()
    """What tells the reader's `change` from others, for the notes."""

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def sites(self) -> tuple[str, ...]:
        """The site of each vector."""
        return self.reader.sites

    @property
    def size(self) -> int:
        """Number of values of each vector."""
        return sum(stretch.size for stretch in self.reader.stretches)

    def total(self, measure: Callable[[Block], Tensor]) -> Tensor:
        """Sum of a measure over all blocks, added in their order."""
        return sum_in_order(self.totals(measure))

    def totals(self, measure: Callable[[Block], Tensor]) -> dict[str, Tensor]:
        """Sum of a measure over the blocks of each tensor."""
        found: dict[str, Tensor] = {}
        for stretch, part in self.reader.each(lambda block: measure(block).cpu()):
            before = found.get(stretch.tensor)
            found[stretch.tensor] = part if before is None else before + part
        return found

    def kth_largest(
        self,
        measure: Callable[[Block], Tensor],
        fraction: float,
        scope: Scope,
        noted: str | None = None,
    ) -> dict[str, Tensor]:
        """The exact k-th largest of each row, k = int(fraction d) + 1, or 0 where k exceeds d.

        With `noted`, a name for a measure of each vector by itself, vectors that were measured
        before are not read again, and the others are read a few at a time: what is kept of each
        while it is read does not grow with their number.
        """
        subject = ["kth largest", noted, fraction, scope, *self._subject()]
        keys = self._names if scope == "tensor" else [""] if self._names else []
        known = self.notes.read(subject) if self.notes and noted else {}
        missing = [index for index, name in enumerate(self.reader.ids) if name not in known]
        if not noted:
            found = self._kth_largest(measure, fraction, scope)
        elif not self.notes or len(self.reader.ids) != len(self):
            found = self._few_at_a_time(range(len(self)), measure, fraction, scope)
        else:
            if missing:
                new = self._few_at_a_time(missing, measure, fraction, scope)
                figures = {
                    self.reader.ids[index]: [new[key][row].item() for key in keys]
                    for row, index in enumerate(missing)
                }
                self.notes.add(subject, figures)
                known = {**known, **figures}
            columns = zip(*(known[name] for name in self.reader.ids), strict=True)
            found = {key: torch.tensor(column) for key, column in zip(keys, columns, strict=True)}
        return {name: found[name if scope == "tensor" else ""] for name in self._names}

    @property
    def _names(self) -> list[str]:
        """The tensors that have values."""
        return list(dict.fromkeys(stretch.tensor for stretch in self.reader.stretches))

    def _subject(self) -> list[object]:
        # Products come from the linear algebra under torch: another version may round otherwise.
        made_by = [_FORMAT, torch.__version__, torch.backends.cpu.get_cpu_capability()]
        device = self.reader.device.name
        return [list(self.reader.names), list(self.changed_by), made_by, device]

    def _few_at_a_time(
        self,
        chosen: Sequence[int],
        measure: Callable[[Block], Tensor],
        fraction: float,
        scope: Scope,
    ) -> dict[str, Tensor]:
        groups = [chosen[at : at + _TOGETHER] for at in range(0, len(chosen), _TOGETHER)]
        readers = [self.reader.only(group) for group in groups]
        parts = [Survey(reader)._kth_largest(measure, fraction, scope) for reader in readers]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _kth_largest(
        self, measure: Callable[[Block], Tensor], fraction: float, scope: Scope
    ) -> dict[str, Tensor]:
        groups: dict[str, list[Stretch]] = {}
        for stretch in self.reader.stretches:
            groups.setdefault(stretch.tensor if scope == "tensor" else "", []).append(stretch)
        found = {}
        for group, parts in groups.items():
            rank = int(fraction * sum(part.size for part in parts)) + 1
            keys = kth_largest(
                self.reader,
                lambda block: keys_of(measure(block)),
                parts,
                [rank],
                divisible=not self.reader.whole,
            )
            found[group] = torch.from_numpy(keys[0].view(np.float32))
        return found

    def order_statistics(self, measure: Callable[[Block], Tensor], ranks: Sequence[int]) -> Tensor:
        """The exact k-th largest value of each row, of any sign, for every k of `ranks`."""
        if not self.reader.stretches:
            return torch.zeros(len(ranks), len(self))
        keys = kth_largest(
            self.reader,
            lambda block: signed_keys_of(measure(block)),
            self.reader.stretches,
            ranks,
            divisible=not self.reader.whole,
        )
        return torch.from_numpy(values_of(keys))

    def inner_products(self, *, on_weights: bool = False) -> dict[str, Tensor]:
        """<v_i, v_j> of each tensor, (N, N) float64; v is tau, or with `on_weights` theta.

        Up to 32 vectors every product is computed by itself, so that it does not depend on which
        other vectors there are; what was noted of a pair is not computed again.
        """
        size, names, scratch = len(self), self._names, threading.local()
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        if not self.notes or size > _ALONE or len(self.reader.ids) != size:
            return self.totals(lambda block: _products(block, pairs, on_weights, scratch))
        subject = ["inner products", on_weights, *self._subject()]
        known = self.notes.read(subject)
        missing = [(i, j) for i, j in pairs if self._pair(i, j) not in known]
        if missing:
            new = self.totals(lambda block: _products(block, missing, on_weights, scratch))
            figures = {
                self._pair(i, j): [new[name][i, j].item() for name in names] for i, j in missing
            }
            self.notes.add(subject, figures)
            known = {**known, **figures}
        found = {name: torch.zeros(size, size, dtype=torch.float64) for name in names}
        for i, j in pairs:
            for name, product in zip(names, known[self._pair(i, j)], strict=True):
                found[name][i, j] = found[name][j, i] = product
        return found

    def _pair(self, i: int, j: int) -> str:
        return " ".join(sorted((self.reader.ids[i], self.reader.ids[j])))


def _products(
    block: Block, pairs: Sequence[tuple[int, int]], on_weights: bool, scratch: threading.local
) -> Tensor:
    size, length = block.values.shape
    # One buffer for each thread: new ones between small results that stay would scatter the heap.
    # BLAS may treat rows by their alignment: every row begins at a multiple of 64 bytes.
    if getattr(scratch, "length", 0) < length:
        scratch.length = -(-length // 8) * 8
        scratch.values = block.start.new_empty(size, scratch.length)
    values = scratch.values[:, :length]
    values.copy_(block.values)
    if on_weights:
        values += block.start
    if size > _ALONE:
        product: Tensor = values @ values.T
        return product
    found = torch.zeros(size, size, dtype=torch.float64)
    # Brought to the CPU together: on a GPU each one would be waited for.
    products = torch.stack([values[i].dot(values[j]) for i, j in pairs])
    for (i, j), product in zip(pairs, products.tolist(), strict=True):
        found[i, j] = found[j, i] = product
    return found


def sum_in_order(parts: Mapping[str, Tensor]) -> Tensor:
    """Sum of tensors, in the order of the mapping."""
    values = iter(parts.values())
    result = next(values)
    for value in values:
        result = result + value
    return result
