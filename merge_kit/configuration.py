"""The config.json beside a model's weights, as timm writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_kit.checkpoints import WEIGHTS
from merge_kit.errors import VectorError
from merge_kit.strictjson import read_json

CONFIG = "config.json"
_IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a config.json says: as it stands, and what a merge asks of it."""

    path: Path
    data: dict[str, Any]
    classifier: tuple[str, ...]
    """Module names of the classifiers; empty where the file names none or the model has none."""
    label_names: tuple[str, ...]
    """Class names in the order of the head's rows; empty where the file does not name them."""
    num_classes: int | None = None
    """Rows of the head; None where the file does not say."""
    architecture: str = ""
    """timm's name; empty where the file does not say."""

    @property
    def text(self) -> str:
        """The file's content, in our layout."""
        return json.dumps(self.data, indent=2, ensure_ascii=False) + "\n"

    def other_images(self, other: ModelConfig) -> str | None:
        """The first entry on how images become inputs in which the other one differs."""
        ours, theirs = (c.data.get("pretrained_cfg") or c.data for c in (self, other))
        return next((key for key in _IMAGES if ours.get(key) != theirs.get(key)), None)

    def with_classes(self, count: int) -> ModelConfig:
        """The configuration of a model with so many classes, whose names are not known."""
        data = _renumbered(self.data, count)
        for key in ("pretrained_cfg", "model_args"):
            if isinstance(data.get(key), dict):
                data[key] = _renumbered(data[key], count)
        return replace(self, data=data, label_names=(), num_classes=count)


def _renumbered(data: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {**{k: v for k, v in data.items() if not k.startswith("label")}, "num_classes": count}


def read_config(path: Path) -> ModelConfig | None:
    """The config.json of a timm folder, or beside its model.safetensors; None where there is none.

    timm writes `classifier` and `label_names` at the top or under ``pretrained_cfg``.

    Raises
    ------
    VectorError
        The file is not JSON, or these entries are not names.
    """
    file = (path.parent if path.name == WEIGHTS else path) / CONFIG
    if not file.is_file():
        return None
    otherwise = f"{file} is not valid JSON: copy it again, or remove it."
    data = read_json(file.read_bytes(), str(file), VectorError, otherwise)
    nested = data.get("pretrained_cfg") or {} if isinstance(data, dict) else None
    if not isinstance(nested, dict):
        raise VectorError(f"{file} is no model configuration: remove it, or copy it again.")
    both = {**nested, **data}
    classifier = () if both.get("num_classes") == 0 else both.get("classifier") or ()
    labels = both.get("label_names") or both.get("labels") or ()
    count, architecture = data.get("num_classes"), data.get("architecture")
    return ModelConfig(
        file,
        data,
        _names(classifier, file, "classifier"),
        _names(labels, file, "label_names"),
        count if isinstance(count, int) and count > 0 else None,
        architecture if isinstance(architecture, str) else "",
    )


def _names(value: object, file: Path, key: str) -> tuple[str, ...]:
    if isinstance(value, dict) and all(number.isdecimal() for number in value):
        value = [value[number] for number in sorted(value, key=int)]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise VectorError(f"{file}: '{key}' must hold names: correct it.")
    return tuple(names)


def require_config(folder: Path) -> ModelConfig:
    """The same of a folder that must be one of timm's.

    Raises
    ------
    VectorError
        It has none.
    """
    config = read_config(folder)
    if config is None:
        raise VectorError(f"{folder} is no model: it has no config.json; give a timm folder.")
    return config
