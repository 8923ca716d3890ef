"""A small labelled set at the merger, which counts in a classifier like the images of a site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from finetune import network
from finetune.cases import Case, contents_digest
from finetune.pixels import Images, decode
from finetune.splits import split_of
from merge_kit import findings, moments
from merge_kit.federation import Federation
from merge_kit.solving import Own


def labelled_images(
    federation: Federation,
    cases: Sequence[Case],
    *,
    skip_unreadable: bool = False,
) -> tuple[Images, list[str]]:
    """The images of the split ``train``, or all where there are no splits, decoded; and a sentence
    for each that was left out.

    Raises
    ------
    DataError
        As `decode`.
    """
    if any(case.split for case in cases):
        cases = split_of(cases, "train")
    return decode(
        sorted(cases, key=lambda case: case.file),
        federation.preprocessing,
        skip_unreadable=skip_unreadable,
    )


def own_moments(
    federation: Federation,
    model: Path,
    images: Images,
    device: torch.device,
) -> Own:
    """The moments of a model's features of labelled images.

    Raises
    ------
    VectorError
        timm cannot load the model.
    """
    opened = network.load(model).to(device)
    features = network.features(opened, images, device).flatten(1)
    if federation.multi_label:
        return Own(findings.measure(features, images.targets()), contents_digest(images.cases))
    found = moments.measure(features, images.labels(), len(federation.classes))
    return Own(found, contents_digest(images.cases))
