"""What a user may name as a model, and how it looks at images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from evaluate.predictions import read_classes
from merge_kit.configuration import CONFIG, read_config
from merge_kit.errors import DataError, UsageError, VectorError
from merge_kit.federation import (
    FEDERATION_FILE,
    Preprocessing,
    groups_of,
    is_multi_label,
    preprocessing_of,
)
from merge_kit.labelspace import LabelSpace
from merge_kit.provenance import PROVENANCE
from merge_kit.runs import SUMMARY, latest_run
from merge_kit.site import SITE_FILE, open_site


@dataclass(frozen=True, slots=True)
class Model:
    """A timm folder with its name in the report and its part in the federation."""

    name: str
    role: str
    """base, merged, pooled, federated, other or site:<site>."""
    folder: Path
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Groups of its classes, as its federation has them."""
    multi_label: bool = False
    """An image has any number of its classes, or none, as its federation says."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A model that is known by its predictions alone; see `evaluate.predictions`."""

    name: str
    role: str
    file: Path
    classes: tuple[str, ...]


AnyModel: TypeAlias = Model | Imported


def find_models(
    texts: Sequence[str],
    *,
    classes: Sequence[str] = (),
    pooled: Sequence[str] = (),
    federated: Sequence[str] = (),
) -> list[AnyModel]:
    """Models as a user names them, all of the same classes: ``FOLDER`` or ``NAME=FOLDER``.

    A folder may be a timm folder, a merged model, a run, a site's working folder (its latest run),
    or a federation (its base); a CSV file holds the predictions of a model that is elsewhere. Its
    columns may stand in another order than the classes of the first model.

    Parameters
    ----------
    classes
        Class names of models whose configuration does not name them, in the order of the outputs.
    pooled
        Names of models that were trained on all sites' images.
    federated
        Names of models that all sites trained together, in rounds.

    Raises
    ------
    UsageError
        Two models have one name.
    VectorError
        A folder holds no model.
    DataError
        The models do not have the same classes.
    """
    models = find_apart(texts, classes=classes, pooled=pooled, federated=federated)
    first = models[0]
    for model in models:
        same = model.classes == first.classes
        if isinstance(model, Imported) or isinstance(first, Imported):  # joined by name
            same = _folded(model) == _folded(first)
        if not same:
            raise DataError(
                f"{place_of(model)} has the classes {', '.join(model.classes)}, {place_of(first)} "
                f"has {', '.join(first.classes)}: evaluate them separately, or use "
                "'merge-kit compare' for the classes in common."
            )
    return models


def find_apart(
    texts: Sequence[str],
    *,
    classes: Sequence[str] = (),
    pooled: Sequence[str] = (),
    federated: Sequence[str] = (),
) -> list[AnyModel]:
    """As `find_models`, for models that may differ in their classes."""
    models = [_find(text, classes) for text in texts]
    for role, names in (("pooled", pooled), ("federated", federated)):
        if unknown := sorted(set(names) - {model.name for model in models}):
            raise UsageError(f"--{role} {unknown[0]}: no model has this name.")
        models = [replace(m, role=role) if m.name in names else m for m in models]
    for model in models:
        if [m.name for m in models].count(model.name) > 1:
            raise UsageError(
                f"two models are called '{model.name}': tell them apart with NAME=FOLDER."
            )
    return models


def classes_in_common(models: Sequence[AnyModel]) -> tuple[str, ...]:
    """The classes that every model knows, as the first one writes and orders them.

    Names are matched without regard to case. `Predictions.restricted_to` gives a model's
    probabilities on them.

    Raises
    ------
    DataError
        They have fewer than two in common, or a model has one class twice but for the case.
    """
    for model in models:
        if len(_folded(model)) != len(model.classes):
            raise DataError(
                f"{place_of(model)} has two classes that differ only in case: rename one."
            )
    shared = frozenset.intersection(*(_folded(model) for model in models))
    found = tuple(name for name in models[0].classes if name.casefold() in shared)
    if len(found) < 2:
        told = "; ".join(f"{model.name}: {', '.join(model.classes)}" for model in models)
        raise DataError(
            f"the models have {len(found)} class{'es' * (len(found) != 1)} in common ({told}): "
            "compare models that share "
            "two or more."
        )
    return found


def labels_of(models: Sequence[AnyModel]) -> LabelSpace:
    """The classes of models that have the same, and the groups that any of them names.

    Raises
    ------
    DataError
        Two models have different groups.
    """
    trees = [(m, dict(m.groups)) for m in models if isinstance(m, Model) and m.groups]
    for model, tree in trees[1:]:
        if tree != trees[0][1]:
            raise DataError(
                f"{place_of(model)} has other groups of classes than {place_of(trees[0][0])}: "
                "evaluate them separately."
            )
    classes = trees[0][0].classes if trees else models[0].classes
    return LabelSpace(classes, trees[0][1] if trees else {})


def several_labels(models: Sequence[AnyModel]) -> bool:
    """Whether an image may have several classes, or none, by what any of the models says."""
    return any(isinstance(model, Model) and model.multi_label for model in models)


def place_of(model: AnyModel) -> Path:
    """Where a model lies."""
    return model.file if isinstance(model, Imported) else model.folder


def _folded(model: AnyModel) -> frozenset[str]:
    return frozenset(name.casefold() for name in model.classes)


def _find(text: str, classes: Sequence[str]) -> AnyModel:
    name, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        name, path = "", text
    folder = Path(path)
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return Imported(name or folder.stem, "other", folder, read_classes(folder))
    if (folder / "config.json").is_file():
        kind = "merged" if (folder / PROVENANCE).is_file() else "other"
        return _read(name or folder.absolute().name, kind, folder, classes)
    if (folder / SITE_FILE).is_file():
        site, run = open_site(folder), latest_run(folder)
        if run is None:
            raise VectorError(f"{folder} has no finished run: run 'merge-kit finetune {folder}'.")
        return _read(name or site.name, f"site:{site.name}", run / "model", classes)
    if (folder / SUMMARY).is_file():
        own = _site_of(folder / SUMMARY)
        return _read(name or own, f"site:{own}", folder / "model", classes)
    if (folder / FEDERATION_FILE).is_file():
        return _read(name or "base", "base", folder / "base", classes)
    raise VectorError(
        f"{folder} is no model: give a timm folder (config.json, model.safetensors), a site's "
        "folder, a run, a federation, or a CSV of predictions."
    )


def _site_of(summary: Path) -> str:
    try:
        return str(json.loads(summary.read_text(encoding="utf-8"))["site"])
    except (ValueError, KeyError, TypeError) as error:
        raise VectorError(f"{summary} is damaged: run 'merge-kit finetune' again.") from error


def _read(name: str, role: str, folder: Path, classes: Sequence[str]) -> Model:
    path, config = folder / CONFIG, read_config(folder)
    if config is None:
        raise VectorError(f"{path} is not there: copy the whole folder again.")
    preprocessing, groups = preprocessing_of(config), groups_of(config)
    names = config.label_names or tuple(classes)
    if not names:
        raise VectorError(f"{path} names no classes: give them in their order with --classes.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise VectorError(f"{path}: two classes are called '{twice[0]}': rename one.")
    if len(names) != (config.num_classes or len(names)):
        raise VectorError(
            f"{path} is of a model with {config.num_classes} classes and {len(names)} names: "
            "correct --classes."
        )
    try:
        LabelSpace(names, groups)
    except ValueError as error:
        raise VectorError(f"{path}: {error}: copy the whole folder again.") from error
    several = is_multi_label(config)
    return Model(name, role, folder, names, preprocessing, groups, several)
