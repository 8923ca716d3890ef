"""A recipe of federated distillation: what the student learns from its teachers, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from finetune.options import TrainingOptions, make_options
from merge_kit.errors import RecipeError, UsageError
from merge_kit.recipe import DISTILL, Recipe, make_recipe, read_document
from merge_kit.schema import Document, Place, parse

Weighting = Literal["uniform", "examples", "sqrt-examples", "classes", "confidence", "stacking"]
_TRAINING: dict[str, Any] = {
    "steps": 200, "learning_rate": 1e-4, "head_steps": 0, "head": "own", "flip": "both",
}  # fmt: skip
"""What differs from the training of a site: more steps, and a classifier that is there already."""
_NEW_HEAD = {"head_steps": 300, "learning_rate": 3e-4}
"""Of a student of another backbone, which has no classifier yet."""


class Student(Document):
    """A backbone of timm's that the teachers teach, in the place of the federation's."""

    name: str
    weights: str = "pretrained"
    """``pretrained`` (the Hugging Face Hub or its cache), ``none``, or a safetensors file."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    """Values that replace the backbone's own, as in a federation: input_size, mean, std ..."""


class Distillation(Document):
    """FedDF (arXiv 2006.07242): a student that starts from a merge and learns, on images without
    labels, what an ensemble of the sites' models says."""

    format: Literal[1] = 1
    method: Literal["distill"] = DISTILL
    start: dict[str, Any] | None = Field(default_factory=lambda: {"method": "mean"})
    """The recipe by which the weights are merged that the student starts from."""
    student: Student | None = None
    """Another backbone; then nothing is merged, and `start` is null or left out."""
    teachers: Weighting = "classes"
    """How much each teacher counts: alike; by its images, or their square root; by its images of
    each class, for that class; by how sure it is of an image; or learnt on a few labelled ones."""
    temperature: float = Field(default=2.0, gt=0, le=100)
    """Both sides' logits are divided by it."""
    features: float = Field(default=0.0, ge=0)
    """Weight of the distance between the student's features and the teachers' mean ones."""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """Share of the images that nothing is learnt from."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Options of `merge-kit finetune` that differ from a distillation's defaults."""

    @model_validator(mode="before")
    @classmethod
    def _starts_from_one(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("student") is not None:
            if data.get("start") is not None:
                raise ValueError(
                    "'start' merges weights of the federation's backbone, which a "
                    "'student' of its own does not have: leave one of them out"
                )
            return {**data, "start": None}
        if isinstance(data, dict) and "start" in data and data["start"] is None:
            raise ValueError("'start' is null, and there is no 'student': give one of them")
        return data

    def options(self, where: str | Place = "training") -> TrainingOptions:
        """How the student trains."""
        new = _NEW_HEAD if self.student else {}
        return make_options({**_TRAINING, **new, **self.training}, where)

    def with_new_classifier(self) -> Distillation:
        """The recipe for a student that has no classifier yet."""
        return self.model_copy(update={"training": {**_NEW_HEAD, **self.training}})

    def merge(self, where: str = "start") -> Recipe | None:
        """By what the student's first weights are merged."""
        return None if self.start is None else make_recipe(self.start, where)


def read_distillation(path: Path) -> Distillation:
    """Read and check a recipe file, or a shipped recipe by its name.

    Raises
    ------
    RecipeError
        A wrong key or value.
    """
    file = read_document(path)
    return make_distillation(file.data, file.place)


def make_distillation(data: Mapping[str, Any], where: str | Place) -> Distillation:
    """Check a recipe of distillation.

    Raises
    ------
    RecipeError
        A wrong key or value.
    """
    found = parse(Distillation, data, where, RecipeError)
    inside = where.inside(f"{where}, training", "training") if isinstance(where, Place) else where
    try:
        found.options(inside)
    except UsageError as error:
        raise RecipeError(str(error)) from error
    found.merge(f"{where}, start")
    return found
