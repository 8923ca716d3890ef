"""Make a merged model again from what lies on a hub, and compare: for whoever must trust it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from merge_kit import engine
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.contributions import (
    MANIFEST,
    ROOT,
    Contribution,
    Trust,
    check_payload,
    entry_at,
)
from merge_kit.devices import CPU, Device
from merge_kit.errors import MergeKitError
from merge_kit.federation import BASE_WEIGHTS, Federation, Policy, check_base
from merge_kit.hub import Hub
from merge_kit.material import Beside, Material, opened
from merge_kit.methods.base import Statistics
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.provenance import PROVENANCE, Ingredient, Provenance, read_provenance
from merge_kit.recipe import Recipe, make_recipe
from merge_kit.remembered import Checked
from merge_kit.site import federation_on
from merge_kit.tensorfile import Fingerprint, TensorFile, fingerprint, read_all
from merge_kit.tensorheader import TensorSpec

LAST_DIGIT = 1e-5
"""A relative difference that may come from rounding."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was compared."""

    subject: str
    ok: bool
    text: str
    """What was found, or what differs and what that means."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was compared."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing differs."""
        return all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.verified:
            return "Verified: merging again gives the very tensors of this model."
        failed = [check.subject for check in self.checks if not check.ok]
        return f"Not verified: {len(failed)} of {len(self.checks)} differ: {', '.join(failed)}."


@dataclass(frozen=True, slots=True)
class _Base:
    """The base's file, once it was found to be the one that was stated."""

    path: Path
    checked: Checked
    specs: Mapping[str, TensorSpec]
    roles: Mapping[str, Role]


def verify(
    folder: Path, hub: Hub, copies: Sequence[Contribution] = (), device: Device = CPU
) -> Report:
    """Compare a merged model with its provenance, the hub and the signatures, and merge it again.

    Every file is read, whatever is remembered of it, and nothing is written. A contribution is
    looked for among `copies` first, then on the hub. The federation's policy is not applied: it
    may have changed since. The model card is not compared: people add to it.

    Raises
    ------
    ProvenanceError
        The provenance cannot be read.
    FederationError
        The hub holds no federation.
    """
    record = read_provenance(folder)
    federation = federation_on(hub).model_copy(update={"policy": Policy()})
    base_check, base = _find_base(record, federation, hub)
    checks = [_contract(record, federation), _config(folder, federation), base_check]
    local = {(copy.site, copy.id): copy for copy in copies}

    def find(part: Ingredient) -> tuple[Check, Contribution | None]:
        return _find(part, federation, hub, local, base)

    with one_thread_each() as workers:
        found = list(in_order(find, record.contributions, workers))
    checks += [check for check, _ in found]
    there = [contribution for _, contribution in found if contribution]
    beside: dict[Statistics, list[Contribution]] = {}
    for check, kind, statistic in _find_statistics(record, federation, hub, local, base):
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
            checks += _merge_again(record, federation, base, there, beside, model, device)
        else:
            checks.append(Check("rebuilt", False, "not done: it takes the base and every vector."))
    return Report(tuple(checks), tuple(_notes(record, device)))


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


def _find_base(record: Provenance, federation: Federation, hub: Hub) -> tuple[Check, _Base | None]:
    if record.base != federation.base_fingerprint:
        text = (
            f"{PROVENANCE} states {record.base}, the contract on the hub "
            f"{federation.base_fingerprint}."
        )
        return Check("base", False, text), None
    try:
        path = hub.fetch(BASE_WEIGHTS)
        checked = check_base(federation, path, str(path), again=True)
        with TensorFile(path) as file:
            roles = roles_of(file.specs, federation.classifier)
            base = _Base(path, checked, file.specs, roles)
    except MergeKitError as error:
        return Check("base", False, str(error)), None
    return Check("base", True, f"has the stated fingerprint {record.base}"), base


def _find(
    part: Ingredient,
    federation: Federation,
    hub: Hub,
    local: Mapping[tuple[str, str], Contribution],
    base: _Base | None,
) -> tuple[Check, Contribution | None]:
    def differs(text: str) -> tuple[Check, None]:
        return Check(part.label, False, text), None

    found = local.get((part.site, part.id))
    if found is None:
        if not hub.has(f"{ROOT}/{part.site}/{part.id}/{MANIFEST}"):
            return differs(
                "is not on the hub: its site withdrew it, or somebody removed it; the model still "
                "holds what it gave: merge again without it, or give a copy of it with --from."
            )
        entry = entry_at(hub, federation, part.site, part.id)
        if entry.contribution is None:
            return differs(str(entry.problem))
        found = entry.contribution
    if text := _misstated(part, found):
        return differs(text)
    if base is None:
        return differs("its payload was not compared: that takes the base.")
    try:
        expected = vector_specs(base.specs, base.roles)
        checked = check_payload(found, federation, expected, base.roles, again=True)
    except MergeKitError as error:
        return differs(str(error))
    trust = {
        Trust.ADMITTED: "signed with the admitted key",
        Trust.STRANGER: "signed, by a key that the federation does not admit",
        Trust.UNSIGNED: "not signed: nobody vouches for it",
    }
    text = f"{trust[found.trust]}; payload as stated"
    return Check(part.label, True, text), replace(found, checked=checked)


def _find_statistics(
    record: Provenance,
    federation: Federation,
    hub: Hub,
    local: Mapping[tuple[str, str], Contribution],
    base: _Base | None,
) -> Iterator[tuple[Check, Statistics, Contribution | None]]:
    """The statistics that were used beside the vectors, in the order of the vectors' ids."""
    for part in sorted(record.contributions, key=lambda part: part.id):
        for kind, name in sorted(part.statistics.items()):
            subject = f"{part.site}/{name[:12]}"
            found = local.get((part.site, name))
            if found is None:
                entry = entry_at(hub, federation, part.site, name)
                found = entry.contribution
                if found is None:
                    yield Check(subject, False, str(entry.problem)), kind, None
                    continue
            if found.kind != kind or found.manifest.about != part.payload or base is None:
                text = f"is not the {kind} of {part.label}, or the base is missing."
                yield Check(subject, False, text), kind, None
                continue
            try:
                expected = vector_specs(base.specs, base.roles)
                checked = check_payload(found, federation, expected, base.roles, again=True)
            except MergeKitError as error:
                yield Check(subject, False, str(error)), kind, None
                continue
            text = f"{kind} of {part.label}, as signed"
            yield Check(subject, True, text), kind, replace(found, checked=checked)


def _misstated(part: Ingredient, found: Contribution) -> str | None:
    """What the provenance says of a contribution that is not so."""
    if part.payload != found.manifest.payload.sha256:
        return (
            f"{PROVENANCE} states the payload {part.payload}, its manifest "
            f"{found.manifest.payload.sha256}."
        )
    if part.public_key != found.key:
        return (
            f"{PROVENANCE} states the key {part.public_key or 'none'}, its signature on the hub is "
            f"of {found.key or 'none'}."
        )
    if part.signature != found.signature:
        return f"{PROVENANCE} states another signature than lies on the hub."
    admitted_since = part.trust is Trust.STRANGER and found.trust is Trust.ADMITTED
    if part.trust is not found.trust and not admitted_since:
        return (
            f"{PROVENANCE} calls it '{part.trust.value}', by the federation file on the hub it is "
            f"'{found.trust.value}': the list of sites was changed, or the statement."
        )
    return None


def _merge_again(
    record: Provenance,
    federation: Federation,
    base: _Base,
    contributions: Sequence[Contribution],
    beside: Beside,
    model: TensorFile | None,
    device: Device,
) -> list[Check]:
    checks: list[Check] = []
    try:
        recipe = make_recipe(record.recipe, f"the recipe in {PROVENANCE}")
        with opened(
            federation, base.path, contributions, beside=beside, base_checked=base.checked
        ) as inputs:
            engine.check_sites(inputs.sources, recipe)
            checks.append(_shares(record, inputs, recipe))
            checks.append(_compare(record, inputs, recipe, model, device))
            inputs.check_unchanged()
    except MergeKitError as error:
        checks.append(Check("rebuilt", False, str(error)))
    return checks


def _shares(record: Provenance, inputs: Material, recipe: Recipe) -> Check:
    shares = engine.weigh(inputs.sources, recipe).shares
    found = dict(zip([source.id for source in inputs.sources], shares, strict=True))
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


def _compare(
    record: Provenance,
    inputs: Material,
    recipe: Recipe,
    model: TensorFile | None,
    device: Device,
) -> Check:
    specs = engine.merged_specs(inputs.base.specs, recipe)
    gap = _Gap() if model and model.specs == specs else None
    digest = Fingerprint()
    for part in engine.merge(inputs.base, inputs.sources, inputs.roles, recipe, device=device):
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


def _notes(record: Provenance, device: Device) -> list[str]:
    stated = record.software
    here = {"merge-kit": importlib.metadata.version("merge-kit"), "torch": str(torch.__version__)}
    then = {"merge-kit": stated.merge_kit, "torch": stated.torch}
    notes = [
        f"it was merged with {name} {then[name]}, this is {name} {version}"
        for name, version in here.items()
        if then[name] != version
    ]
    if stated.device != device.name:
        notes.append(
            f"it was merged on {stated.device}, this is {device.name}: unless the methods are "
            "linear the last digits may differ (--device takes another)"
        )
    return notes
