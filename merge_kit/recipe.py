"""How to merge: a YAML file, checked, with every default spelled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, field_validator

from merge_kit.errors import RecipeError
from merge_kit.methods import METHODS, Method, WeightScheme
from merge_kit.methods.base import Sparsify
from merge_kit.schema import Document, Place, SiteName, parse, shown, suggestion
from merge_kit.yamlfile import YamlFile, dump_yaml, read_yaml

DISTILL: Literal["distill"] = "distill"
"""The method of recipes that merge what sites know and not their weights: they take images, and
`finetune.distillation` reads them."""
Share = Annotated[float, Field(ge=0, le=1)]
# Products of a few such numbers stay within what float64 holds.
Factor = Annotated[float, Field(ge=-1e100, le=1e100)]
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class _Weights(Document):
    """Checked by itself: of two alternatives, a fault would speak of the wrong one."""

    weights: dict[SiteName, float]


class Rule(Document):
    """One merge rule with all its choices."""

    method: str
    options: dict[str, Any]
    weights: WeightScheme | dict[SiteName, float]
    """Share of each site: by a rule, or a number for each site."""
    scale: Factor = 1.0
    """lambda in theta_0 + lambda tau; of the weights, not of heads and norm statistics."""

    @property
    def entry(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    @property
    def checked_options(self) -> Document:
        """The options as the method reads them."""
        return self.entry.options.model_validate(self.options)

    @property
    def merging_rule(self) -> tuple[Method, Document]:
        """The method that combines the values, with its options: behind DARE and its like."""
        options = self.checked_options
        if not isinstance(self.entry.rule, Sparsify):
            return self.entry, options
        then = METHODS[getattr(options, "rule")]  # noqa: B009
        return then, then.options.model_validate(getattr(options, "rule_options"))  # noqa: B009


class Group(Rule):
    """Parameters that are merged by a rule of their own."""

    match: tuple[str, ...] = ("*",)
    """Patterns of parameter names, as of files: ``blocks.*.mlp.*``; one of them must fit."""
    depth: tuple[Share, Share] | None = None
    """Only parameters in blocks of this relative depth, from 0 (first) to 1 (last), ends included;
    null takes all, also those outside the blocks."""

    @field_validator("depth")
    @classmethod
    def _is_a_range(cls, depth: tuple[float, float] | None) -> tuple[float, float] | None:
        if depth and depth[0] > depth[1]:
            raise ValueError("must begin with the smaller number")
        return depth


class Lines(Document):
    """Layer scaling: the merged vector of block l of L is multiplied by alpha + beta l / (L - 1).

    LiNeS, arXiv 2410.17146, equation 3; parameters outside the blocks are multiplied by alpha.
    """

    alpha: Factor | None = None
    """Null takes the paper's for several tasks: (|sum tau_i|_1 / |tau_M|_1) / N."""
    beta: Factor = 0.5
    """The paper searches it from 0 to 1 on validation images."""


class Recipe(Rule):
    """A complete recipe: nothing in it is left to a default."""

    format: Literal[1] = 1
    groups: tuple[Group, ...] = ()
    """Parameters with a rule of their own; the first group that fits counts, else the main rule."""
    lines: Lines | None = None
    """Scale blocks by their depth after merging, whatever the method; null leaves them."""
    norm: Literal["pooled", "average", "base"] = "pooled"
    """Running statistics of batch norm: pooled by examples, averaged without weights, or kept."""
    head: Literal["seen", "method"] = "seen"
    """Head rows from the sites that have seen the class, by its counts; or merged like weights."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """Storage type of the merged model's floats."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """For methods that draw random numbers."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The main rule, then that of each group."""
        return (self, *self.groups)

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return dump_yaml(self)


def make_recipe(
    data: Mapping[str, Any], where: str | Place, defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Check a recipe and fill in `defaults`, then those of its method.

    Raises
    ------
    RecipeError
        An unknown key or method (with the nearest known one), or a value out of its range.
    """
    place = where if isinstance(where, Place) else Place(where)
    of_recipe = defaults or {}
    of_rules = {key: value for key, value in of_recipe.items() if key in Rule.model_fields}
    filled = _filled(data, place, of_recipe)
    groups = data.get("groups") or ()
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) for g in groups):
        raise RecipeError(
            f"{place.at('groups')}: 'groups' must be a list, each entry with keys and values."
        )
    filled["groups"] = [
        _group(group, place.inside(f"{place}, group {number + 1}", "groups", number), of_rules)
        for number, group in enumerate(groups)
    ]
    return parse(Recipe, filled, place, RecipeError)


def _group(data: Mapping[str, Any], place: Place, defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = _filled(data, place, defaults)
    match = data.get("match")
    if match is None and data.get("depth") is None:
        raise RecipeError(f"{place.at()}: say which parameters it takes, with 'match' or 'depth'.")
    if isinstance(match, str):
        filled["match"] = (match,)
    return parse(Group, filled, place, RecipeError).model_dump(mode="json")


def _filled(data: Mapping[str, Any], place: Place, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """One rule with `defaults`, then its method's."""
    name = data.get("method")
    if name is None:
        raise RecipeError(
            f"{place.at()}: the key 'method' is missing; known are {', '.join(METHODS)}."
        )
    method = _method(name, list(METHODS), place.at("method"))
    given = data.get("options") or {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{place.at('options')}: 'options' must hold keys and values.")
    weights = data.get("weights", method.weights)
    if isinstance(weights, str) and weights not in (known := list(get_args(WeightScheme))):
        raise RecipeError(
            f"{place.at('weights')}: unknown weights '{shown(weights)}'{suggestion(weights, known)}"
        )
    if isinstance(weights, Mapping):
        parse(_Weights, {"weights": weights}, place, RecipeError)
    inner = place.inside(f"{place}, options of {name}", "options")
    options = _options(method, given, inner)
    if isinstance(method.rule, Sparsify):
        plain = [n for n, m in METHODS.items() if not isinstance(m.rule, Sparsify)]
        then = _method(options["rule"], plain, inner.at("rule"))
        innermost = inner.inside(f"{place}, options of {then.name}", "rule_options")
        options["rule_options"] = _options(then, options["rule_options"], innermost)
    return {"weights": method.weights, **defaults, **data, "options": options}


def _method(name: object, known: list[str], where: str) -> Method:
    if not isinstance(name, str):
        raise RecipeError(f"{where}: 'method' must be a name; known are {', '.join(known)}.")
    if name == DISTILL:
        raise RecipeError(
            f"{where}: '{DISTILL}' takes images and is not a merge of weights: give its recipe to "
            "'merge-kit merge <hub> --recipe <file> --data <images>'."
        )
    if name not in known:
        raise RecipeError(f"{where}: unknown method '{shown(name)}'{suggestion(name, known)}")
    return METHODS[name]


def _options(method: Method, given: Mapping[str, Any], place: Place) -> dict[str, Any]:
    return parse(method.options, given, place, RecipeError).model_dump(mode="json")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with merge-kit, by name."""
    here = Path(__file__).parent
    # In a wheel configs/ lies inside the package; in a checkout beside it.
    folders = (here / "configs" / "merge", here.parent / "configs" / "merge")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def read_recipe(path: Path, defaults: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or one that comes with merge-kit by its name alone.

    Raises
    ------
    RecipeError
        As `make_recipe`, or the file cannot be read as YAML.
    """
    file = read_document(path)
    return make_recipe(file.data, file.place, defaults)


def read_document(path: Path) -> YamlFile:
    """What a recipe file holds, or one that comes with merge-kit by its name alone.

    Raises
    ------
    RecipeError
        It is not there, or cannot be read as YAML.
    """
    if not path.exists():
        shipped = shipped_recipes()
        if path.suffix == "" and str(path) not in shipped:
            raise RecipeError(
                f"{path} does not exist and is no recipe that comes with merge-kit"
                f"{suggestion(str(path), list(shipped))}"
            )
        path = shipped.get(str(path), path)
    return read_yaml(path, RecipeError)
