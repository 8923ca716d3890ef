"""What a merge would do, read, hold and take, without doing it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_kit import engine, jobs
from merge_kit.blocks import one_thread_each
from merge_kit.coverage import coverage
from merge_kit.devices import CPU, Device
from merge_kit.methods.base import ByValue
from merge_kit.parameters import Role
from merge_kit.recipe import Recipe, Rule
from merge_kit.sitemasks import packed_spec
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec
from merge_kit.weighing import Source

_SHARE = 0.02
"""Fraction of the values that is merged for trial."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors that are treated alike."""

    what: str
    treatment: str
    tensors: int
    values: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect of a merge."""

    rows: tuple[Row, ...]
    readings: float
    """How often the values that a method merges are read from each vector; less where an earlier
    merge noted what first passes find."""
    seconds: float
    memory: int
    """Bytes of blocks and what is computed from them, above the program itself; on a GPU its."""
    output: int
    """Bytes of the merged weights."""
    masks: int
    """Bytes of the sites' masks, for methods that keep them."""
    running_sum: int
    """Bytes of the numbers of an exact running sum, if one is kept."""
    statistics: int
    """Bytes of the statistics that are read beside the vectors."""


class _Counted:
    """A vector that counts the values read from it."""

    def __init__(self, file: Tensors) -> None:
        self._file, self._lock, self.values = file, threading.Lock(), 0
        self.specs = file.specs

    def read(self, name: str) -> Tensor:
        with self._lock:
            self.values += self.specs[name].elements
        return self._file.read(name)

    def read_into(self, name: str, begin: int, out: Tensor) -> None:
        with self._lock:
            self.values += out.numel()
        self._file.read_into(name, begin, out)


def estimate(
    base: Tensors,
    sources: Sequence[Source],
    roles: Mapping[str, Role],
    recipe: Recipe,
    device: Device = CPU,
) -> Estimate:
    """Merge a fiftieth of the values for trial, and say what the whole would be.

    Raises
    ------
    MergeKitError
        As `engine.merge`, for what shows before the values are read.
    """
    ordered = sorted(sources, key=lambda source: source.id)
    engine.check_sites(ordered, recipe)
    groups = engine.groups_of(roles, recipe)
    seconds, readings, memory, total = 0.0, 0.0, 0, 0
    with one_thread_each() as workers:
        for rule, names in zip(recipe.rules, groups, strict=True):
            size = sum(base.specs[name].elements for name in names)
            if not size:
                continue
            trial = _trial(base, ordered, names, rule, workers, recipe.seed, device)
            seconds += trial.seconds * size / trial.values
            readings += trial.readings * size
            memory = max(memory, trial.memory)
            total += size
    specs = engine.merged_specs(base.specs, recipe)
    rules = [rule.merging_rule[0].rule for rule in recipe.rules]
    masked = [g for rule, g in zip(rules, groups, strict=True) if _keeps_masks(rule)]
    by_method = _method_rows(base.specs, groups, recipe, ordered)
    return Estimate(
        rows=(*by_method, *_role_rows(base.specs, roles, recipe)),
        readings=readings / total if total else 0.0,
        seconds=seconds,
        memory=memory,
        output=sum(spec.nbytes for spec in specs.values()),
        masks=len(ordered)
        * sum(packed_spec(base.specs[name]).nbytes for names in masked for name in names),
        running_sum=8 * total,
        statistics=_statistics(ordered, recipe),
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    values: int
    seconds: float
    readings: float
    memory: int


def _trial(
    base: Tensors,
    sources: Sequence[Source],
    names: Sequence[str],
    rule: Rule,
    workers: int,
    seed: int,
    device: Device,
) -> _Trial:
    chosen = _sample(base.specs, names)
    values = sum(base.specs[name].elements for name in chosen)
    counted = _Counted(sources[0].file)
    watched = [replace(sources[0], file=counted), *sources[1:]]
    begun = time.perf_counter()
    job = jobs.plan(base, watched, chosen, rule, workers, seed=seed, sampled=True, device=device)
    for _ in job.reader.each(lambda block: job.combine(block).at(job.scale).cpu()):
        pass
    seconds = time.perf_counter() - begun
    largest = max(base.specs[name].elements for name in names)
    block = largest if job.reader.whole else min(device.block, largest)
    # Float32 values, their float64 copies and what is made of them; results wait in a queue.
    each = block * (16 * len(sources) + 64) + _beside(sources, names, rule, block)
    memory = job.reader.workers * each
    return _Trial(values, seconds, counted.values / values, memory)


def _beside(sources: Sequence[Source], names: Sequence[str], rule: Rule, block: int) -> int:
    """Bytes of the statistics that lie in memory beside one block."""
    kind = rule.merging_rule[0].statistics
    if kind is None:
        return 0
    if kind == "fisher":
        return 4 * block * len(sources)
    sizes = [
        source.statistics[kind].specs[name].elements
        for source in sources
        for name in names
        if name in source.statistics[kind].specs
    ]
    # Every site's Gram matrix in float32; in float64 their sum, the one that is added, a factor.
    return max(sizes, default=0) * (4 * len(sources) + 24)


def _statistics(sources: Sequence[Source], recipe: Recipe) -> int:
    kinds = {kind for rule in recipe.rules if (kind := rule.merging_rule[0].statistics)}
    files = [source.statistics[kind] for source in sources for kind in kinds]
    return sum(spec.nbytes for file in files for spec in file.specs.values())


def _keeps_masks(rule: object) -> bool:
    return isinstance(rule, ByValue) and rule.masks is not None


def _sample(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> list[str]:
    """Tensors from the middle of the model outwards that hold enough of its values."""
    sizes = [specs[name].elements for name in names]
    ends = torch.tensor(sizes).cumsum(0)
    wanted, chosen = _SHARE * sum(sizes), dict[int, None]()
    for step in range(1, 64):
        # 1/2, 1/4, 3/4, 1/8 ...: evenly over the values, whatever the number of tensors.
        place = int(f"{step:06b}"[::-1], 2) / 64 * sum(sizes)
        chosen[int(torch.searchsorted(ends, place, right=True))] = None
        if sum(sizes[index] for index in chosen) >= wanted:
            break
    return [names[index] for index in sorted(chosen)]


def _method_rows(
    specs: Mapping[str, TensorSpec],
    groups: Sequence[Sequence[str]],
    recipe: Recipe,
    sources: Sequence[Source],
) -> list[Row]:
    rows = []
    for number, (rule, names) in enumerate(zip(recipe.rules, groups, strict=True)):
        what = f"group {number}" if number else "weights"
        found = coverage(rule, names, specs, sources)
        rest = f"{found.others}, {found.method} takes none of these"
        for treatment, part in ((rule.method, found.own), (rest, found.rest)):
            if part:
                rows.append(Row(what, treatment, len(part), _size(specs, part)))
    return rows


def _role_rows(
    specs: Mapping[str, TensorSpec], roles: Mapping[str, Role], recipe: Recipe
) -> list[Row]:
    treatment = {
        Role.HEAD: "rows from the sites that know the class",
        Role.NORM_MEAN: recipe.norm,
        Role.NORM_VARIANCE: recipe.norm,
        Role.COUNTER: "the largest",
        Role.CONSTANT: "as in the base",
    }
    if recipe.head == "method":
        del treatment[Role.HEAD]
    rows = []
    for role, text in treatment.items():
        if names := [name for name, found in roles.items() if found is role]:
            rows.append(Row(role.value, text, len(names), _size(specs, names)))
    return rows


def _size(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> int:
    return sum(specs[name].elements for name in names)
