"""merge-kit distill, which 'merge --recipe' calls for a recipe of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from torch import nn

from finetune import network
from finetune.cases import content_key, load_unlabelled
from finetune.distillation import Distillation, Student, read_distillation
from finetune.distilling import Lesson, digest_of, distil, lesson, split, told_of
from finetune.image_options import of_split, table_cases, unlabelled_options
from finetune.network import choose_device
from finetune.pixels import Images, decode
from finetune.private import with_backbone
from finetune.progress import Progress
from finetune.run import alone
from finetune.teachers import Teacher, absent_teachers, other_teacher, site_teachers
from merge_kit import backbone, distilled, merging
from merge_kit.commands.merging_options import contribution_options
from merge_kit.commands.options import next_step, pairs, shown
from merge_kit.configuration import CONFIG, require_config
from merge_kit.contributions import Contribution, Entry, check_payloads, list_entries
from merge_kit.errors import DataError, UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation, Preprocessing, preprocessing_of
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.hub import Hub, open_hub
from merge_kit.manifest import Kind
from merge_kit.predictionsfile import digest_of as digest_of_images
from merge_kit.provenance import DistilRecord, OtherTeacher, OwnImages, StatedTeacher
from merge_kit.recipe import DISTILL
from merge_kit.remembered import cache_folder
from merge_kit.site import base_folder, federation_on
from merge_kit.writing import check_target

CHECKPOINT = "checkpoint.pt"
_TEACH: tuple[Kind, ...] = ("vector", "predictions")
"""What of a hub teaches."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A student before its training."""

    model: nn.Module
    config: str
    preprocessing: Preprocessing
    other: str | None
    """Its timm name, where it is not of the federation's backbone."""


@click.command()
@click.argument("hub")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    default=Path(DISTILL),
    show_default=True,
    help="A YAML recipe of distillation, or the name of a shipped one.",
)
@unlabelled_options
@click.option(
    "--teacher",
    "others",
    multiple=True,
    metavar="[NAME=]FOLDER",
    help="A timm folder of any backbone that teaches too (repeatable).",
)
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    help="A model of the federation's classes to start from, instead of the recipe's.",
)
@click.option(
    "--labelled",
    type=click.Path(path_type=Path),
    help="A few labelled images, for 'teachers: stacking'; as for 'evaluate'.",
)
@click.option("--alone", "without_sites", is_flag=True, help="Only the --teacher models teach.")
@contribution_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--replace", is_flag=True, help="Replace an existing model of merge-kit.")
def distill(
    hub: str,
    recipe: Path,
    data: Path,
    images: Path | None,
    where: tuple[str, ...],
    split_of: str,
    skip_unreadable: bool,
    others: tuple[str, ...],
    student: Path | None,
    labelled: Path | None,
    without_sites: bool,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    device: str,
    out: Path | None,
    replace: bool,
) -> None:
    """Merge what the sites' models know: a student learns what they say of images without labels.

    The images in --data may be public ones, or those of one willing site; their labels are not
    read. The student starts from a merge of the weights, from --student, or is another backbone,
    which the recipe names or --student holds under a classifier of zeros. Teachers are the sites'
    models, and any other ones that share classes with the federation. Called again alike it goes on
    where it was.

    \b
    merge-kit merge hub --recipe distill --data images --out distilled
    merge-kit merge hub --recipe distill --data images --student merged --out distilled
    """
    target = out or Path(f"merged-{DISTILL}")
    check_target(target, replace=replace)
    told = read_distillation(recipe)
    if told.student and student:
        raise UsageError(
            "--student and the recipe's 'student' are two students: leave one of them out."
        )
    opened = open_hub(hub)
    federation = federation_on(opened)
    if federation.multi_label:
        raise UsageError(
            "distillation is for images of one class each: in a federation of findings merge "
            "weights, with 'merge-kit merge' and another recipe."
        )
    cases = of_split(
        load_unlabelled(data, images=images, where=pairs(where, "--where")), split_of, data
    )
    keys = [content_key(case) for case in cases]
    few = table_cases(federation.classes, labelled, images, (), ()) if labelled else None
    arrived = _arrived(
        opened,
        federation,
        without_sites,
        sites=sites,
        exclude=exclude,
        skip_refused=skip_refused,
        allow_unsigned=allow_unsigned,
    )
    on = choose_device(device)
    precision = network.resolved("auto", on)
    teachers = _teachers(opened, federation, arrived, others, precision, told.features > 0, keys)
    with ExitStack() as stack, Progress() as progress:
        cache, works = cache_folder("outputs"), cache_folder("distilling")
        if cache is None or works is None:
            place = Path(stack.enter_context(TemporaryDirectory()))
            cache, works = place / "outputs", place / "distilling"
        heard = lesson(
            teachers,
            cases,
            keys,
            told,
            on,
            cache,
            labelled=few,
            skip_unreadable=skip_unreadable,
            progress=progress.stage,
        )
        for sentence in heard.left_out:
            click.echo(f"Left out: {sentence}", err=True)
        begun = _begin(federation, opened, arrived, told, student)
        if student and not any(p.any() for p in network.head_of(begun.model).parameters()):
            told = told.with_new_classifier()
        record = DistilRecord(
            start=distilled.fingerprint_of(begun.model.state_dict()),
            other_backbone=begun.other,
            images=_told(heard.keys),
            labelled=_told([content_key(case) for case in few]) if few else None,
            **_beside(teachers, heard.shares, arrived),
        )
        parts = split(heard, told.validation, told.options().seed)
        stated = told_of(told, given=student is not None)
        identity = [stated, record.model_dump(mode="json"), on.type, digest_of(heard), begun.config]
        work = works / sha256_bytes(canonical_json(identity))[7:23]
        stack.enter_context(alone(work))
        state = distil(
            begun.model,
            _pixels(parts, begun.preprocessing, progress),
            parts,
            told,
            on,
            work / CHECKPOINT,
            progress,
        )
        merged = distilled.fingerprint_of(state)
        by_payload = {c.manifest.payload.sha256: c for c in arrived.vectors}
        shares = [
            (by_payload[teacher.fingerprint], share)
            for teacher, share in zip(teachers, heard.shares, strict=True)
            if teacher.fingerprint in by_payload
        ]
        whole = distilled.provenance(
            federation, shares, arrived.refused, stated, record, merged, on.type
        )
        distilled.write(target, state, begun.config, federation, whole, replace=replace)
        (work / CHECKPOINT).unlink(missing_ok=True)
    click.echo(f"Model in {target}: distilled from {len(teachers)} teachers")
    for teacher, share in zip(teachers, heard.shares, strict=True):
        click.echo(f"  {teacher.name:<30} share {share:.3f}")
    click.echo(f"  on {len(heard.cases)} images without labels; fingerprint {merged}")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


@dataclass(frozen=True, slots=True)
class _Arrived:
    """What has arrived on a hub to learn from."""

    vectors: Sequence[Contribution] = ()
    predictions: Sequence[Contribution] = ()
    refused: Sequence[Entry] = ()


def _arrived(
    hub: Hub,
    federation: Federation,
    without_sites: bool,
    *,
    sites: Sequence[str],
    exclude: Sequence[str],
    skip_refused: bool,
    allow_unsigned: bool,
) -> _Arrived:
    """The vectors and the predictions that may teach, checked; says on stderr what was left out.

    Raises
    ------
    ContributionError
        One of them may not be used and `skip_refused` is false; or there is none.
    """
    if without_sites:
        return _Arrived()
    with Console(stderr=True).status("checking what has arrived"):
        wanted = [entry for entry in list_entries(hub, federation) if entry.kind in _TEACH]
        checked = check_payloads(wanted, federation, hub.fetch(BASE_WEIGHTS))
    found, refused = merging.choose(
        checked,
        allow_unsigned=allow_unsigned,
        skip_refused=skip_refused,
        sites=sites,
        exclude=exclude,
        kinds=_TEACH,
    )
    for entry in refused:
        click.echo(f"Left out: {entry.problem}", err=True)
    vectors, predictions = ([c for c in found if c.kind == kind] for kind in _TEACH)
    return _Arrived(vectors, predictions, refused)


def _beside(
    teachers: Sequence[Teacher], shares: Sequence[float], arrived: _Arrived
) -> dict[str, Any]:
    """The teachers that are no vectors, as a provenance names them."""
    vectors = {c.manifest.payload.sha256 for c in arrived.vectors}
    answers = {c.manifest.payload.sha256: c for c in arrived.predictions}
    others, predictions = [], []
    for teacher, share in zip(teachers, shares, strict=True):
        name = teacher.fingerprint
        if teacher.network is None:
            told = {**merging.stated(answers[name]), "about": answers[name].manifest.about}
            predictions.append(StatedTeacher.model_validate({**told, "weight": share}))
        elif name not in vectors:
            others.append(OtherTeacher(name=teacher.name, fingerprint=name, weight=share))
    return {"others": tuple(others), "predictions": tuple(predictions)}


def _told(keys: Sequence[str]) -> OwnImages:
    return OwnImages(count=len(keys), sha256=digest_of_images(keys))


def _teachers(
    hub: Hub,
    federation: Federation,
    arrived: _Arrived,
    others: Sequence[str],
    precision: str,
    features: bool,
    keys: Sequence[str],
) -> list[Teacher]:
    teachers, silent = site_teachers(
        federation, base_folder(hub), arrived.vectors, precision, features=features
    )
    for sentence in silent:
        click.echo(f"Left out: {sentence}", err=True)
    teachers += absent_teachers(federation, arrived.predictions, keys)
    for text in others:
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            name, path = Path(text).absolute().name, text
        teachers.append(other_teacher(name, Path(path), federation, precision, features=features))
    if not teachers:
        raise UsageError("nobody teaches: give --teacher, or wait for sites to publish.")
    names = [teacher.name for teacher in teachers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two teachers are called '{twice}': tell them apart with NAME=FOLDER.")
    return teachers


def _begin(
    federation: Federation,
    hub: Hub,
    arrived: _Arrived,
    recipe: Distillation,
    student: Path | None,
) -> _Begun:
    """The student with its first weights."""
    if student:
        return _given(student, federation)
    if recipe.student:
        return _built(recipe.student, federation)
    merge = recipe.merge()
    assert merge is not None  # or there is a student
    if not arrived.vectors:
        raise UsageError(
            "there are no vectors to merge the student's first weights from: give --student, or a "
            "recipe with a 'student'."
        )
    with TemporaryDirectory() as place:
        merged = Path(place) / "start"
        merging.merge(
            federation,
            hub.fetch(BASE_WEIGHTS),
            arrived.vectors,
            merge,
            merged,
        )
        model = network.load(merged)
    return _Begun(model, federation.model_config_json, federation.preprocessing, None)


def _given(folder: Path, federation: Federation) -> _Begun:
    config = require_config(folder)
    if config.label_names != federation.classes:
        own = ", ".join(config.label_names) or "of no name"
        raise DataError(
            f"the student {folder} has the classes {own}, the federation "
            f"{', '.join(federation.classes)}: they must be the same, in this order."
        )
    model, seen = network.load(folder), preprocessing_of(config)
    text = (folder / CONFIG).read_text(encoding="utf-8")
    name = str(config.data.get("architecture", "unknown"))
    alike = (name, config.data.get("model_args") or {}) == (
        federation.architecture,
        federation.model_args,
    )
    if alike and seen == federation.preprocessing:
        return _Begun(model, federation.model_config_json, seen, None)
    return _Begun(model, text, seen, name)


def _built(student: Student, federation: Federation) -> _Begun:
    model = backbone.build(
        student.name,
        federation.classes,
        weights=student.weights,
        model_args=student.model_args,
    )
    seen = backbone.preprocessing_of(model, student.preprocessing)
    like = with_backbone(federation, student.name, student.model_args, model, seen)
    return _Begun(model, like.model_config_json, seen, student.name)


def _pixels(
    parts: tuple[Lesson, Lesson], preprocessing: Preprocessing, progress: Progress
) -> tuple[Images, Images]:
    def decoded(part: Lesson) -> Images:
        found, _ = decode(
            part.cases,
            preprocessing,
            progress=lambda done, of: progress.stage("decoding", done, of),
        )
        return found

    return decoded(parts[0]), decoded(parts[1])
