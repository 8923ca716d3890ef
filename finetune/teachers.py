"""The teachers of a distillation: the sites' models, as their vectors give them, and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune import kept, network
from finetune.outputs import Network, load_exactly
from merge_kit import predictionsfile, vector
from merge_kit.checkpoints import Checkpoint
from merge_kit.configuration import CONFIG, read_config
from merge_kit.contributions import Contribution
from merge_kit.errors import DataError, VectorError
from merge_kit.federation import Federation, is_multi_label, preprocessing_of
from merge_kit.files import sha256_bytes, sha256_file
from merge_kit.heads import group_shares
from merge_kit.manifest import count_of
from merge_kit.normstats import layers_of
from merge_kit.parameters import roles_of
from merge_kit.plain import Sound, sound
from merge_kit.predictionsfile import Predictions
from merge_kit.remembered import check_unchanged, look
from merge_kit.tensorfile import TensorFile, Tensors


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model that says something of each image."""

    name: str
    fingerprint: str
    """Of a site the payload's digest, of another model that of its tensors."""
    network: Network | None
    """What computes its answers; None where it has answered already."""
    rows: tuple[int, ...]
    """For each of its outputs the federation's class, -1 where that has none."""
    known: Tensor
    """(C,) bool."""
    counts: Tensor
    """(C,) float64, training images of each class; NaN where a model does not tell."""
    features: int = 0
    """Width of the features that its outputs end with; 0 where they are not asked for."""
    answers: Mapping[str, Tensor] = field(default_factory=dict, hash=False)
    """(C,) float32 for each image, by its content, where it has answered already."""
    norms: bool = False
    """Whether its network has batch norm, which keeps statistics of the images it has seen."""


class _WithFeatures(nn.Module):
    """A model that puts out its classifier's inputs behind the classes: (b, K + d)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._inputs = model, torch.empty(0)
        network.head_of(model).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs[0].flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """The model's outputs and features, side by side."""
        outputs = self._model(images)
        return torch.cat([outputs, self._inputs.to(outputs)], dim=1)


def site_teachers(
    federation: Federation,
    base: Path,
    contributions: Sequence[Contribution],
    precision: str,
    *,
    features: bool,
) -> tuple[list[Teacher], list[str]]:
    """The models of the sites' vectors; and a sentence for each site that cannot teach.

    A site that trained under the federation's own classifier knows what all of these sites know;
    one with a classifier of its own the classes that it has images of.

    Parameters
    ----------
    base
        The folder of the base.
    precision
        As `Outputs.precision` resolves it.
    features
        Whether features are put out behind the classes.
    """
    if not contributions:
        return [], []
    width = network.width_of(network.load(base)) if features else 0
    with TensorFile(base / "model.safetensors") as start:
        norms = _has_norms(start)
    counted = [_counts(c, federation) for c in contributions]
    anywhere = torch.stack(counted).sum(dim=0) > 0
    teachers, silent = [], []
    for found, counts in zip(contributions, counted, strict=True):
        manifest = found.manifest
        assert manifest.training is not None  # of a vector
        known = anywhere if manifest.training.head else counts > 0
        if not counts.sum():
            silent.append(f"{found.label} has no image of the federation's classes to teach from.")
            continue
        payload = manifest.payload.sha256
        told = f"{federation.base_fingerprint} {payload}{' features' if features else ''}"
        config = sha256_bytes(federation.model_config_json.encode())
        key = kept.model_key(told, config, federation.preprocessing.hash, precision)
        load = partial(_site_model, base, found, features)
        size = len(federation.classes) + width
        loaded = Network(found.site, found.payload, key, size, federation.preprocessing, load)
        rows = tuple(range(len(federation.classes)))
        # A site may have left several vectors side by side.
        several = sum(other.site == found.site for other in contributions) > 1
        name = f"{found.site} {found.id[:8]}" if several else found.site
        teachers.append(Teacher(name, payload, loaded, rows, known, counts, width, norms=norms))
    return teachers, silent


def absent_teachers(
    federation: Federation, predictions: Sequence[Contribution], images: Sequence[str]
) -> list[Teacher]:
    """Models that stay at their sites, which have published what they say of some images.

    A site may have said something of several sets: that one counts which holds all these images,
    the latest of several. One whose site does not tell how many images it has seen counts like the
    mean of the others.

    Parameters
    ----------
    images
        The contents of the images, as `finetune.cases.content_key` gives them.

    Raises
    ------
    DataError
        What a site has said is of other images.
    """
    teachers = []
    by_site: dict[str, list[tuple[Contribution, Predictions]]] = {}
    for found in sorted(predictions, key=lambda c: (c.manifest.created_at, c.id)):
        with TensorFile(found.payload) as file:
            told = predictionsfile.read(file)
            if found.checked is not None:
                check_unchanged(file, found.checked)
        by_site.setdefault(found.site, []).append((found, told))
    for site, those in by_site.items():
        there = [set(told.images) for _, told in those]
        gone = [sum(image not in known for image in images) for known in there]
        if min(gone):
            raise DataError(
                f"{min(gone)} of the {len(images)} images are not among those that site '{site}' "
                "has said something of: the set has changed since; let it label the set again with "
                f"'merge-kit predict-proxy', give the images as they were, or leave it out with "
                f"--exclude {site}."
            )
        found, told = [pair for pair, lack in zip(those, gone, strict=True) if not lack][-1]
        counts = _counts(found, federation)
        silent = not bool(counts.any())
        teachers.append(
            Teacher(
                f"{found.site}, by its predictions",
                found.manifest.payload.sha256,
                None,
                tuple(range(len(federation.classes))),
                told.known,
                torch.full_like(counts, torch.nan) if silent else counts,
                answers=dict(zip(told.images, told.logits, strict=True)),
            )
        )
    return teachers


def other_teacher(
    name: str, folder: Path, federation: Federation, precision: str, *, features: bool
) -> Teacher:
    """A timm folder of any architecture, which shares classes with the federation by their names.

    Raises
    ------
    VectorError
        The folder holds no model, or one that does not name its classes.
    DataError
        It has no class in common with the federation, or several for an image.
    """
    config = read_config(folder)
    if config is None or not config.label_names:
        raise VectorError(
            f"the teacher {folder} names no classes: give a timm folder whose config.json has "
            "'label_names'."
        )
    if is_multi_label(config):
        raise DataError(f"the teacher {folder} gives an image several classes: leave it out.")
    known_names = {label.casefold(): place for place, label in enumerate(federation.classes)}
    rows = tuple(known_names.get(label.casefold(), -1) for label in config.label_names)
    if all(row < 0 for row in rows):
        raise DataError(
            f"the teacher {folder} has no class in common with the federation "
            f"({', '.join(config.label_names[:5])}): leave it out, or rename its 'label_names'."
        )
    known = torch.tensor([place in rows for place in range(len(federation.classes))])
    with Checkpoint(folder) as file:
        fingerprint, norms = look(file, Sound, sound)[0].fingerprint, _has_norms(file)
    width = network.width_of(network.load(folder)) if features else 0
    seen = preprocessing_of(config)
    told = f"{fingerprint}{' features' if features else ''}"
    key = kept.model_key(told, sha256_file(folder / CONFIG), seen.hash, precision)
    load = partial(_other_model, folder, fingerprint, features)
    loaded = Network(name, folder, key, len(rows) + width, seen, load)
    counts = torch.full((len(federation.classes),), torch.nan, dtype=torch.float64)
    return Teacher(name, fingerprint, loaded, rows, known, counts, width, norms=norms)


def _other_model(folder: Path, fingerprint: str, features: bool) -> nn.Module:
    model = load_exactly(folder, fingerprint)
    return _WithFeatures(model) if features else model


def _site_model(base: Path, found: Contribution, features: bool) -> nn.Module:
    model = network.load(base)
    with (
        TensorFile(base / "model.safetensors") as start,
        vector.opened(found.payload) as file,
    ):
        if found.checked is not None:
            check_unchanged(file, found.checked)
        state = {
            name: vector.apply(start.read(name), file.read(name))
            if name in file.specs
            else start.read(name)
            for name in start.specs
        }
    model.load_state_dict(state)
    return _WithFeatures(model) if features else model


def _has_norms(file: Tensors) -> bool:
    return bool(layers_of(roles_of(file.specs, ())))


def _counts(found: Contribution, federation: Federation) -> Tensor:
    """(C,) float64: images of each class; those of a group in equal shares."""
    told = found.manifest
    coarse = {name: count_of(count) for name, count in (told.group_counts or {}).items()}
    own = [count_of(told.class_counts[name]) for name in federation.classes]
    shares = group_shares(federation.labels, coarse)
    return torch.tensor(own, dtype=torch.float64) + torch.tensor(shares, dtype=torch.float64)
