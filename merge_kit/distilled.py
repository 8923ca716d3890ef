"""A model that was distilled: what its provenance says, its card, and its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_kit.cards import CARD, render
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.contributions import Contribution, Entry
from merge_kit.federation import Federation
from merge_kit.files import new_folder, write_atomic
from merge_kit.merging import software, stated
from merge_kit.provenance import PROVENANCE, DistilRecord
from merge_kit.tensorfile import fingerprint, write_tensors
from merge_kit.writing import METADATA


def provenance(
    federation: Federation,
    contributions: Sequence[tuple[Contribution, float]],
    refused: Sequence[Entry],
    recipe: Mapping[str, Any],
    record: DistilRecord,
    merged: str,
    device: str,
) -> dict[str, Any]:
    """What a distilled model was made of.

    Parameters
    ----------
    contributions
        The vectors whose models taught, each with its share of what was said.
    """
    ordered = sorted(contributions, key=lambda pair: pair[0].id)
    return {
        "format": 1,
        "federation": {"name": federation.name, "hash": federation.contract_hash},
        "base": federation.base_fingerprint,
        "merged": merged,
        "recipe": dict(recipe),
        "contributions": [{**stated(c), "weight": share} for c, share in ordered],
        "refused": [{"site": entry.site, "id": entry.id} for entry in refused],
        "software": {**software(), "device": device},
        "distilled": record.model_dump(mode="json"),
    }


def card(federation: Federation, record: Mapping[str, Any]) -> str:
    """The model's README.md, a Hugging Face model card."""
    return render("distilled_card.md.j2", federation=federation, record=record)


def write(
    out: Path,
    state: Mapping[str, Tensor],
    config: str,
    federation: Federation,
    record: Mapping[str, Any],
    *,
    replace: bool,
) -> None:
    """Write the model's folder: whole or not at all.

    Raises
    ------
    MergeKitError
        `out` exists, or the storage is full.
    """
    with new_folder(out, replace=replace) as folder:
        write_tensors(folder / WEIGHTS, state, METADATA)
        write_atomic(folder / CONFIG, config)
        write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False))
        write_atomic(folder / CARD, card(federation, record))


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """Of a model's tensors in memory."""
    return fingerprint(sorted(state.items()))
