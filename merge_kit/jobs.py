"""One merge rule made ready to run over blocks: weights, coefficients and first passes settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from merge_kit.blocks import BlockReader
from merge_kit.devices import CPU, Device
from merge_kit.errors import RecipeError, VectorError
from merge_kit.exact import Pair, affine, affine_of_sum
from merge_kit.heap import return_large
from merge_kit.methods.base import (
    Block,
    ByValue,
    FromGram,
    Linear,
    Method,
    Sparsify,
    Statistics,
    named,
)
from merge_kit.methods.linear import weighted_sum
from merge_kit.notes import Notes
from merge_kit.recipe import Rule
from merge_kit.running import Sums
from merge_kit.schema import Document
from merge_kit.surveys import Survey, sum_in_order
from merge_kit.tensorfile import Tensors
from merge_kit.weighing import Source, weigh


@dataclass(frozen=True, slots=True)
class Combined:
    """One block, merged but for the scale."""

    at: Callable[[float], Tensor]
    """A scale gives the merged weights, (n,) float64."""
    masks: Tensor | None = None
    """(N, n): which values of the merged vector are each site's too."""
    pair: Pair | None = None
    """The exact sum of the weighted vectors, where it is kept."""


@dataclass(frozen=True, slots=True)
class Job:
    """A rule over some of the tensors."""

    reader: BlockReader
    scale: float
    combine: Callable[[Block], Combined]
    """What the scales share is done once, when the block is given."""
    keeps: tuple[bool, ...]
    """Which vectors the method accepts; heads and statistics of the others are left out too."""
    rescalers: Tensor | None = None
    """For methods with masks, (N,) float64: the factor of each site's values."""


def check_sites(sources: Sequence[Source], rule: Rule) -> None:
    """Refuse a method that needs more vectors, fewer, or statistics that a site did not publish.

    Raises
    ------
    RecipeError
        Names the method and what it needs.
    """
    for method, options in ((rule.entry, rule.checked_options), rule.merging_rule):
        _check_method(method, options, sources)


def _check_method(method: Method, options: Document, sources: Sequence[Source]) -> None:
    size = len(sources)
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
    if method.statistics:
        for source in sources:
            if method.statistics not in source.statistics:
                raise without_statistics(source.site, method.statistics)


def without_statistics(site: str, kind: Statistics) -> RecipeError:
    """The error that a site's vector has none of the statistics that a method asks for."""
    return RecipeError(
        f"site '{site}' has published no {kind} statistics for its vector: ask it to run "
        f"'merge-kit statistics <folder> --kind {kind}' and to publish again, or take another "
        "method (plain checkpoints have none)."
    )


def plan(
    base: Tensors,
    sources: Sequence[Source],
    names: Sequence[str],
    rule: Rule,
    workers: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sums: Sums | None = None,
    notes: Notes | None = None,
    sampled: bool = False,
    device: Device = CPU,
) -> Job:
    """Make a rule ready for the tensors `names`; sources must be sorted by id.

    With `sums` a linear rule keeps its exact sum, and reads only what `sums` says has changed; what
    `notes` knows of the vectors is not measured again. `sampled` says that `names` are a sample:
    a vector that is zero there need not be. Sums that are kept are made on the CPU, in its blocks:
    their digests are of those.

    Raises
    ------
    RecipeError, VectorError
        As `weigh`; or a vector has no direction and the method measures angles.
    """
    read = sources if sums is None else [source for source, _ in sums.changes]
    device = device if sums is None else CPU
    reader, changed_by = _reader(base, read, names, rule, workers, seed, device)
    survey = Survey(reader, notes, changed_by)
    (method, options), weighing = rule.merging_rule, weigh(sources, rule)
    weights = torch.tensor(weighing.shares, dtype=torch.float64)
    everyone = (True,) * len(sources)
    if isinstance(method.rule, Linear):
        factor = Fraction(method.rule.factor(options)) * weighing.unit
        if method.rule.average:
            factor /= len(sources)

        def exactly(block: Block) -> Combined:
            start, values = block.start, block.values
            if sums is not None:
                pair = sums.updated(block)
                return Combined(
                    lambda scale: affine_of_sum(start, *pair, factor * Fraction(scale), dtype),
                    pair=pair,
                )
            return Combined(
                lambda scale: affine(start, values, weighing.raw, factor * Fraction(scale), dtype)
            )

        return Job(reader, rule.scale, exactly, everyone)
    if isinstance(method.rule, FromGram):
        return _from_gram(survey, sources, rule, weights, sampled)
    assert isinstance(method.rule, ByValue)
    return _by_value(survey, method.rule, rule.scale, weights, options)


def _by_value(
    survey: Survey, rule: ByValue, scale: float, weights: Tensor, options: Document
) -> Job:
    state: Any = rule.survey(survey, options) if rule.survey else None

    def combine(block: Block) -> Combined:
        tau = rule.combine(block, weights, options, state)
        return Combined(
            lambda scale: (scale * tau).add_(block.start),
            masks=rule.masks(block, options, state) if rule.masks else None,
        )

    rescalers = rule.rescalers(state) if rule.rescalers else None
    return Job(survey.reader, scale, combine, (True,) * len(survey), rescalers)


def _from_gram(
    survey: Survey, sources: Sequence[Source], rule: Rule, weights: Tensor, sampled: bool
) -> Job:
    method, options = rule.merging_rule
    assert isinstance(method.rule, FromGram)
    grams = survey.inner_products(on_weights=method.rule.on_weights(options))
    if method.directions and grams and not sampled:
        _check_directions(grams, sources, method)
    chosen = _coefficients(grams, method, weights, options)
    on_weights = method.rule.on_weights(options)

    def combine(block: Block) -> Combined:
        shares = chosen[block.tensor]
        tau = weighted_sum(block.values, shares)
        if on_weights:
            tau += (shares.sum() - 1) * block.start
        return Combined(lambda scale: block.start + scale * tau)

    keeps = (True,) * len(sources)
    if method.rule.selects and chosen:
        keeps = tuple((next(iter(chosen.values())) > 0).tolist())
    return Job(survey.reader, rule.scale, combine, keeps)


def _check_directions(
    grams: Mapping[str, Tensor], sources: Sequence[Source], method: Method
) -> None:
    squares = sum_in_order(grams).diagonal().tolist()
    for source, square in zip(sources, squares, strict=True):
        if square == 0:
            raise VectorError(
                f"site '{source.site}': its vector is all zeros in what '{method.name}' merges "
                f"({named(grams)}) and has no direction: leave it out with "
                f"--exclude {source.site}, or merge these tensors by another method."
            )


def _coefficients(
    grams: Mapping[str, Tensor], method: Method, weights: Tensor, options: Document
) -> dict[str, Tensor]:
    assert isinstance(method.rule, FromGram)
    if grams and method.rule.scope(options) == "vector":
        shares = method.rule.coefficients(sum_in_order(grams), weights, options)
        return dict.fromkeys(grams, shares)
    return {name: method.rule.coefficients(gram, weights, options) for name, gram in grams.items()}


def _reader(
    base: Tensors,
    sources: Sequence[Source],
    names: Sequence[str],
    rule: Rule,
    workers: int,
    seed: int,
    device: Device,
) -> tuple[BlockReader, tuple[object, ...]]:
    """A reader for a rule, and what tells its changes to the values from others."""
    first, options = rule.entry.rule, rule.checked_options
    method, then = rule.merging_rule
    whole = isinstance(method.rule, ByValue) and method.rule.whole(then)
    change: Callable[[Block], Tensor] | None = None
    changed_by: tuple[object, ...] = ()
    if isinstance(first, Sparsify):
        changed_by = (rule.method, options.model_dump(mode="json"), seed)
        whole = whole or first.whole(options)
        sparse = first

        def change(block: Block) -> Tensor:
            return sparse.change(block, options)

    if whole:
        return_large()
    kind = method.statistics
    reader = BlockReader(
        base,
        tuple(source.file for source in sources),
        tuple(name for name in names if base.specs[name].elements),
        device.workers(workers, whole=whole),
        ids=tuple(source.id for source in sources),
        sites=tuple(source.site for source in sources),
        seed=seed,
        whole=whole,
        change=change,
        statistics=tuple(source.statistics[kind] for source in sources) if kind else (),
        kind=kind,
        device=device,
    )
    return reader, changed_by
