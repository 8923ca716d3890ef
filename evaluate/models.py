"""What a user may name as a model, and how it looks at images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit.errors import DataError, UsageError, VectorError
from merge_kit.federation import FEDERATION_FILE, Preprocessing
from merge_kit.merging import PROVENANCE
from merge_kit.runs import SUMMARY, latest_run
from merge_kit.schema import parse
from merge_kit.site import SITE_FILE, open_site


@dataclass(frozen=True, slots=True)
class Model:
    """A timm folder with its name in the report and its part in the federation."""

    name: str
    role: str
    """base, merged, pooled, other or site:<site>."""
    folder: Path
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def find_models(texts: Sequence[str]) -> list[Model]:
    """Models as a user names them: ``FOLDER`` or ``NAME=FOLDER``.

    A folder may be a timm folder, a merged model, a run, a site's working folder (its latest run),
    or a federation (its base).

    Raises
    ------
    UsageError
        Two models have one name.
    VectorError
        A folder holds no model.
    DataError
        The models do not have the same classes.
    """
    models = [_find(text) for text in texts]
    for model in models:
        if [m.name for m in models].count(model.name) > 1:
            raise UsageError(
                f"two models are called '{model.name}': tell them apart with NAME=FOLDER."
            )
        if model.classes != models[0].classes:
            raise DataError(
                f"{model.folder} has the classes {', '.join(model.classes)}, {models[0].folder} "
                f"has {', '.join(models[0].classes)}: evaluate them separately."
            )
    return models


def _find(text: str) -> Model:
    name, separator, path = text.partition("=")
    folder = Path(path if separator else text)
    given = name if separator else None
    if (folder / "config.json").is_file():
        kind = "merged" if (folder / PROVENANCE).is_file() else "other"
        return _read(given or folder.absolute().name, kind, folder)
    if (folder / SITE_FILE).is_file():
        site, run = open_site(folder), latest_run(folder)
        if run is None:
            raise VectorError(f"{folder} has no finished run: run 'merge-kit finetune {folder}'.")
        return _read(given or site.name, f"site:{site.name}", run / "model")
    if (folder / SUMMARY).is_file():
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return _read(given or summary["site"], f"site:{summary['site']}", folder / "model")
    if (folder / FEDERATION_FILE).is_file():
        return _read(given or "base", "base", folder / "base")
    raise VectorError(
        f"{folder} is no model: give a timm folder (config.json, model.safetensors), a site's "
        "folder, a run, or a federation."
    )


def _read(name: str, role: str, folder: Path) -> Model:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seen = config["pretrained_cfg"]
        names = config["label_names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VectorError(
            f"{path} is no timm configuration with label names and preprocessing ({error})."
        ) from error
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    values = {key: seen[key] for key in keys if key in seen}
    preprocessing = parse(Preprocessing, values, str(path), VectorError)
    # A model that was trained on all sites' images is the yardstick, not one site's model.
    return Model(name, "pooled" if name == "pooled" else role, folder, tuple(names), preprocessing)
