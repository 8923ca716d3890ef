"""Everything that no method merges: heads, norm statistics, counters, tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.heads import merge_rows, row_counts
from merge_kit.methods.statistics import largest, pool_moments
from merge_kit.parameters import Role, variance_of
from merge_kit.recipe import Recipe
from merge_kit.tensorfile import Tensors
from merge_kit.weighing import Source


class Pooling:
    """Merges the tensors of one model, one by one, by their role."""

    def __init__(self, base: Tensors, sources: Sequence[Source], recipe: Recipe) -> None:
        self._base, self._sources, self._recipe = base, sources, recipe
        self._variances: dict[str, Tensor] = {}

    def merge(self, name: str, role: Role) -> Tensor:
        """One tensor; a running mean comes before its variance, as names are sorted.

        Raises
        ------
        VectorError
            A vector makes a running variance negative.
        """
        start = self._base.read(name)
        if role is Role.HEAD:
            counts = row_counts(
                [s.class_counts for s in self._sources], [s.group_shares for s in self._sources]
            )
            rows = torch.stack([source.file.read(name) for source in self._sources])
            return start.double() + merge_rows(rows, counts)
        if role is Role.NORM_MEAN:
            partner = variance_of(name)
            mean, variance = self._norm(name, partner)
            self._variances[partner] = variance
            return mean
        if role is Role.NORM_VARIANCE:
            return self._variances.pop(name)
        if role is Role.COUNTER:
            return start + largest(torch.stack([s.file.read(name) for s in self._sources]))
        return start

    def _norm(self, mean: str, variance: str) -> tuple[Tensor, Tensor]:
        start_mean = self._base.read(mean).double()
        start_variance = self._base.read(variance).double()
        if self._recipe.norm == "base":
            return start_mean, start_variance
        sources = self._sources
        means = start_mean + torch.stack([s.file.read(mean).double() for s in sources])
        variances = start_variance + torch.stack([s.file.read(variance).double() for s in sources])
        for source, values in zip(sources, variances, strict=True):
            if bool((values < 0).any()):
                raise VectorError(
                    f"site '{source.site}': its vector makes the running variance '{variance}' "
                    "negative, which no training can: leave it out with --exclude "
                    f"{source.site}."
                )
        if self._recipe.norm == "average":
            return means.mean(dim=0), variances.mean(dim=0)
        examples = torch.tensor([s.examples for s in sources], dtype=torch.float64)
        if not examples.any():
            examples = torch.ones_like(examples)
        return pool_moments(means, variances, examples)
