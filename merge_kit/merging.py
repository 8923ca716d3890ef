"""The whole job: contributions and a recipe give a merged model folder with its provenance."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_kit import engine
from merge_kit.cards import CARD, render
from merge_kit.configuration import CONFIG
from merge_kit.contributions import (
    Contribution,
    Entry,
    Trust,
    current,
    speaks_of,
)
from merge_kit.devices import CPU, Device
from merge_kit.errors import ContributionError
from merge_kit.federation import Federation
from merge_kit.jobs import without_statistics
from merge_kit.manifest import Kind
from merge_kit.material import Beside, opened
from merge_kit.methods.base import Statistics
from merge_kit.provenance import PROVENANCE
from merge_kit.recipe import Recipe
from merge_kit.remembered import Checked
from merge_kit.settling import settled
from merge_kit.writing import Written, check_target, write_folder


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made."""

    folder: Path
    written: Written
    contributions: tuple[Contribution, ...]
    """Sorted by id, each checked."""
    weights: tuple[float, ...]
    base: Checked

    @property
    def fingerprint(self) -> str:
        """Of the merged model."""
        return self.written.fingerprint


def choose(
    entries: Sequence[Entry],
    *,
    allow_unsigned: bool,
    skip_refused: bool,
    sites: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[Kind] = ("vector",),
    unasked: Collection[str] = (),
) -> tuple[list[Contribution], list[Entry]]:
    """The contributions to merge, and the entries that were left out because of a problem.

    What is of other kinds is passed over: see `find_statistics`. Entries should have passed
    `check_payloads`: what is unsound replaces nothing. Of sites that are `unasked`, because they
    are left out, nothing need be among them.

    A contribution that is given twice counts once.

    Raises
    ------
    ContributionError
        One of them may not be merged and `skip_refused` is false; or none is left.
    """
    known = {entry.site for entry in entries}
    if unknown := sorted({*sites, *exclude} - known - {*unasked}):
        raise ContributionError(
            f"no contribution of site '{unknown[0]}' is there; "
            f"there are {', '.join(sorted(known)) or 'none'}."
        )
    chosen, refused = [], []
    once = {(entry.site, entry.id): entry for entry in current(entries)}
    for entry in once.values():
        if (sites and entry.site not in sites) or entry.site in exclude or entry.kind not in kinds:
            continue
        problem = entry.problem or _distrust(entry, allow_unsigned)
        if problem and not skip_refused:
            raise ContributionError(
                f"{problem} Leave it out with --exclude {entry.site} or --skip-refused."
            )
        if problem:
            refused.append(Entry(entry.site, entry.id, None, problem))
        elif entry.contribution:
            chosen.append(entry.contribution)
    if not chosen:
        raise ContributionError(
            "no contribution can be merged: sites publish with 'merge-kit publish', "
            "'merge-kit status' shows what is there."
        )
    return chosen, refused


def _distrust(entry: Entry, allow_unsigned: bool) -> str | None:
    found = entry.contribution
    if found is None or found.trust is Trust.ADMITTED or allow_unsigned:
        return None
    if found.trust is Trust.UNSIGNED:
        return f"{found.label} is not signed (--allow-unsigned takes it all the same)."
    return (
        f"{found.label} is signed by a key that is not admitted: check it with the site and run "
        f"'merge-kit admit <hub> {found.site} {found.key}'."
    )


def find_statistics(
    contributions: Sequence[Contribution], kind: Statistics, there: Sequence[Contribution]
) -> list[Contribution]:
    """For each vector the statistics that its site published about it; the latest of several.

    Raises
    ------
    RecipeError
        Names the first site that has published none.
    """
    found = []
    for contribution in contributions:
        own = [s for s in there if s.kind == kind and speaks_of(s, contribution)]
        if not own:
            raise without_statistics(contribution.site, kind)
        found.append(max(own, key=lambda s: (s.manifest.created_at, s.id)))
    return found


def asked_of(recipe: Recipe) -> set[Statistics]:
    """The kinds of statistics that a recipe's methods need."""
    return {kind for rule in recipe.rules if (kind := rule.merging_rule[0].statistics)}


def beside_of(
    contributions: Sequence[Contribution], recipe: Recipe, there: Sequence[Contribution]
) -> Beside:
    """The statistics that a recipe's methods need, for each vector in the order of the ids."""
    ordered = sorted(contributions, key=lambda c: c.id)
    return {kind: find_statistics(ordered, kind, there) for kind in sorted(asked_of(recipe))}


def merge(
    federation: Federation,
    base_weights: Path,
    contributions: Sequence[Contribution],
    recipe: Recipe,
    out: Path,
    *,
    statistics: Sequence[Contribution] = (),
    refused: Sequence[Entry] = (),
    gone: Sequence[Contribution] = (),
    replace: bool = False,
    keep_sum: bool = False,
    device: Device = CPU,
) -> Merged:
    """Merge contributions into a folder that timm loads, with provenance and model card.

    `statistics` is where methods that need them find what the sites published beside their vectors;
    `refused` is what was left out, for the provenance. With `replace` an existing merged model
    gives way; any other folder is never touched. With `keep_sum`, or where the model that gives way
    has one, an exact running sum is kept beside the model; `gone` are contributions that may be in
    it and are not merged now. A running sum is made on the CPU, whatever the device.

    Everything is checked before any work starts. The folder appears whole or not at all, and its
    bytes depend only on the base, the set of contributions and the recipe; unless the methods are
    linear, on the kind of device too.

    Raises
    ------
    MergeKitError
        The base is not the federation's, a contribution is unsound, statistics are missing, a
        file changed after it was checked, or `out` exists.
    """
    check_target(out, replace=replace)
    ordered = sorted(contributions, key=lambda c: c.id)
    beside = beside_of(ordered, recipe, statistics)
    with opened(federation, base_weights, ordered, gone, beside) as material:
        engine.check_sites(material.sources, recipe)
        recipe = settled(recipe, material)
        weights = engine.weigh(material.sources, recipe).shares

        def texts(fingerprint: str) -> dict[str, str]:
            record = provenance(
                federation, ordered, beside, weights, recipe, fingerprint, refused, device
            )
            return {
                CONFIG: federation.model_config_json,
                PROVENANCE: json.dumps(record, indent=2, ensure_ascii=False),
                CARD: model_card(federation, ordered, record),
            }

        written = write_folder(
            out, material, recipe, texts, replace=replace, keep_sum=keep_sum, device=device
        )
    return Merged(out, written, material.contributions, tuple(weights), material.files[0][1])


def provenance(
    federation: Federation,
    contributions: Sequence[Contribution],
    beside: Beside,
    weights: Sequence[float],
    recipe: Recipe,
    fingerprint: str,
    refused: Sequence[Entry],
    device: Device,
) -> dict[str, Any]:
    """What a merged model was made of: enough to make it again and compare."""
    return {
        "format": 1,
        "federation": {"name": federation.name, "hash": federation.contract_hash},
        "base": federation.base_fingerprint,
        "merged": fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "contributions": [
            {
                **stated(c),
                "weight": weight,
                **_named(beside, index),
            }
            for index, (c, weight) in enumerate(zip(contributions, weights, strict=True))
        ],
        "refused": [{"site": entry.site, "id": entry.id} for entry in refused],
        "software": {**software(), "device": device.name},
    }


def stated(contribution: Contribution) -> dict[str, Any]:
    """How a provenance names a contribution."""
    return {
        "id": contribution.id,
        "site": contribution.site,
        "payload": contribution.manifest.payload.sha256,
        "trust": contribution.trust.value,
        "public_key": contribution.key,
        "signature": contribution.signature,
    }


def software() -> dict[str, str]:
    """The versions that a merged model's bytes may depend on."""
    return {"merge_kit": importlib.metadata.version("merge-kit"), "torch": torch.__version__}


def _named(beside: Beside, index: int) -> dict[str, Any]:
    found = {kind: those[index].id for kind, those in sorted(beside.items())}
    return {"statistics": found} if found else {}


def model_card(
    federation: Federation, contributions: Sequence[Contribution], record: dict[str, Any]
) -> str:
    """The merged model's README.md, a Hugging Face model card."""
    return render(
        "model_card.md.j2", federation=federation, contributions=contributions, record=record
    )
