"""Running sums: a vector comes or goes, and that one alone is read.

Beside a merged model lies the exact sum of its weighted vectors, as pairs of float64. Exact sums do
not depend on the order in which they were made: after any vectors have come and gone the sum, and
the model that follows from it, have the very bytes that a merge from scratch gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, StringConstraints

from merge_kit.blocks import BLOCK
from merge_kit.errors import MergeKitError, TensorFileError
from merge_kit.exact import InexactSumError, Pair, add_exactly
from merge_kit.files import canonical_json, write_atomic
from merge_kit.methods.base import Block, Linear
from merge_kit.recipe import Recipe, Rule
from merge_kit.schema import Digest, Document, parse
from merge_kit.strictjson import loads
from merge_kit.tensorfile import TensorFile, TensorWriter
from merge_kit.tensorheader import TensorSpec
from merge_kit.weighing import Source, weigh

FOLDER = "running-sum"
SUMS = "sums.safetensors"
RECORD = "record.json"
_MOST_RESTS = 200_000
"""So many values may need the second number of their pair."""
BlockDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Rest = tuple[Annotated[int, Field(ge=0)], float]


class RuleSum(Document):
    """What one rule of the recipe has summed."""

    names: tuple[str, ...]
    """The tensors."""
    weights: dict[str, float]
    """The weight in the sum of each contribution, by its id."""


class Record(Document):
    """What a running sum says of itself."""

    format: Literal[1] = 1
    base: Digest
    rules: tuple[RuleSum, ...]
    rests: dict[str, tuple[Rest, ...]]
    """By tensor: index and second number of the pairs that have one."""
    digests: dict[str, tuple[BlockDigest, ...]]
    """By tensor: of the bytes of the pairs of each block."""


class RunningSum:
    """A running sum on disk, open for reading; use as a context manager.

    Raises
    ------
    MergeKitError
        It is damaged, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / RECORD
        try:
            data = loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise MergeKitError(f"{path} cannot be read: merge from scratch.") from error
        self.record = parse(Record, data, str(path), MergeKitError)
        self._file = TensorFile(folder / SUMS)
        self._rests: dict[tuple[str, int], list[Rest]] = {}
        for name, rests in self.record.rests.items():
            for index, rest in rests:
                self._rests.setdefault((name, index // BLOCK), []).append((index, rest))

    def __enter__(self) -> RunningSum:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str, begin: int, size: int) -> Pair:
        """The pairs of the block that begins at index `begin`.

        Raises
        ------
        TensorFileError
            They are not what was written.
        """
        high = torch.zeros(size, dtype=torch.float64)
        if name in self._file.specs:
            self._file.read_into(name, begin, high)
        place, low = begin // BLOCK, np.zeros(size)
        for index, rest in self._rests.get((name, place), ()):
            low[(index - begin) % size] = rest
        pair = high.numpy(), low
        if self.record.digests.get(name, ())[place : place + 1] != (_digest(pair),):
            raise TensorFileError(f"{self._file.path}: '{name}' was changed: merge from scratch.")
        return pair


@dataclass(frozen=True, slots=True)
class Sums:
    """The sum of one rule, and what has come or gone since it was made."""

    old: RunningSum | None
    changes: tuple[tuple[Source, float], ...]
    """Vectors with the weight that they get, or lose, in the sum."""
    weights: Mapping[str, float]
    """The weight of each contribution in the sum once the changes are made, by id."""

    def updated(self, block: Block) -> Pair:
        """The sum over a block of the changed vectors.

        Raises
        ------
        InexactSumError
            The sum has more digits than a pair holds.
        """
        size = block.values.shape[1]
        pair = np.zeros(size), np.zeros(size)
        if self.old is not None:
            pair = self.old.read(block.tensor, block.begin, size)
        weights = [weight for _, weight in self.changes]
        return add_exactly(*pair, block.values.numpy(), weights)


def fits(recipe: Recipe) -> bool:
    """Whether every rule of a recipe is linear, so that a running sum can be kept."""
    return all(map(is_linear, recipe.rules))


def is_linear(rule: Rule) -> bool:
    """Whether a rule's method is a weighted sum."""
    return isinstance(rule.entry.rule, Linear)


def from_scratch(sources: Sequence[Source], recipe: Recipe) -> tuple[Sums, ...]:
    """Sums that begin with every vector."""
    return tuple(_begun(sources, rule) for rule in recipe.rules)


def _begun(sources: Sequence[Source], rule: Rule) -> Sums:
    weights = _weights(sources, rule)
    ordered = sorted(sources, key=lambda source: source.id)
    changes = tuple((source, weights[source.id]) for source in ordered)
    return Sums(None, changes, weights)


def _weights(sources: Sequence[Source], rule: Rule) -> dict[str, float]:
    ordered = sorted(sources, key=lambda source: source.id)
    return dict(zip([s.id for s in ordered], weigh(ordered, rule).raw, strict=True))


def updates(
    old: RunningSum,
    sources: Sequence[Source],
    gone: Sequence[Source],
    recipe: Recipe,
    groups: Sequence[Sequence[str]],
    base: str,
) -> tuple[Sums, ...] | None:
    """What has come and gone since a sum was made; None where a merge from scratch is as cheap.

    `gone` holds the vectors that may have been merged then and are not merged now.
    """
    record = old.record
    if recipe.lines and recipe.lines.alpha is None:
        return None  # it measures all vectors
    if record.base != base or [rule.names for rule in record.rules] != [*map(tuple, groups)]:
        return None
    by_id = {source.id: source for source in (*gone, *sources)}
    found = []
    for summed, rule in zip(record.rules, recipe.rules, strict=True):
        weights = _weights(sources, rule)
        delta = sorted(set(weights.items()) ^ set(summed.weights.items()))
        if len(delta) >= len(weights) or not {key for key, _ in delta} <= set(by_id):
            return None
        # A weight that changes is taken away and given anew: their difference may not be exact.
        changes = [(by_id[key], w if weights.get(key) == w else -w) for key, w in delta]
        found.append(Sums(old, tuple(changes), weights))
    return tuple(found)


def sum_specs(
    groups: Sequence[Sequence[str]], specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """What the file of a running sum holds; `specs` are the base's."""
    names = [name for group in groups for name in group]
    return {name: TensorSpec(torch.float64, specs[name].shape) for name in names}


class Recorder:
    """What a running sum says of itself, gathered as its blocks come."""

    def __init__(self, base: str, groups: Sequence[Sequence[str]], sums: Sequence[Sums]) -> None:
        self._base = base
        self._rules = [
            RuleSum(names=tuple(names), weights=dict(kept.weights))
            for names, kept in zip(groups, sums, strict=True)
        ]
        self._digests: dict[str, list[str]] = {name: [] for group in groups for name in group}
        self._rests: dict[str, list[tuple[int, float]]] = {}
        self._left = _MOST_RESTS

    def add(self, name: str, begin: int, pair: Pair) -> None:
        """The pairs of one block; those of one tensor come in order.

        Raises
        ------
        InexactSumError
            Too many values need both numbers.
        """
        low = pair[1]
        places = np.flatnonzero(low)
        self._left -= len(places)
        if self._left < 0:
            raise InexactSumError
        if len(places):
            rests = zip((places + begin).tolist(), low[places].tolist(), strict=True)
            self._rests.setdefault(name, []).extend(rests)
        self._digests[name].append(_digest(pair))

    def to_bytes(self) -> bytes:
        """The record, as it is written."""
        record = Record(
            base=self._base,
            rules=tuple(self._rules),
            rests={name: tuple(rests) for name, rests in self._rests.items()},
            digests={name: tuple(found) for name, found in self._digests.items()},
        )
        return canonical_json(record.model_dump(mode="json"))


class SumWriter:
    """Writes a running sum as the blocks of a merge come; use as a context manager."""

    def __init__(
        self,
        folder: Path,
        base: str,
        specs: Mapping[str, TensorSpec],
        groups: Sequence[Sequence[str]],
        sums: Sequence[Sums],
    ) -> None:
        self._folder = folder
        self._recorder = Recorder(base, groups, sums)
        self._writer = TensorWriter(folder / SUMS, sum_specs(groups, specs))

    def __enter__(self) -> SumWriter:
        self._writer.__enter__()
        return self

    def write(self, name: str, begin: int, pair: Pair) -> None:
        """The pairs of one block.

        Raises
        ------
        InexactSumError
            Too many values need both numbers.
        """
        self._recorder.add(name, begin, pair)
        self._writer.write_part(name, begin, torch.from_numpy(pair[0]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            write_atomic(self._folder / RECORD, self._recorder.to_bytes())


def _digest(pair: Pair) -> str:
    digest = hashlib.sha256(pair[0].data)
    digest.update(pair[1].data)
    return digest.hexdigest()[:32]
