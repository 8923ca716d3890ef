"""A whole federation in one YAML file, checked."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.distillation import read_distillation
from finetune.options import TrainingOptions, make_options
from merge_kit.compressing import parse_compression
from merge_kit.errors import UsageError
from merge_kit.schema import Document, SiteName, parse
from merge_kit.yamlfile import read_yaml

SYNTHETIC = "synthetic"
"""No images: a student learns from those that its recipe has synthesised."""
Baseline = Literal["single", "pooled", "ensemble"]
Strategy = Literal["fedavg", "fedavg-common", "fedprox", "fedsgd", "fedbn"]


class Split(Document):
    """Artificial sites, drawn by the seed from the cases of one table."""

    kind: Literal["dirichlet", "missing", "quantity", "shift"]
    """dirichlet: each class's cases are shared out by a draw from Dirichlet(alpha) (arXiv
    1909.06335); missing: each site lacks `missing` classes; quantity: sites' sizes are a draw from
    Dirichlet(alpha); shift: equal shares, each site with colours and sharpness of its own."""
    sites: int = Field(ge=2, le=100)
    alpha: float = Field(default=0.5, gt=0)
    missing: int = Field(default=1, ge=1)


class Backbone(Document):
    """What all sites start from: options of `merge-kit init`."""

    name: str
    weights: str | None = None
    """A file, from the same folder; null for the Hugging Face Hub."""
    init: str = ""
    """More options of `merge-kit init`, as on a command line."""


class Merge(Document):
    """One way to merge."""

    options: str = ""
    """Of `merge-kit merge`, as on a command line."""
    tune: str = ""
    """Options of `merge-kit tune`, such as ``--by entropy``, which learns how much each site counts
    in each block, on the validation images of all sites; those of the merge are where it starts."""
    calibrate: bool = False
    """Whether the sites measure the merged model and its classifier is solved again."""
    head: str = ""
    """Options of `merge-kit head`, where it is."""
    compress: str = ""
    """How the sites' vectors travel (`merge-kit publish --compress`); empty for whole ones."""
    transfer: str = ""
    """Whose images, without labels, a recipe of distillation learns from: a choice of rows of the
    table, such as ``site=north`` (of the split train), another table or folder of images, or
    ``synthetic`` for those that the recipe has synthesised from the teachers."""
    student: str = ""
    """Which of the `others` a recipe of distillation teaches; empty for the federation's."""
    private: dict[SiteName, SiteName] = Field(default_factory=dict)
    """Sites that publish no vector: a model of one of the `others`, which each trains alone, says
    what it makes of the transfer images (`merge-kit predict-proxy`), which a recipe of distillation
    hears."""
    restore: str = ""
    """Whose images the norm statistics of the merged model are measured on again, before its
    classifier is solved: ``sites`` for what each site measures, or a choice of rows of the table,
    such as ``site=north``, for training images that lie at the merger."""

    @property
    def wire(self) -> str:
        """What sets apart the contributions that it is made of; empty for the sites' whole vectors.
        Those of one wire lie on one hub."""
        if not self.private:
            return self.compress
        said = ",".join(f"{site}={other}" for site, other in sorted(self.private.items()))
        return f"{said} of {self.transfer}"

    @model_validator(mode="after")
    def _private_models_have_images(self) -> Merge:
        if self.private and self.transfer in ("", SYNTHETIC):
            raise ValueError("'private' models speak of images: say of which with 'transfer'")
        if self.private and self.compress:
            raise ValueError("'private' and 'compress' in one merge are not supported")
        return self


class Arrivals(Document):
    """Sites that come one by one, and leave one by one in the same order; of the first seed."""

    merge: SiteName
    orders: int = Field(default=3, ge=1, le=20)


class Experiment(Document):
    """What is run."""

    format: Literal[1] = 1
    name: SiteName
    data: str
    """A CSV with file,label and, for natural sites, site; from this file's folder or --root."""
    sites: Literal["natural"] | Split = "natural"
    classes: tuple[str, ...] = ()
    """In their order; empty for all labels of the table, sorted."""
    backbone: Backbone
    training: dict[str, Any] = Field(default_factory=dict)
    """Training options of every site that are not the defaults."""
    variants: dict[SiteName, dict[str, Any]] = Field(default_factory=dict)
    """Other training options to compare, by name: every merge of vectors that were trained so."""
    others: dict[SiteName, Backbone] = Field(default_factory=dict)
    """Other backbones, by name: of private teachers (`mutual` of a training), of students that
    models of the sites teach (`student` of a merge), of models that stay at sites (`private`)."""
    merges: dict[SiteName, Merge] = Field(min_length=1)
    baselines: tuple[Baseline, ...] = ("single", "pooled", "ensemble")
    rounds: int = Field(default=10, ge=1)
    """Of each strategy; all sites train as many steps as for one vector, in equal parts."""
    strategies: tuple[Strategy, ...] = ("fedavg", "fedavg-common")
    unseen: tuple[SiteName, ...] = ()
    """Merges for which every site is left out once, from its first day on, and tested on; of the
    first seed."""
    personal: tuple[SiteName, ...] = ()
    """Merges whose model every site makes its own (`merge-kit personalise`)."""
    arrivals: Arrivals | None = None
    means: int | None = Field(default=None, ge=1)
    """Images of a group whose means sites send in the place of moments (`calibrate --means`)."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @field_validator("seeds", "baselines", "strategies", "unseen", "personal")
    @classmethod
    def _each_once(cls, found: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(found)) != len(found):
            raise ValueError("an entry is named twice")
        return found

    @model_validator(mode="after")
    def _merges_are_there(self) -> Experiment:
        named = [*self.unseen, *self.personal, *([self.arrivals.merge] if self.arrivals else [])]
        if odd := [name for name in named if name not in self.merges]:
            raise ValueError(f"'{odd[0]}' is none of the merges")
        for name in self.unseen:
            merge = self.merges[name]
            if "=" in merge.transfer or "=" in merge.restore or merge.tune:
                raise ValueError(
                    f"'{name}' uses images of the table, which may be those of the site that is "
                    "left out: take it from 'unseen'"
                )
        return self

    @model_validator(mode="after")
    def _others_are_there(self) -> Experiment:
        trainings = (self.training, *self.variants.values())
        named = [("mutual", options.get("mutual")) for options in trainings]
        for merge in self.merges.values():
            named += [("student", merge.student or None)]
            named += [(f"private: {site}", other) for site, other in merge.private.items()]
        for key, name in named:
            if name is not None and name not in self.others:
                raise ValueError(f"'{key}: {name}' is none of the 'others'")
        return self

    def training_of(self, variant: str | None) -> dict[str, Any]:
        """The training options that are not the defaults, without the seed."""
        return {**self.training, **(self.variants[variant] if variant else {})}

    def options(self, variant: str | None = None) -> TrainingOptions:
        """How every site trains, without its seed."""
        return make_options(self.training_of(variant), "training")


def read_experiment(path: Path, root: Path) -> Experiment:
    """Read and check an experiment whose paths start from `root`.

    Raises
    ------
    UsageError
        A key or value is wrong, or a file that it names is not there.
    """
    file = read_yaml(path, UsageError)
    found = parse(Experiment, file.data, file.place, UsageError)
    make_options(found.training, file.place.inside(f"{file.place}, training", "training"))
    for name, changes in found.variants.items():
        inside = file.place.inside(f"{file.place}, variant {name}", "variants", name)
        make_options({**found.training, **changes}, inside)
    places = [
        (found.data, file.place.at("data")),
        (found.backbone.weights, file.place.at("backbone", "weights")),
        *((t.weights, file.place.at("others", name)) for name, t in found.others.items()),
    ]
    for named, where in places:
        if named and not (root / named).exists():
            raise UsageError(
                f"{where}: {root / named} does not exist: paths start from {root}; "
                "--root changes it."
            )
    for name, merge in found.merges.items():
        for text in (merge.options, merge.head, merge.tune):
            _split(text, f"{file.place.at('merges', name)}: '{name}'")
        where = file.place.at("merges", name)
        if merge.transfer == SYNTHETIC:
            _check_synthesis(merge.options, where)
        elif merge.transfer and "=" not in merge.transfer:
            images = root / merge.transfer
            if not images.exists():
                raise UsageError(
                    f"{where}: {images} does not exist: 'transfer' is a folder or a table from "
                    "--root, rows such as site=north, or 'synthetic'."
                )
        if merge.compress:
            _check_compression(merge.compress, where)
    for name, other in found.others.items():
        _split(other.init, f"{file.place.at('others', name)}: 'init'")
    init = _split(found.backbone.init, f"{file.place.at('backbone', 'init')}: 'init'")
    if "--multi-label" in init:
        raise UsageError(
            f"{file.place.at('backbone', 'init')}: experiments are on images of one class each: "
            "leave --multi-label out, and run the commands of such a federation one by one."
        )
    return found


def _check_synthesis(options: str, where: str) -> None:
    """Refuse a student that is to learn from images that nobody has made.

    Raises
    ------
    UsageError
        No recipe of distillation is named, or nothing says how many images it has synthesised.
    """
    words = [part for word in _split(options, where) for part in word.split("=", 1)]
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words[:-1] else ""
    if recipe:
        told = read_distillation(Path(recipe)).synthesis
        if "--synthesise" in words or (told and told.images):
            return
    raise UsageError(
        f"{where}: 'transfer: {SYNTHETIC}' goes with a recipe that says how many images are "
        "synthesised, such as '--recipe distill-synthetic', or with --synthesise in 'options'."
    )


def _check_compression(text: str, where: str) -> None:
    try:
        parse_compression(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _split(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{where} has a quotation mark without its pair: close it.") from error
