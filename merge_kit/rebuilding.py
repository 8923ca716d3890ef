"""A merged model made again from what was found, and compared as it comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from merge_kit import engine
from merge_kit.checkpoints import WEIGHTS
from merge_kit.checks import Check
from merge_kit.material import Material
from merge_kit.provenance import PROVENANCE, Provenance
from merge_kit.recipe import Recipe
from merge_kit.tensorfile import Fingerprint, TensorFile

LAST_DIGIT = 1e-5
"""A relative difference that may come from rounding."""


def shares(record: Provenance, inputs: Material, recipe: Recipe) -> Check:
    """Compare the stated weights with those that follow from the recipe."""
    found_shares = engine.weigh(inputs.sources, recipe).shares
    found = dict(zip([source.id for source in inputs.sources], found_shares, strict=True))
    if odd := [part for part in record.contributions if part.weight != found[part.id]]:
        text = (
            f"{PROVENANCE} states {odd[0].weight:.6g} for {odd[0].label}, by the recipe and the "
            f"manifests it is {found[odd[0].id]:.6g}."
        )
        return Check("weights", False, text)
    return Check("weights", True, "follow from the recipe and the manifests")


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


def compare(
    record: Provenance, inputs: Material, recipe: Recipe, model: TensorFile | None
) -> Check:
    """Merge again and compare with the stated fingerprint; with the model, value by value."""
    specs = engine.merged_specs(inputs.base.specs, recipe)
    gap = _Gap() if model and model.specs == specs else None
    digest = Fingerprint()
    for part in engine.merge(inputs.base, inputs.sources, inputs.roles, recipe):
        if part.begin == 0:
            digest.begin(part.name, specs[part.name])
        digest.values(part.values)
        if gap and model:
            gap.add(part, model)
    found = str(digest)
    if found == record.merged:
        text = f"merging again gives the stated fingerprint {found}"
        return Check("rebuilt", True, f"{text}; {_size_of(gap)}" if gap and gap.differing else text)
    text = f"merging again gives {found}, {PROVENANCE} states {record.merged}; {_size_of(gap)}"
    return Check("rebuilt", False, text)


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
