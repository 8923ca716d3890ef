"""Networks of a site's own choice: what they are made from, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune import network
from finetune.labelling import Labelling
from finetune.pixels import Images, decode
from finetune.tasks import PrivateTeacher
from merge_kit import backbone
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG, require_config
from merge_kit.distilled import fingerprint_of
from merge_kit.errors import DataError
from merge_kit.federation import Federation, Preprocessing, is_multi_label, preprocessing_of
from merge_kit.files import sha256_file, write_atomic
from merge_kit.tensorfile import fingerprint_file, write_tensors
from merge_kit.writing import METADATA


@dataclass(frozen=True, slots=True)
class Private:
    """A network that stays at a site, with a classifier of the classes that the site learns."""

    model: nn.Module
    preprocessing: Preprocessing
    config: str
    """Its config.json."""
    knows: bool
    """Whether it had a classifier of just these classes; else that is one of zeros."""


def identity(text: str) -> str:
    """What `--mutual` names, by its content where it is a folder.

    Raises
    ------
    VectorError
        The folder holds no model.
    """
    folder = Path(text)
    if not folder.is_dir():
        return text
    require_config(folder)
    return " ".join([fingerprint_file(folder / WEIGHTS), sha256_file(folder / CONFIG)])


def open_private(text: str, labelling: Labelling) -> Private:
    """A timm folder, or the pretrained network of a name of timm's.

    Raises
    ------
    VectorError
        The folder holds no model.
    DataError
        Its outputs are not of the kind that the site learns.
    UsageError, FederationError
        timm has no such name, or its weights cannot be had.
    """
    classes, federation = labelling.space.classes, labelling.federation
    folder = Path(text)
    if not folder.is_dir():
        model = backbone.build(text, classes)
        seen = backbone.preprocessing_of(model, {})
        return Private(model, seen, _config(labelling, text, {}, model, seen), knows=False)
    config = require_config(folder)
    if federation.multi_label != is_multi_label(config) and config.label_names == classes:
        raise DataError(
            f"{folder} has the federation's classes, but not one class an image, or several, as "
            "the federation has: give another model."
        )
    model, seen = network.load(folder), preprocessing_of(config)
    knows = config.label_names == classes
    if not knows:
        network.with_classes(model, len(classes))
    arguments = config.data.get("model_args") or {}
    name = str(config.data.get("architecture", "unknown"))
    told = _config(labelling, name, arguments, model, seen)
    return Private(model, seen, told, knows)


def _config(
    labelling: Labelling,
    name: str,
    arguments: Mapping[str, Any],
    model: nn.Module,
    seen: Preprocessing,
) -> str:
    other = with_backbone(labelling.federation, name, arguments, model, seen)
    return Labelling(other, labelling.own_classes).config


def with_backbone(
    federation: Federation,
    name: str,
    arguments: Mapping[str, Any],
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Federation:
    """The federation as it would be with another backbone: for that one's config.json."""
    return federation.model_copy(
        update={
            "architecture": name,
            "model_args": dict(arguments),
            "classifier": backbone.classifier_names(model),
            "preprocessing": preprocessing,
        }
    )


def teacher_of(
    private: Private, train: Images, validation: Images, head_steps: int, cache: Path
) -> PrivateTeacher:
    """The network as a teacher, and the images as it sees them.

    Parameters
    ----------
    cache
        Where decoded images are kept.
    """
    if private.preprocessing == train.preprocessing:
        parts = [train, validation]
    else:
        # What could not be read is among neither of them.
        parts = [
            decode(part.cases, private.preprocessing, cache=cache)[0]
            for part in (train, validation)
        ]
    return PrivateTeacher(
        private.model,
        parts[0],
        parts[1],
        0 if private.knows else head_steps,
        fingerprint_of(private.model.state_dict()),
    )


def write(folder: Path, private: Private, state: Mapping[str, Tensor]) -> None:
    """A plain timm folder."""
    write_tensors(folder / WEIGHTS, dict(state), METADATA)
    write_atomic(folder / CONFIG, private.config)
