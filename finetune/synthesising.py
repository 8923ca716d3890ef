"""Images to learn from that are made from the teachers, batch by batch, and what teachers say of
them.

``<folder>/<key>/<number>.safetensors`` keeps a batch as soon as it is there, so that a killed call
goes on with the next one: `pixels`, uint8 (S * b, side, side, 3), the b images after each of S
stages; `before` and `after`, float32 (b,), see `finetune.synthesis.Made`. `<key>` is a digest of
the teachers, the settings and what else the images follow from.
"""

from __future__ import annotations

import copy
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune import kept
from finetune.cases import ArrayItem, Case, content_key, read_case
from finetune.distillation import Distillation, Synthesis
from finetune.distilling import Lesson, counted, lesson
from finetune.feed import draw_seed
from finetune.normalizing import norm_layers, norm_sums
from finetune.outputs import Network, Stage
from finetune.pixels import decode, stored_size
from finetune.students import Begun
from finetune.synthesis import Brief, Inverted, Made, synthesise
from finetune.teachers import Teacher
from merge_kit.distilled import fingerprint_of
from merge_kit.errors import UsageError
from merge_kit.federation import Preprocessing
from merge_kit.files import canonical_json, new_folder, sha256_bytes, storage_errors, write_atomic
from merge_kit.normstats import statistics
from merge_kit.predictionsfile import digest_of
from merge_kit.tensorheader import TensorSpec

FORMAT = 1
_PIXELS, _BEFORE, _AFTER = "pixels", "before", "after"
_STAGE = "synthesising"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Lot:
    """One batch that is to be made."""

    teachers: tuple[Teacher, ...]
    """From whose networks."""
    targets: tuple[int, ...]
    """The class that each image is to show."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Images that were made."""

    cases: tuple[Case, ...]
    """A case for each stage of each image: labelled with the class that it is to show, of one
    `group` with its other stages, with the columns `teacher` and `stage`."""
    keys: tuple[str, ...]
    """Their contents, as `finetune.cases.content_key` gives them."""
    before: float
    """Mean probability of the class that an image is to show in the noise that it began as, by the
    teachers that it is made from."""
    after: float
    """The same in the finished images."""

    def rows(self, stage: int) -> list[int]:
        """The places of the images of a stage, counted from 1."""
        return [row for row, case in enumerate(self.cases) if case.columns["stage"] == str(stage)]


def asked_of(teacher: Teacher) -> Tensor:
    """(C,) bool: of which classes images may be made from a teacher: those that it knows and, where
    it tells, has had images of."""
    return teacher.known & (teacher.counts != 0)


def able(teachers: Sequence[Teacher]) -> tuple[list[Teacher], list[str]]:
    """The teachers that images can be made from, sorted; and a sentence for each of the others.

    Raises
    ------
    UsageError
        There is none.
    """
    chosen, others = [], []
    for teacher in teachers:
        if teacher.norms:
            chosen.append(teacher)
        else:
            others.append(
                f"'{teacher.name}' has no batch norm: images are made from the others, and it "
                "says what it makes of them."
            )
    if not chosen:
        raise UsageError(
            "images are synthesised from the statistics that batch norm keeps, and none of these "
            "teachers has it: learn from unlabelled images (--data), let sites say what they make "
            "of images that all have ('merge-kit predict-proxy'), add the weights ('merge-kit "
            "merge --method sum'), or solve the classifier in closed form ('merge-kit head')."
        )
    return sorted(chosen, key=lambda teacher: teacher.fingerprint), others


def plan(teachers: Sequence[Teacher], settings: Synthesis) -> list[Lot]:
    """Which images are made from whom: of each class that may be asked for equally many, and of a
    class equally many from each teacher that may be asked for it.

    Parameters
    ----------
    teachers
        As `able` gives them.

    Raises
    ------
    UsageError
        There are fewer images than classes.
    """
    assert settings.images is not None  # the command has seen to it
    asked = [asked_of(teacher) for teacher in teachers]
    classes = torch.stack(asked).any(dim=0).nonzero().flatten().tolist()
    if settings.images < len(classes):
        raise UsageError(
            f"{settings.images} images cannot show {len(classes)} classes: have {len(classes)} "
            "synthesised at least, better ten of each."
        )
    targets = [classes[number % len(classes)] for number in range(settings.images)]
    if settings.invert == "together":
        return _lots(tuple(teachers), targets, settings.batch_size)
    shares: list[list[int]] = [[] for _ in teachers]
    tally = [[0] * len(asked[0]) for _ in teachers]
    for target in targets:
        may = [place for place, known in enumerate(asked) if known[target]]
        least = min(may, key=lambda place: (tally[place][target], len(shares[place]), place))
        tally[least][target] += 1
        shares[least].append(target)
    return [
        lot
        for teacher, share in zip(teachers, shares, strict=True)
        for lot in _lots((teacher,), share, settings.batch_size)
    ]


def _lots(teachers: tuple[Teacher, ...], targets: Sequence[int], size: int) -> list[Lot]:
    """Batches of about the same size: their statistics are as good as each other's."""
    if not targets:
        return []
    parts = torch.tensor(targets).tensor_split(-(-len(targets) // size))
    return [Lot(teachers, tuple(part.tolist())) for part in parts]


def make(
    teachers: Sequence[Teacher],
    recipe: Distillation,
    preprocessing: Preprocessing,
    begun: Begun,
    device: torch.device,
    cache: Path,
    progress: Stage,
) -> Synthetic:
    """The images that a recipe asks for, from teachers as `able` gives them.

    Parameters
    ----------
    preprocessing
        The federation's: how large the images are.
    begun
        The student, which is looked at where images are to be new to it.
    cache
        Where batches are kept, and looked for.

    Raises
    ------
    UsageError
        The student is to be looked at, and has no classifier or does not see images as the
        federation says.
    TrainingError
        As `synthesise`.
    """
    settings = recipe.synthesis
    assert settings is not None  # or there would be nothing to make
    student = _watching(begun, preprocessing, settings, device)
    lots = plan(teachers, settings)
    told = [
        FORMAT,
        settings.model_dump(mode="json"),
        recipe.teachers,
        [_identity(teacher) for teacher in teachers],
        preprocessing.hash,
        None if student is None else [fingerprint_of(begun.model.state_dict()), begun.config],
        device.type,
    ]
    key = sha256_bytes(canonical_json(told)).removeprefix("sha256:")
    kept.tidy(cache, key)
    before, after, paths, total = [], [], [], settings.steps * len(lots)
    for number, lot in enumerate(lots):
        path = cache / key / f"{number:05}.safetensors"
        stated = {"format": FORMAT, "synthesis": key, "batch": number}
        tensors = kept.recall(path, _specs(lot, settings, preprocessing), stated)
        if tensors is None:
            brief = _brief(lot, recipe, preprocessing, student, device)
            seed = draw_seed(settings.seed, "synthesis", number)
            report = partial(_report, progress, number * settings.steps, total)
            tensors = _tensors(synthesise(brief, settings, seed, device, report))
            kept.keep(path, tensors, stated)
        paths.append(path)
        before.append(tensors[_BEFORE])
        after.append(tensors[_AFTER])
    progress(_STAGE, total, total)
    cases = _cases(paths, lots, settings.stages)
    keys = tuple(content_key(case) for case in cases)
    return Synthetic(cases, keys, *(float(torch.cat(part).mean()) for part in (before, after)))


def taught(
    teachers: Sequence[Teacher],
    made: Synthetic,
    recipe: Distillation,
    device: torch.device,
    cache: Path,
    *,
    labelled: Sequence[Case] | None = None,
    progress: Stage | None = None,
) -> Lesson:
    """What the teachers together say of synthesised images, as `finetune.distilling.lesson`.

    Of stage i of S they say it as they are with the share i / S, and with the rest as
    noise-adapted teachers: with the batch norm statistics that they have on the images of this
    stage. The divergence from a mixture of two probabilities differs from the mixture of the two
    divergences, which FedISCA lowers, by what does not depend on the student. FedISCA's authors
    take the statistics of each batch; here they are those of all images of the stage.
    """
    settings = recipe.synthesis
    assert settings is not None  # or nothing has been made
    ask = partial(
        lesson, recipe=recipe, device=device, cache=cache, labelled=labelled, progress=progress
    )
    whole = ask(teachers, made.cases, made.keys)
    for stage in range(1, settings.stages):
        rows, share = made.rows(stage), stage / settings.stages
        part = whole.take(rows)
        adapted = [_adapted(teacher, part, device) for teacher in teachers]
        told = ask(adapted, part.cases, part.keys)
        whole.logits[rows] = mixed(part.logits, told.logits, share, recipe.temperature)
        if whole.features is not None and told.features is not None:
            whole.features[rows] = torch.lerp(told.features, whole.features[rows], share)
    return whole


def mixed(first: Tensor, second: Tensor, share: float, temperature: float) -> Tensor:
    """Logits (n, C) whose probabilities at a temperature are those of `first`, with a share, and of
    `second`, with the rest; minus infinity where both are."""
    p, q = ((logits / temperature).softmax(dim=1) for logits in (first, second))
    return torch.lerp(q, p, share).log() * temperature


def save(made: Synthetic, classes: Sequence[str], folder: Path) -> None:
    """Write the images as PNG files, with a table `labels.csv`, for a person to look at: whole or
    not at all.

    Raises
    ------
    UsageError
        `folder` exists.
    MergeKitError
        The storage is full, read-only or gone.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "label", "teacher", "stage"])
    with new_folder(folder) as place:
        for case in made.cases:
            name = f"{Path(case.file).stem}-{_UNSAFE.sub('_', classes[case.label])}.png"
            with storage_errors(folder / name):
                read_case(case).save(place / name, "PNG")
            told = case.columns
            writer.writerow([name, classes[case.label], told["teacher"], told["stage"]])
        write_atomic(place / "labels.csv", table.getvalue())


def _watching(
    begun: Begun, preprocessing: Preprocessing, settings: Synthesis, device: torch.device
) -> nn.Module | None:
    """The student that images are to be new to, if they are to be."""
    if not settings.competition:
        return None
    if not begun.knows:
        raise UsageError(
            "'competition' is with a student that knows the classes already, and the classifier of "
            "this one is of zeros: leave it at 0."
        )
    if begun.preprocessing.hash != preprocessing.hash:
        raise UsageError(
            "'competition' compares a student with the teachers on the same images, and this one "
            "sees them in another size or other colours than the federation says: leave it at 0."
        )
    return _ready(copy.deepcopy(begun.model), device)


def _ready(model: nn.Module, device: torch.device) -> nn.Module:
    """Frozen, in evaluation mode, on the device."""
    model.eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _identity(teacher: Teacher) -> list[object]:
    """What images that are made from a teacher depend on."""
    assert teacher.network is not None  # it has batch norm
    counts = [None if count != count else count for count in teacher.counts.tolist()]
    return [teacher.network.key, list(teacher.rows), teacher.known.tolist(), counts]


def _brief(
    lot: Lot,
    recipe: Distillation,
    preprocessing: Preprocessing,
    student: nn.Module | None,
    device: torch.device,
) -> Brief:
    networks = []
    for teacher in lot.teachers:
        assert teacher.network is not None  # it has batch norm
        model = _ready(teacher.network.load(), device)
        seen = teacher.network.preprocessing
        networks.append(Inverted(model, teacher.rows, teacher.known, seen))
    weights = counted(lot.teachers, recipe.teachers).float()
    return Brief(networks, weights, torch.tensor(lot.targets), preprocessing, student)


def _report(progress: Stage, before: int, total: int, step: int) -> None:
    progress(_STAGE, before + step, total)


def _specs(lot: Lot, settings: Synthesis, seen: Preprocessing) -> dict[str, TensorSpec]:
    count, side = len(lot.targets), stored_size(seen)
    return {
        _AFTER: TensorSpec(torch.float32, (count,)),
        _BEFORE: TensorSpec(torch.float32, (count,)),
        _PIXELS: TensorSpec(torch.uint8, (settings.stages * count, side, side, 3)),
    }


def _tensors(made: Made) -> dict[str, Tensor]:
    return {_PIXELS: made.pixels.flatten(0, 1), _BEFORE: made.before, _AFTER: made.after}


def _cases(paths: Sequence[Path], lots: Sequence[Lot], stages: int) -> tuple[Case, ...]:
    """Batch by batch, in each of them stage by stage."""
    cases, first = [], 0
    for path, lot in zip(paths, lots, strict=True):
        makers = ", ".join(teacher.name for teacher in lot.teachers)
        size = len(lot.targets)
        for row in range(stages * size):
            stage, place = divmod(row, size)
            number = first + place
            told = {"teacher": makers, "stage": str(stage + 1)}
            name = f"{number:06}-stage{stage + 1}" if stages > 1 else f"{number:06}"
            source = ArrayItem(path, _PIXELS, row)
            label, group = lot.targets[place], str(number)
            cases.append(Case(f"{name}.png", source, label, group=group, columns=told))
        first += size
    return tuple(cases)


def _adapted(teacher: Teacher, seen: Lesson, device: torch.device) -> Teacher:
    """The teacher with the batch norm statistics that it has on these images."""
    if teacher.network is None or not teacher.norms:
        return teacher
    told = ["adapted", teacher.network.key, digest_of(seen.keys)]
    key = sha256_bytes(canonical_json(told)).removeprefix("sha256:")
    load = partial(_load_adapted, teacher.network, seen.cases, device)
    return replace(teacher, network=replace(teacher.network, key=key, outputs={}, load=load))


def _load_adapted(network: Network, cases: Sequence[Case], device: torch.device) -> nn.Module:
    model = network.load()
    images, _ = decode(cases, network.preprocessing)
    found = norm_sums(model.to(device), images, device)
    with torch.no_grad():
        for name, layer in norm_layers(model).items():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = statistics(found[name])
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
    return model.cpu()
