"""Merged models made again without what has been withdrawn or revoked since."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_kit.contributions import Contribution, Entry, Trust, list_entries
from merge_kit.devices import CPU, Device
from merge_kit.errors import ContributionError, ProvenanceError
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.hub import Hub
from merge_kit.merging import merge
from merge_kit.payloads import check_payloads
from merge_kit.provenance import HeadRecord, Provenance, Stated, read_provenance
from merge_kit.recipe import Recipe, make_recipe
from merge_kit.reheading import Candidate, find_model, rehead
from merge_kit.schema import parse
from merge_kit.solving import HeadOptions


@dataclass(frozen=True, slots=True)
class Remade:
    """What has become of one model."""

    gone: tuple[tuple[Stated, str], ...]
    """What it held and holds no more, and why; empty where nothing was to be done."""
    sites: tuple[str, ...]
    """Whose vectors it is of now."""
    before: str
    after: str
    """Fingerprints."""
    to_calibrate: bool = False
    """Its classifier, or its norm statistics, were of the backbone that it had before: the sites
    measure it again."""


def remerge(folder: Path, hub: Hub, federation: Federation, device: Device = CPU) -> Remade:
    """Make a merged model again, in its place, from what is left of it; else it stays as it is.

    Where only moments are gone its classifier is solved again with the options that it states, also
    where they had been chosen from all moments. Where vectors are gone the others are merged again
    by the same recipe, and what sites had measured of the old backbone is of no use.

    Raises
    ------
    ProvenanceError
        It is no model of this federation, or takes images to be made again; says how.
    ContributionError
        Nothing is left of it, or what it was made of is not on the hub and nobody has withdrawn it.
    """
    record = read_provenance(folder)
    if not isinstance(record, Provenance) or record.federation.hash != federation.contract_hash:
        raise ProvenanceError(f"{folder} was not merged from {hub.uri}: give its own hub.")
    entries = {(entry.site, entry.id): entry for entry in list_entries(hub, federation)}
    stated = _stated(record)
    gone = {part.id: (part, _why(part, entries)) for part in stated}
    gone = {name: (part, why) for name, (part, why) in gone.items() if why}
    told = tuple((part, why or "") for part, why in gone.values())
    _check_statistics(folder, record, gone, entries)
    if not gone:
        return Remade((), tuple(c.site for c in record.contributions), record.merged, record.merged)
    if record.distilled:
        raise ProvenanceError(
            f"{folder} was taught by {_names(told)}, and takes images to be made again: run "
            "'merge-kit distill' as it was run before, with --replace."
        )
    left = [entries[c.site, c.id] for c in record.contributions if c.id not in gone]
    beside = [
        entries[c.site, of]
        for c in record.contributions
        for of in c.statistics.values()
        if c.id not in gone and (c.site, of) in entries
    ]
    checked = check_payloads([*left, *beside], federation, hub.fetch(BASE_WEIGHTS))
    if problem := next((entry.problem for entry in checked if entry.problem), None):
        raise ContributionError(problem)
    found = [entry.contribution for entry in checked if entry.contribution]
    vectors = [c for c in found if c.kind == "vector"]
    sites = tuple(c.site for c in vectors)
    if len(vectors) < len(record.contributions):
        after = _merge_again(folder, record, hub, federation, vectors, found, device)
        measured = record.head is not None or record.norms is not None
        return Remade(told, sites, record.merged, after, measured)
    if record.norms and any(part.id in gone for part in record.norms.sums):
        raise ProvenanceError(
            f"the norm statistics of {folder} are of {_names(told)}: run 'merge-kit restore' on "
            "the model that they were measured on, and 'merge-kit head' after it."
        )
    assert record.head  # what else is gone are its moments
    after = _solve_again(folder, record.head, gone, entries, hub, federation)
    return Remade(told, sites, record.merged, after)


def _stated(record: Provenance) -> list[Stated]:
    """Everything on a hub that a model was made of, each once."""
    found: list[Stated] = list(record.contributions)
    found += record.head.moments if record.head else ()
    found += record.norms.sums if record.norms else ()
    found += record.distilled.predictions if record.distilled else ()
    return list({part.id: part for part in found}.values())


def _why(part: Stated, entries: Mapping[tuple[str, str], Entry]) -> str | None:
    """Why a contribution counts no more; None where it still does."""
    entry = entries.get((part.site, part.id))
    if entry is None:
        raise ContributionError(
            f"{part.label} is not on the hub, and nobody has withdrawn it: look for it, or merge "
            "again without it with 'merge-kit merge'."
        )
    if entry.withdrawn:
        return f"site '{part.site}' has withdrawn it"
    admitted = entry.contribution is None or entry.contribution.trust is Trust.ADMITTED
    if part.trust is Trust.ADMITTED and not admitted:
        # Else a revocation would be undone by whoever removes the signature.
        return f"it does not carry the signature of an admitted site any more: ask '{part.site}'"
    return entry.problem


def _check_statistics(
    folder: Path,
    record: Provenance,
    gone: Collection[str],
    entries: Mapping[tuple[str, str], Entry],
) -> None:
    """Refuse where statistics are gone that speak of a vector which is still there: the method that
    needs them cannot go on with that vector, and to leave it out is not for us to decide."""
    for vector in record.contributions:
        for kind, name in vector.statistics.items():
            entry = entries.get((vector.site, name))
            if vector.id in gone or (entry and entry.contribution):
                continue
            raise ProvenanceError(
                f"{folder} was made with the {kind} {name[:12]} of site '{vector.site}', which is "
                f"{'withdrawn or refused' if entry else 'not on the hub'} while its vector is not: "
                f"merge again with --exclude {vector.site}, or by a method that needs no {kind}."
            )


def _check_weights(folder: Path, recipe: Recipe, gone: Collection[str]) -> None:
    """Refuse where the recipe says what each site weighs: it was said of all of them together."""
    for rule in (recipe, *recipe.groups):
        named = sorted(set(gone) & set(rule.weights)) if isinstance(rule.weights, dict) else []
        if named:
            raise ProvenanceError(
                f"the recipe of {folder} has a weight for site '{named[0]}', which is gone, and "
                "what the others weigh without it is for you to say (with 'merge-kit tune', if it "
                "was learnt): write a recipe without it, and run 'merge-kit merge' with --replace."
            )


def _names(gone: Sequence[tuple[Stated, str]]) -> str:
    return ", ".join(part.label for part, _ in gone)


def _merge_again(
    folder: Path,
    record: Provenance,
    hub: Hub,
    federation: Federation,
    vectors: Sequence[Contribution],
    found: Sequence[Contribution],
    device: Device,
) -> str:
    if not vectors:
        raise ContributionError(
            f"nothing is left of {folder}: all that it was merged from is withdrawn or refused; "
            "remove it."
        )
    assert record.recipe is not None  # there were vectors
    recipe = make_recipe(record.recipe, f"{folder}, recipe")
    there = {c.site for c in vectors}
    _check_weights(folder, recipe, {c.site for c in record.contributions} - there)
    statistics = [c for c in found if c.kind != "vector"]
    merge(
        federation,
        hub.fetch(BASE_WEIGHTS),
        vectors,
        recipe,
        folder,
        statistics=statistics,
        replace=True,
        device=device,
    )
    again = read_provenance(folder)
    return again.merged


def _solve_again(
    folder: Path,
    head: HeadRecord,
    gone: Mapping[str, object],
    entries: Mapping[tuple[str, str], Entry],
    hub: Hub,
    federation: Federation,
) -> str:
    if head.images is not None:
        raise ProvenanceError(
            f"the classifier of {folder} is of images at the merger, too: run 'merge-kit head' "
            "again with the same --data."
        )
    kept = [entries[part.site, part.id] for part in head.moments if part.id not in gone]
    checked = check_payloads(kept, federation, hub.fetch(BASE_WEIGHTS))
    if problem := next((entry.problem for entry in checked if entry.problem), None):
        raise ContributionError(problem)
    moments = tuple(entry.contribution for entry in checked if entry.contribution)
    if not moments:
        raise ContributionError(
            f"nobody is left who has calibrated {folder}: let sites do it with 'merge-kit "
            "calibrate', then run 'merge-kit head'."
        )
    options = parse(HeadOptions, head.options, f"{folder}, head", ProvenanceError)
    model = find_model(hub, federation, folder)
    _, merged = rehead(federation, Candidate(folder, model, moments), options, folder, replace=True)
    return merged
