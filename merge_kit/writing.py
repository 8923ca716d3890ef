"""A merged model's folder, written as the blocks of a merge come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from merge_kit import engine, running
from merge_kit.checkpoints import WEIGHTS
from merge_kit.contributions import ROOT
from merge_kit.coverage import Coverage, coverage
from merge_kit.devices import CPU, Device
from merge_kit.errors import MergeKitError, TensorFileError, UsageError
from merge_kit.exact import InexactSumError
from merge_kit.federation import BASE_WEIGHTS, FEDERATION_FILE
from merge_kit.files import new_folder, write_atomic
from merge_kit.material import Material
from merge_kit.provenance import PROVENANCE
from merge_kit.recipe import Recipe
from merge_kit.running import RunningSum, Sums, SumWriter
from merge_kit.sitemasks import MaskWriter
from merge_kit.tensorfile import Fingerprint, TensorFile, TensorWriter

METADATA = ("format", "pt")
"""What the header of a model's weights says: transformers and timm look for it."""
_OF_A_HUB = (ROOT, str(Path(BASE_WEIGHTS).parent))
"""Folders that only sites, and only `init`, write to."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    fingerprint: str
    sum_kept: bool
    """Whether the exact running sum lies beside the model."""
    sum_lost: str | None
    """Why none lies there, where one was asked for or lay beside the model that gave way."""
    read: int
    """How many vectors were read for the weights; the running sum stood for the others."""
    partly: tuple[Coverage, ...] = ()
    """Of the rules whose method does not merge all of its tensors itself."""


def check_target(out: Path, *, replace: bool) -> None:
    """Refuse a folder that a merged model may not be written to.

    Raises
    ------
    UsageError
        `out` exists, and is no merged model that may be replaced; or it lies where a federation
        keeps its base or its contributions.
    """
    place = Path(os.path.realpath(out))
    for root in place.parents:
        part = place.relative_to(root).parts[0]
        if part in _OF_A_HUB and (root / FEDERATION_FILE).is_file():
            raise UsageError(
                f"{out} lies in the folder '{part}' of the federation in {root}: choose another "
                "--out."
            )
    if out.exists() and not replace:
        raise UsageError(f"{out} exists already: choose another --out, or pass --replace.")
    if replace and out.exists() and not (out / PROVENANCE).is_file():
        raise UsageError(f"{out} is no merged model: --replace does not remove it.")


def check_keeps(recipe: Recipe, *, keep_sum: bool) -> None:
    """Refuse to keep a running sum of rules that have none.

    Raises
    ------
    UsageError
        Names the method.
    """
    if keep_sum and not running.fits(recipe):
        odd = next(rule.method for rule in recipe.rules if not running.is_linear(rule))
        raise UsageError(
            f"a running sum can be kept of linear methods only, '{odd}' is none: leave --keep-sum "
            "out."
        )


def write_folder(
    out: Path,
    material: Material,
    recipe: Recipe,
    texts: Callable[[str], Mapping[str, str]],
    *,
    replace: bool,
    keep_sum: bool = False,
    device: Device = CPU,
) -> Written:
    """Merge into a new folder.

    `texts` maps the fingerprint of the merged model to the files that lie beside the weights, by
    name. With `keep_sum`, or where the folder that gives way has one, the exact running sum is kept
    too, and what it holds already is not read again.

    Raises
    ------
    UsageError
        A running sum is asked of rules that are not linear.
    """
    check_keeps(recipe, keep_sum=keep_sum)
    with new_folder(out, replace=replace) as folder:
        # What a killed run had put aside is back by now.
        had = (out / running.FOLDER).is_dir()
        keep = keep_sum or (running.fits(recipe) and had)
        fingerprint, kept, read = _write_weights(folder, out, material, recipe, keep, device)
        material.check_unchanged()
        for name, text in texts(fingerprint).items():
            write_atomic(folder / name, text)
    groups = engine.groups_of(material.roles, recipe)
    found = (
        coverage(rule, names, material.base.specs, material.sources)
        for rule, names in zip(recipe.rules, groups, strict=True)
    )
    partly = tuple(one for one in found if one.rest)
    return Written(fingerprint, kept, None if kept else _lost(keep, had), read, partly)


def _lost(asked: bool, had: bool) -> str | None:
    if asked:
        return "the vectors' sum has too many digits for one"
    return "the one that was there is gone, only linear methods have one" if had else None


def expected_reads(
    out: Path, material: Material, recipe: Recipe, *, keep_sum: bool
) -> tuple[bool, int]:
    """Whether `write_folder` would keep a running sum there, and how many vectors it would read."""
    every = len(material.sources)
    if not (running.fits(recipe) and (keep_sum or (out / running.FOLDER).is_dir())):
        return False, every
    groups = engine.groups_of(material.roles, recipe)
    with ExitStack() as stack:
        sums = _updates(out, material, recipe, groups, stack)
    return True, every if sums is None else _count(sums)


def _write_weights(
    folder: Path, before: Path, material: Material, recipe: Recipe, keep: bool, device: Device
) -> tuple[str, bool, int]:
    groups = engine.groups_of(material.roles, recipe)
    if keep:
        with ExitStack() as stack:
            updates = _updates(before, material, recipe, groups, stack)
            for sums in filter(None, (updates, running.from_scratch(material.sources, recipe))):
                # A sum that was damaged is made again; one with too many digits is not kept.
                try:
                    fingerprint = _write(folder, material, recipe, groups, sums, device)
                except TensorFileError:
                    if sums is not updates:
                        raise
                except InexactSumError:
                    shutil.rmtree(folder / running.FOLDER)
                else:
                    return fingerprint, True, _count(sums)
    return _write(folder, material, recipe, groups, (), device), False, len(material.sources)


def _count(sums: Sequence[Sums]) -> int:
    return len({source.id for one in sums for source, _ in one.changes})


def _updates(
    before: Path,
    material: Material,
    recipe: Recipe,
    groups: Sequence[Sequence[str]],
    stack: ExitStack,
) -> tuple[Sums, ...] | None:
    try:
        old = stack.enter_context(RunningSum(before / running.FOLDER))
    except MergeKitError:
        return None
    base, gone = material.base_fingerprint, material.gone
    return running.updates(old, material.sources, gone, recipe, groups, base)


def _write(
    folder: Path,
    material: Material,
    recipe: Recipe,
    groups: Sequence[Sequence[str]],
    sums: Sequence[Sums],
    device: Device,
) -> str:
    base = material.base
    specs = engine.merged_specs(base.specs, recipe)
    parts = engine.merge(
        base, material.sources, material.roles, recipe, sums, material.notes, device
    )
    with TensorWriter(folder / WEIGHTS, specs, METADATA) as writer:
        if not sums:
            with MaskWriter(folder, material.sources) as masks:
                fingerprint = write_parts(writer, masks.seen(parts))
                masks.finish(fingerprint)
                return fingerprint
        with SumWriter(
            folder / running.FOLDER, material.base_fingerprint, base.specs, groups, sums
        ) as kept:
            return write_parts(writer, _noticed(parts, kept))


def _noticed(parts: Iterable[engine.Part], kept: SumWriter) -> Iterator[engine.Part]:
    for part in parts:
        if part.pair is not None:
            kept.write(part.name, part.begin, part.pair)
        yield part


def write_instead(folder: Path, model: TensorFile, instead: Mapping[str, Tensor]) -> str:
    """Write a model's weights with some tensors in the place of its own, by name; gives the
    fingerprint. All others are the model's, byte by byte.
    """
    with TensorWriter(folder / WEIGHTS, model.specs, METADATA) as writer:
        tensors = ((n, instead[n] if n in instead else model.read(n)) for n in model.specs)
        return write_parts(writer, (engine.Part(n, 0, t.reshape(-1)) for n, t in tensors))


def write_parts(writer: TensorWriter, parts: Iterable[engine.Part]) -> str:
    """Write a merged model as it comes; gives its fingerprint."""
    found = Fingerprint()
    for part in parts:
        if part.begin == 0:
            found.begin(part.name, writer.specs[part.name])
        found.values(part.values)
        writer.write_part(part.name, part.begin, part.values)
    return str(found)
