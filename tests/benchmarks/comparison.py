"""Merges the same small models with the engine and with a peer, and measures how far they differ.

The module of each peer (`peer_mergekit`, `peer_sd_mecha`, ...) holds rows: a recipe of ours and a
call of the peer that should give the same model. `peers.py` runs them.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_kit import engine
from merge_kit.blocks import BlockReader
from merge_kit.methods import METHODS
from merge_kit.methods.base import ByValue
from merge_kit.methods.sparsify import drawn, uniform_bits
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.surveys import Survey
from merge_kit.tensorfile import TensorFile, write_tensors

StateDict = dict[str, Tensor]
Merge = Callable[["Inputs"], StateDict]

SITES = ("a", "b", "c", "d", "e")
SHAPES = {
    "blocks.0.attn.weight": (37, 19),
    "blocks.0.attn.bias": (37,),
    "blocks.0.mlp.weight": (23, 41),
    "cls_token": (1, 1, 29),
    "norm.weight": (31,),
    "stem.weight": (11, 3, 5, 5),
}
FLAT = tuple(name for name, shape in SHAPES.items() if len(shape) < 3)
"""Matrices and vectors: what peers that were written for language models expect."""
MATRICES = tuple(name for name, shape in SHAPES.items() if len(shape) == 2)
VECTORS = tuple(name for name, shape in SHAPES.items() if len(shape) == 1)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A base, the models that were fine-tuned from it, and their task vectors; all float32."""

    base: StateDict
    tuned: tuple[StateDict, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Name of each model."""
        return SITES[: len(self.tuned)]

    @property
    def vectors(self) -> tuple[StateDict, ...]:
        """theta_i - theta_0."""
        return tuple({k: v - self.base[k] for k, v in model.items()} for model in self.tuned)

    def part(self, sites: int, names: Iterable[str]) -> Inputs:
        """The first so many models, and of them only some tensors."""
        kept = tuple(names)
        return Inputs(
            {k: self.base[k] for k in kept},
            tuple({k: model[k] for k in kept} for model in self.tuned[:sites]),
        )

    def plus(self, tau: Mapping[str, Tensor], scale: float = 1.0) -> StateDict:
        """theta_0 + scale tau."""
        return {k: v + scale * tau[k] for k, v in self.base.items()}

    def stacked(self, name: str) -> list[Tensor]:
        """One tensor of every vector."""
        return [tau[name] for tau in self.vectors]


def made_inputs() -> Inputs:
    """Five vectors of different length that have something in common, as trained ones do."""
    generator = torch.Generator().manual_seed(20)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: normal(shape) * 0.1 for name, shape in SHAPES.items()}
    shared = {name: normal(shape) * 0.006 for name, shape in SHAPES.items()}
    tuned = tuple(
        {
            name: start + (0.8 + 0.1 * index) * (shared[name] + 0.01 * normal(SHAPES[name]))
            for name, start in base.items()
        }
        for index in range(len(SITES))
    )
    return Inputs(base, tuned)


def statistics(kind: str, inputs: Inputs) -> tuple[StateDict, ...]:
    """What each site could publish beside its vector: made up, the same on every call."""
    return tuple(
        {
            name: _statistic(kind, f"{kind} {name} {site}", SHAPES[name])
            for name in inputs.base
            if kind == "fisher" or name in MATRICES
        }
        for site in inputs.sites
    )


def _statistic(kind: str, seed: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    if kind == "fisher":
        return torch.randn(shape, generator=generator).square_() * 1e-3
    rows = torch.randn(256, shape[1], generator=generator)
    rows[:, 1:] += rows[:, :1]
    return rows.T @ rows / len(rows)


@contextlib.contextmanager
def opened(
    inputs: Inputs, kind: str | None = None
) -> Iterator[tuple[TensorFile, list[engine.Source]]]:
    """Base and vectors as files, as the engine takes them."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)

        def written(file: str, tensors: StateDict) -> TensorFile:
            write_tensors(folder / file, tensors)
            return stack.enter_context(TensorFile(folder / file))

        base = written("base", inputs.base)
        published = statistics(kind, inputs) if kind else ()
        sources = []
        for index, (site, tau) in enumerate(zip(inputs.sites, inputs.vectors, strict=True)):
            more = (
                {"statistics": {kind: written(f"{site} {kind}", published[index])}} if kind else {}
            )
            sources.append(engine.Source(site, site, written(site, tau), (100.0,), 1, **more))
        yield base, sources


def ours(inputs: Inputs, recipe: Mapping[str, Any]) -> StateDict:
    """The merged model of the engine."""
    checked = make_recipe(recipe, "the comparison")
    with opened(inputs, METHODS[checked.method].statistics) as (base, sources):
        found = {name: torch.empty(spec.elements) for name, spec in base.specs.items()}
        for part in engine.merge(base, sources, roles_of(base.specs, ()), checked):
            found[part.name][part.begin : part.begin + len(part.values)] = part.values
        return {name: flat.reshape(SHAPES[name]) for name, flat in found.items()}


def for_site(index: int, recipe: Mapping[str, Any]) -> Merge:
    """The model that a method with masks gives back for one site."""

    def merge(inputs: Inputs) -> StateDict:
        checked = make_recipe(recipe, "the comparison")
        rule, options = METHODS[checked.method].rule, checked.checked_options
        if not isinstance(rule, ByValue) or rule.survey is None or rule.masks is None:
            raise TypeError(f"'{checked.method}' keeps no masks")
        weights, found = torch.ones(len(inputs.tuned), dtype=torch.float64), {}
        with opened(inputs) as (base, sources):
            files = [source.file for source in sources]
            reader = BlockReader(base, tuple(files), tuple(base.specs), 1, whole=True)
            state = rule.survey(Survey(reader), options)
            factor = rule.rescalers(state)[index] if rule.rescalers else 1.0
            for stretch in reader.stretches:
                block = reader.block(stretch)
                kept = rule.masks(block, options, state)[index]
                tau = factor * kept * rule.combine(block, weights, options, state)
                found[stretch.tensor] = tau.reshape(block.shape)
        return inputs.plus(found)

    return merge


def each_tensor(recipe: Callable[[int], Mapping[str, Any]]) -> Merge:
    """Merge every tensor by a recipe of its own, made from its number of values."""

    def merge(inputs: Inputs) -> StateDict:
        found: StateDict = {}
        for name, start in inputs.base.items():
            found |= ours(inputs.part(len(inputs.tuned), (name,)), recipe(start.numel()))
        return found

    return merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison."""

    method: str
    """Name in the registry; the row waits until there is such a method."""
    call: str
    """What is asked of the peer."""
    theirs: Merge
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Our recipe but for the method's name."""
    by: Merge | None = None
    """Our side, where one recipe does not say it."""
    note: str = ""
    """Said of our side, beside the recipe."""
    sites: int = len(SITES)
    names: Sequence[str] = tuple(SHAPES)
    where: Callable[[Inputs, str], Tensor] | None = None
    """Compare only these values of a tensor."""
    why: str = ""
    """Where a difference comes from."""

    @property
    def asked(self) -> str:
        """Our options, in one line."""
        options = dict(self.recipe.get("options", {}))
        said = [f"{k}: {_plain(v)}" for k, v in options.items() if k != "rule_options"]
        said += [f"{k}: {_plain(v)}" for k, v in options.get("rule_options", {}).items()]
        said += [f"{k}: {_plain(v)}" for k, v in self.recipe.items() if k != "options"]
        return ", ".join([*said, *filter(None, [self.note])]) or "defaults"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "/".join(f"{v:g}" for v in value.values())
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two merged models are apart."""

    absolute: float
    relative: float
    """To the largest value of any task vector in the same tensor."""


def compare(row: Row, inputs: Inputs) -> Difference:
    """Merge with both and compare."""
    part = inputs.part(row.sites, row.names)
    with quiet():
        theirs = row.theirs(part)
    mine = row.by(part) if row.by else ours(part, {"method": row.method, **row.recipe})
    absolute = relative = 0.0
    for name in part.base:
        apart = (mine[name].double() - theirs[name].double()).abs()
        if row.where:
            apart = apart[row.where(part, name)]
        largest = max(float(tau.abs().max()) for tau in part.stacked(name))
        furthest = float(apart.max()) if apart.numel() else 0.0
        absolute = max(absolute, furthest)
        relative = max(relative, furthest / largest)
    return Difference(absolute, relative)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that a peer does wrong, measured."""

    what: str
    measure: Callable[[Inputs], str]


def raised(call: Callable[[], object]) -> str:
    """What a call raises, in one line."""
    try:
        with quiet():
            call()
    except Exception as error:
        return f"raises {named(error)}"
    return "raises nothing"


def named(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 100, placeholder=' …')}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers print as they go."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute with another value, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def our_numbers(order: Iterable[tuple[str, str]]) -> Callable[..., Tensor]:
    """Stands in for torch.bernoulli: the engine's masks, for tensors and sites in this order."""
    turns = iter(order)

    def bernoulli(probability: Tensor, **_: object) -> Tensor:
        tensor, site = next(turns)
        bits = uniform_bits(0, tensor, site, 0, probability.numel())
        chance = probability.double().numpy().reshape(-1)
        return drawn(bits, chance).reshape(probability.shape).to(probability.dtype)

    return bernoulli


def our_uniforms(order: Iterable[tuple[str, str]]) -> Callable[..., Tensor]:
    """Stands in for torch.rand_like: above 1 - p where the engine keeps a value of chance p."""
    turns = iter(order)

    def rand_like(like: Tensor, **_: object) -> Tensor:
        tensor, site = next(turns)
        bits = uniform_bits(0, tensor, site, 0, like.numel())
        return torch.from_numpy(1 - bits.astype(np.float64) / 2.0**32).reshape(like.shape)

    return rand_like


def turns(inputs: Inputs) -> list[tuple[str, str]]:
    """Tensor after tensor, and of each one site after the other."""
    return [(name, site) for name in inputs.base for site in inputs.sites]


def known(row: Row) -> bool:
    """Whether the registry has what the row asks for."""
    return row.method in METHODS
