"""Runs a recipe over many task vectors, block by block; each entry by its role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest

import torch
from torch import Tensor

from merge_kit import jobs, vector
from merge_kit.blocks import one_thread_each
from merge_kit.depth import depths
from merge_kit.devices import CPU, Device
from merge_kit.errors import RecipeError
from merge_kit.exact import Pair
from merge_kit.jobs import Job
from merge_kit.methods.base import Block
from merge_kit.notes import Notes
from merge_kit.parameters import Role
from merge_kit.pooling import Pooling
from merge_kit.recipe import DTYPES, Group, Lines, Recipe
from merge_kit.running import Sums
from merge_kit.surveys import Survey
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec
from merge_kit.weighing import Source, Weighing, weigh

__all__ = [
    "Part",
    "Source",
    "Weighing",
    "check_sites",
    "groups_of",
    "merge",
    "merge_scales",
    "merged_specs",
    "weigh",
]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a merged tensor: flat values from index `begin` on."""

    name: str
    begin: int
    values: Tensor
    masks: Tensor | None = None
    """(N, n) of True and False, in the order of the ids, for methods that keep what is whose."""
    pair: Pair | None = None
    """The exact sum of the weighted vectors, where it is kept."""
    rescalers: Tensor | None = None
    """With `masks`, (N,) float64: what each site's share of theta - theta_0 is multiplied by."""


def check_sites(sources: Sequence[Source], recipe: Recipe) -> None:
    """Refuse a method that needs more vectors, fewer, or statistics that a site did not publish.

    Raises
    ------
    RecipeError
        Names the method and what it needs.
    """
    for rule in recipe.rules:
        jobs.check_sites(sources, rule)


def merged_specs(base: Mapping[str, TensorSpec], recipe: Recipe) -> dict[str, TensorSpec]:
    """What the merged model holds: the base's tensors, floats in the recipe's dtype."""
    return {
        name: TensorSpec(DTYPES[recipe.dtype], spec.shape) if spec.dtype.is_floating_point else spec
        for name, spec in base.items()
    }


def groups_of(roles: Mapping[str, Role], recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """The tensors that each of the recipe's `rules` merges, in the order of `roles`.

    Raises
    ------
    RecipeError
        A group takes no tensor: its pattern is misspelt, or an earlier group takes them all.
    """
    kinds = {Role.WEIGHT, Role.HEAD} if recipe.head == "method" else {Role.WEIGHT}
    names = [name for name, role in roles.items() if role in kinds]
    deep = depths(names)
    found: list[list[str]] = [[] for _ in recipe.rules]
    for name in names:
        fits = (i for i, g in enumerate(recipe.groups, 1) if _takes(g, name, deep[name]))
        found[next(fits, 0)].append(name)
    for number, (group, taken) in enumerate(zip(recipe.groups, found[1:], strict=True), 1):
        if not taken:
            raise RecipeError(
                f"group {number} of the recipe ({', '.join(group.match)}) takes no tensor: correct "
                "its 'match' or 'depth', or put it before the group that takes them."
            )
    return tuple(map(tuple, found))


def _takes(group: Group, name: str, depth: float | None) -> bool:
    if not any(fnmatchcase(name, pattern) for pattern in group.match):
        return False
    if group.depth is None:
        return True
    return depth is not None and group.depth[0] <= depth <= group.depth[1]


def merge(
    base: Tensors,
    sources: Sequence[Source],
    roles: Mapping[str, Role],
    recipe: Recipe,
    sums: Sequence[Sums] = (),
    notes: Notes | None = None,
    device: Device = CPU,
) -> Iterator[Part]:
    """The merged model, stretch by stretch, sorted by name, in the dtypes of `merged_specs`.

    Vectors are sorted by id first and cut into the same blocks whatever the number of threads, so
    neither order nor threads ever matter; sums run in float64. Private memory is a few blocks of
    every vector, whatever the size of the model; torch's number of threads is the number of blocks
    that are worked on at once.

    `sums`, one for each of the recipe's `rules`, keep the exact sums of linear rules, and say which
    vectors have come or gone since the sums were made. `notes` save first passes over vectors that
    were merged before. Neither changes a byte. The device may change the last digit of rules that
    are not linear; parts lie on the CPU.

    Raises
    ------
    RecipeError
        The method needs more vectors, or fewer.
    VectorError
        A vector has no direction and the method measures angles.
    NonFiniteError
        A merged value overflows.
    """
    for parts in merge_scales(base, sources, roles, recipe, (1.0,), sums, notes, device):
        yield parts[0]


def merge_scales(
    base: Tensors,
    sources: Sequence[Source],
    roles: Mapping[str, Role],
    recipe: Recipe,
    factors: Sequence[float],
    sums: Sequence[Sums] = (),
    notes: Notes | None = None,
    device: Device = CPU,
) -> Iterator[tuple[Part, ...]]:
    """As `merge`, one part for each factor of the recipe's scales; the files are read once."""
    ordered = sorted(sources, key=lambda source: source.id)
    check_sites(ordered, recipe)
    groups = groups_of(roles, recipe)
    specs = merged_specs(base.specs, recipe)
    with one_thread_each() as workers:
        planned = [
            jobs.plan(
                base,
                ordered,
                names,
                rule,
                workers,
                seed=recipe.seed,
                dtype=DTYPES[recipe.dtype],
                sums=kept_sum,
                notes=notes,
                device=device,
            )
            for rule, names, kept_sum in zip_longest(recipe.rules, groups, sums)
        ]
        layers = _layer_factors(planned, groups, recipe.lines, len(ordered))
        streams = {}
        for job, names in zip(planned, groups, strict=True):
            streams.update(dict.fromkeys(names, _stream(job, layers, factors, specs)))
        # A site that one of the rules refuses has no say in heads and norm statistics.
        accepted = [all(uses) for uses in zip(*(job.keeps for job in planned), strict=True)]
        kept = [s for s, use in zip(ordered, accepted, strict=True) if use]
        if not kept:
            raise RecipeError(
                "the recipe's groups refuse every site between them: let one rule choose the sites."
            )
        pooling = Pooling(base, kept, recipe)
        for name, role in roles.items():
            if name not in streams:
                values = _cast(pooling.merge(name, role), name, specs).reshape(-1)
                yield (Part(name, 0, values),) * len(factors)
                continue
            left = specs[name].elements
            if not left:  # it has a name and a shape, which the fingerprint speaks of
                empty = torch.empty(0, dtype=specs[name].dtype)
                yield (Part(name, 0, empty),) * len(factors)
            while left:
                parts = next(streams[name])
                left -= parts[0].values.numel()
                yield parts


def _stream(
    job: Job,
    layers: Mapping[str, float],
    factors: Sequence[float],
    specs: Mapping[str, TensorSpec],
) -> Iterator[tuple[Part, ...]]:
    def work(block: Block) -> tuple[Part, ...]:
        name, found = block.tensor, job.combine(block)
        scale = job.scale * layers.get(name, 1.0)
        masks = None if found.masks is None else found.masks.cpu()
        return tuple(
            Part(
                name,
                block.begin,
                _cast(found.at(scale * f), name, specs).cpu(),
                masks,
                found.pair,
                None if job.rescalers is None else job.rescalers / (scale * f),
            )
            for f in factors
        )

    return (parts for _, parts in job.reader.each(work))


def _layer_factors(
    planned: Sequence[Job], groups: Sequence[Sequence[str]], lines: Lines | None, size: int
) -> dict[str, float]:
    """The factor of each tensor by its depth (LiNeS, arXiv 2410.17146, equation 3)."""
    if lines is None:
        return {}
    alpha = lines.alpha
    if alpha is None:
        summed, merged = (sum(part) for part in zip(*map(_lengths, planned), strict=True))
        alpha = summed / merged / size if merged else 1.0
    deep = depths([name for names in groups for name in names])
    return {name: alpha + lines.beta * (depth or 0.0) for name, depth in deep.items()}


def _lengths(job: Job) -> tuple[float, float]:
    """|sum_i tau_i|_1 and |tau_M|_1 over the job's tensors."""

    def measure(block: Block) -> Tensor:
        plain = torch.zeros_like(block.start)
        for tau in block.values:
            plain += tau
        merged = job.combine(block).at(job.scale) - block.start
        return torch.stack([plain.abs().sum(), merged.abs().sum()])

    found = Survey(job.reader).totals(measure)
    return (
        sum(float(part[0]) for part in found.values()),
        sum(float(part[1]) for part in found.values()),
    )


def _cast(values: Tensor, name: str, specs: Mapping[str, TensorSpec]) -> Tensor:
    merged = values.to(specs[name].dtype)
    remedy = "choose a smaller scale, or a wider dtype."
    vector.check_finite(merged, name, "the merged model", remedy)
    return merged
