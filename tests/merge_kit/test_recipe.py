"""How to merge."""

from __future__ import annotations

import pytest

from merge_kit.errors import RecipeError
from merge_kit.methods import METHODS
from merge_kit.recipe import make_recipe, read_recipe
from tests.merge_kit.helpers import says

ONE_OF = "input should be"


def test_every_default_is_spelled_out():
    assert make_recipe({"method": "ties"}, "here").model_dump(mode="json") == {
        "format": 1,
        "method": "ties",
        "options": {"density": 0.2, "scope": "vector", "reduction": "mean", "vote": "values"},
        "weights": "uniform",
        "scale": 1.0,
        "groups": [],
        "lines": None,
        "norm": "pooled",
        "head": "seen",
        "dtype": "float32",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("method", "weights"), [("mean", "examples"), ("sum", "uniform"), ("ties", "uniform")]
)
def test_weights_default_to_the_methods_own(method, weights):
    assert make_recipe({"method": method}, "here").weights == weights
    assert make_recipe({"method": method, "weights": "steps"}, "here").weights == "steps"


@pytest.mark.parametrize(
    "data",
    [
        {"method": "mean"},
        {"method": "sum", "scale": 0.3, "dtype": "bfloat16", "norm": "base", "head": "method"},
        {"method": "ties", "options": {"density": 0.5, "scope": "tensor"}, "seed": 7},
        {"method": "mean", "weights": {"north": 2.0, "south": 0.5}},
    ],
    ids=["mean", "sum", "ties", "weights"],
)
def test_a_recipe_comes_back_from_yaml(tmp_path, data):
    recipe = make_recipe(data, "here")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, f"the key 'method' is missing; known are {', '.join(METHODS)}."),
        ({"method": "tise"}, "unknown method 'tise'; did you mean 'ties'?"),
        ({"method": "tiess"}, "unknown method 'tiess'; did you mean 'ties'?"),
        ({"method": ["mean"]}, f"'method' must be a name; known are {', '.join(METHODS)}."),
        ({"method": "\x1b[2J" * 50},
         f"unknown method '{('?[2J' * 50)[:120]}...'; known are {', '.join(METHODS)}."),
        ({"method": "mean", "weights": "exampels"}, "unknown weights 'exampels'; "
         "did you mean 'examples'?"),
        ({"method": "mean", "scael": 2}, "unknown key 'scael'; did you mean 'scale'?"),
        ({"method": "mean", "options": [1]}, "'options' must hold keys and values."),
        ({"method": "mean", "scale": "big"}, "'scale': input should be a valid number "
         "(got 'big')."),
        ({"method": "mean", "scale": True}, "'scale': input should be a valid number (got True)."),
        ({"method": "mean", "seed": 1.0}, "'seed': input should be a valid integer (got 1.0)."),
        ({"method": "mean", "weights": {"north": True}}, "'weights.north': input should be a valid "
         "number (got True)."),
        ({"method": "mean", "scale": float("inf")}, "'scale': input should be a finite number "
         "(got inf)."),
        ({"method": "mean", "norm": "median"}, "'norm': input should be 'pooled', 'average' or "
         "'base' (got 'median')."),
        ({"method": "mean", "head": "all"}, "'head': input should be 'seen' or 'method' "
         "(got 'all')."),
        ({"method": "mean", "dtype": "int8"}, "'dtype': input should be 'float32', 'float16', "
         "'bfloat16' or 'float64' (got 'int8')."),
        ({"method": "mean", "seed": -1}, "'seed': input should be greater than or equal to 0 "
         "(got -1)."),
        ({"method": "mean", "groups": 3},
         "'groups' must be a list, each entry with keys and values."),
        ({"method": "mean", "lines": {"bta": 1}}, "unknown key 'lines.bta'; did you mean 'beta'?"),
        ({"method": "mean", "weights": "\x1b[2J"}, "unknown weights '?[2J'; known are uniform, "
         "examples, sqrt-examples, steps, validation, agreement."),
        ({"method": "mean", "seed": 2**64},
         "'seed': input should be less than 18446744073709551616 (got 18446744073709551616)."),
        ({"method": "mean", "format": 2}, "'format': input should be 1 (got 2)."),
    ],
)  # fmt: skip
def test_faults_are_told_in_one_sentence(data, sentence):
    with says(RecipeError, f"here: {sentence}"):
        make_recipe(data, "here")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"densty": 0.1}, "unknown key 'densty'; did you mean 'density'?"),
        ({"density": 0}, "'density': input should be greater than 0 (got 0)."),
        ({"density": 1.5}, "'density': input should be less than or equal to 1 (got 1.5)."),
        ({"scope": "layer"}, "'scope': input should be 'vector' or 'tensor' (got 'layer')."),
        (
            {"reduction": "median"},
            "'reduction': input should be 'mean', 'sum' or 'max' (got 'median').",
        ),
    ],
)
def test_faults_in_options_are_told_in_one_sentence(options, sentence):
    with says(RecipeError, f"here, options of ties: {sentence}"):
        make_recipe({"method": "ties", "options": options}, "here")


def test_a_text_is_no_number_for_an_option():
    with says(
        RecipeError, "here, options of ties: 'density': input should be a valid number (got '1')."
    ):
        make_recipe({"method": "ties", "options": {"density": "1"}}, "here")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("method: mean\nscale: true",
         ", line 2: 'scale': input should be a valid number (got True)"),
        ("method: mean\nseed: 1\nweights:\n  south: 2\n  north: x\n",
         ", line 5: 'weights.north': input should be a valid number (got 'x')"),
        ("method: ties\noptions:\n  scope: vector\n  density: 2\n", ", options of ties, line 4: "
         "'density': input should be less than or equal to 1 (got 2)"),
        ("method: dare\noptions:\n  rule: ties\n  rule_options:\n    density: no\n", ", options of "
         "ties, line 5: 'density': input should be a valid number (got False)"),
        ("method: mean\ngroups:\n- match: fc.*\n  method: mean\n- match: a\n  method: mean\n"
         "  scale: '1'\n", ", group 2, line 7: 'scale': input should be a valid number (got '1')"),
        ("method: mean\ngroups:\n- match: fc.*\n  method: maen\n", ", group 1, line 4: unknown "
         "method 'maen'; did you mean 'mean'?"),
        ("method: mean\nscale: 1\nscale: 2\n", ", line 3: the key 'scale' stands there already, in "
         "line 2: leave one of the two"),
    ],
)  # fmt: skip
def test_the_line_of_a_fault_in_a_file_is_named(tmp_path, text, sentence):
    (tmp_path / "r.yaml").write_text(text)
    with says(RecipeError, f"{tmp_path}/r.yaml{sentence}" + "." * (sentence[-1] != "?")):
        read_recipe(tmp_path / "r.yaml")


def test_a_method_without_options_takes_none():
    with says(RecipeError, "here, options of mean: unknown key 'density'."):
        make_recipe({"method": "mean", "options": {"density": 0.1}}, "here")


@pytest.mark.parametrize(
    "weights", [3, None, {"North": 1}, {"north": "x"}, {"north": float("nan")}, [1]]
)
def test_malformed_weights_are_refused(weights):
    with pytest.raises(RecipeError, match=r"^here: 'weights"):
        make_recipe({"method": "mean", "weights": weights}, "here")


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "r.yaml").write_text("method: mean\nscale: [1\n")
    with says(RecipeError, f"{tmp_path}/r.yaml, line 3: not valid YAML."):
        read_recipe(tmp_path / "r.yaml")


def test_a_recipe_reads_its_options_with_their_types():
    recipe = make_recipe({"method": "ties", "options": {"density": 1}}, "here")
    assert recipe.checked_options.density == 1.0
    assert recipe.entry.name == "ties"


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ({"match": "a.*"}, f"the key 'method' is missing; known are {', '.join(METHODS)}."),
        ({"method": "mean"}, "say which parameters it takes, with 'match' or 'depth'."),
        (
            {"match": "a.*", "method": "ties", "options": {"densty": 1}},
            "unknown key 'densty'; did you mean 'density'?",
        ),
        ({"match": "a.*", "method": "mean", "norm": "base"}, "unknown key 'norm'; known are "),
        (
            {"method": "mean", "depth": [0.5, 0.2]},
            "'depth': must begin with the smaller number.",
        ),
        ({"method": "mean", "depth": [0.5, 2]}, "'depth.1': input should be less than or equal "
         "to 1 (got 2)."),
    ],
)  # fmt: skip
def test_faults_of_a_group_name_the_group(group, sentence):
    with pytest.raises(RecipeError) as caught:
        make_recipe({"method": "mean", "groups": [group]}, "here")
    assert str(caught.value).startswith("here, group 1")
    assert sentence in str(caught.value)


def test_the_defaults_of_a_group_are_its_methods():
    recipe = make_recipe({"method": "mean", "groups": [{"match": "*.b", "method": "ties"}]}, "here")
    (group,) = recipe.groups
    assert (group.match, group.depth) == (("*.b",), None)
    assert group.weights == "uniform"
    assert group.options["density"] == 0.2


def test_a_recipe_that_is_misspelt_is_answered_with_the_nearest_shipped_one():
    from pathlib import Path

    with says(
        RecipeError,
        "tise does not exist and is no recipe that comes with merge-kit; did you mean 'ties'?",
    ):
        read_recipe(Path("tise"))
