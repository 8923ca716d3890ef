"""Runs a method over many task vectors, block by block; each entry by its role."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from merge_kit import vector
from merge_kit.blocks import BlockReader, one_thread_each, sum_in_order
from merge_kit.errors import RecipeError, VectorError
from merge_kit.exact import affine, round_weight
from merge_kit.heads import merge_rows
from merge_kit.methods.base import Block, ByValue, FromGram, Linear, Method, Sparsify
from merge_kit.methods.linear import weighted_sum
from merge_kit.methods.statistics import largest, pool_moments
from merge_kit.parameters import Role, variance_of
from merge_kit.recipe import DTYPES, Recipe
from merge_kit.schema import Document
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
    statistics: TensorFile | None = None
    """What the site published beside the vector, where the method asks for it."""

    @property
    def examples(self) -> float:
        """Number of training images."""
        return sum(self.class_counts)


@dataclass(frozen=True, slots=True)
class Weighing:
    """The weight of each vector is raw_i times unit, so that sums of raw_i tau_i stay exact."""

    raw: tuple[float, ...]
    unit: Fraction

    @property
    def shares(self) -> list[float]:
        """The weights as floats; 1 each when all count alike."""
        return [float(Fraction(raw) * self.unit) for raw in self.raw]


def weigh(sources: Sequence[Source], recipe: Recipe) -> Weighing:
    """The weight of each vector, in the order of `sources`.

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
        return _explicit_weights(sources, scheme, recipe.merging_rule[0].normalises)
    if scheme == "uniform":
        return Weighing((1.0,) * size, Fraction(1))
    if not any(source.examples for source in sources):
        raise RecipeError("no site reports an example: weigh them with 'weights: uniform'.")
    if scheme == "steps":
        return _by_steps(sources)
    examples = [source.examples for source in sources]
    if scheme == "sqrt-examples":
        examples = [math.sqrt(count) for count in examples]
    raw = tuple(map(round_weight, examples))
    return Weighing(raw, size / _sum(raw))


def _by_steps(sources: Sequence[Source]) -> Weighing:
    if any(source.steps == 0 for source in sources):
        raise RecipeError("a site reports 0 steps: weigh them with 'weights: examples'.")
    examples = [Fraction(source.examples) for source in sources]
    raw = [round_weight(n / s.steps) for n, s in zip(examples, sources, strict=True)]
    total = sum(examples, Fraction())
    steps = sum((n * s.steps for n, s in zip(examples, sources, strict=True)), Fraction())
    effective = steps / total
    return Weighing(tuple(raw), len(sources) * effective / total)


def _explicit_weights(
    sources: Sequence[Source], given: Mapping[str, float], normalise: bool
) -> Weighing:
    sites = {source.site for source in sources}
    if odd := sorted(sites ^ set(given)):
        where = "has no weight" if odd[0] in sites else "has a weight but no contribution"
        raise RecipeError(f"site '{odd[0]}' {where}: give each contributing site one weight.")
    raw = tuple(round_weight(given[source.site]) for source in sources)
    if not normalise:
        return Weighing(raw, Fraction(1))
    total = _sum(raw)
    if total < 1e-8 or any(w < 0 for w in raw):
        raise RecipeError("the weights must be 0 or more and not all 0: correct 'weights'.")
    return Weighing(raw, len(raw) / total)


def _sum(values: Sequence[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction())


def check_sites(sources: Sequence[Source], recipe: Recipe) -> None:
    """Refuse a method that needs more vectors, or fewer, than there are.

    Raises
    ------
    RecipeError
        Names the method and what it needs.
    """
    size = len(sources)
    for method, options in ((recipe.rule, recipe.checked_options), recipe.merging_rule):
        _check_method(method, options, size)


def _check_method(method: Method, options: Document, size: int) -> None:
    if size < method.minimum:
        raise RecipeError(
            f"'{method.name}' needs at least {method.minimum} vectors, there is {size}: "
            "wait for more sites, or take another method."
        )
    if method.maximum is not None and size > method.maximum:
        raise RecipeError(
            f"'{method.name}' merges at most {method.maximum} vectors, there are {size}: "
            "choose with --site, or take another method."
        )
    if reason := method.refusal(size, options):
        raise RecipeError(f"'{method.name}' cannot be used: {reason}.")


def merged_specs(base: Mapping[str, TensorSpec], recipe: Recipe) -> dict[str, TensorSpec]:
    """What the merged model holds: the base's tensors, floats in the recipe's dtype."""
    return {
        name: TensorSpec(DTYPES[recipe.dtype], spec.shape) if spec.dtype.is_floating_point else spec
        for name, spec in base.items()
    }


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a merged tensor: flat values from index `begin` on."""

    name: str
    begin: int
    values: Tensor


def merge(
    base: TensorFile,
    sources: Sequence[Source],
    roles: Mapping[str, Role],
    recipe: Recipe,
) -> Iterator[Part]:
    """The merged model, stretch by stretch, sorted by name, in the dtypes of `merged_specs`.

    Vectors are sorted by id first and cut into the same blocks whatever the number of threads, so
    neither order nor threads ever matter; sums run in float64. Private memory is a few blocks of
    every vector, whatever the size of the model; torch's number of threads is the number of blocks
    that are worked on at once.

    Raises
    ------
    RecipeError
        The method needs more vectors, or fewer.
    VectorError
        A vector has no direction and the method measures angles.
    NonFiniteError
        A merged value overflows.
    """
    ordered = sorted(sources, key=lambda source: source.id)
    check_sites(ordered, recipe)
    names = _names_by_method(roles, recipe)
    with one_thread_each() as workers:
        reader = _reader(base, ordered, tuple(names), recipe, workers)
        job = _plan(reader, ordered, recipe)
        specs = merged_specs(base.specs, recipe)
        kept = [s for s, use in zip(ordered, job.keeps, strict=True) if use]

        def work(block: Block) -> Tensor:
            return _cast(job.combine(block), block.tensor, specs)

        by_method = reader.each(work)
        others = _Others(base, kept, recipe)
        for name, role in roles.items():
            if name not in names:
                values = _cast(others.merge(name, role), name, specs)
                yield Part(name, 0, values.reshape(-1))
                continue
            left = specs[name].elements
            while left:
                stretch, values = next(by_method)
                left -= stretch.size
                yield Part(name, stretch.begin, values)


def _cast(values: Tensor, name: str, specs: Mapping[str, TensorSpec]) -> Tensor:
    merged = values.to(specs[name].dtype)
    remedy = "choose a smaller scale, or a wider dtype."
    vector.check_finite(merged, name, "the merged model", remedy)
    return merged


def _names_by_method(roles: Mapping[str, Role], recipe: Recipe) -> dict[str, None]:
    kinds = {Role.WEIGHT, Role.HEAD} if recipe.head == "method" else {Role.WEIGHT}
    return {name: None for name, role in roles.items() if role in kinds}


def _reader(
    base: TensorFile,
    sources: Sequence[Source],
    names: Sequence[str],
    recipe: Recipe,
    workers: int,
) -> BlockReader:
    first, options = recipe.rule.rule, recipe.checked_options
    method, then = recipe.merging_rule
    whole = isinstance(method.rule, ByValue) and method.rule.whole(then)
    change: Callable[[Block], Tensor] | None = None
    if isinstance(first, Sparsify):
        whole = whole or first.whole(options)
        rule = first

        def change(block: Block) -> Tensor:
            return rule.change(block, options)

    return BlockReader(
        base,
        [source.file for source in sources],
        names,
        workers,
        ids=tuple(source.id for source in sources),
        sites=tuple(source.site for source in sources),
        seed=recipe.seed,
        whole=whole,
        change=change,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    combine: Callable[[Block], Tensor]
    """The merged weights of a block, (n,) float64."""
    keeps: tuple[bool, ...]
    """Which vectors the method accepts; heads and statistics of the others are left out too."""


def _plan(reader: BlockReader, sources: Sequence[Source], recipe: Recipe) -> _Job:
    (method, options), scale = recipe.merging_rule, recipe.scale
    weighing = weigh(sources, recipe)
    weights = torch.tensor(weighing.shares, dtype=torch.float64)
    everyone = (True,) * len(sources)
    if isinstance(method.rule, Linear):
        factor = Fraction(scale) * Fraction(method.rule.factor(options)) * weighing.unit
        if method.rule.average:
            factor /= len(sources)
        return _Job(lambda block: affine(block.start, block.values, weighing.raw, factor), everyone)
    if isinstance(method.rule, FromGram):
        chosen = _coefficients(reader, sources, method, weights, options)
        on_weights = method.rule.on_weights(options)

        def by_gram(block: Block) -> Tensor:
            shares = chosen[block.tensor]
            tau = weighted_sum(block.values, shares)
            if on_weights:
                tau += (shares.sum() - 1) * block.start
            return block.start + scale * tau

        keeps = everyone
        if method.rule.selects and chosen:
            keeps = tuple((next(iter(chosen.values())) > 0).tolist())
        return _Job(by_gram, keeps)
    rule = method.rule
    assert isinstance(rule, ByValue)
    state = rule.survey(reader, options) if rule.survey else None
    return _Job(
        lambda block: block.start + scale * rule.combine(block, weights, options, state), everyone
    )


def _coefficients(
    reader: BlockReader,
    sources: Sequence[Source],
    method: Method,
    weights: Tensor,
    options: Document,
) -> dict[str, Tensor]:
    assert isinstance(method.rule, FromGram)
    on_weights = method.rule.on_weights(options)

    def products(block: Block) -> Tensor:
        values = block.values.double()
        if on_weights:
            values += block.start
        return values @ values.T

    grams = reader.totals(products)
    whole = sum_in_order(grams) if grams else torch.zeros(len(sources), len(sources))
    for source, square in zip(sources, whole.diagonal().tolist(), strict=True):
        if method.directions and square == 0:
            raise VectorError(
                f"site '{source.site}': its vector is all zeros and '{method.name}' needs a "
                f"direction: leave it out with --exclude {source.site}."
            )
    if method.rule.scope(options) == "vector":
        shares = method.rule.coefficients(whole, weights, options)
        return dict.fromkeys(grams, shares)
    return {name: method.rule.coefficients(gram, weights, options) for name, gram in grams.items()}


class _Others:
    """Everything that is not merged by the method: heads, norm statistics, counters, tables."""

    def __init__(self, base: TensorFile, sources: Sequence[Source], recipe: Recipe) -> None:
        self._base, self._sources, self._recipe = base, sources, recipe
        self._variances: dict[str, Tensor] = {}

    def merge(self, name: str, role: Role) -> Tensor:
        """One tensor; a running mean comes before its variance, as names are sorted."""
        start = self._base.read(name)
        if role is Role.HEAD:
            counts = torch.tensor([s.class_counts for s in self._sources], dtype=torch.float64)
            rows = torch.stack([source.file.read(name) for source in self._sources])
            return start.double() + merge_rows(rows, counts)
        if role is Role.NORM_MEAN:
            partner = variance_of(name)
            mean, variance = _norm(self._base, self._sources, name, partner, self._recipe)
            self._variances[partner] = variance
            return mean
        if role is Role.NORM_VARIANCE:
            return self._variances.pop(name)
        if role is Role.COUNTER:
            return start + largest(torch.stack([s.file.read(name) for s in self._sources]))
        return start


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
