"""Merging without a federation: a base, and checkpoints or task vectors that were made from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merge_kit import engine, vector
from merge_kit.agreement import (
    check_architectures,
    check_classes,
    check_heads,
    check_labels,
    check_length,
)
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.cards import CARD, render
from merge_kit.checkpoints import (
    Checkpoint,
    Difference,
    Start,
    WithHead,
    check_fit,
    read_checked,
)
from merge_kit.configuration import CONFIG, ModelConfig, read_config
from merge_kit.devices import CPU, Device
from merge_kit.encoding import Stored
from merge_kit.errors import BaseMismatchError, NonFiniteError, RecipeError, VectorError
from merge_kit.inputs import Input, choose, each_once, named_apart, open_input
from merge_kit.material import Material
from merge_kit.merging import software
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.provenance import PROVENANCE
from merge_kit.recipe import Recipe
from merge_kit.remembered import Checked, look
from merge_kit.schema import Digest, Document
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec
from merge_kit.writing import Written, write_folder

DEFAULTS = {"weights": "uniform", "head": "method"}
"""What a recipe that does not say it means: checkpoints do not tell how many images they saw."""
_BY_IMAGES = ("examples", "sqrt-examples", "steps", "validation", "agreement")


@dataclass(frozen=True, slots=True)
class Job:
    """What a merge needs, open and checked."""

    base: Tensors
    base_fingerprint: str
    roles: dict[str, Role]
    inputs: tuple[Input, ...]
    """Sorted by id."""
    recipe: Recipe
    config: ModelConfig | None
    """What the merged model's config.json is."""
    notes: tuple[str, ...]
    """What the user should know of what was found."""
    files: tuple[tuple[Stored, Checked], ...] = ()
    """Every file with what was checked of it; the base's comes first."""

    @property
    def rows(self) -> int:
        """Number of classes; 1 where no head is known."""
        heads = (self.base.specs[name] for name, r in self.roles.items() if r is Role.HEAD)
        return next((spec.shape[0] for spec in heads), 1)


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made."""

    written: Written
    weights: tuple[float, ...]
    """In the order of the job's inputs."""


@contextmanager
def gather(
    base: Path,
    inputs: Sequence[Path],
    recipe: Recipe,
    *,
    sites: Sequence[str] = (),
    exclude: Sequence[str] = (),
    again: bool = False,
) -> Iterator[Job]:
    """Open a base and what is to be merged, and check that it fits, before any work starts.

    Parameters
    ----------
    base
        A checkpoint; see `Checkpoint`. Its config.json, if any, names the classifier.
    inputs
        Checkpoints with the base's tensors in any precision, or task vectors; each may be written
        as ``NAME=PATH``. Two with the same tensors count once.
    sites, exclude
        Names to merge, or to leave out.
    again
        Read everything, whatever is remembered of it.

    Raises
    ------
    UsageError
        A name is given twice, or nothing has it.
    RecipeError
        The recipe asks for numbers of images.
    VectorError
        Something does not fit the base, or the others.
    """
    odd = next((r.weights for r in recipe.rules if r.weights in _BY_IMAGES), None)
    if odd:
        raise RecipeError(
            f"'weights: {odd}' needs numbers of images and steps, which only "
            "contributions tell: use 'uniform', or a number for each name."
        )
    with ExitStack() as stack:
        file, own = stack.enter_context(Checkpoint(base)), read_config(base)
        found = [open_input(text, stack) for text in inputs]
        known = [config for config in (own, *(one.config for one in found)) if config]
        classifier = next((config.classifier for config in known if config.classifier), ())
        start = _with_their_head(file, found, classifier)
        renewed = start is not file
        roles = roles_of(start.specs, classifier)
        check_heads(start, roles)
        check_labels([config for config in known if not (renewed and config is own)])
        check_architectures(known)
        for config, tensors in ((own, file), *((one.config, one.file) for one in found)):
            if config:
                check_classes(config, _head(tensors, classifier))
        for one in found:
            if one.header:
                vector.check_specs(one.file, vector_specs(start.specs, roles))
            else:
                check_fit(one.file, start, roles)
                check_length(one.file, start, roles)
        fingerprint, found, files = _read_all(file, found, Start(start, roles), again=again)
        once, notes = each_once(found)
        chosen = choose(named_apart(once), sites, exclude)
        job = Job(start, fingerprint, roles, tuple(chosen), recipe, None, tuple(notes), files)
        if renewed:
            job = _with_new_head(job, _head(file, classifier))
            own = own.with_classes(job.rows) if own else None
        yield _with_config(job, own)


class Sound(Document):
    """What reading a checkpoint finds: all its values are finite."""

    fingerprint: Digest
    huge: tuple[str, ...]
    """Tensors whose difference from a base may overflow."""


def sound(file: Stored) -> Sound:
    """What `look` finds in a checkpoint; raises NonFiniteError."""
    fingerprint, huge = read_checked(file)
    return Sound(fingerprint=fingerprint, huge=huge)


def _read_all(
    base: Checkpoint, found: Sequence[Input], start: Start, *, again: bool
) -> tuple[str, list[Input], tuple[tuple[Stored, Checked], ...]]:
    """The base's fingerprint, and the inputs with theirs: all is read, or was read before."""
    files: list[Stored] = [base, *(one.file for one in found)]
    with one_thread_each() as workers:
        looked = list(in_order(lambda file: look(file, Sound, sound, again=again), files, workers))
    fingerprint, *theirs = (one.fingerprint for one, _ in looked)
    huge, *others = (one.huge for one, _ in looked)
    checked = tuple(zip(files, (check for _, check in looked), strict=True))
    for one in found:
        if one.header and one.header.base != fingerprint:
            raise BaseMismatchError(
                f"{one.path} was taken from the base {one.header.base}, the given base is "
                f"{fingerprint}: give the base that it was taken from."
            )
    for one, own in zip(found, others, strict=True):
        if not one.header:
            _check_difference(one, start, {*huge, *own} & start.specs.keys())
    named = [replace(one, fingerprint=f) for one, f in zip(found, theirs, strict=True)]
    return fingerprint, named, checked


def _check_difference(one: Input, start: Start, names: Collection[str]) -> None:
    for name in sorted(names):
        if not bool(Difference(start, one.file).read(name).isfinite().all()):
            raise NonFiniteError(
                f"{one.path}: tensor '{name}' has values so large that the difference from the "
                "base's overflows float32: give a sound checkpoint."
            )


def _with_new_head(job: Job, old: Mapping[str, TensorSpec]) -> Job:
    had = next((spec.shape[0] for spec in old.values()), "none")
    note = (
        f"The head is new ({job.rows} classes, the base has {had}): it is the weighted mean of the "
        "checkpoints' heads, whatever the method."
    )
    recipe = job.recipe.model_copy(update={"head": "seen"})
    return replace(job, recipe=recipe, notes=(*job.notes, note))


def _with_config(job: Job, own: ModelConfig | None) -> Job:
    """The first config.json that names the classes, or the first: by id, and the base's last."""
    theirs = [one.config for one in job.inputs if one.config]
    configs = [*theirs, own] if own else theirs
    config = next((c for c in configs if c.label_names), configs[0] if configs else None)
    notes = [
        f"{other.path} has another {odd} than {config.path}, which the merged model has."
        for other in theirs
        if config in theirs and (odd := config.other_images(other))
    ]
    return replace(job, config=config, notes=(*job.notes, *notes))


def _head(file: Tensors, classifier: Sequence[str]) -> dict[str, TensorSpec]:
    """The head of a checkpoint as a base would have it."""
    return {
        name: TensorSpec(torch.float32, spec.shape)
        for name, spec in file.specs.items()
        if name.rpartition(".")[0] in classifier
    }


def _with_their_head(
    base: Checkpoint, found: Sequence[Input], classifier: Sequence[str]
) -> Checkpoint | WithHead:
    """The base, or its body with a head of zeros where all checkpoints have another head."""
    head, first = _head(found[0].file, classifier), found[0]
    for one in found[1:]:
        if odd := head.items() ^ _head(one.file, classifier).items():
            name = min(name for name, _ in odd)
            specs = [f.file.specs.get(name, "missing") for f in (first, one)]
            raise VectorError(
                f"the heads differ, '{name}' is {specs[0]} in {first.path} and {specs[1]} in "
                f"{one.path}: only checkpoints of the same classes can be merged."
            )
    old = _head(base, classifier)
    if not head or old == head or (old and old.keys() != head.keys()):
        return base
    body = {name: spec for name, spec in base.specs.items() if name not in old}
    return WithHead(base, dict(sorted((body | head).items())), frozenset(head))


def merge(
    job: Job, out: Path, *, give_way: bool = False, keep_sum: bool = False, device: Device = CPU
) -> Merged:
    """Merge into a folder as `merging.merge` makes it; timm loads it when the inputs are timm's.

    With `give_way` a merged model that is there is replaced; `keep_sum` and `device` as there.

    Statistics of norm layers, and heads under ``head: seen``, are weighted as the vectors are; a
    negative weight counts as 0 there.

    Raises
    ------
    MergeKitError
        The recipe does not fit the number of inputs, or a value overflows.
    """
    found, weights = _weighed(job)

    def texts(fingerprint: str) -> dict[str, str]:
        record = provenance(job, weights, fingerprint, device)
        config = {CONFIG: job.config.text} if job.config else {}
        return {
            **config,
            PROVENANCE: json.dumps(record, indent=2, ensure_ascii=False),
            CARD: model_card(record, job.config),
        }

    written = write_folder(
        out, found, job.recipe, texts, replace=give_way, keep_sum=keep_sum, device=device
    )
    return Merged(written, tuple(weights))


def material(job: Job) -> Material:
    """What the engine reads."""
    return _weighed(job)[0]


def _weighed(job: Job) -> tuple[Material, list[float]]:
    """What the engine reads, with the weights in the place of the numbers of images."""
    start = Start(job.base, job.roles)
    sources = [
        engine.Source(
            id=one.id,
            site=one.name,
            file=one.file if one.header else Difference(start, one.file),
            class_counts=(1.0,) * job.rows,
            steps=0,
        )
        for one in job.inputs
    ]
    engine.check_sites(sources, job.recipe)
    weights = engine.weigh(sources, job.recipe).shares
    counts = [(max(weight, 0.0),) * job.rows for weight in weights]
    weighed = (replace(s, class_counts=c) for s, c in zip(sources, counts, strict=True))
    return (
        Material(job.base, job.base_fingerprint, tuple(weighed), job.roles, files=job.files),
        weights,
    )


def model_card(record: dict[str, Any], config: ModelConfig | None) -> str:
    """The merged model's README.md; `record` is its provenance."""
    return render("plain_card.md.j2", record=record, config=config)


def provenance(
    job: Job, weights: Sequence[float], fingerprint: str, device: Device
) -> dict[str, Any]:
    """What a merged model was made of; names and digests, never a path."""
    return {
        "format": 1,
        "base": job.base_fingerprint,
        "merged": fingerprint,
        "recipe": job.recipe.model_dump(mode="json"),
        "inputs": [
            {
                "name": one.name,
                "kind": one.kind,
                "fingerprint": one.fingerprint,
                "weight": weight,
            }
            for one, weight in zip(job.inputs, weights, strict=True)
        ],
        "software": {**software(), "device": device.name},
    }
