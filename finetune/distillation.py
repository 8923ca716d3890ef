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


class Synthesis(Document):
    """Images to learn from that are made from the teachers themselves, by inverting the batch norm
    statistics of their networks (DeepInversion, arXiv 1912.08795; FedISCA, MICCAI 2023, doi
    10.1007/978-3-031-43895-0_49, whose choices are the defaults but for `statistics`)."""

    images: int | None = Field(default=None, ge=2)
    """How many are made; `--synthesise N` takes its place."""
    invert: Literal["together", "each"] = "together"
    """together: every image is made from all teachers at once, and shows what they together find;
    each: from one of them, which has seen the class, for a part of the work. The others need not
    find the class in it: for sites that have seen the same classes."""
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=50, ge=1)
    """Images that are made at once: their statistics are compared with those that batch norm
    remembers, which few images cannot have."""
    learning_rate: float = Field(default=0.05, gt=0)
    """Of Adam, on colours as the network sees them."""
    statistics: float = Field(default=0.1, ge=0)
    """Weight of the distance from the batch norm statistics, summed over the layers: the deeper and
    the wider the network, the less. FedISCA's 10, for a ResNet-18, drowns the classes out in a
    MobileNetV2; DeepInversion's authors take 0.01 to 0.05 for ImageNet's networks."""
    variation: float = Field(default=2.5e-5, ge=0)
    """Weight of the total variation."""
    length: float = Field(default=0.0, ge=0)
    """Weight of the images' mean Euclidean norm."""
    competition: float = Field(default=0.0, ge=0)
    """Weight of the agreement with the student as it starts: images that it does not know yet
    (adaptive DeepInversion, which trains student and images in turn)."""
    jitter: float = Field(default=0.125, ge=0, lt=1)
    """Images are rolled by up to this share of their side at each step."""
    stages: int = Field(default=4, ge=1)
    """How often each image is kept on its way from noise, the last one included. What teachers say
    of earlier stages is mixed with what they say under batch norm statistics of these images: the
    noise-adapted teachers of FedISCA, which keeps every step."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_the_steps(self) -> Synthesis:
        if self.stages > self.steps:
            raise ValueError(f"{self.stages} stages take as many steps at least")
        return self


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
    synthesis: Synthesis | None = None
    """How images are made where none are given."""
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


def with_images(recipe: Distillation, data: Path | None, synthesise: int | None) -> Distillation:
    """The recipe with the number of images that are to be synthesised, where they are; without any
    synthesis, where images are given.

    Raises
    ------
    UsageError
        There are no images to learn from, or they come from two places; or teachers are to be
        weighed by what noise-adapted ones cannot know.
    """
    asked = recipe.synthesis.images if recipe.synthesis else None
    if data and synthesise:
        raise UsageError(
            "--data and --synthesise are two sets of images to learn from: leave one of them out."
        )
    if data and asked:
        raise UsageError(
            f"the recipe has {asked} images synthesised ('images' under 'synthesis'), and --data "
            "gives others: leave --data out, or take a recipe without them."
        )
    if data:
        return recipe.model_copy(update={"synthesis": None})
    if not (synthesise or asked):
        raise UsageError(
            "there are no images to learn from: give unlabelled ones with --data, or let N be made "
            "from the teachers themselves with --synthesise N."
        )
    settings = recipe.synthesis or Synthesis()
    number = synthesise or asked
    if recipe.teachers == "stacking" and settings.stages > 1:
        raise UsageError(
            "'teachers: stacking' is learnt on labelled images, of which noise-adapted teachers "
            "know nothing: set 'stages: 1' under 'synthesis', or choose other 'teachers'."
        )
    return recipe.model_copy(update={"synthesis": settings.model_copy(update={"images": number})})
