"""merge-kit distill, which 'merge --recipe' calls for a recipe of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from torch import nn

from finetune import network
from finetune.cases import Case, contents_digest, load_unlabelled
from finetune.distillation import Distillation, Student, read_distillation
from finetune.distilling import Labelled, Lesson, distil, lesson, split, told_of
from finetune.image_options import table_cases, unlabelled_options
from finetune.network import choose_device
from finetune.pixels import Images, decode
from finetune.progress import Progress
from finetune.run import alone
from finetune.teachers import Teacher, other_teacher, site_teachers
from merge_kit import backbone, distilled, merging
from merge_kit.commands.merging_options import Gathered, contribution_options, gather
from merge_kit.commands.options import next_step, pairs, shown
from merge_kit.configuration import read_config
from merge_kit.contributions import Contribution, list_entries
from merge_kit.errors import DataError, UsageError, VectorError
from merge_kit.federation import BASE_WEIGHTS, Federation, Preprocessing, preprocessing_of
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.hub import Hub, open_hub
from merge_kit.provenance import DistilRecord, OtherTeacher, OwnImages
from merge_kit.recipe import DISTILL, make_recipe
from merge_kit.remembered import cache_folder
from merge_kit.site import base_folder, federation_on
from merge_kit.writing import check_target

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class _Begun:
    """A student before its training."""

    model: nn.Module
    config: str
    architecture: str
    preprocessing: Preprocessing


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
    read. The student starts from a merge of the weights, from --student, or is another backbone
    that the recipe names; teachers are the sites' models, and any other ones that share classes
    with the federation. Called again alike it goes on where it was.

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
    options, chosen_device = told.options(), choose_device(device)
    opened = open_hub(hub)
    federation = federation_on(opened)
    if federation.multi_label:
        raise UsageError(
            "distillation is for images of one class each: in a federation of findings merge "
            "weights, with 'merge-kit merge' and another recipe."
        )
    cases = _cases(data, images, where, split_of)
    few = None
    if labelled:
        few = Labelled(tuple(table_cases(federation.classes, labelled, images, (), ())))
    found = None
    if not without_sites:
        found = gather(
            list_entries(opened, federation),
            federation,
            opened.fetch(BASE_WEIGHTS),
            make_recipe({"method": "mean"}, "distillation"),
            sites=sites,
            exclude=exclude,
            skip_refused=skip_refused,
            allow_unsigned=allow_unsigned,
        )
    precision = network.resolved("auto", chosen_device)
    teachers, taught = _teachers(
        opened, federation, found, others, precision, features=told.features > 0
    )
    cache = cache_folder("outputs")
    with ExitStack() as stack, Progress() as progress:
        cache = cache or Path(stack.enter_context(TemporaryDirectory()))
        heard = lesson(
            teachers,
            cases,
            told,
            chosen_device,
            cache,
            labelled=few,
            skip_unreadable=skip_unreadable,
            progress=progress.stage,
        )
        for sentence in heard.left_out:
            click.echo(f"Left out: {sentence}", err=True)
        begun = _begin(federation, opened, found, told, student)
        parts = split(heard, told.validation, options.seed)
        pixels = _pixels(parts, begun.preprocessing, progress)
        start = distilled.fingerprint_of(begun.model.state_dict())
        digest = contents_digest(heard.cases)
        identity = [
            told_of(told), start, digest, chosen_device.type,
            [[t.fingerprint, share] for t, share in zip(teachers, heard.shares, strict=True)],
        ]  # fmt: skip
        name = sha256_bytes(canonical_json(identity))[7:23]
        work = cache.parent / "distilling" / name
        stack.enter_context(alone(work))
        state = distil(
            begun.model,
            pixels,
            parts,
            told,
            options,
            chosen_device,
            work / CHECKPOINT,
            progress,
        )
        record = DistilRecord(
            start=start,
            images=_told(heard.cases),
            labelled=_told(few.cases) if few else None,
            others=tuple(
                OtherTeacher(name=t.name, fingerprint=t.fingerprint, weight=share)
                for t, share in zip(teachers, heard.shares, strict=True)
                if t.fingerprint not in taught
            ),
        )
        shares = [
            (taught[t.fingerprint], share)
            for t, share in zip(teachers, heard.shares, strict=True)
            if t.fingerprint in taught
        ]
        merged = distilled.fingerprint_of(state)
        whole = distilled.provenance(
            federation,
            shares,
            found.refused if found else [],
            told_of(told),
            record,
            merged,
            chosen_device.type,
        )
        distilled.write(
            target, state, begun.config, federation, whole, begun.architecture, replace=replace
        )
        (work / CHECKPOINT).unlink(missing_ok=True)
    click.echo(f"Model in {target}: distilled from {len(teachers)} teachers")
    for teacher, share in zip(teachers, heard.shares, strict=True):
        click.echo(f"  {teacher.name:<20} share {share:.3f}")
    click.echo(f"  on {len(heard.cases)} images without labels; fingerprint {merged}")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


def _told(cases: Sequence[Case]) -> OwnImages:
    return OwnImages(count=len(cases), sha256=contents_digest(cases))


def _cases(data: Path, images: Path | None, where: tuple[str, ...], split_of: str) -> list[Case]:
    cases = load_unlabelled(data, images=images, where=pairs(where, "--where"))
    if split_of != "all" and any(case.split for case in cases):
        cases = [case for case in cases if case.split == split_of]
    if not cases:
        raise DataError(f"{data} has no image to learn from: give others, or another --split.")
    return sorted(cases, key=lambda case: case.file)


def _teachers(
    hub: Hub,
    federation: Federation,
    found: Gathered | None,
    others: Sequence[str],
    precision: str,
    *,
    features: bool,
) -> tuple[list[Teacher], dict[str, Contribution]]:
    """All teachers, and the contributions among them by their payload's digest."""
    teachers: list[Teacher] = []
    taught: dict[str, Contribution] = {}
    if found:
        teachers, silent = site_teachers(
            federation, base_folder(hub), found.chosen, precision, features=features
        )
        for sentence in silent:
            click.echo(f"Left out: {sentence}", err=True)
        taught = {c.manifest.payload.sha256: c for c in found.chosen}
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
    return teachers, taught


def _begin(
    federation: Federation,
    hub: Hub,
    found: Gathered | None,
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
    if found is None:
        raise UsageError(
            "with --alone no weights are merged to start from: give --student, or a recipe with a "
            "'student'."
        )
    with TemporaryDirectory() as place:
        merged = Path(place) / "start"
        merging.merge(
            federation,
            hub.fetch(BASE_WEIGHTS),
            found.chosen,
            merge,
            merged,
            statistics=found.statistics,
        )
        model = network.load(merged)
    return _Begun(
        model, federation.model_config_json, federation.architecture, federation.preprocessing
    )


def _given(folder: Path, federation: Federation) -> _Begun:
    config = read_config(folder)
    if config is None:
        raise VectorError(f"{folder} is no model: it has no config.json; give a timm folder.")
    if config.label_names != federation.classes:
        own = ", ".join(config.label_names) or "of no name"
        raise DataError(
            f"the student {folder} has the classes {own}, the federation "
            f"{', '.join(federation.classes)}: they must be the same, in this order."
        )
    text = (folder / "config.json").read_text(encoding="utf-8")
    name = str(config.data.get("architecture", "timm"))
    return _Begun(network.load(folder), text, name, preprocessing_of(config))


def _built(student: Student, federation: Federation) -> _Begun:
    model = backbone.build(
        student.name,
        federation.classes,
        weights=student.weights,
        model_args=student.model_args,
    )
    seen = backbone.preprocessing_of(model, student.preprocessing)
    like = federation.model_copy(
        update={
            "architecture": student.name,
            "model_args": student.model_args,
            "classifier": backbone.classifier_names(model),
            "preprocessing": seen,
        }
    )
    return _Begun(model, like.model_config_json, student.name, seen)


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
