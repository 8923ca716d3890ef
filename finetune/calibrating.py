"""What a site measures of a model on its own images: moments, in a folder that can be published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from finetune import network
from finetune.cases import Case, case_key
from finetune.drafting import write_measured
from finetune.labelling import finding_counts
from finetune.normalizing import norm_sums
from finetune.objectives import told_of
from finetune.pixels import decode
from finetune.run import alone
from finetune.splits import split_of
from finetune.withholding import withhold
from merge_kit import classmeans, findings, moments, momentsfile, normstats
from merge_kit.checkpoints import WEIGHTS
from merge_kit.classmeans import GroupMeans
from merge_kit.errors import DataError, LabelError, UsageError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.manifest import read_draft
from merge_kit.momentsfile import AnyMoments
from merge_kit.publishing import DRAFT, draft_file, payload_file
from merge_kit.reheading import record_of
from merge_kit.runs import latest_run
from merge_kit.site import COPY, Site
from merge_kit.solving import backbone_of
from merge_kit.tensorfile import TensorFile

CALIBRATIONS = "calibrations"
Measured: TypeAlias = Literal["moments", "norms"]
Stage: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What has been measured and written."""

    folder: Path
    size: int
    """Bytes that would leave the site."""
    images: int
    """Number of images in it."""
    counts: tuple[int, ...]
    """Images of each class in it."""
    absent: tuple[int, ...]
    """Where an image may have several classes, images in it that lack each; else nothing."""
    held_back: tuple[tuple[str, int], ...]
    """Classes with fewer images than the policy asks for, and how many; where an image may have
    several classes, in how many images each is held back."""
    coarse: int
    """Images whose label names a group and that are therefore in no sum over a class."""
    assigned: int
    """Images whose label names a group and that count for its most probable class."""
    skipped: tuple[str, ...]
    was_there: bool


def backbone_at(site: Site, model: Path | None) -> str:
    """The fingerprint of the backbone of a merged model, or of the base.

    Raises
    ------
    ProvenanceError, BaseMismatchError
        The model is of no federation, or of another one.
    """
    if model is not None:
        record_of(model, site.federation)
    weights = site.root / COPY / BASE_WEIGHTS if model is None else model / WEIGHTS
    with TensorFile(weights) as file:
        return backbone_of(file, site.federation.classifier).fingerprint


def calibrate(
    site: Site,
    cases: Sequence[Case],
    model: Path | None,
    device: torch.device,
    kind: Measured = "moments",
    *,
    means: int | None = None,
    assign_groups: bool = False,
    skip_unreadable: bool = False,
    stage: Stage = lambda name, done, of: None,
) -> Calibration:
    """One pass forward over the site's training images, and the moments of their features; or with
    ``norms`` the sums over the inputs of the batch norm layers.

    A class of fewer images than the policy's `minimum_class_count` is held back: its sum would give
    its images' features away. So is an image whose label names a group of classes: the classifier
    is made of sums over single classes. With `assign_groups` it counts for the class of its group
    that the model's own classifier, which others have solved, finds most probable. Where an image
    may have several classes, what `withhold` holds back is not told. With `means` the means of
    groups of so many images are told in the place of the moments: see `merge_kit.classmeans`.
    The folder's name is a hash of the model and the images: what has been measured before is not
    measured again.

    Raises
    ------
    DataError
        No class has enough images, or the model is none of this federation.
    VectorError
        Norm statistics are asked of a backbone without batch norm.
    UsageError
        Groups are to be assigned by a model whose classifier nobody has solved.
    """
    if means is not None:
        classmeans.check_size(means, _minimum(site))
    every = sorted(split_of(cases, "train"), key=lambda case: case.file)
    cases, size = every, len(site.federation.classes)
    several = site.federation.multi_label
    if assign_groups:
        solved_by = _solved(site, model)
    elif not several:
        cases = [case for case in every if case.label < size]
    if not cases:
        raise DataError(
            f"all {len(every)} training images have labels of groups, and the classifier is made "
            "of sums over single classes: this site has no part in it, its vector in the merge "
            "stays; --assign-groups takes its images for the most probable class of their group."
        )
    about = backbone_at(site, model)
    told: list[object] = [about, site.config.federation, _minimum(site)]
    told += [] if kind == "moments" else [kind]
    told += [] if means is None else [f"means of {means}"]
    told += [solved_by] if assign_groups else []
    told += [[case.file, *told_of(case), case_key(case)] for case in cases]
    folder = site.root / CALIBRATIONS / sha256_bytes(canonical_json(told))[7:19]
    with alone(folder):
        path, draft = folder / payload_file(kind), folder / draft_file(kind)
        was_there = draft.is_file() and path.is_file()
        skipped: list[str] = []
        if not was_there:
            images, skipped = decode(
                cases,
                site.federation.preprocessing,
                cache=site.root / "cache",
                skip_unreadable=skip_unreadable,
                progress=lambda done, of: stage("decoding", done, of),
            )
            opened = network.load(site.base_folder if model is None else model).to(device)
            truth = images.targets() if several else images.labels()
            if kind == "norms":
                kept = _enough(site, truth)
                found = norm_sums(
                    opened,
                    images.take([int(index) for index in kept.nonzero()]),
                    device,
                    lambda done, of: stage("measuring", done, of),
                )
                tensors = normstats.to_tensors(found)
            else:
                features = network.features(
                    opened, images, device, progress=lambda done, of: stage("features", done, of)
                ).flatten(1)
                if assign_groups:
                    truth = _assigned(opened, features, truth, site.federation.labels.meaning)
                if several:
                    truth = withhold(truth, _minimum(site))
                kept = _enough(site, truth)
                tensors = momentsfile.to_tensors(
                    _measured(site, features[kept], truth[kept], means)
                )
            counted = withhold(truth, _minimum(site)) if several else truth
            write_measured(site, folder, kind, about, tensors, _counts(site, counted[kept]))
        stated = read_draft(draft, "calibrate")
        counts, absent = (
            tuple(int(those[name]) for name in site.federation.classes if name in those)
            for those in (stated.class_counts, stated.absent_counts or {})
        )
        return Calibration(
            folder,
            path.stat().st_size,
            int(stated.images or 0) if several else sum(counts),
            counts,
            absent,
            _held_back(site, cases, counts),
            len(every) - len(cases),
            sum(case.label >= size for case in cases),
            tuple(skipped),
            was_there,
        )


def _measured(
    site: Site, features: Tensor, truth: Tensor, means: int | None
) -> AnyMoments | GroupMeans:
    size = len(site.federation.classes)
    if site.federation.multi_label:
        return findings.measure(features, truth)
    if means is not None:
        grouped = classmeans.measure(features, truth, size, means)
        if classmeans.fault(grouped):
            raise DataError(
                f"no class has two groups of {means} training images, and one group says nothing "
                "of how images differ: give a smaller --means, or leave it out."
            )
        return grouped
    return moments.measure(features, truth, size)


def _enough(site: Site, truth: Tensor) -> Tensor:
    """(n,) bool: the images of classes that are large enough, or in which any finding is annotated.

    Raises
    ------
    DataError
        There is none, or too few.
    """
    minimum, size = _minimum(site), len(site.federation.classes)
    if site.federation.multi_label:
        kept = (truth >= 0).any(dim=1)
        if int(kept.sum()) < minimum:
            raise DataError(
                f"no class has {minimum} training images with it and {minimum} without it, as the "
                "federation's policy asks for: fewer would give their features away; add images."
            )
        return kept
    kept = torch.bincount(truth, minlength=size)[truth] >= minimum
    if not bool(kept.any()):
        raise DataError(
            f"no class has {minimum} training images, as the federation's policy "
            "asks for: fewer would give their features away; add images."
        )
    return kept


def _solved(site: Site, model: Path | None) -> str:
    """The fingerprint of a model whose classifier was solved from moments."""
    record = None if model is None else record_of(model, site.federation)
    if record is None or record.head is None:
        raise UsageError(
            "--assign-groups needs a classifier that tells the classes of a group apart: give a "
            "model of 'merge-kit head' with --model."
        )
    return record.merged


@torch.no_grad()
def _assigned(model: nn.Module, features: Tensor, labels: Tensor, meaning: Tensor) -> Tensor:
    """(n,) int64: for each image the class of its label that the classifier gives most to."""
    outputs: Tensor = network.head_of(model).cpu()(features).flatten(1)
    return outputs.masked_fill(~meaning[labels], -torch.inf).argmax(dim=1)


def explained(error: LabelError, site: Site) -> DataError:
    """What is wrong with a table, and why where the site has a task of its own."""
    run = latest_run(site.root)
    if run is None or not read_draft(run / DRAFT).other_images:
        return error
    return DataError(
        f"site '{site.name}' has trained classes of its own, and moments are sums over the images "
        f"of the federation's ({', '.join(site.federation.classes)}): it has none to give; "
        "'merge-kit calibrate --own-classes' puts its own classifier on a merged backbone."
    )


def _minimum(site: Site) -> int:
    return site.federation.policy.minimum_class_count


def _held_back(
    site: Site, cases: Sequence[Case], counts: Sequence[int]
) -> tuple[tuple[str, int], ...]:
    names = site.federation.classes
    if site.federation.multi_label:
        targets = torch.tensor([case.targets for case in cases], dtype=torch.int8)
        gone = ((targets >= 0) & (withhold(targets, _minimum(site)) < 0)).sum(dim=0).tolist()
        return tuple((n, count) for n, count in zip(names, gone, strict=True) if count)
    there = Counter(case.label for case in cases)
    return tuple((n, there[i]) for i, n in enumerate(names) if there[i] and not counts[i])


def _counts(site: Site, truth: Tensor) -> dict[str, Any]:
    """The fields of a manifest that count the images that were measured."""
    federation = site.federation
    if federation.multi_label:
        return finding_counts(federation, truth)
    found = torch.bincount(truth, minlength=len(federation.classes)).tolist()
    return {"class_counts": dict(zip(federation.classes, found, strict=True))}
