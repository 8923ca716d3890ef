"""Make a model again from the plain checkpoints that it was merged from, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from merge_kit import engine, plain
from merge_kit.accounting import check_card, check_config, open_weights, report, same_version
from merge_kit.checks import Check, Report
from merge_kit.devices import CPU, Device
from merge_kit.errors import MergeKitError
from merge_kit.plain import Job
from merge_kit.provenance import PROVENANCE, PlainInput, PlainProvenance
from merge_kit.rebuilding import norms_again, rebuild, shares
from merge_kit.recipe import make_recipe
from merge_kit.restoring import with_norms
from merge_kit.tensorfile import TensorFile


def verify(
    folder: Path,
    record: PlainProvenance,
    base: Path,
    inputs: Sequence[Path],
    device: Device = CPU,
) -> Report:
    """Compare a merged model with `record`, its provenance, and merge it again.

    `base` and `inputs` are as for `plain.gather`, the inputs in any order: each is known by its
    tensors. Every file is read, whatever is remembered of it, and nothing is written. Each file of
    the folder is accounted for.

    Raises
    ------
    MergeKitError
        The recipe in the provenance is none, or what is given does not fit together.
    """
    recipe = make_recipe(record.recipe, f"the recipe in {PROVENANCE}")
    with ExitStack() as stack:
        job = stack.enter_context(plain.gather(base, inputs, recipe, again=True))
        parts = [_base(record, job, base), *_inputs(record, job)]
        checks = [*parts]
        if job.config:
            checks.append(check_config(folder, job.config.text, "what it was merged from"))
        model, check = open_weights(folder, record.merged, stack)
        checks.append(check)
        if all(check.state == "ok" for check in parts):
            again = _merge_again(folder, record, _renamed(job, record), model, device)
        else:
            text = "not done: it takes the base and every input, and nothing else."
            again = [Check("rebuilt", "differs", text)]
    return report(folder, record.software, checks, again, device)


def _base(record: PlainProvenance, job: Job, given: Path) -> Check:
    found = job.base_fingerprint
    if found == record.base:
        return Check("base", "ok", f"has the stated fingerprint {found}")
    return Check(
        "base",
        "differs",
        f"{given} has the fingerprint {found}, {PROVENANCE} states {record.base}: give the base "
        "that it was merged from.",
    )


def _inputs(record: PlainProvenance, job: Job) -> list[Check]:
    """Each input that is stated, then what else was given."""
    stated = {_identity(one): one for one in record.inputs}
    given = {(one.kind, one.fingerprint): one for one in job.inputs}
    checks = []
    for key, part in stated.items():
        if one := given.get(key):
            checks.append(Check(part.label, "ok", f"{one.path} has the stated fingerprint"))
        else:
            text = f"no {part.kind} that was given has its fingerprint: give it, as it was then."
            checks.append(Check(part.label, "differs", text))
    for key, one in given.items():
        if key not in stated:
            text = f"{PROVENANCE} states no {one.kind} with its fingerprint, {one.fingerprint}."
            checks.append(Check(str(one.path), "differs", text))
    return checks


def _identity(part: PlainInput) -> tuple[str, str]:
    return part.kind, part.fingerprint


def _renamed(job: Job, record: PlainProvenance) -> Job:
    """The names of the merge, which weights and masks go by."""
    names = {part.id: part.name for part in record.inputs}
    return replace(job, inputs=tuple(replace(one, name=names[one.id]) for one in job.inputs))


def _merge_again(
    folder: Path, record: PlainProvenance, job: Job, model: TensorFile | None, device: Device
) -> list[Check]:
    checks: list[Check] = []
    try:
        inputs = plain.material(job)
        checks.append(shares(record, inputs, job.recipe))
        specs = engine.merged_specs(inputs.base.specs, job.recipe)
        norms, told = norms_again(record, (), specs, inputs.roles, model)
        checks += [*told, *rebuild(record, inputs, job.recipe, folder, model, device, norms)]
        inputs.check_unchanged()
    except MergeKitError as error:
        return [*checks, Check("rebuilt", "differs", str(error))]
    ordered = sorted(record.inputs, key=lambda part: part.id)
    stated = {
        **record.model_dump(mode="json"),
        "recipe": job.recipe.model_dump(mode="json"),
        "inputs": [part.model_dump(mode="json") for part in ordered],
    }
    card = with_norms(plain.model_card(stated, job.config), stated)
    return [*checks, check_card(folder, card, same_version=same_version(record.software))]
