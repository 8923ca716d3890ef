"""Weights that follow from the vectors, and from what sites report of their own models."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import RecipeError
from merge_kit.recipe import make_recipe
from merge_kit.settling import agreement
from merge_kit.weighing import Source, weigh
from tests.merge_kit.helpers import load, quick, says


def source(name, counts, score=None):
    return Source(id=name, site=name, file=None, class_counts=counts, steps=1, score=score)


def validated(*sources):
    return weigh(sources, make_recipe({"method": "sum", "weights": "validation"}, "x")).shares


@given(st.integers(0, 999), st.integers(2, 6))
@quick
def test_agreement_is_the_cosine_to_the_others_sum(seed, size):
    vectors = torch.randn(size, 7, generator=torch.Generator().manual_seed(seed)).double()
    counts = torch.arange(1, size + 1).double()
    found = agreement(vectors @ vectors.T, counts)
    for i in range(size):
        others = sum(counts[j] * vectors[j] for j in range(size) if j != i)
        expected = torch.cosine_similarity(vectors[i], others, dim=0)
        torch.testing.assert_close(found[i], expected)


def test_a_vector_without_length_agrees_with_nobody():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 1.0]]).double()
    found = agreement(vectors @ vectors.T, torch.ones(3).double())
    assert found[1] == 0
    assert bool(found.isfinite().all())


def test_validation_figures_count_by_examples_above_chance():
    assert validated(source("a", (10.0, 10.0), 0.5), source("b", (30.0, 10.0), 0.25)) == [1, 1]
    assert validated(source("a", (10.0, 0.0), 0.9), source("b", (10.0, 0.0), 0.0)) == [2, 0]


def test_who_reports_nothing_is_named():
    with says(
        RecipeError,
        "site 'b' reports no balanced accuracy of its own model on validation images: weigh the "
        "sites with 'weights: examples'.",
    ):
        validated(source("a", (1.0, 1.0), 0.5), source("b", (1.0, 1.0)))
    with pytest.raises(RecipeError, match="for certain better than chance"):
        validated(source("a", (1.0, 1.0), 0.0))


def test_a_merge_holds_the_numbers_and_is_verified(hub, contribute, run_cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 3)):  # two have learnt the same
        contribute(name, seed=seed)
    out = tmp_path / "merged"
    options = ("--method", "sum", "--weights", "agreement")
    result = run_cli("merge", hub.root, *options, "--out", out)
    assert result.exit_code == 0, result.output
    weights = json.loads((out / "provenance.json").read_text())["recipe"]["weights"]
    assert sorted(weights) == ["a", "b", "c"]
    assert sum(weights.values()) == pytest.approx(3)
    assert weights["c"] < weights["a"] == pytest.approx(weights["b"])
    assert run_cli("verify", out, "--hub", hub.root).exit_code == 0
    text = ",".join(f"{name}={value!r}" for name, value in weights.items())
    by_hand = ("--method", "sum", "--weights", text, "--out", tmp_path / "hand")
    assert run_cli("merge", hub.root, *by_hand).exit_code == 0
    first, again = (load(p / "model.safetensors") for p in (out, tmp_path / "hand"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_validation_weights_are_verified(hub, contribute, run_cli, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        contribute(name, seed=seed)
    out = tmp_path / "merged"
    result = run_cli("merge", hub.root, "--weights", "validation", "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "provenance.json").read_text())["recipe"]["weights"] == "validation"
    assert run_cli("verify", out, "--hub", hub.root).exit_code == 0


def test_checkpoints_have_no_figures(hub, contribute, run_cli, tmp_path):
    contribute("a", seed=1)
    vector = next((tmp_path / "a" / "runs").iterdir()) / "vector.safetensors"
    options = ("--weights", "agreement", "--out", tmp_path / "m")
    result = run_cli("merge", hub.root / "base", vector, *options)
    assert result.exit_code == 1
    assert "'weights: agreement' needs numbers of images" in result.stderr
