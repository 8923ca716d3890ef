"""What of findings is held back, so that sums over images do not give single images away.

Sums over all images of a pattern (those in which the same findings were annotated) and over those
that have each finding are told. Whoever adds and subtracts them can get any weighted sum of images
whose weights are a linear combination of the findings' columns and of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALONE = 1 - 1e-6
"""Leverage of labels whose images' features follow from the sums."""


def withhold(targets: Tensor, minimum: int) -> Tensor:
    """Targets (n, C) in which -1 (not annotated) stands for what may not be told.

    Of the images in which the same findings are annotated, a finding is held back

    - that fewer than `minimum` have or lack, though some do;
    - that differs from another one, or from its opposite, in fewer images than that;
    - that is the rarest of a set of labels which fewer than `minimum` images have, and whose sum
      follows from all sums (its leverage is 1).

    Its images then count for what else was annotated in them. Combinations of three and more
    findings which leave the images of two or more rare sets of labels are not looked for.
    """
    found = targets.clone()
    while True:
        known = found >= 0
        patterns, which = torch.unique(known, dim=0, return_inverse=True)
        drop = torch.zeros_like(known)
        for place, pattern in enumerate(patterns):
            columns = pattern.nonzero().flatten()
            rows = (which == place).nonzero().flatten()
            if not len(columns):
                continue
            marks = found[rows][:, columns] == 1
            told = _faults(marks, minimum)
            drop[rows[:, None], columns[told]] = True
        if not bool(drop.any()):
            return found
        found[drop] = -1


def _faults(marks: Tensor, minimum: int) -> Tensor:
    """(k,) bool: which findings of marks (n, k) of one pattern to hold back; the simplest reason
    first, for what is dropped may make others safe."""
    counts, size = marks.sum(dim=0), len(marks)

    def few(numbers: Tensor) -> Tensor:
        return (numbers > 0) & (numbers < minimum)

    faults = few(counts) | few(size - counts)
    if bool(faults.any()):
        return faults
    exact = marks.double()
    differ = (exact.T @ (1 - exact) + (1 - exact).T @ exact).round()
    close = (few(differ) | few(size - differ)).nonzero()
    if len(close):
        first, second = close[0].tolist()
        faults[first if counts[first] <= counts[second] else second] = True
        return faults
    kinds, numbers = torch.unique(marks, dim=0, return_counts=True)
    rows = torch.cat([kinds.double(), torch.ones(len(kinds), 1, dtype=torch.float64)], dim=1)
    leverage = (rows @ torch.linalg.pinv(rows)).diagonal()
    bare = (few(numbers) & (leverage > _ALONE)).nonzero().flatten()
    if len(bare):
        own = kinds[bare[0]]
        candidates = own.nonzero().flatten() if bool(own.any()) else torch.arange(len(counts))
        faults[candidates[counts[candidates].argmin()]] = True
    return faults
