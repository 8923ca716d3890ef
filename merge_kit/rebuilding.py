"""A merged model made again from what was found, and compared as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from merge_kit import engine, normstats, restoring, running
from merge_kit.checkpoints import WEIGHTS
from merge_kit.checks import Check
from merge_kit.comparing import MaskFiles, SumFiles
from merge_kit.contributions import Contribution
from merge_kit.devices import Device
from merge_kit.exact import InexactSumError
from merge_kit.material import Material
from merge_kit.parameters import Role
from merge_kit.provenance import PROVENANCE, PlainProvenance, Provenance
from merge_kit.recipe import Recipe
from merge_kit.running import Sums
from merge_kit.tensorfile import Fingerprint, TensorFile, Tensors, read_all
from merge_kit.tensorheader import TensorSpec

LAST_DIGIT = 1e-5
"""A relative difference that may come from rounding."""


def shares(record: Provenance | PlainProvenance, inputs: Material, recipe: Recipe) -> Check:
    """Compare the stated weights with those that follow from the recipe."""
    of_a_hub = isinstance(record, Provenance)
    basis = "the recipe and the manifests" if of_a_hub else "the recipe"
    found_shares = engine.weigh(inputs.sources, recipe).shares
    found = dict(zip([source.id for source in inputs.sources], found_shares, strict=True))
    if odd := [part for part in record.ingredients if part.weight != found[part.id]]:
        text = (
            f"{PROVENANCE} states {odd[0].weight:.6g} for {odd[0].label}, by {basis} it is "
            f"{found[odd[0].id]:.6g}."
        )
        return Check("weights", "differs", text)
    return Check("weights", "ok", f"follow from {basis}")


@dataclass(slots=True)
class _Gap:
    """How far the model is from what merging again gives."""

    values: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0
    tensor: str = ""

    def add(self, part: engine.Part, model: TensorFile) -> None:
        """Compare one stretch."""
        there = torch.empty_like(part.values)
        model.read_into(part.name, part.begin, there)
        self.values += there.numel()
        if not (odd := int((there != part.values).sum())):
            return
        self.differing += odd
        gaps = (there.double() - part.values.double()).abs().nan_to_num(nan=torch.inf)
        largest, scale = float(gaps.max()), float(part.values.double().abs().max())
        self.relative = max(self.relative, largest / scale if scale else torch.inf)
        if largest > self.largest:
            self.largest, self.tensor = largest, part.name


def rebuild(
    record: Provenance | PlainProvenance,
    inputs: Material,
    recipe: Recipe,
    folder: Path,
    model: TensorFile | None,
    device: Device,
    instead: Mapping[str, torch.Tensor] = MappingProxyType({}),
    watch: Watch | None = None,
) -> list[Check]:
    """Merge again and compare with the stated fingerprint, and with every tensor in the folder.

    `model` is the folder's own, if it can be read; `instead` what stands in the place of merged
    tensors, by name: the classifier, norm statistics. `watch` sees all as it was merged.
    """
    if instead:
        specs = engine.merged_specs(inputs.base.specs, recipe)
        merged = engine.merge(inputs.base, inputs.sources, inputs.roles, recipe, device=device)
        seen = merged if watch is None else watch.see(merged, specs)
        check = _compare_parts(record, _with_others(seen, instead), specs, model)[1]
        return [check, *(watch.checks() if watch else ())]
    if running.fits(recipe) and (folder / running.FOLDER).is_dir():
        try:
            sums = running.from_scratch(inputs.sources, recipe)
            return _compare(record, inputs, recipe, folder, model, sums, device)
        except InexactSumError:  # then no merge has kept it
            pass
    return _compare(record, inputs, recipe, folder, model, (), device)


def rebuild_on_base(
    record: Provenance, base: Tensors, model: TensorFile | None, head: Mapping[str, torch.Tensor]
) -> Check:
    """As `rebuild`, of a model that is the base but for its classifier."""
    parts = (engine.Part(name, 0, tensor.reshape(-1)) for name, tensor in read_all(base))
    return _compare_parts(record, _with_others(parts, head), base.specs, model)[1]


def norms_again(
    record: Provenance | PlainProvenance,
    found: Sequence[Contribution],
    specs: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    model: TensorFile | None,
) -> tuple[dict[str, torch.Tensor], list[Check]]:
    """Norm statistics that were measured again: from the sites' sums, or as the model has them
    where the images lie with the merger.

    Raises
    ------
    MergeKitError
        A file changed after it was checked.
    """
    if record.norms is None:
        return {}, []
    if record.norms.images is None:
        return normstats.running_statistics(restoring.sums_of(found), specs), []
    of = (Role.NORM_MEAN, Role.NORM_VARIANCE)
    own = {n: model.read(n) for n, r in roles.items() if r in of} if model else {}
    text = (
        f"were measured on {record.norms.images.count} images that lie with the merger: taken as "
        "they are; all else was merged again"
    )
    return own, [Check("norm statistics", "unknown", text)]


class Watch:
    """The fingerprint of a merged backbone, before anything was put in the place of its tensors."""

    def __init__(self, classifier: Sequence[str], stated: str | None) -> None:
        self._heads = {f"{module}.{leaf}" for module in classifier for leaf in ("weight", "bias")}
        self._stated, self._found = stated, Fingerprint()

    def see(
        self, parts: Iterable[engine.Part], specs: Mapping[str, TensorSpec]
    ) -> Iterator[engine.Part]:
        """The parts as they come."""
        for part in parts:
            if part.name not in self._heads:
                if part.begin == 0:
                    self._found.begin(part.name, specs[part.name])
                self._found.values(part.values)
            yield part

    def checks(self) -> list[Check]:
        """Whether it is the one that the norm statistics are of."""
        if self._stated is None:
            return []
        if str(self._found) == self._stated:
            text = f"are of the merged backbone, {self._stated}"
            return [Check("norm statistics", "ok", text)]
        text = f"are of the backbone {self._stated}, merging again gives {self._found}."
        return [Check("norm statistics", "differs", text)]


def _with_others(
    parts: Iterable[engine.Part], instead: Mapping[str, torch.Tensor]
) -> Iterator[engine.Part]:
    for part in parts:
        if part.name not in instead:
            yield part
            continue
        end = part.begin + part.values.numel()
        yield engine.Part(part.name, part.begin, instead[part.name].reshape(-1)[part.begin : end])


def _compare_parts(
    record: Provenance | PlainProvenance,
    parts: Iterable[engine.Part],
    specs: Mapping[str, TensorSpec],
    model: TensorFile | None,
    beside: Sequence[Callable[[engine.Part], None]] = (),
) -> tuple[str, Check]:
    """The fingerprint of what comes, and the check of it; `beside` is shown every part, too."""
    gap = _Gap() if model and model.specs == specs else None
    digest = Fingerprint()
    for part in parts:
        if part.begin == 0:
            digest.begin(part.name, specs[part.name])
        digest.values(part.values)
        if gap and model:
            gap.add(part, model)
        for watch in beside:
            watch(part)
    return str(digest), _rebuilt(str(digest), record.merged, gap)


def _compare(
    record: Provenance | PlainProvenance,
    inputs: Material,
    recipe: Recipe,
    folder: Path,
    model: TensorFile | None,
    sums: Sequence[Sums],
    device: Device,
) -> list[Check]:
    base = inputs.base.specs
    specs = engine.merged_specs(base, recipe)
    with ExitStack() as stack:
        masks = MaskFiles(folder, inputs.sources, specs, stack)
        groups = engine.groups_of(inputs.roles, recipe)
        kept = (
            SumFiles(folder, inputs.base_fingerprint, base, groups, sums, stack) if sums else None
        )
        parts = engine.merge(inputs.base, inputs.sources, inputs.roles, recipe, sums, device=device)
        beside = [masks.add, *([kept.add] if kept else [])]
        found, check = _compare_parts(record, parts, specs, model, beside)
        return [check, *masks.checks(found), *(kept.checks() if kept else [])]


def _rebuilt(found: str, stated: str, gap: _Gap | None) -> Check:
    if found == stated:
        text = f"merging again gives the stated fingerprint {found}"
        return Check("rebuilt", "ok", f"{text}; {_size_of(gap)}" if gap and gap.differing else text)
    text = f"merging again gives {found}, {PROVENANCE} states {stated}; {_size_of(gap)}"
    return Check("rebuilt", "differs", text)


def _size_of(gap: _Gap | None) -> str:
    if gap is None:
        return f"{WEIGHTS} has other tensors than the base."
    if not gap.differing:
        return f"{WEIGHTS} holds what merging again gives, so the statement is wrong."
    text = (
        f"{gap.differing} of {gap.values} values of {WEIGHTS} differ, by at most "
        f"{gap.largest:.3g}, in '{gap.tensor}'."
    )
    if gap.relative > LAST_DIGIT:
        return text
    return (
        f"{text} So little may be rounding: methods with linear algebra can differ in the last "
        "digit on another version of torch or another processor; verify where it was merged."
    )
