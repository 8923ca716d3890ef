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
        patterns, which = torch.unique(found >= 0, dim=0, return_inverse=True)
        sizes = patterns.sum(dim=1)
        faults = torch.zeros_like(patterns)
        for place in sizes.nonzero().flatten().tolist():
            columns = patterns[place].nonzero().flatten()
            marks = found[which == place][:, columns] == 1
            faults[place, columns] = _fault(marks, minimum)
        # What is left of the images of many findings may make enough of others with fewer.
        first = sizes * faults.any(dim=1)
        if not bool(first.any()):
            return found
        faults[first < first.max()] = False
        found[faults[which]] = -1


def _fault(marks: Tensor, minimum: int) -> Tensor:
    """(k,) bool: which finding of marks (n, k) of one pattern to hold back, at most one: without
    it others may be safe."""
    counts, size = marks.sum(dim=0), len(marks)
    fault = torch.zeros(len(counts), dtype=torch.bool)

    def few(numbers: Tensor) -> Tensor:
        return (numbers > 0) & (numbers < minimum)

    smaller = torch.minimum(counts, size - counts)
    smaller = torch.where(smaller > 0, smaller, torch.where(counts > 0, counts, size))
    if bool(few(smaller).any()):
        fault[smaller.argmin()] = True
        return fault
    exact = marks.double()
    differ = (exact.T @ (1 - exact) + (1 - exact).T @ exact).round()
    close = (few(differ) | few(size - differ)).nonzero()
    if len(close):
        first, second = close[0].tolist()
        fault[first if counts[first] <= counts[second] else second] = True
        return fault
    kinds, numbers = torch.unique(marks, dim=0, return_counts=True)
    rows = torch.cat([kinds.double(), torch.ones(len(kinds), 1, dtype=torch.float64)], dim=1)
    leverage = (rows @ torch.linalg.pinv(rows)).diagonal()
    bare = (few(numbers) & (leverage > _ALONE)).nonzero().flatten()
    if len(bare):
        own = kinds[bare[0]]
        candidates = own.nonzero().flatten() if bool(own.any()) else torch.arange(len(counts))
        fault[candidates[counts[candidates].argmin()]] = True
    return fault
