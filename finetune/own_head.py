"""The way back to a site with a task of its own: a merged backbone under the site's classifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import network, scores
from finetune.calibrating import backbone_at
from finetune.cases import Case
from finetune.labelling import Labelling
from finetune.run import prepare
from merge_kit import moments
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.errors import UsageError
from merge_kit.federation import FEDERATION_FILE
from merge_kit.files import new_folder, write_atomic
from merge_kit.site import Site
from merge_kit.solving import HeadOptions, solve
from merge_kit.tensorfile import write_tensors
from merge_kit.writing import METADATA


@dataclass(frozen=True, slots=True)
class OwnHead:
    """A model that has been written."""

    train_images: int
    validation_images: int
    balanced_accuracy: float
    """On the site's validation images."""
    skipped: tuple[str, ...]


def own_head(
    site: Site,
    cases: Sequence[Case],
    model: Path | None,
    labelling: Labelling,
    out: Path,
    device: torch.device,
    *,
    skip_unreadable: bool = False,
    stage: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> OwnHead:
    """Write the backbone of a merged model, or of the base, with a classifier of own classes.

    The classifier is solved in closed form from the features of the site's training images, as that
    of the federation is from all sites' (`moments.discriminant`). It stays at the site: the folder
    may not lie in a federation.

    Raises
    ------
    UsageError
        `out` exists, or lies in a federation.
    ProvenanceError, BaseMismatchError
        The model is of no federation, or of another one.
    """
    check_place(out)
    backbone_at(site, model)
    material = prepare(
        site,
        cases,
        skip_unreadable=skip_unreadable,
        progress=lambda done, of: stage("decoding", done, of),
    )
    classes = labelling.space.classes
    opened = network.load(site.base_folder if model is None else model).to(device)
    features = network.features(
        opened,
        material.train,
        device,
        progress=lambda done, of: stage("features", done, of),
    )
    found = moments.measure(features.flatten(1), material.train.labels(), len(classes))
    solved, _ = solve([found], HeadOptions())
    network.with_classes(opened.cpu(), len(classes))
    head = network.head_of(opened)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(getattr(solved, name).reshape(parameter.shape))
    outputs = network.logits(opened.to(device), material.validation, device)
    figure = scores.balanced_accuracy(
        material.validation.labels().numpy(), outputs.double().numpy()
    )
    with new_folder(out) as folder:
        state = {name: tensor.cpu() for name, tensor in opened.state_dict().items()}
        write_tensors(folder / WEIGHTS, state, METADATA)
        write_atomic(folder / CONFIG, labelling.config)
    return OwnHead(len(material.train), len(material.validation), figure, material.skipped)


def check_place(out: Path) -> None:
    """Refuse a folder that is there, or that others of the federation read.

    Raises
    ------
    UsageError
        Names it.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it.")
    for root in Path(os.path.realpath(out)).parents:
        if (root / FEDERATION_FILE).is_file():
            raise UsageError(
                f"{out} lies in the federation in {root}, and a classifier of own classes stays "
                "at the site: choose another --out."
            )
