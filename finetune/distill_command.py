"""merge-kit distill, which 'merge --recipe' calls for a recipe of distillation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from rich.console import Console

from finetune import network
from finetune.cases import Case, content_key, load_unlabelled
from finetune.distillation import Distillation, read_distillation, with_images
from finetune.distilling import Lesson, digest_of, distil, lesson, split, told_of
from finetune.image_options import of_split, table_cases, unlabelled_options
from finetune.network import choose_device
from finetune.pixels import Images, decode
from finetune.progress import Progress
from finetune.run import alone
from finetune.students import Begun, begin
from finetune.synthesising import Synthetic, able, make, save, taught
from finetune.teachers import Teacher, absent_teachers, other_teacher, site_teachers
from merge_kit import distilled, merging
from merge_kit.commands.merging_options import contribution_options
from merge_kit.commands.options import next_step, opened_federation, pairs, shown
from merge_kit.contributions import Contribution, Entry, list_entries
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation, Preprocessing
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.homes import unasked
from merge_kit.hub import Hub
from merge_kit.manifest import Kind
from merge_kit.payloads import check_payloads
from merge_kit.predictionsfile import digest_of as digest_of_images
from merge_kit.provenance import DistilRecord, OtherTeacher, OwnImages, StatedTeacher, Synthesised
from merge_kit.recipe import DISTILL
from merge_kit.remembered import cache_folder
from merge_kit.site import base_folder
from merge_kit.writing import check_target

CHECKPOINT = "checkpoint.pt"
_TEACH: tuple[Kind, ...] = ("vector", "predictions")
"""What of a hub teaches."""


@click.command()
@click.argument("hub")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    default=Path(DISTILL),
    show_default=True,
    help="A YAML recipe of distillation, or the name of a shipped one.",
)
@partial(unlabelled_options, required=False)
@click.option(
    "--synthesise",
    type=click.IntRange(min=2),
    metavar="N",
    help="Learn from N images that are made from the teachers themselves, in the place of --data.",
)
@click.option(
    "--save-images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write synthesised images as PNG, to look at them.",
)
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
    data: Path | None,
    synthesise: int | None,
    save_images: Path | None,
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
    read. Where there are none, backbones with batch norm can have them made from themselves. The
    student starts from a merge of the weights, from --student, or is another backbone, which the
    recipe names or --student holds under a classifier of zeros. Teachers are the sites' models, and
    any other ones that share classes with the federation. Called again alike it goes on where it
    was.

    \b
    merge-kit merge hub --recipe distill --data images --out distilled
    merge-kit merge hub --recipe distill --data images --student merged --out distilled
    merge-kit merge hub --recipe distill-synthetic --out distilled
    """
    target = out or Path(f"merged-{DISTILL}")
    check_target(target, replace=replace)
    told = with_images(read_distillation(recipe), data, synthesise)
    _check(told, student, save_images, for_data=bool(where) or skip_unreadable)
    opened, federation = opened_federation(hub)
    if federation.multi_label:
        raise UsageError(
            "distillation is for images of one class each: in a federation of findings merge "
            "weights, with 'merge-kit merge' and another recipe."
        )
    cases: list[Case] = []
    if data:
        found = load_unlabelled(data, images=images, where=pairs(where, "--where"))
        cases = of_split(found, split_of, data)
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
    if told.synthesis:
        arrived = _without_predictions(arrived)
    on = choose_device(device)
    precision = network.resolved("auto", on)
    teachers = _teachers(opened, federation, arrived, others, precision, told.features > 0, keys)
    with ExitStack() as stack, Progress() as progress:
        cache, works, batches = _folders(stack)
        begun = begin(federation, opened, arrived.vectors, told, student)
        if student and not begun.knows:
            told = told.with_new_classifier()
        made = None
        if told.synthesis:
            made = _made(teachers, told, federation, begun, on, batches, progress)
            heard = taught(teachers, made, told, on, cache, labelled=few, progress=progress.stage)
        else:
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
        record = DistilRecord(
            start=distilled.fingerprint_of(begun.model.state_dict()),
            other_backbone=begun.other,
            images=_told(heard.keys),
            synthesised=Synthesised(probability=round(made.after, 6)) if made else None,
            labelled=_told([content_key(case) for case in few]) if few else None,
            **_beside(teachers, heard.shares, arrived),
        )
        kin = [case.group for case in made.cases] if made else None
        parts = split(heard, told.validation, told.options().seed, kin)
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
        if made and save_images:
            save(made, federation.classes, save_images)
        (work / CHECKPOINT).unlink(missing_ok=True)
    click.echo(f"Model in {target}: distilled from {len(teachers)} teachers")
    for teacher, share in zip(teachers, heard.shares, strict=True):
        click.echo(f"  {teacher.name:<30} share {share:.3f}")
    if made:
        click.echo(f"  on {len(heard.cases)} synthesised images; fingerprint {merged}")
        click.echo(
            f"  the classes that they were to show: probability {made.before:.3f} in the noise, "
            f"{made.after:.3f} in the images"
        )
    else:
        click.echo(f"  on {len(heard.cases)} images without labels; fingerprint {merged}")
    if made and save_images:
        click.echo(f"  images to look at in {save_images}")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


def _check(
    recipe: Distillation,
    student: Path | None,
    images: Path | None,
    *,
    for_data: bool,
) -> None:
    """Refuse options that do not go together.

    Raises
    ------
    UsageError
        Says which.
    """
    if recipe.student and student:
        raise UsageError(
            "--student and the recipe's 'student' are two students: leave one of them out."
        )
    if images and not recipe.synthesis:
        raise UsageError("--save-images is for images that are synthesised: leave it out.")
    if images and images.exists():
        raise UsageError(f"{images} exists already: choose another --save-images.")
    if recipe.synthesis and for_data:
        raise UsageError(
            "--where and --skip-unreadable choose among the images of --data: leave them out where "
            "images are synthesised."
        )


def _folders(stack: ExitStack) -> list[Path]:
    """Where outputs, students and synthesised images are kept; for this call alone, where nothing
    is."""
    parts = ("outputs", "distilling", "synthesis")
    kept = [folder for folder in map(cache_folder, parts) if folder]
    if len(kept) == len(parts):
        return kept
    place = Path(stack.enter_context(TemporaryDirectory()))
    return [place / part for part in parts]


def _made(
    teachers: Sequence[Teacher],
    recipe: Distillation,
    federation: Federation,
    begun: Begun,
    device: torch.device,
    cache: Path,
    progress: Progress,
) -> Synthetic:
    """The images that are learnt from, where none were given."""
    chosen, others = able(teachers)
    for sentence in others:
        click.echo(f"Note: {sentence}", err=True)
    return make(chosen, recipe, federation.preprocessing, begun, device, cache, progress.stage)


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
        left_out = unasked(federation, sites, exclude)
        there = list_entries(hub, federation, without=left_out)
        wanted = [entry for entry in there if entry.kind in _TEACH]
        checked = check_payloads(wanted, federation, hub.fetch(BASE_WEIGHTS))
    found, refused = merging.choose(
        checked,
        allow_unsigned=allow_unsigned,
        skip_refused=skip_refused,
        sites=sites,
        exclude=exclude,
        kinds=_TEACH,
        unasked=left_out,
    )
    for entry in refused:
        click.echo(f"Left out: {entry.problem}", err=True)
    vectors, predictions = ([c for c in found if c.kind == kind] for kind in _TEACH)
    return _Arrived(vectors, predictions, refused)


def _without_predictions(arrived: _Arrived) -> _Arrived:
    """Who has said something of other images can say nothing of these; says so on stderr."""
    for found in arrived.predictions:
        click.echo(
            f"Left out: the predictions of site '{found.site}' are of images that there are, and "
            "not of synthesised ones.",
            err=True,
        )
    return dataclasses.replace(arrived, predictions=())


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
