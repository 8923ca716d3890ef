"""Merging without a federation: a base, and checkpoints or task vectors that were made from it."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merge_kit import engine, vector
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.checkpoints import (
    Checkpoint,
    Difference,
    Start,
    WithHead,
    check_fit,
    fingerprint_checked,
)
from merge_kit.configuration import CONFIG, ModelConfig, read_config
from merge_kit.errors import BaseMismatchError, RecipeError, UsageError, VectorError
from merge_kit.merging import CARD, PROVENANCE, render, software, write_folder
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.recipe import Recipe
from merge_kit.schema import Document, SiteName, parse
from merge_kit.tensorfile import Tensors, TensorSpec

DEFAULTS = {"weights": "uniform", "head": "method"}
"""What a recipe that does not say it means: checkpoints do not tell how many images they saw."""
_NAMELESS = ("model", "payload", "vector")


class _Name(Document):
    name: SiteName


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint, or a task vector, that is merged."""

    name: str
    path: Path
    file: Checkpoint
    header: vector.VectorHeader | None
    """Of a task vector."""
    config: ModelConfig | None
    given: bool
    """Whether the user chose the name."""
    fingerprint: str = ""
    """Of the tensors and not of the files: shards and metadata make no other checkpoint."""

    @property
    def id(self) -> str:
        """What the engine sorts by: the order of the arguments never matters."""
        return self.fingerprint.removeprefix("sha256:")


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

    @property
    def rows(self) -> int:
        """Number of classes; 1 where no head is known."""
        heads = (self.base.specs[name] for name, r in self.roles.items() if r is Role.HEAD)
        return next((spec.shape[0] for spec in heads), 1)


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made."""

    fingerprint: str
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

    Raises
    ------
    UsageError
        A name is given twice, or nothing has it.
    RecipeError
        The recipe asks for numbers of images.
    VectorError
        Something does not fit the base, or the others.
    """
    if isinstance(recipe.weights, str) and recipe.weights != "uniform":
        raise RecipeError(
            f"'weights: {recipe.weights}' needs numbers of images and steps, which only "
            "contributions tell: use 'uniform', or a number for each name."
        )
    with ExitStack() as stack:
        file, own = stack.enter_context(Checkpoint(base)), read_config(base)
        found = [_open(text, stack) for text in inputs]
        known = [config for config in (own, *(one.config for one in found)) if config]
        classifier = next((config.classifier for config in known if config.classifier), ())
        start = _with_their_head(file, found, classifier)
        renewed = start is not file
        roles = roles_of(start.specs, classifier)
        _check_heads(start, roles)
        _check_labels([config for config in known if not (renewed and config is own)])
        for one in found:
            if one.header:
                vector.check_specs(one.file, vector_specs(start.specs, roles))
            else:
                check_fit(one.file, start, roles)
        with one_thread_each() as workers:
            files = [file, *(one.file for one in found)]
            fingerprint, *theirs = in_order(fingerprint_checked, files, workers)
        for one in found:
            _check_base(one, fingerprint)
        once, notes = _once([replace(o, fingerprint=f) for o, f in zip(found, theirs, strict=True)])
        chosen = _choose(_named_apart(once), sites, exclude)
        job = Job(start, fingerprint, roles, tuple(chosen), recipe, None, tuple(notes))
        job = replace(job, config=_config(job, own, renewed=renewed))
        if renewed:
            had = next((file.specs[n].shape[0] for n in _head(file, classifier)), "none")
            note = (
                f"The head is new ({job.rows} classes, the base has {had}): it is the weighted "
                "mean of the checkpoints' heads, whatever the method."
            )
            recipe = recipe.model_copy(update={"head": "seen"})
            job = replace(job, recipe=recipe, notes=(*notes, note))
        yield job


def _open(text: Path, stack: ExitStack) -> Input:
    name, separator, rest = str(text).partition("=")
    given = bool(separator) and not text.exists()
    path = Path(rest) if given else text
    if given:
        parse(_Name, {"name": name}, str(text), UsageError)
    file = stack.enter_context(Checkpoint(path))
    header = vector.read_header(file) if vector.METADATA_KEY in file.metadata else None
    if not given:
        name = header.site if header else _name_from(path)
    return Input(name, path, file, header, None if header else read_config(path), given)


def _name_from(path: Path) -> str:
    """A legal name for what lies at a path; of the path, only its last telling part."""
    place = Path(os.path.abspath(path))
    stem = place.name if place.is_dir() else place.stem
    if not place.is_dir() and stem in _NAMELESS:
        stem = place.parent.name
    ascii_only = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:63].strip("-") or "checkpoint"


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
        if odd := sorted(head.items() ^ _head(one.file, classifier).items()):
            name = odd[0][0]
            specs = [f.file.specs.get(name, "missing") for f in (first, one)]
            raise VectorError(
                f"the heads differ, '{name}' is {specs[0]} in {first.path} and {specs[1]} in "
                f"{one.path}: only checkpoints of the same classes can be merged."
            )
    old = _head(base, classifier)
    if not head or {n: s.shape for n, s in old.items()} == {n: s.shape for n, s in head.items()}:
        return base
    body = {name: spec for name, spec in base.specs.items() if name not in old}
    return WithHead(base, dict(sorted((body | head).items())), frozenset(head))


def _check_heads(base: Tensors, roles: Mapping[str, Role]) -> None:
    heads = [name for name, role in roles.items() if role is Role.HEAD]
    for name in heads[1:]:
        one, other = base.specs[heads[0]], base.specs[name]
        if one.shape[:1] != other.shape[:1]:
            raise VectorError(
                f"the heads '{heads[0]}' ({one}) and '{name}' ({other}) are not of the same "
                "classes: correct 'classifier' in config.json."
            )


def _check_labels(configs: Sequence[ModelConfig]) -> None:
    named = [config for config in configs if config.label_names]
    for config in named[1:]:
        ours, theirs = named[0].label_names, config.label_names
        if len(ours) != len(theirs):
            raise VectorError(
                f"{config.path} names {len(theirs)} classes, {named[0].path} names {len(ours)}: "
                "only checkpoints of the same classes can be merged."
            )
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            if our != their:
                raise VectorError(
                    f"class {number} is '{their}' in {config.path} and '{our}' in "
                    f"{named[0].path}: only checkpoints with the same classes in the same order "
                    "can be merged."
                )


def _check_base(one: Input, fingerprint: str) -> None:
    if one.header and one.header.base != fingerprint:
        raise BaseMismatchError(
            f"{one.path} was taken from the base {one.header.base}, the given base is "
            f"{fingerprint}: give the base that it was taken from."
        )


def _once(found: Sequence[Input]) -> tuple[list[Input], list[str]]:
    """Each content once, sorted by it, and a sentence on every one that was there already."""
    kept: dict[str, Input] = {}
    notes = []
    for one in sorted(found, key=_rank):
        first = kept.setdefault(one.id, one)
        if first is one:
            continue
        if first.path == one.path:
            notes.append(f"{one.path} is given twice: it counts once.")
        else:
            notes.append(f"{first.path} and {one.path} hold the same tensors: they count once.")
    return list(kept.values()), notes


def _rank(one: Input) -> tuple[object, ...]:
    """By content; of equal ones the first tells most."""
    return one.id, not one.given, one.config is None, one.name, str(one.path)


def _named_apart(found: Sequence[Input]) -> list[Input]:
    """Numbers behind names that several have, in the order of their content."""
    taken: set[str] = set()
    for one in found:
        if one.given and one.name in taken:
            raise UsageError(
                f"two checkpoints are called '{one.name}': tell them apart with NAME=PATH."
            )
        if one.given:
            taken.add(one.name)
    named = []
    for one in found:
        name, number = one.name, 2
        while not one.given and name in taken:
            name, number = f"{one.name[:60]}-{number}", number + 1
        taken.add(name)
        named.append(replace(one, name=name))
    return named


def _choose(found: Sequence[Input], sites: Sequence[str], exclude: Sequence[str]) -> list[Input]:
    names = [one.name for one in found]
    if unknown := sorted({*sites, *exclude} - set(names)):
        raise UsageError(
            f"no checkpoint is called '{unknown[0]}'; there are {', '.join(sorted(names))}."
        )
    chosen = [o for o in found if (not sites or o.name in sites) and o.name not in exclude]
    if not chosen:
        raise UsageError("--site and --exclude leave nothing to merge: name one checkpoint fewer.")
    return chosen


def _config(job: Job, own: ModelConfig | None, *, renewed: bool) -> ModelConfig | None:
    """The first that names the classes, or the first: checkpoints by id, then the base."""
    if own and renewed:
        own = own.with_classes(job.rows)
    configs = [config for config in (*(one.config for one in job.inputs), own) if config]
    return next((c for c in configs if c.label_names), configs[0] if configs else None)


def merge(job: Job, out: Path, *, give_way: bool = False) -> Merged:
    """Merge into a folder as `merging.merge` makes it; timm loads it when the inputs are timm's.

    With `give_way` a merged model that is there is replaced.

    Statistics of norm layers, and heads under ``head: seen``, are weighted as the vectors are; a
    negative weight counts as 0 there.

    Raises
    ------
    MergeKitError
        The recipe does not fit the number of inputs, or a value overflows.
    """
    sources, weights = _weighed(job)

    def texts(fingerprint: str) -> dict[str, str]:
        record = provenance(job, weights, fingerprint)
        config = {CONFIG: job.config.text} if job.config else {}
        return {
            **config,
            PROVENANCE: json.dumps(record, indent=2, ensure_ascii=False),
            CARD: render("plain_card.md.j2", record=record, config=job.config),
        }

    fingerprint = write_folder(
        out, job.base, sources, job.roles, job.recipe, texts, replace=give_way
    )
    return Merged(fingerprint, tuple(weights))


def _weighed(job: Job) -> tuple[list[engine.Source], list[float]]:
    """What the engine merges, with the weights in the place of the numbers of images."""
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
    weighed = [replace(s, class_counts=c) for s, c in zip(sources, counts, strict=True)]
    return weighed, weights


def provenance(job: Job, weights: Sequence[float], fingerprint: str) -> dict[str, Any]:
    """What a merged model was made of; names and digests, never a path."""
    return {
        "format": 1,
        "base": job.base_fingerprint,
        "merged": fingerprint,
        "recipe": job.recipe.model_dump(mode="json"),
        "inputs": [
            {
                "name": one.name,
                "kind": "vector" if one.header else "checkpoint",
                "fingerprint": one.fingerprint,
                "weight": weight,
            }
            for one, weight in zip(job.inputs, weights, strict=True)
        ],
        "software": software(),
    }
