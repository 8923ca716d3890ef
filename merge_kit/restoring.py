"""A merged model with norm statistics that were measured again, on its own weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_kit import normstats
from merge_kit.cards import CARD, render
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.contributions import Contribution
from merge_kit.errors import ContributionError, UsageError
from merge_kit.files import new_folder, write_atomic
from merge_kit.merging import stated
from merge_kit.normstats import NormSums
from merge_kit.provenance import (
    PROVENANCE,
    NormRecord,
    OwnImages,
    PlainProvenance,
    Provenance,
    read_provenance,
)
from merge_kit.remembered import check_unchanged
from merge_kit.tensorfile import TensorFile
from merge_kit.writing import check_target, write_instead


def restorable(folder: Path) -> Provenance | PlainProvenance:
    """What a merged model says of itself, if its norm statistics may be measured again.

    Raises
    ------
    ProvenanceError
        The folder holds no merged model.
    UsageError
        They have been already, or its classifier was solved for those that it has.
    """
    record = read_provenance(folder)
    if isinstance(record, Provenance) and record.head:
        raise UsageError(
            f"{folder} has a classifier that was solved for its norm statistics: restore the model "
            "that 'merge-kit merge' made, then solve the classifier again."
        )
    if record.norms:
        raise UsageError(
            f"the norm statistics of {folder} have been measured again: restore the model that "
            "'merge-kit merge' made."
        )
    return record


def sums_of(found: Sequence[Contribution]) -> dict[str, NormSums]:
    """What sites have published, added up; from contributions that have been checked.

    Raises
    ------
    ContributionError
        There is none.
    TensorFileError
        A file changed after it was checked.
    """
    if not found:
        raise ContributionError(
            "no site has published norm statistics of this model: sites make them with "
            "'merge-kit calibrate --norms' and 'merge-kit publish'."
        )
    parts = []
    for contribution in sorted(found, key=lambda c: c.id):
        with TensorFile(contribution.payload) as file:
            parts.append(normstats.read(file))
            if contribution.checked:
                check_unchanged(file, contribution.checked)
    return normstats.add(parts)


def from_sites(about: str, found: Sequence[Contribution]) -> NormRecord:
    """How a provenance tells of statistics that sites measured."""
    ordered = sorted(found, key=lambda c: c.id)
    return NormRecord.model_validate({"about": about, "sums": [stated(c) for c in ordered]})


def from_images(about: str, count: int, digest: str) -> NormRecord:
    """How a provenance tells of statistics of images that lie at the merger."""
    return NormRecord(about=about, images=OwnImages(count=count, sha256=digest))


def restore(
    folder: Path,
    record: Provenance | PlainProvenance,
    sums: Mapping[str, NormSums],
    norms: NormRecord,
    out: Path,
    *,
    replace: bool = False,
) -> str:
    """Write the model with other norm statistics to a new folder; gives its fingerprint.

    All other tensors are the model's, byte by byte. The folder appears whole or not at all.

    Raises
    ------
    MergeKitError
        The sums are of other layers than the model's, or `out` exists.
    """
    check_target(out, replace=replace)
    with TensorFile(folder / WEIGHTS) as file, new_folder(out, replace=replace) as target:
        merged = write_instead(target, file, normstats.running_statistics(sums, file.specs))
        told = {
            **record.model_dump(mode="json"),
            "merged": merged,
            "norms": norms.model_dump(mode="json"),
        }
        write_atomic(target / CONFIG, (folder / CONFIG).read_bytes())
        write_atomic(target / PROVENANCE, json.dumps(told, indent=2, ensure_ascii=False))
        card = (folder / CARD).read_text(encoding="utf-8")
        write_atomic(target / CARD, with_norms(card.replace(record.merged, merged), told))
    return merged


def with_norms(card: str, record: Mapping[str, Any]) -> str:
    """A model card that tells of norm statistics that were measured again, if they were."""
    if not record.get("norms"):
        return card
    return card.rstrip("\n") + "\n\n" + render("norms.md.j2", norms=record["norms"])
