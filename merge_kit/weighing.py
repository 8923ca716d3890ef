"""How much each site counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from merge_kit.errors import RecipeError
from merge_kit.exact import round_weight
from merge_kit.methods.base import Statistics
from merge_kit.recipe import Rule
from merge_kit.tensorfile import Tensors

AGREEMENT = "agreement"
"""Weights that `merge_kit.settling` works out."""


@dataclass(frozen=True, slots=True)
class Source:
    """One task vector and what its site says of the training."""

    id: str
    site: str
    file: Tensors
    class_counts: tuple[float, ...]
    """Training images of each class, in the order of the head's rows."""
    steps: int
    statistics: Mapping[Statistics, Tensors] = field(default_factory=dict)
    """What the site published beside its vector, by kind."""
    group_shares: tuple[float, ...] = ()
    """Images whose label names a group of classes, shared equally among these; empty for none."""
    other_images: float = 0.0
    """Images that are in no class count: labels that name a group, or classes of the site's own."""
    images: float | None = None
    """All training images, where one may be in several class counts or in none."""
    score: float | None = None
    """How far above chance the site's own model is, from 0 to 1; None where it does not say."""

    @property
    def examples(self) -> float:
        """Number of training images."""
        if self.images is not None:
            return self.images + self.other_images
        return sum(self.class_counts) + self.other_images


@dataclass(frozen=True, slots=True)
class Weighing:
    """The weight of each vector is raw_i times unit, so that sums of raw_i tau_i stay exact."""

    raw: tuple[float, ...]
    unit: Fraction

    @property
    def shares(self) -> list[float]:
        """The weights as floats; 1 each when all count alike."""
        return [float(Fraction(raw) * self.unit) for raw in self.raw]


def weigh(sources: Sequence[Source], rule: Rule) -> Weighing:
    """The weight of each vector, in the order of `sources`.

    ``examples`` and ``sqrt-examples`` average 1, and so does ``validation``: the number of examples
    times how far the site's own model is above chance for certain (`Source.score`). ``steps`` is
    FedNova (arXiv 2007.07481, eq. 10): each vector is divided by its steps and given the examples'
    share of the mean step count.

    Raises
    ------
    RecipeError
        An explicit weight is missing or names a site that is not there; weights that are made to
        average 1 are negative or all 0; or no site reports an example, or one reports no steps.
    """
    scheme, size = rule.weights, len(sources)
    if isinstance(scheme, dict):
        return _explicit_weights(sources, scheme, rule.merging_rule[0].normalises)
    if scheme == "uniform":
        return Weighing((1.0,) * size, Fraction(1))
    if not any(source.examples for source in sources):
        raise RecipeError("no site reports an example: weigh them with 'weights: uniform'.")
    if scheme == "steps":
        return _by_steps(sources)
    if scheme == "validation":
        return _by_validation(sources)
    if scheme == AGREEMENT:
        raise RecipeError(
            "'weights: agreement' follows from the vectors that are merged: it is for 'merge-kit "
            "merge' of a hub, whose recipe then holds the numbers."
        )
    examples = [source.examples for source in sources]
    if scheme == "sqrt-examples":
        examples = [math.sqrt(count) for count in examples]
    raw = tuple(map(round_weight, examples))
    return Weighing(raw, size / _sum(raw))


def one_each(sources: Sequence[Source], reason: str) -> tuple[str, ...]:
    """The sites of vectors of which each has one; `reason` says in an error why that must be.

    Raises
    ------
    RecipeError
        Names a site that has several.
    """
    sites = [source.site for source in sources]
    if twice := next((site for site in sites if sites.count(site) > 1), None):
        raise RecipeError(f"site '{twice}' has several vectors: {reason}, choose others.")
    return tuple(sites)


def _by_validation(sources: Sequence[Source]) -> Weighing:
    if silent := next((source.site for source in sources if source.score is None), None):
        raise RecipeError(
            f"site '{silent}' reports no balanced accuracy of its own model on validation images: "
            "weigh the sites with 'weights: examples'."
        )
    raw = tuple(round_weight(source.examples * (source.score or 0.0)) for source in sources)
    if not any(raw):
        raise RecipeError(
            "no site's own model is for certain better than chance on its validation images: weigh "
            "the sites with 'weights: examples'."
        )
    return Weighing(raw, len(raw) / _sum(raw))


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
        raise RecipeError(
            "the weights must be 0 or more, and their sum at least 1e-8: correct 'weights'."
        )
    return Weighing(raw, len(raw) / total)


def _sum(values: Sequence[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction())
