"""How to merge: a YAML file, checked, with every default spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field

from merge_kit.errors import RecipeError
from merge_kit.methods import METHODS, Method, WeightScheme
from merge_kit.methods.base import Sparsify
from merge_kit.schema import Document, SiteName, dump_yaml, parse, read_yaml, suggestion

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class _Weights(Document):
    """Checked by itself: of two alternatives, a fault would speak of the wrong one."""

    weights: dict[SiteName, float]


class Recipe(Document):
    """A complete recipe: nothing in it is left to a default."""

    format: Literal[1] = 1
    method: str
    options: dict[str, Any]
    weights: WeightScheme | dict[SiteName, float]
    """Share of each site: by a rule, or a number for each site."""
    scale: float = 1.0
    """lambda in theta_0 + lambda tau; of the weights, not of heads and norm statistics."""
    norm: Literal["pooled", "average", "base"] = "pooled"
    """Running statistics of batch norm: pooled by examples, averaged without weights, or kept."""
    head: Literal["seen", "method"] = "seen"
    """Head rows from the sites that have seen the class, by its counts; or merged like weights."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """Storage type of the merged model's floats."""
    seed: int = Field(default=0, ge=0)
    """For methods that draw random numbers."""

    @property
    def rule(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    @property
    def checked_options(self) -> Document:
        """The options as the method reads them."""
        return self.rule.options.model_validate(self.options)

    @property
    def merging_rule(self) -> tuple[Method, Document]:
        """The method that combines the values, with its options: behind DARE and its like."""
        options = self.checked_options
        if not isinstance(self.rule.rule, Sparsify):
            return self.rule, options
        then = METHODS[getattr(options, "rule")]  # noqa: B009
        return then, then.options.model_validate(getattr(options, "rule_options"))  # noqa: B009

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return dump_yaml(self)


def make_recipe(
    data: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Check a recipe and fill in `defaults`, then those of its method.

    Raises
    ------
    RecipeError
        An unknown key or method (with the nearest known one), or a value out of its range.
    """
    name = data.get("method")
    if name is None:
        raise RecipeError(f"{where}: the key 'method' is missing; known are {', '.join(METHODS)}.")
    method = _method(name, list(METHODS), where)
    given = data.get("options") or {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: 'options' must hold keys and values.")
    weights = data.get("weights", method.weights)
    if isinstance(weights, str) and weights not in (known := list(get_args(WeightScheme))):
        raise RecipeError(f"{where}: unknown weights '{weights}'{suggestion(weights, known)}")
    if isinstance(weights, Mapping):
        parse(_Weights, {"weights": weights}, where, RecipeError)
    options = _options(method, given, where)
    if isinstance(method.rule, Sparsify):
        plain = [n for n, m in METHODS.items() if not isinstance(m.rule, Sparsify)]
        then = _method(options["rule"], plain, f"{where}, options of {name}")
        options["rule_options"] = _options(then, options["rule_options"], where)
    filled = {"weights": method.weights, **(defaults or {}), **data, "options": options}
    return parse(Recipe, filled, where, RecipeError)


def _method(name: object, known: list[str], where: str) -> Method:
    if not isinstance(name, str) or name not in known:
        raise RecipeError(f"{where}: unknown method '{name}'{suggestion(str(name), known)}")
    return METHODS[name]


def _options(method: Method, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    checked = parse(method.options, given, f"{where}, options of {method.name}", RecipeError)
    return checked.model_dump(mode="json")


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
    if not path.exists():
        path = shipped_recipes().get(str(path), path)
    return make_recipe(read_yaml(path, RecipeError), str(path), defaults)
