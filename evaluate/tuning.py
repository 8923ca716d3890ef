"""How much each site counts in each block of the network, learnt on images at the merger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from evaluate.candidates import states
from finetune import network
from finetune.pixels import Images, centre
from merge_kit.depth import depths
from merge_kit.errors import DataError, RecipeError
from merge_kit.material import Material
from merge_kit.parameters import Role
from merge_kit.recipe import Recipe, make_recipe
from merge_kit.weighing import one_each, weigh

Goal = Literal["entropy", "labels"]
_COLLAPSED = 0.5
"""Share of the entropy of the mean prediction below which one class has swallowed the others."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How coefficients are learnt; the defaults are AdaMerging's."""

    goal: Goal = "entropy"
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was learnt."""

    recipe: Recipe
    """Holds every coefficient: merging by it needs no image."""
    sites: tuple[str, ...]
    blocks: tuple[float | None, ...]
    """Relative depth of each block; None for what lies outside all."""
    coefficients: Tensor
    """(L, N) float64."""
    before: float
    """The loss over all images with the coefficients at the start."""
    after: float


class Coefficients:
    """Merged weights as a differentiable function of a number for each block and site.

    theta(lambda) = theta_0 + sum_k lambda_lk tau_k for the weights of block l; heads, norm
    statistics and counters are as the starting recipe merges them. All vectors lie in memory.
    """

    def __init__(self, material: Material, recipe: Recipe, device: torch.device) -> None:
        self.sites = one_each(material.sources, "coefficients are learnt for one of each site")
        (merged,) = states(material, material.sources, recipe, (1.0,))
        names = [n for n, role in material.roles.items() if role is Role.WEIGHT]
        deep = depths(names)
        self.blocks = sorted(set(deep.values()), key=lambda d: (d is not None, d or 0.0))
        self._block = {name: self.blocks.index(deep[name]) for name in names}
        self._fixed = {n: t.to(device) for n, t in merged.items() if n not in self._block}
        self._base = {n: material.base.read(n).float().to(device) for n in names}
        self._taus = {
            n: torch.stack([s.file.read(n).float() for s in material.sources]).to(device)
            for n in names
        }
        shares = torch.tensor(_start(material, recipe), dtype=torch.float64, device=device)
        self.values = shares.expand(len(self.blocks), -1).clone().requires_grad_()
        self.most = max(1.0, float(shares.max()))

    def state(self) -> dict[str, Tensor]:
        """The merged state dict; gradients reach `values`."""
        weights = {
            name: base
            + torch.einsum("k,k...->...", self.values[self._block[name]].float(), self._taus[name])
            for name, base in self._base.items()
        }
        return {**self._fixed, **weights}


def check_start(recipe: Recipe) -> None:
    """Refuse a recipe from which no coefficients can start.

    Raises
    ------
    RecipeError
        Its method is not linear, or it has groups or layer scaling.
    """
    if recipe.method not in ("mean", "sum") or recipe.groups or recipe.lines:
        raise RecipeError(
            "coefficients are learnt from the method 'mean' or 'sum', without groups and lines: "
            "take one of them."
        )


def _start(material: Material, recipe: Recipe) -> list[float]:
    """The number that the recipe itself gives to each vector."""
    shares = weigh(material.sources, recipe).shares
    parts = len(shares) if recipe.method == "mean" else 1
    return [recipe.scale * share / parts for share in shares]


def tune(
    material: Material,
    recipe: Recipe,
    model: nn.Module,
    images: Images,
    settings: Settings,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Tuned:
    """Learn the coefficients and give them as a recipe.

    ``entropy`` minimises the mean entropy of the predictions on images without labels (AdaMerging,
    layer-wise, arXiv 2310.02575, equation 6); ``labels`` the cross-entropy with the labels, each
    class alike. Adam; coefficients stay between 0 and 1, or the largest that the recipe starts
    with. Batches and all else follow from the seed.

    Raises
    ------
    DataError
        Without labels the predictions of nearly all images became those of one class: the entropy
        has its least value there, and such a model is of no use.
    RecipeError
        As `check_start`; or a site has several vectors.
    """
    check_start(recipe)
    found = Coefficients(material, recipe, device)
    model.to(device).eval().requires_grad_(False)
    loss_of = _entropy if settings.goal == "entropy" else _balanced(images, device)
    optimizer = torch.optim.Adam([found.values], lr=settings.learning_rate)
    before, spread = _whole(model, found, images, loss_of, device)
    for step, batch in enumerate(_batches(len(images), settings)):
        inputs = centre(images.batch(batch).to(device), images.preprocessing)
        outputs = functional_call(model, found.state(), (inputs,))
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(outputs, batch))
        optimizer.step()
        with torch.no_grad():
            found.values.clamp_(0.0, found.most)
        progress(step + 1, settings.steps)
    after, left = _whole(model, found, images, loss_of, device)
    if settings.goal == "entropy" and left < _COLLAPSED * spread:
        raise DataError(
            "the predictions on these images became nearly all the same class: minimising entropy "
            "has led nowhere. Take images of all classes, fewer --steps, or a few labels (--by "
            "labels)."
        )
    coefficients = found.values.detach().cpu()
    return Tuned(
        _recipe(recipe, found.sites, found.blocks, coefficients),
        found.sites,
        tuple(found.blocks),
        coefficients,
        before,
        after,
    )


def _batches(count: int, settings: Settings) -> list[list[int]]:
    """`steps` batches; every image comes once before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, count)
    order: list[int] = []
    batches = []
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator).tolist()
        batches.append(order[:size])
        order = order[size:]
    return batches


def _entropy(outputs: Tensor, batch: Sequence[int]) -> Tensor:
    logs = outputs.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1).mean()


def _balanced(images: Images, device: torch.device) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Cross-entropy in which every class that is there counts alike."""
    labels = images.labels().to(device)
    counts = torch.bincount(labels)
    weights = len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1).float())

    def loss(outputs: Tensor, batch: Sequence[int]) -> Tensor:
        own = labels[list(batch)]
        each = functional.cross_entropy(outputs, own, reduction="none")
        return (each * weights[own]).mean()

    return loss


@torch.no_grad()
def _whole(
    model: nn.Module,
    found: Coefficients,
    images: Images,
    loss_of: Callable[[Tensor, Sequence[int]], Tensor],
    device: torch.device,
) -> tuple[float, float]:
    """The loss over all images, and the entropy of the mean prediction."""
    state, outputs = found.state(), []
    for batch in network.chunks(len(images), 64):
        inputs = centre(images.batch(batch).to(device), images.preprocessing)
        outputs.append(functional_call(model, state, (inputs,)))
    every = torch.cat(outputs)
    mean = every.softmax(dim=1).mean(dim=0)
    loss = float(loss_of(every, range(len(images))))
    if not math.isfinite(loss):
        raise DataError(
            "the merged model's outputs on these images are not finite: start from another recipe, "
            "or a smaller scale."
        )
    return loss, float(torch.special.entr(mean).sum())


def _recipe(
    start: Recipe,
    sites: Sequence[str],
    blocks: Sequence[float | None],
    coefficients: Tensor,
) -> Recipe:
    """Sums with a number for each site: one group a block, the main rule for what lies outside."""
    rules = [
        {"method": "sum", "weights": dict(zip(sites, row, strict=True))}
        for row in coefficients.tolist()
    ]
    main: Mapping[str, Any] = rules[blocks.index(None)] if None in blocks else rules[0]
    groups = [
        {**rule, "match": ["*"], "depth": [depth, depth]}
        for rule, depth in zip(rules, blocks, strict=True)
        if depth is not None
    ]
    kept = start.model_dump(mode="json", include={"norm", "head", "dtype", "seed"})
    return make_recipe({**kept, **main, "groups": groups}, "the coefficients")
