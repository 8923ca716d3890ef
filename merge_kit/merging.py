"""The whole job: contributions and a recipe give a merged model folder with its provenance."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch

from merge_kit import engine
from merge_kit.contributions import Contribution, Entry, Trust, current
from merge_kit.errors import ContributionError, UsageError
from merge_kit.federation import Federation
from merge_kit.files import new_folder, write_atomic
from merge_kit.inputs import open_inputs
from merge_kit.provenance import PROVENANCE
from merge_kit.recipe import Recipe
from merge_kit.remembered import Checked
from merge_kit.tensorfile import Fingerprint, TensorWriter

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made."""

    folder: Path
    fingerprint: str
    contributions: tuple[Contribution, ...]
    weights: tuple[float, ...]
    base: Checked


def choose(
    entries: Sequence[Entry],
    *,
    allow_unsigned: bool,
    skip_refused: bool,
    sites: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[Contribution], list[Entry]]:
    """The contributions to merge, and the entries that were left out because of a problem.

    Entries should have passed `check_payloads`: what is unsound replaces nothing.

    A contribution that is given twice counts once.

    Raises
    ------
    ContributionError
        One of them may not be merged and `skip_refused` is false; or none is left.
    """
    known = {entry.site for entry in entries}
    if unknown := sorted({*sites, *exclude} - known):
        raise ContributionError(
            f"no contribution of site '{unknown[0]}' is there; "
            f"there are {', '.join(sorted(known)) or 'none'}."
        )
    chosen, refused = [], []
    once = {(entry.site, entry.id): entry for entry in current(entries)}
    for entry in once.values():
        if (sites and entry.site not in sites) or entry.site in exclude:
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
        f"'merge-kit admit {found.site} {found.key}'."
    )


def merge(
    federation: Federation,
    base_weights: Path,
    contributions: Sequence[Contribution],
    recipe: Recipe,
    out: Path,
    *,
    refused: Sequence[Entry] = (),
    replace: bool = False,
) -> Merged:
    """Merge contributions into a folder that timm loads, with provenance and model card.

    `refused` is what was left out, for the provenance. With `replace` an existing merged model
    gives way; any other folder is never touched.

    Everything is checked before any work starts. The folder appears whole or not at all, and its
    bytes depend only on the base, the set of contributions and the recipe.

    Raises
    ------
    MergeKitError
        The base is not the federation's, a contribution is unsound, a file changed after it was
        checked, or `out` exists.
    """
    if out.exists() and not replace:
        raise UsageError(f"{out} exists already: choose another --out, or pass --replace.")
    if replace and out.exists() and not (out / PROVENANCE).is_file():
        raise UsageError(f"{out} is no merged model: --replace does not remove it.")
    with open_inputs(federation, base_weights, contributions) as inputs:
        ordered, sources = inputs.contributions, inputs.sources
        engine.check_sites(sources, recipe)
        weights = engine.weigh(sources, recipe).shares
        with new_folder(out, replace=replace) as folder:
            specs = engine.merged_specs(inputs.base.specs, recipe)
            parts = engine.merge(inputs.base, sources, inputs.roles, recipe)
            with TensorWriter(folder / WEIGHTS, specs, ("format", "pt")) as writer:
                fingerprint = write_parts(writer, parts)
            inputs.check_unchanged()
            write_atomic(folder / CONFIG, federation.model_config_json)
            record = provenance(federation, ordered, weights, recipe, fingerprint, refused)
            write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False))
            write_atomic(folder / "README.md", model_card(federation, ordered, record))
    return Merged(out, fingerprint, ordered, tuple(weights), inputs.base_checked)


def write_parts(writer: TensorWriter, parts: Iterable[engine.Part]) -> str:
    """Write a merged model as it comes; gives its fingerprint."""
    found = Fingerprint()
    for part in parts:
        if part.begin == 0:
            found.begin(part.name, writer.specs[part.name])
        found.values(part.values)
        writer.write_part(part.name, part.begin, part.values)
    return str(found)


def provenance(
    federation: Federation,
    contributions: Sequence[Contribution],
    weights: Sequence[float],
    recipe: Recipe,
    fingerprint: str,
    refused: Sequence[Entry],
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
                "id": c.id,
                "site": c.site,
                "payload": c.manifest.payload.sha256,
                "trust": c.trust.value,
                "public_key": c.key,
                "signature": c.signature,
                "weight": weight,
            }
            for c, weight in zip(contributions, weights, strict=True)
        ],
        "refused": [{"site": entry.site, "id": entry.id} for entry in refused],
        "software": {
            "merge_kit": importlib.metadata.version("merge-kit"),
            "torch": torch.__version__,
        },
    }


def model_card(
    federation: Federation, contributions: Sequence[Contribution], record: dict[str, Any]
) -> str:
    """The merged model's README.md, a Hugging Face model card."""
    source = resources.files("merge_kit").joinpath("templates/model_card.md.j2")
    template = jinja2.Template(
        source.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True
    )
    return str(template.render(federation=federation, contributions=contributions, record=record))
