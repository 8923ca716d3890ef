"""merge --method auto: what is there decides, and the recipe is as if it had been named."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit.federation import read_federation
from merge_kit.reheading import find_model
from tests.merge_kit.helpers import load


@pytest.fixture
def automatic(hub, run_cli, tmp_path):
    """`merge --method auto`; gives what it says and the recipe."""

    def go(*arguments, out="auto"):
        options = ("--method", "auto", *arguments, "--out", tmp_path / out)
        result = run_cli("merge", hub.root, *options)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / out / "provenance.json").read_text())
        return result.stdout, record["recipe"]

    return go


def test_one_vector_is_taken_as_it_is(contribute, automatic):
    contribute("a")
    said, recipe = automatic()
    assert (recipe["method"], recipe["weights"]) == ("mean", "examples")
    assert "one vector has arrived" in said


def test_without_a_common_classifier_it_is_the_mean(contribute, automatic):
    contribute("a", seed=1)
    contribute("b", seed=2)
    said, recipe = automatic()
    assert recipe["method"] == "mean"
    assert "with classifiers of their own" in said


def test_sites_that_come_again_get_the_sum(hub, contribute, measured, automatic, run_cli, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        contribute(name, seed=seed)
    _, recipe = automatic(out="first")
    assert recipe["method"] == "mean"
    about = find_model(hub, read_federation(hub.root), tmp_path / "first").backbone
    measured("a", about=about, seed=5)
    assert automatic(out="second")[1]["method"] == "mean"
    measured("b", about=about, seed=6)
    said, recipe = automatic(out="third")
    assert (recipe["method"], recipe["weights"]) == ("sum", "examples")
    assert "2 of these sites have calibrated a merged model before" in said
    by_hand = ("--method", "sum", "--weights", "examples", "--out", tmp_path / "hand")
    assert run_cli("merge", hub.root, *by_hand).exit_code == 0
    first, again = (load(tmp_path / n / "model.safetensors") for n in ("third", "hand"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sites_that_are_left_out_do_not_decide(hub, contribute, measured, automatic, tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        contribute(name, seed=seed)
    automatic(out="first")
    about = find_model(hub, read_federation(hub.root), tmp_path / "first").backbone
    measured("a", about=about, seed=5)
    measured("b", about=about, seed=6)
    assert automatic("--exclude", "a", out="second")[1]["method"] == "mean"


def test_calibrating_the_base_is_no_second_visit(contribute, measured, automatic):
    for name, seed in (("a", 1), ("b", 2)):
        contribute(name, seed=seed)
        measured(name, seed=seed)
    assert automatic()[1]["method"] == "mean"


def test_the_recipe_can_be_shown_alone(hub, contribute, run_cli):
    contribute("a")
    result = run_cli("merge", hub.root, "--method", "auto", "--print-recipe")
    assert result.exit_code == 0
    assert result.stdout.startswith("method: mean")
    assert "Chosen: mean" in result.stderr


@pytest.mark.parametrize("more", [("--weights", "uniform"), ("--option", "density=0.2")])
def test_what_is_chosen_cannot_be_given_too(hub, contribute, run_cli, more):
    contribute("a")
    result = run_cli("merge", hub.root, "--method", "auto", *more)
    assert result.exit_code == 2
    assert "--method auto chooses method and weights by what lies on a hub" in result.stderr
