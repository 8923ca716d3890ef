"""Make a merged model again from what lies on a hub, and compare: for whoever must trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from merge_kit import distilled, engine
from merge_kit.accounting import check_card, check_config, open_weights, report, same_version
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.checks import Check, Report
from merge_kit.configuration import CONFIG
from merge_kit.contributions import Contribution
from merge_kit.devices import CPU, Device
from merge_kit.errors import MergeKitError, ProvenanceError
from merge_kit.federation import Federation, Policy
from merge_kit.hub import Hub
from merge_kit.ingredients import (
    FoundBase,
    find_base,
    find_contribution,
    find_measured,
    find_statistics,
)
from merge_kit.manifest import Kind
from merge_kit.material import Beside, opened
from merge_kit.merging import model_card
from merge_kit.methods.base import Statistics
from merge_kit.provenance import (
    PROVENANCE,
    HeadRecord,
    Ingredient,
    Provenance,
    Stated,
)
from merge_kit.rebuilding import Watch, norms_again, rebuild, rebuild_on_base, shares
from merge_kit.recipe import Recipe, make_recipe
from merge_kit.reheading import head_card
from merge_kit.restoring import with_norms
from merge_kit.schema import parse
from merge_kit.site import federation_on
from merge_kit.solving import HeadOptions, backbone_of, head_tensors, solve_from
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec


def verify(
    folder: Path,
    record: Provenance,
    hub: Hub,
    copies: Sequence[Contribution] = (),
    device: Device = CPU,
) -> Report:
    """Compare a merged model with its provenance, the hub and the signatures, and merge it again.

    Every file is read, whatever is remembered of it, and nothing is written. A contribution is
    looked for among `copies` first, then on the hub. The federation's policy is not applied: it
    may have changed since. Each file of the folder is accounted for.

    Raises
    ------
    FederationError
        The hub holds no federation.
    """
    federation = federation_on(hub).model_copy(update={"policy": Policy()})
    base_check, base = find_base(record, federation, hub)
    config = _config(folder, record, federation)
    checks = [_contract(record, federation), config, base_check]
    local = {(copy.site, copy.id): copy for copy in copies}

    def find(part: Ingredient) -> tuple[Check, Contribution | None]:
        return find_contribution(part, federation, hub, local, base)

    with one_thread_each() as workers:
        found = list(in_order(find, record.contributions, workers))
    checks += [check for check, _ in found]
    there = [contribution for _, contribution in found if contribution]
    beside: dict[Statistics, list[Contribution]] = {}
    for check, kind, statistic in find_statistics(record, federation, hub, local, base):
        checks.append(check)
        if statistic:
            beside.setdefault(kind, []).append(statistic)
    measured: dict[Kind, list[Contribution]] = {"moments": [], "norms": []}
    stated: dict[Kind, tuple[Sequence[Stated], str]] = {}
    if record.head:
        stated["moments"] = record.head.moments, record.head.about
    if record.norms:
        stated["norms"] = record.norms.sums, record.norms.about
    for of, (parts, about) in stated.items():
        for check, one in find_measured(parts, of, about, federation, hub, local, base):
            checks.append(check)
            measured[of] += [one] if one else []
    for part in record.distilled.predictions if record.distilled else ():
        told = find_measured((part,), "predictions", part.about, federation, hub, local, base)
        checks += [check for check, _ in told]
    whole = base is not None and all(check.state == "ok" for check in checks[3:])
    with ExitStack() as stack:
        model, check = open_weights(folder, record.merged, stack)
        checks.append(check)
        if base and whole:
            found_all = Found(there, beside, measured["moments"], measured["norms"])
            again = _merge_again(folder, record, federation, base, found_all, model, device)
        else:
            text = "not done: it takes the base and every vector."
            again = [Check("rebuilt", "differs", text)]
    return report(folder, record.software, checks, again, device)


def _config(folder: Path, record: Provenance, federation: Federation) -> Check:
    if record.distilled and record.distilled.other_backbone:
        return Check(CONFIG, "unknown", "is of a backbone that the contract does not know")
    return check_config(folder, federation.model_config_json, "the contract")


def _contract(record: Provenance, federation: Federation) -> Check:
    stated, found = record.federation, federation.contract_hash
    if (stated.name, stated.hash) == (federation.name, found):
        return Check("contract", "ok", f"federation '{federation.name}', {found}")
    return Check(
        "contract",
        "differs",
        f"the model is of the federation '{stated.name}' with the contract {stated.hash}, the hub "
        f"is '{federation.name}' with {found}: give the hub that it was merged from.",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """Every contribution that a model was made of."""

    vectors: Sequence[Contribution]
    beside: Beside
    moments: Sequence[Contribution]
    norms: Sequence[Contribution]


def _merge_again(
    folder: Path,
    record: Provenance,
    federation: Federation,
    base: FoundBase,
    found: Found,
    model: TensorFile | None,
    device: Device,
) -> list[Check]:
    if record.distilled:
        return _taken(folder, record, federation, model)
    checks: list[Check] = []
    recipe: Recipe | None = None
    try:
        if record.recipe is not None:
            recipe = make_recipe(record.recipe, f"the recipe in {PROVENANCE}")
        with opened(
            federation, base.path, found.vectors, beside=found.beside, base_checked=base.checked
        ) as inputs:
            specs = (
                inputs.base.specs
                if recipe is None
                else engine.merged_specs(inputs.base.specs, recipe)
            )
            head, told = _head_again(record.head, found.moments, federation, specs, model)
            checks += told
            if recipe is None:
                checks.append(rebuild_on_base(record, inputs.base, model, head))
            else:
                engine.check_sites(inputs.sources, recipe)
                checks.append(shares(record, inputs, recipe))
                norms, told = norms_again(record, found.norms, specs, inputs.roles, model)
                checks += told
                about = record.norms.about if found.norms and record.norms else None
                watch = Watch(federation.classifier, about)
                checks += rebuild(
                    record, inputs, recipe, folder, model, device, {**head, **norms}, watch
                )
            inputs.check_unchanged()
        if record.head and model:
            checks.append(_backbone(record.head, model, federation))
    except MergeKitError as error:
        return [*checks, Check("rebuilt", "differs", str(error))]
    told_of = record.model_dump(mode="json")
    if record.head:
        card = head_card(federation, told_of)
    else:
        assert recipe is not None  # or there would be a head
        card = with_norms(_card(record, federation, found.vectors, recipe), told_of)
    return [*checks, check_card(folder, card, same_version=same_version(record.software))]


def _taken(
    folder: Path, record: Provenance, federation: Federation, model: TensorFile | None
) -> list[Check]:
    """Of a model that was trained: what is stated of it, but not that its weights follow."""
    assert record.distilled is not None
    count, made = record.distilled.images.count, record.distilled.synthesised
    whence = "were synthesised from its teachers" if made else "lie with the merger"
    text = f"was distilled on {count} images that {whence}: its weights are taken as they are"
    checks = [Check("rebuilt", "unknown", text)]
    told = record.model_dump(mode="json")
    if record.head:
        if model:
            checks.append(_backbone(record.head, model, federation))
        expected = head_card(federation, told)
    else:
        expected = distilled.card(federation, told)
    return [*checks, check_card(folder, expected, same_version=same_version(record.software))]


def _head_again(
    head: HeadRecord | None,
    moments: Sequence[Contribution],
    federation: Federation,
    specs: Mapping[str, TensorSpec],
    model: TensorFile | None,
) -> tuple[dict[str, torch.Tensor], list[Check]]:
    """The classifier from the moments, or as the model has it where images of the merger's are in
    it.
    """
    if head is None:
        return {}, []
    if head.images:
        names = [f"{federation.classifier[0]}.{leaf}" for leaf in ("weight", "bias")]
        text = (
            f"was solved with {head.images.count} labelled images that lie with the merger: taken "
            "as it is; all else was merged again"
        )
        own = {name: model.read(name) for name in names} if model else {}
        return own, [Check("classifier", "unknown", text)]
    options = parse(HeadOptions, head.options, f"the head in {PROVENANCE}", ProvenanceError)
    return head_tensors(solve_from(moments, options).head, federation, specs), []


def _backbone(head: HeadRecord, model: TensorFile, federation: Federation) -> Check:
    found = backbone_of(model, federation.classifier).fingerprint
    if found == head.about:
        return Check("backbone", "ok", f"is the one that the moments are of, {found}")
    text = f"has the fingerprint {found}, the moments are of {head.about}."
    return Check("backbone", "differs", text)


def _card(
    record: Provenance,
    federation: Federation,
    contributions: Sequence[Contribution],
    recipe: Recipe,
) -> str:
    """The model card as it was written, when sites may have been admitted that are not now."""
    parts = {part.id: part for part in record.contributions}
    then = [replace(c, trust=parts[c.id].trust) for c in sorted(contributions, key=lambda c: c.id)]
    stated = {
        **record.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "contributions": [parts[c.id].model_dump(mode="json") for c in then],
    }
    return model_card(federation, then, stated)
