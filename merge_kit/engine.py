"""Runs a method over many task vectors, tensor by tensor; each entry by its role."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit import vector
from merge_kit.errors import RecipeError, VectorError
from merge_kit.heads import merge_rows
from merge_kit.methods.statistics import largest, pool_moments
from merge_kit.parameters import Role, variance_of
from merge_kit.recipe import DTYPES, Recipe
from merge_kit.tensorfile import TensorFile, TensorSpec


@dataclass(frozen=True, slots=True)
class Source:
    """One task vector and what its site says of the training."""

    id: str
    site: str
    file: TensorFile
    class_counts: tuple[float, ...]
    """Training images of each class, in the order of the head's rows."""
    steps: int

    @property
    def examples(self) -> float:
        """Number of training images."""
        return sum(self.class_counts)


def site_weights(sources: Sequence[Source], recipe: Recipe) -> list[float]:
    """The weight of each vector, in the order of `sources`; 1 each when all count alike.

    ``examples`` and ``sqrt-examples`` average 1. ``steps`` is FedNova (arXiv 2007.07481, eq. 10):
    each vector is divided by its steps and given the examples' share of the mean step count.

    Raises
    ------
    RecipeError
        An explicit weight is missing, not finite, or names a site that is not there; or the
        weights cancel out.
    """
    scheme, size = recipe.weights, len(sources)
    if isinstance(scheme, dict):
        return _explicit_weights(sources, scheme, recipe.rule.normalises)
    if scheme == "uniform":
        return [1.0] * size
    raw = [s.examples if scheme != "sqrt-examples" else math.sqrt(s.examples) for s in sources]
    total = math.fsum(raw)
    if total == 0:
        raise RecipeError("no site reports an example: weigh them with 'weights: uniform'.")
    shares = [value / total for value in raw]
    if scheme == "steps":
        if any(s.steps == 0 for s in sources):
            raise RecipeError("a site reports 0 steps: weigh them with 'weights: examples'.")
        effective = math.fsum(p * s.steps for p, s in zip(shares, sources, strict=True))
        shares = [p * effective / s.steps for p, s in zip(shares, sources, strict=True)]
    return [share * size for share in shares]


def _explicit_weights(
    sources: Sequence[Source], given: Mapping[str, float], normalise: bool
) -> list[float]:
    sites = {source.site for source in sources}
    if odd := sorted(sites ^ set(given)):
        where = "has no weight" if odd[0] in sites else "has a weight but no contribution"
        raise RecipeError(f"site '{odd[0]}' {where}: give each contributing site one weight.")
    weights = [given[source.site] for source in sources]
    if not normalise:
        return weights
    total = math.fsum(weights)
    if abs(total) < 1e-8 or any(w < 0 for w in weights):
        raise RecipeError("the weights must be 0 or more and not all 0: correct 'weights'.")
    return [weight * len(weights) / total for weight in weights]


def merged_specs(base: Mapping[str, TensorSpec], recipe: Recipe) -> dict[str, TensorSpec]:
    """What the merged model holds: the base's tensors, floats in the recipe's dtype."""
    return {
        name: TensorSpec(DTYPES[recipe.dtype], spec.shape) if spec.dtype.is_floating_point else spec
        for name, spec in base.items()
    }


def merge(
    base: TensorFile,
    sources: Sequence[Source],
    roles: Mapping[str, Role],
    recipe: Recipe,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the merged model, in the dtypes of `merged_specs`.

    Vectors are sorted by id first, so their order never matters; sums run in float64. Peak memory
    is one tensor of every vector; methods that trim over whole vectors also hold one vector.

    Raises
    ------
    NonFiniteError
        A merged value overflows.
    """
    ordered = sorted(sources, key=lambda source: source.id)
    weights = torch.tensor(site_weights(ordered, recipe), dtype=torch.float64)
    counts = torch.tensor([s.class_counts for s in ordered], dtype=torch.float64)
    by_method = _names_by_method(roles, recipe)
    options = recipe.checked_options
    view = _WeightView([source.file for source in ordered], by_method)
    state = recipe.rule.prepare(view, options) if recipe.rule.prepare else None
    specs = merged_specs(base.specs, recipe)
    variances: dict[str, Tensor] = {}
    for name, role in roles.items():
        start = base.read(name)
        if name in by_method:
            stack = view.stack(name)
            combined = recipe.rule.combine(stack, weights, options, state) * recipe.scale
            result = start.double() + combined.reshape(start.shape)
        elif role is Role.HEAD:
            rows = torch.stack([source.file.read(name) for source in ordered])
            result = start.double() + merge_rows(rows, counts)
        elif role is Role.NORM_MEAN:
            partner = variance_of(name)
            result, variances[partner] = _norm(base, ordered, name, partner, recipe)
        elif role is Role.NORM_VARIANCE:
            result = variances.pop(name)
        elif role is Role.COUNTER:
            steps = torch.stack([source.file.read(name) for source in ordered])
            result = start + largest(steps)
        else:
            result = start
        merged = result.to(specs[name].dtype)
        remedy = "choose a smaller scale, or a wider dtype."
        vector.check_finite(merged, name, "the merged model", remedy)
        yield name, merged


def _names_by_method(roles: Mapping[str, Role], recipe: Recipe) -> dict[str, None]:
    kinds = {Role.WEIGHT, Role.HEAD} if recipe.head == "method" else {Role.WEIGHT}
    return {name: None for name, role in roles.items() if role in kinds}


def _norm(
    base: TensorFile, sources: Sequence[Source], mean: str, variance: str, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    start_mean, start_variance = base.read(mean).double(), base.read(variance).double()
    if recipe.norm == "base":
        return start_mean, start_variance
    means = start_mean + torch.stack([s.file.read(mean).double() for s in sources])
    variances = start_variance + torch.stack([s.file.read(variance).double() for s in sources])
    for source, values in zip(sources, variances, strict=True):
        if bool((values < 0).any()):
            raise VectorError(
                f"site '{source.site}': its vector makes the running variance '{variance}' "
                "negative, which no training can: leave it out with --exclude "
                f"{source.site}."
            )
    if recipe.norm == "average":
        return means.mean(dim=0), variances.mean(dim=0)
    examples = torch.tensor([s.examples for s in sources], dtype=torch.float64)
    if not examples.any():
        examples = torch.ones_like(examples)
    return pool_moments(means, variances, examples)


class _WeightView:
    """The weights of all vectors, one tensor or one vector at a time."""

    def __init__(self, files: Sequence[TensorFile], names: Mapping[str, None]) -> None:
        self._files = files
        self._names = names

    def __len__(self) -> int:
        return len(self._files)

    def stack(self, name: str) -> Tensor:
        return torch.stack([file.read(name).reshape(-1) for file in self._files])

    def stacks(self) -> Iterator[Tensor]:
        return (self.stack(name) for name in self._names)

    def flat(self, index: int) -> Tensor:
        return torch.cat([self._files[index].read(name).reshape(-1) for name in self._names])
