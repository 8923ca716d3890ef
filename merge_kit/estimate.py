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
from merge_kit.devices import CPU, Device
from merge_kit.parameters import Role
from merge_kit.recipe import Recipe, Rule
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
    """How often the values that a method merges are read from each vector."""
    seconds: float
    memory: int
    """Bytes of blocks and what is computed from them, above the program itself; on a GPU its."""
    output: int
    """Bytes of the merged weights."""


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
    return Estimate(
        rows=(*_method_rows(base.specs, groups, recipe), *_role_rows(base.specs, roles, recipe)),
        readings=readings / total if total else 0.0,
        seconds=seconds,
        memory=memory,
        output=sum(spec.nbytes for spec in specs.values()),
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
    memory = job.reader.workers * block * (16 * len(sources) + 64)
    return _Trial(values, seconds, counted.values / values, memory)


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
    specs: Mapping[str, TensorSpec], groups: Sequence[Sequence[str]], recipe: Recipe
) -> list[Row]:
    rows = []
    for number, (rule, names) in enumerate(zip(recipe.rules, groups, strict=True)):
        what = f"group {number}" if number else "weights"
        if names:
            rows.append(Row(what, rule.method, len(names), _size(specs, names)))
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
