"""Choosing a merge on validation images: greedy soup, and the search of scale and options.

The figure of whatever is chosen is too good on the images that chose it. The test images must not
be among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluate.candidates import Judge, scaled, states
from evaluate.metrics import log_loss
from evaluate.scoring import LEVEL
from finetune.cases import Case
from finetune.scores import (
    Interval,
    Score,
    balanced_accuracy,
    macro_auroc,
)
from finetune.splits import split_of
from merge_kit.devices import CPU, Device
from merge_kit.errors import DataError, UsageError
from merge_kit.material import Material
from merge_kit.recipe import Recipe, make_recipe

Search = Literal["scale", "greedy-soup"]
Accept = Literal["not-worse", "better"]
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
"""Task arithmetic searches 0 to 1 (arXiv 2212.04089), TIES 0.8 to 3 (arXiv 2306.01708)."""
OPTIMISTIC = (
    "The figure of the chosen model is too good: it was chosen on these very images. "
    "'merge-kit evaluate' needs other ones."
)


@dataclass(frozen=True, slots=True)
class Metric:
    """By which figure a candidate is chosen."""

    title: str
    score: Score
    sign: int = 1
    """-1 where less is better."""

    def gain(self, figure: Interval) -> float:
        """The larger the better; an undefined figure is the worst of all."""
        return -math.inf if math.isnan(figure.value) else self.sign * figure.value


METRICS: Mapping[str, Metric] = {
    "balanced_accuracy": Metric("balanced accuracy", balanced_accuracy),
    "macro_auroc": Metric("macro AUROC", macro_auroc),
    "log_loss": Metric("log loss", log_loss, sign=-1),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried, checked before any work starts."""

    search: Search
    metric: str
    recipes: tuple[Recipe, ...]
    """One for a soup."""
    factors: tuple[float, ...]
    """Of each recipe's scales; nearest to 0 first."""
    options: tuple[str, ...]
    """Options of the method that differ between the recipes."""
    accept: Accept

    def size(self, sites: int) -> int:
        """Number of candidates."""
        if self.search == "greedy-soup":
            return 2 * sites - 1
        return len(self.recipes) * len(self.factors)


def plan_scales(
    recipe: Recipe,
    scales: Sequence[float] = SCALES,
    grid: Mapping[str, Sequence[Any]] | None = None,
    metric: str = "balanced_accuracy",
) -> Plan:
    """Plan a search: the recipe with each combination of option values, at each scale.

    A scale is a factor of the scales that the recipe has itself, 1 unless it says otherwise. The
    last option of the grid varies fastest.

    Raises
    ------
    UsageError
        A scale is not finite.
    RecipeError
        The method has no such option, or a value is out of its range.
    """
    if not all(map(math.isfinite, scales)):
        raise UsageError("--scales: every scale must be a finite number: correct it.")
    grid, data = grid or {}, recipe.model_dump(mode="json")
    combinations = (dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values()))
    recipes = [
        make_recipe({**data, "options": {**recipe.options, **values}}, "--grid")
        for values in combinations
    ]
    ordered = sorted(set(scales), key=lambda scale: (abs(scale), scale))
    return Plan("scale", metric, tuple(recipes), tuple(ordered), tuple(grid), "not-worse")


def plan_soup(
    recipe: Recipe, accept: Accept = "not-worse", metric: str = "balanced_accuracy"
) -> Plan:
    """Plan a greedy soup; the recipe says what is done with heads and norm statistics.

    Raises
    ------
    UsageError
        The recipe is not the mean with equal weights.
    """
    plain = {"options": {}, "scale": 1.0, "groups": (), "lines": None}
    wanted = recipe.model_copy(update={"method": "mean", "weights": "uniform", **plain})
    if recipe != wanted:
        raise UsageError(
            "a greedy soup is the plain mean of the sites that it chooses: take the method 'mean' "
            "with the weights 'uniform', and no scale, groups or lines."
        )
    return Plan("greedy-soup", metric, (recipe,), (1.0,), (), accept)


def validation_cases(cases: Sequence[Case], split: Literal["val", "all"], data: str) -> list[Case]:
    """The cases that may choose a model: those of the split "val", or all where none is "test".

    Raises
    ------
    DataError
        There is no validation image, or ``all`` would take test images; `data` names the table.
    """
    chosen = list(cases) if split == "all" else split_of(cases, "val")
    if not chosen:
        raise DataError(
            f"{data} has no image of the split 'val': name some in its column 'split', or take all "
            "its images with --split all."
        )
    if kept := len(split_of(chosen, "test")):
        raise DataError(
            f"{data} has {kept} images of the split 'test', which must not choose a model: leave "
            "--split all out, or take other rows with --where."
        )
    return chosen


@dataclass(frozen=True, slots=True)
class Candidate:
    """A merge that was tried."""

    recipe: Recipe
    sites: tuple[str, ...]
    """In the order in which a soup took them in; the last is the one in question."""
    figure: Interval
    factor: float = 1.0
    """Of the recipe's scales before the search."""
    added: bool | None = None
    """Whether a soup kept its last site; None for what is no step of a soup."""


@dataclass(frozen=True, slots=True)
class Selection:
    """All that was tried, in that order, and what was chosen of it."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    chosen: Candidate


def select(plan: Plan, material: Material, judge: Judge, device: Device = CPU) -> Selection:
    """Carry a plan out; candidates are merged on `device`.

    Raises
    ------
    DataError
        No candidate has a defined figure.
    MergeKitError
        A merge is refused.
    """
    search = _greedy_soup if plan.search == "greedy-soup" else _search_scales
    return search(plan, material, judge, device)


def _search_scales(plan: Plan, material: Material, judge: Judge, device: Device) -> Selection:
    """Of equal figures the scale nearest to 0 is chosen, then the earlier recipe."""
    metric, sites = METRICS[plan.metric], _sites(material)
    tried = []
    for recipe in plan.recipes:
        models = states(material, material.sources, recipe, plan.factors, device=device)
        for factor, state in zip(plan.factors, models, strict=True):
            tried.append(Candidate(scaled(recipe, factor), sites, judge(state), factor))
    chosen = min(tried, key=lambda c: (-metric.gain(c.figure), abs(c.factor)))
    _check_defined(chosen.figure, metric)
    return Selection(plan, tuple(tried), chosen)


def _greedy_soup(plan: Plan, material: Material, judge: Judge, device: Device) -> Selection:
    """Greedy soup: arXiv 2203.05482, recipe 1. An ingredient is a site: base + its vector.

    Sort the sites by their figures, the best first. S = {}; for each site i in this order
    S <- S + {i} if figure(mean of S + {i}) >= figure(mean of S). This is the paper; the released
    code asks for > (``better``). Equal figures are sorted by the sites' names. Several vectors of
    one site are one ingredient, their mean.
    """
    metric, (recipe,) = METRICS[plan.metric], plan.recipes

    def judged(*sites: str) -> Interval:
        sources = [source for source in material.sources if source.site in sites]
        (state,) = states(material, sources, recipe, plan.factors, device=device)
        return judge(state)

    single = [Candidate(recipe, (site,), judged(site)) for site in _sites(material)]
    single.sort(key=lambda candidate: -metric.gain(candidate.figure))
    soup = single[0]
    _check_defined(soup.figure, metric)
    tried = list(single)
    for ingredient in single[1:]:
        sites = (*soup.sites, *ingredient.sites)
        figure = judged(*sites)
        before, after = metric.gain(soup.figure), metric.gain(figure)
        added = after > before if plan.accept == "better" else after >= before
        tried.append(Candidate(recipe, sites, figure, added=added))
        soup = tried[-1] if added else soup
    return Selection(plan, tuple(tried), soup)


def _sites(material: Material) -> tuple[str, ...]:
    return tuple(sorted({source.site for source in material.sources}))


def _check_defined(best: Interval, metric: Metric) -> None:
    if math.isnan(best.value):
        raise DataError(
            f"no candidate has a defined {metric.title} on these {best.n} images: give images of "
            "more classes, or take another --metric."
        )


def record(selection: Selection) -> dict[str, Any]:
    """The content of selection.json: every candidate with its figure, and the chosen recipe."""
    plan = selection.plan
    return {
        "format": 1,
        "search": plan.search,
        "accept": plan.accept if plan.search == "greedy-soup" else None,
        "metric": plan.metric,
        "level": LEVEL,
        "note": OPTIMISTIC,
        "candidates": [
            {
                "sites": list(candidate.sites),
                "factor": candidate.factor,
                "scale": candidate.recipe.scale,
                "options": {name: candidate.recipe.options[name] for name in plan.options},
                **_numbers(candidate.figure),
                "added": candidate.added,
                "chosen": candidate is selection.chosen,
            }
            for candidate in selection.candidates
        ],
        "recipe": selection.chosen.recipe.model_dump(mode="json"),
    }


def _numbers(figure: Interval) -> dict[str, float | int | None]:
    bounds = {"value": figure.value, "low": figure.low, "high": figure.high}
    return {**{k: None if math.isnan(v) else v for k, v in bounds.items()}, "n": figure.n}
