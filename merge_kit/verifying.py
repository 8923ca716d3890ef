"""Make a merged model again from what lies on a hub, and compare: for whoever must trust it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from merge_kit import engine
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.checkpoints import WEIGHTS
from merge_kit.checks import Check, Report
from merge_kit.configuration import CONFIG
from merge_kit.contributions import Contribution
from merge_kit.errors import MergeKitError, ProvenanceError
from merge_kit.federation import Federation, Policy
from merge_kit.hub import Hub
from merge_kit.ingredients import FoundBase, find_base, find_contribution, find_statistics
from merge_kit.material import Beside, opened
from merge_kit.methods.base import Statistics
from merge_kit.provenance import (
    PROVENANCE,
    Ingredient,
    PlainProvenance,
    Provenance,
    read_provenance,
)
from merge_kit.rebuilding import compare, shares
from merge_kit.recipe import make_recipe
from merge_kit.site import federation_on
from merge_kit.tensorfile import TensorFile, fingerprint, read_all


def verify(folder: Path, hub: Hub, copies: Sequence[Contribution] = ()) -> Report:
    """Compare a merged model with its provenance, the hub and the signatures, and merge it again.

    Every file is read, whatever is remembered of it, and nothing is written. A contribution is
    looked for among `copies` first, then on the hub. The federation's policy is not applied: it
    may have changed since. The model card is not compared: people add to it.

    Raises
    ------
    ProvenanceError
        The provenance cannot be read, or names no federation.
    FederationError
        The hub holds no federation.
    """
    record = read_provenance(folder)
    if isinstance(record, PlainProvenance):
        raise ProvenanceError(
            f"{folder / PROVENANCE} names no federation: a model that was merged from plain "
            "checkpoints cannot be verified, there is nothing signed to compare it with."
        )
    federation = federation_on(hub).model_copy(update={"policy": Policy()})
    base_check, base = find_base(record, federation, hub)
    checks = [_contract(record, federation), _config(folder, federation), base_check]
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
    whole = all(check.ok for check in checks[3:])
    with ExitStack() as stack:
        model = None
        try:
            model = stack.enter_context(TensorFile(folder / WEIGHTS))
            checks.append(_weights(model, record))
        except MergeKitError as error:
            checks.append(Check(WEIGHTS, False, str(error)))
        if base and whole:
            checks += _merge_again(record, federation, base, there, beside, model)
        else:
            checks.append(Check("rebuilt", False, "not done: it takes the base and every vector."))
    return Report(tuple(checks), tuple(_notes(record)))


def _contract(record: Provenance, federation: Federation) -> Check:
    stated, found = record.federation, federation.contract_hash
    if (stated.name, stated.hash) == (federation.name, found):
        return Check("contract", True, f"federation '{federation.name}', {found}")
    return Check(
        "contract",
        False,
        f"the model is of the federation '{stated.name}' with the contract {stated.hash}, the hub "
        f"is '{federation.name}' with {found}: give the hub that it was merged from.",
    )


def _config(folder: Path, federation: Federation) -> Check:
    expected = federation.model_config_json.encode()
    try:
        with (folder / CONFIG).open("rb") as file:
            found = file.read(len(expected) + 1)
    except OSError as error:
        return Check(CONFIG, False, f"cannot be read: {error.strerror}.")
    if found == expected:
        return Check(CONFIG, True, "as the contract gives it")
    return Check(
        CONFIG,
        False,
        "is not what the contract gives: architecture, classes or preprocessing were changed, "
        "and right weights may give wrong predictions.",
    )


def _weights(model: TensorFile, record: Provenance) -> Check:
    found = fingerprint(read_all(model))
    if found == record.merged:
        return Check(WEIGHTS, True, f"has the stated fingerprint {found}")
    return Check(
        WEIGHTS,
        False,
        f"has the fingerprint {found}, {PROVENANCE} states {record.merged}: one of the two was "
        "changed after the merge.",
    )


def _merge_again(
    record: Provenance,
    federation: Federation,
    base: FoundBase,
    contributions: Sequence[Contribution],
    beside: Beside,
    model: TensorFile | None,
) -> list[Check]:
    checks: list[Check] = []
    try:
        recipe = make_recipe(record.recipe, f"the recipe in {PROVENANCE}")
        with opened(
            federation, base.path, contributions, beside=beside, base_checked=base.checked
        ) as inputs:
            engine.check_sites(inputs.sources, recipe)
            checks.append(shares(record, inputs, recipe))
            checks.append(compare(record, inputs, recipe, model))
            inputs.check_unchanged()
    except MergeKitError as error:
        checks.append(Check("rebuilt", False, str(error)))
    return checks


def _notes(record: Provenance) -> list[str]:
    stated = record.software
    here = {"merge-kit": importlib.metadata.version("merge-kit"), "torch": str(torch.__version__)}
    then = {"merge-kit": stated.merge_kit, "torch": stated.torch}
    return [
        f"it was merged with {name} {then[name]}, this is {name} {version}"
        for name, version in here.items()
        if then[name] != version
    ]
