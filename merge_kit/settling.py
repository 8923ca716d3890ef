"""Weights that follow from the vectors themselves, as numbers that a recipe can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge_kit import engine
from merge_kit.blocks import BlockReader, one_thread_each
from merge_kit.devices import CPU
from merge_kit.errors import RecipeError
from merge_kit.material import Material
from merge_kit.recipe import Recipe
from merge_kit.surveys import Survey, sum_in_order
from merge_kit.weighing import AGREEMENT, one_each


def settled(recipe: Recipe, material: Material) -> Recipe:
    """The recipe with numbers in the place of weights that follow from the vectors themselves.

    ``agreement``: a site counts by its examples times the cosine between its vector and the sum of
    the others', each by its examples; below 0 it counts nothing. Who has learnt something else than
    all the others has little to say. The weights average 1.

    Raises
    ------
    RecipeError
        A site has several vectors, or no vector agrees with the others.
    """
    if not any(rule.weights == AGREEMENT for rule in recipe.rules):
        return recipe
    groups = engine.groups_of(material.roles, recipe)
    rules = [
        rule.model_copy(update={"weights": _by_agreement(material, names)})
        if rule.weights == AGREEMENT
        else rule
        for rule, names in zip(recipe.rules, groups, strict=True)
    ]
    main, *others = rules
    return recipe.model_copy(update={"weights": main.weights, "groups": tuple(others)})


def _by_agreement(material: Material, names: Sequence[str]) -> dict[str, float]:
    sources = material.sources
    sites = one_each(sources, f"'weights: {AGREEMENT}' takes one of each site")
    if len(sources) == 1:
        return {sites[0]: 1.0}
    with one_thread_each() as workers:
        reader = BlockReader(
            material.base,
            tuple(source.file for source in sources),
            tuple(name for name in names if material.base.specs[name].elements),
            CPU.workers(workers, whole=False),
            ids=tuple(source.id for source in sources),
            sites=sites,
        )
        gram = sum_in_order(Survey(reader, material.notes).inner_products())
    counts = torch.tensor([source.examples for source in sources], dtype=torch.float64)
    if not bool(counts.any()):
        counts = torch.ones_like(counts)
    shares = counts * agreement(gram, counts).clamp(min=0)
    if not bool((shares > 0).any()):
        raise RecipeError(
            f"no vector agrees with the others: 'weights: {AGREEMENT}' has nothing to go by, take "
            "'examples'."
        )
    weights = shares * len(sources) / shares.sum()
    return dict(zip(sites, weights.tolist(), strict=True))


def agreement(gram: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The cosine between each vector and the weighted sum of the others.

    Parameters
    ----------
    gram
        (N, N) float64: inner products of the vectors.
    counts
        (N,) float64: weight of each.

    Returns
    -------
    Tensor
        (N,) float64; 0 where one of the two has no length.
    """
    others = counts.expand(len(counts), -1).clone()
    others.fill_diagonal_(0.0)
    with_others = (others * gram).sum(dim=1)
    lengths = torch.einsum("ij,jk,ik->i", others, gram, others).clamp(min=0)
    scale = (gram.diagonal().clamp(min=0) * lengths).sqrt()
    return torch.where(scale > 0, with_others / scale.where(scale > 0, 1.0), 0.0)
