"""The student of a distillation before its training: a merge of the weights, a model that is there,
or another backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from finetune import network
from finetune.distillation import Distillation, Student
from finetune.private import with_backbone
from merge_kit import backbone, merging
from merge_kit.configuration import CONFIG, require_config
from merge_kit.contributions import Contribution
from merge_kit.errors import DataError, UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation, Preprocessing, preprocessing_of
from merge_kit.hub import Hub


@dataclass(frozen=True, slots=True)
class Begun:
    """A student before its training."""

    model: nn.Module
    config: str
    preprocessing: Preprocessing
    other: str | None
    """Its timm name, where it is not of the federation's backbone."""

    @property
    def knows(self) -> bool:
        """Whether it has a classifier, and not one of zeros."""
        return any(bool(p.any()) for p in network.head_of(self.model).parameters())


def begin(
    federation: Federation,
    hub: Hub,
    vectors: Sequence[Contribution],
    recipe: Distillation,
    given: Path | None,
) -> Begun:
    """The student with its first weights: of the model that is `given`, or as the recipe says.

    Raises
    ------
    UsageError
        There are no vectors to merge.
    DataError
        The model that is given is of other classes.
    MergeKitError
        It, or the recipe's student, cannot be loaded.
    """
    if given:
        return _given(given, federation)
    if recipe.student:
        return _built(recipe.student, federation)
    merge = recipe.merge()
    assert merge is not None  # or there is a student
    if not vectors:
        raise UsageError(
            "there are no vectors to merge the student's first weights from: give --student, or a "
            "recipe with a 'student'."
        )
    with TemporaryDirectory() as place:
        merged = Path(place) / "start"
        merging.merge(federation, hub.fetch(BASE_WEIGHTS), vectors, merge, merged)
        model = network.load(merged)
    return Begun(model, federation.model_config_json, federation.preprocessing, None)


def _given(folder: Path, federation: Federation) -> Begun:
    config = require_config(folder)
    if config.label_names != federation.classes:
        own = ", ".join(config.label_names) or "of no name"
        raise DataError(
            f"the student {folder} has the classes {own}, the federation "
            f"{', '.join(federation.classes)}: they must be the same, in this order."
        )
    model, seen = network.load(folder), preprocessing_of(config)
    text = (folder / CONFIG).read_text(encoding="utf-8")
    name = str(config.data.get("architecture", "unknown"))
    alike = (name, config.data.get("model_args") or {}) == (
        federation.architecture,
        federation.model_args,
    )
    if alike and seen == federation.preprocessing:
        return Begun(model, federation.model_config_json, seen, None)
    return Begun(model, text, seen, name)


def _built(student: Student, federation: Federation) -> Begun:
    model = backbone.build(
        student.name,
        federation.classes,
        weights=student.weights,
        model_args=student.model_args,
    )
    seen = backbone.preprocessing_of(model, student.preprocessing)
    like = with_backbone(federation, student.name, student.model_args, model, seen)
    return Begun(model, like.model_config_json, seen, student.name)
