"""What a site measures of a model on its own images: moments, in a folder that can be published."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from finetune import network
from finetune.cases import Case, case_key
from finetune.normalizing import norm_sums
from finetune.pixels import Images, decode
from finetune.run import alone, now, software
from finetune.splits import split_of
from merge_kit import moments, momentsfile, normstats
from merge_kit.checkpoints import WEIGHTS
from merge_kit.errors import DataError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.files import canonical_json, sha256_bytes, sha256_file, write_atomic
from merge_kit.manifest import Draft, Payload, read_draft
from merge_kit.publishing import draft_file, payload_file
from merge_kit.reheading import record_of
from merge_kit.site import COPY, Site
from merge_kit.solving import backbone_of
from merge_kit.statistics import StatisticsHeader
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.vector import METADATA_KEY

CALIBRATIONS = "calibrations"
Measured: TypeAlias = Literal["moments", "norms"]
Stage: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What has been measured and written."""

    folder: Path
    size: int
    """Bytes that would leave the site."""
    counts: tuple[int, ...]
    """Images of each class in it."""
    held_back: tuple[tuple[str, int], ...]
    """Classes with fewer images than the policy asks for, and how many."""
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
    skip_unreadable: bool = False,
    stage: Stage = lambda name, done, of: None,
) -> Calibration:
    """One pass forward over the site's training images, and the moments of their features; or with
    ``norms`` the sums over the inputs of the batch norm layers.

    A class of fewer images than the policy's `minimum_class_count` is held back: its sum would give
    its images' features away. The folder's name is a hash of the model and the images: what has
    been measured before is not measured again.

    Raises
    ------
    DataError
        No class has enough images, or the model is none of this federation.
    VectorError
        Norm statistics are asked of a backbone without batch norm.
    """
    cases = sorted(split_of(cases, "train"), key=lambda case: case.file)
    about = backbone_at(site, model)
    told: list[object] = [about, site.config.federation, _minimum(site)]
    told += [] if kind == "moments" else [kind]
    told += [[case.file, case.label, case_key(case)] for case in cases]
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
            images = _kept(site, images)
            opened = network.load(site.base_folder if model is None else model).to(device)
            measure = _moments if kind == "moments" else _norms
            tensors = measure(opened, images, device, len(site.federation.classes), stage)
            _write(site, folder, kind, about, tensors, images)
        stated = read_draft(draft, "calibrate").class_counts
        counts = [int(stated[name]) for name in site.federation.classes]
        return Calibration(
            folder,
            path.stat().st_size,
            tuple(counts),
            _held_back(site, cases, counts),
            tuple(skipped),
            was_there,
        )


def _kept(site: Site, images: Images) -> Images:
    """The images of classes that are large enough."""
    labels, classes = images.labels(), len(site.federation.classes)
    kept = torch.bincount(labels, minlength=classes)[labels] >= _minimum(site)
    if not bool(kept.any()):
        raise DataError(
            f"no class has {_minimum(site)} training images, as the federation's policy "
            "asks for: fewer would give their features away; add images."
        )
    if bool(kept.all()):
        return images
    indices = [int(index) for index in kept.nonzero()]
    cases = tuple(images.cases[index] for index in indices)
    return Images(cases, images.pixels[indices], images.preprocessing)


def _moments(
    model: nn.Module, images: Images, device: torch.device, classes: int, stage: Stage
) -> dict[str, Tensor]:
    features = network.features(
        model, images, device, progress=lambda done, of: stage("features", done, of)
    )
    return momentsfile.to_tensors(moments.measure(features.flatten(1), images.labels(), classes))


def _norms(
    model: nn.Module, images: Images, device: torch.device, classes: int, stage: Stage
) -> dict[str, Tensor]:
    found = norm_sums(model, images, device, lambda done, of: stage("measuring", done, of))
    return normstats.to_tensors(found)


def _minimum(site: Site) -> int:
    return site.federation.policy.minimum_class_count


def _held_back(
    site: Site, cases: Sequence[Case], counts: Sequence[int]
) -> tuple[tuple[str, int], ...]:
    there = Counter(case.label for case in cases)
    classes = enumerate(site.federation.classes)
    return tuple((n, there[i]) for i, n in classes if there[i] and not counts[i])


def _write(
    site: Site,
    folder: Path,
    kind: Measured,
    about: str,
    tensors: Mapping[str, Tensor],
    images: Images,
) -> None:
    federation, path = site.federation, folder / payload_file(kind)
    origin = {
        "base": federation.base_fingerprint,
        "federation": federation.contract_hash,
        "site": site.name,
        "kind": kind,
        "about": about,
    }
    header = StatisticsHeader.model_validate(origin)
    write_tensors(path, tensors, (METADATA_KEY, canonical_json(header.model_dump()).decode()))
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    found = torch.bincount(images.labels(), minlength=len(federation.classes)).tolist()
    counts = dict(zip(federation.classes, found, strict=True))
    draft = Draft.model_validate(
        {
            **origin,
            "payload": Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm),
            "class_counts": counts,
            "preprocessing": federation.preprocessing.hash,
            "software": software(),
            "created_at": now(),
        }
    )
    write_atomic(folder / draft_file(kind), draft.model_dump_json(indent=2))
