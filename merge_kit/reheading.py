"""A model folder with the classifier that follows from the moments of its backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_kit.cards import CARD, render
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.contributions import Contribution, Entry, list_entries
from merge_kit.errors import BaseMismatchError, ContributionError, ProvenanceError
from merge_kit.federation import BASE_WEIGHTS, Federation, check_base
from merge_kit.files import new_folder, write_atomic
from merge_kit.homes import unasked
from merge_kit.hub import Hub
from merge_kit.manifest import Kind
from merge_kit.merging import choose, software, stated
from merge_kit.payloads import check_payloads
from merge_kit.provenance import PROVENANCE, HeadRecord, Provenance, read_provenance
from merge_kit.remembered import look
from merge_kit.restoring import with_norms
from merge_kit.solving import (
    Backbone,
    HeadOptions,
    Own,
    Solved,
    backbone_of,
    head_tensors,
    read_parts,
    solve_from,
    unseen_error,
)
from merge_kit.tensorfile import TensorFile, fingerprint, read_all
from merge_kit.writing import check_target, write_instead

_MERGER = ""
"""Stands for the merger among the names of sites, none of which is empty."""


@dataclass(frozen=True, slots=True)
class Model:
    """The base of a federation, or a model that was merged from its hub."""

    weights: Path
    backbone: str
    """Fingerprint of all but the classifier: what moments are about."""
    record: Provenance | None
    """None for the base."""


def find_model(hub: Hub, federation: Federation, folder: Path | None) -> Model:
    """The merged model in a folder, or the base where there is none.

    Raises
    ------
    ProvenanceError
        The folder holds no model that was merged from a hub.
    BaseMismatchError
        It is a model of another federation, or was changed after the merge.
    """
    if folder is None:
        weights = hub.fetch(BASE_WEIGHTS)
        check_base(federation, weights, str(weights))
        return Model(weights, _backbone(weights, federation), None)
    record = record_of(folder, federation)
    with TensorFile(folder / WEIGHTS) as file:
        if (found := fingerprint(read_all(file))) != record.merged:
            raise BaseMismatchError(
                f"{folder / WEIGHTS} has the fingerprint {found}, its {PROVENANCE} states "
                f"{record.merged}: one of the two was changed; merge again."
            )
    return Model(folder / WEIGHTS, _backbone(folder / WEIGHTS, federation), record)


def record_of(folder: Path, federation: Federation) -> Provenance:
    """What a model that was merged from a federation's hub says of itself.

    Raises
    ------
    ProvenanceError
        The folder holds no model that was merged from a hub, or one of another backbone.
    BaseMismatchError
        It is of another contract; names both.
    """
    record = read_provenance(folder)
    if not isinstance(record, Provenance):
        raise ProvenanceError(
            f"{folder} was merged without a federation: moments are for models of a hub."
        )
    if record.federation.hash != federation.contract_hash:
        raise BaseMismatchError(
            f"{folder} is of the contract {record.federation.hash}, this federation's is "
            f"{federation.contract_hash}: give a model that was merged from this hub."
        )
    if record.distilled and record.distilled.other_backbone:
        raise ProvenanceError(
            f"{folder} is a '{record.distilled.other_backbone}' and not of the federation's "
            "backbone: what sites measure or add up does not fit it; give a model that does."
        )
    return record


def _backbone(weights: Path, federation: Federation) -> str:
    with TensorFile(weights) as file:
        return look(file, Backbone, lambda opened: backbone_of(opened, federation.classifier))[
            0
        ].fingerprint


def find_measured(
    hub: Hub,
    federation: Federation,
    backbone: str,
    kind: Kind = "moments",
    *,
    allow_unsigned: bool = False,
    skip_refused: bool = False,
    sites: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[Contribution], list[Entry]]:
    """What sites measured of a backbone, checked, and the entries that were left out.

    Raises
    ------
    ContributionError
        One of them may not be used and `skip_refused` is false.
    """
    left_out = unasked(federation, sites, exclude)
    there = [
        entry
        for entry in list_entries(hub, federation, without=left_out)
        if entry.stated and (entry.kind, entry.stated.manifest.about) == (kind, backbone)
    ]
    if not any(entry.contribution for entry in there):
        return [], []
    checked = check_payloads(there, federation, hub.fetch(BASE_WEIGHTS))
    return choose(
        checked,
        allow_unsigned=allow_unsigned,
        skip_refused=skip_refused,
        sites=sites,
        exclude=exclude,
        kinds=(kind,),
        unasked=left_out,
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model with the moments that sites have published of its backbone."""

    folder: Path | None
    model: Model
    moments: tuple[Contribution, ...]
    own: Own | None = None
    """Of images at the merger."""
    error: float | None = None
    """`moments.unseen_error` over the sites that have measured every candidate; None of fewer than
    two."""


def compare(found: Sequence[Candidate]) -> list[Candidate]:
    """Candidates, the one that loses least at sites it has not been made of first.

    Raises
    ------
    ContributionError
        There are several, and fewer than two sites have measured them all.
    """
    parts = [
        {**read_parts(one.moments), **({_MERGER: one.own.moments} if one.own else {})}
        for one in found
    ]
    common = set.intersection(*[set(those) for those in parts]) if parts else set()
    if len(found) > 1 and len(common) < 2:
        raise ContributionError(
            f"{len(common)} site(s) have calibrated all {len(found)} models: to choose among them "
            "two sites or more must have measured each."
        )
    candidates = [
        replace(one, error=unseen_error([told[site] for site in sorted(common)]))
        for one, told in zip(found, parts, strict=True)
    ]
    if len(found) > 1 and candidates[0].error is None:  # then it is of all
        raise ContributionError(
            "no class was annotated at two of the sites that have calibrated all models: choosing "
            "among them takes one that was; name one model."
        )
    return sorted(candidates, key=lambda one: (one.error is None, one.error or 0.0))


def rehead(
    federation: Federation,
    candidate: Candidate,
    options: HeadOptions,
    out: Path,
    *,
    replace: bool = False,
) -> tuple[Solved, str]:
    """Write the model with its solved classifier to a new folder; gives its fingerprint too.

    All but the classifier is the model's, byte by byte. The folder appears whole or not at all.

    Raises
    ------
    MergeKitError
        There are no moments, a file changed after it was checked, or `out` exists.
    """
    check_target(out, replace=replace)
    model = candidate.model
    solved = solve_from(candidate.moments, options, candidate.own)
    with ExitStack() as stack:
        file = stack.enter_context(TensorFile(model.weights))
        heads = head_tensors(solved.head, federation, file.specs)
        folder = stack.enter_context(new_folder(out, replace=replace))
        merged = write_instead(folder, file, heads)
        record = provenance(federation, model, solved, merged)
        write_atomic(folder / CONFIG, federation.model_config_json)
        write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False))
        write_atomic(folder / CARD, head_card(federation, record))
    return solved, merged


def head_card(federation: Federation, record: dict[str, Any]) -> str:
    """The README.md of a model whose classifier was solved."""
    return with_norms(render("head_card.md.j2", federation=federation, record=record), record)


def _images(own: Own | None) -> dict[str, Any] | None:
    return {"count": int(own.moments.size), "sha256": own.digest} if own else None


def provenance(federation: Federation, model: Model, solved: Solved, merged: str) -> dict[str, Any]:
    """What the model was made of: how its backbone was merged, and whose moments made the head."""
    head = HeadRecord.model_validate(
        {
            "about": model.backbone,
            "options": solved.options.model_dump(mode="json"),
            "moments": [stated(c) for c in solved.moments],
            "images": _images(solved.own),
        }
    )
    of_the_base = {
        "format": 1,
        "federation": {"name": federation.name, "hash": federation.contract_hash},
        "base": federation.base_fingerprint,
        "recipe": None,
        "contributions": [],
        "refused": [],
        "software": software(),
    }
    told = of_the_base if model.record is None else model.record.model_dump(mode="json")
    return {**told, "merged": merged, "head": head.model_dump(mode="json")}
