"""A small labelled set at the merger, which counts in a classifier like the images of a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from finetune import network
from finetune.cases import contents_digest, load_cases
from finetune.pixels import Images, decode
from finetune.splits import split_of
from merge_kit import moments
from merge_kit.federation import Federation
from merge_kit.solving import Own


def labelled_images(
    federation: Federation,
    data: Path,
    *,
    images: Path | None = None,
    label_map: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Images, list[str]]:
    """The images of a table's split ``train``, or all where it has no splits, decoded; and a
    sentence for each that was left out.

    Raises
    ------
    DataError
        As `load_cases` and `decode`.
    """
    cases = load_cases(
        data, classes=federation.classes, images=images, label_map=label_map, where=where
    )
    if any(case.split for case in cases):
        cases = split_of(cases, "train")
    return decode(
        sorted(cases, key=lambda case: case.file),
        federation.preprocessing,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )


def own_moments(
    federation: Federation,
    model: Path,
    images: Images,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Own:
    """The moments of a model's features of labelled images.

    Raises
    ------
    VectorError
        timm cannot load the model.
    """
    opened = network.load(model).to(device)
    features = network.features(opened, images, device, progress=progress).flatten(1)
    found = moments.measure(features, images.labels(), len(federation.classes))
    return Own(found, contents_digest(images.cases))
