"""Greedy soup and the search of scales, worked by hand with real models of known logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import selection
from evaluate.candidates import Judge, base_network, scaled, states
from finetune.cases import Case, load_cases
from finetune.pixels import decode
from merge_kit import merging
from merge_kit.checkpoints import WEIGHTS
from merge_kit.contributions import list_entries
from merge_kit.errors import DataError, RecipeError, UsageError
from merge_kit.federation import BASE_WEIGHTS, read_federation
from merge_kit.payloads import check_payloads
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import TensorFile, read_all
from tests.evaluate.helpers import draw_images, head_for
from tests.merge_kit.emulated import Emulated
from tests.merge_kit.helpers import says

R, L, G = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
LABELS = ("round", "round", "lobed", "lobed", "granular", "granular")


def times(factor, logits):
    return tuple(factor * value for value in logits)


# Logits of each site's model for the six images; balanced accuracy is the share that is right.
LOGITS = {
    "west": (R, R, L, L, G, R),  # 5/6: the last is wrong
    "north": (R, R, L, times(0.5, R), times(0.5, R), times(4, G)),  # 4/6, but sure of the last
    "south": (times(9, L), R, L, times(0.3, R), times(0.3, R), G),  # 3/6, very wrong on the first
    "east": (R, R, *[times(0.01, R)] * 4),  # 2/6, and hardly sure of anything
}


@pytest.fixture
def table(tmp_path):
    files = draw_images(tmp_path, len(LABELS))
    rows = [f"{file},{label},val" for file, label in zip(files, LABELS, strict=True)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["file,label,split", *rows]) + "\n")
    return path


@pytest.fixture
def run(hub, federation, contribute, table):
    """Publish one model of known logits for each site, and carry out a plan."""

    def carry_out(plan, logits=LOGITS):
        for name, values in logits.items():
            contribute(name, change=head_for(hub.root / "base", federation, table, values))
        contract = read_federation(hub.root)
        base = hub.fetch(BASE_WEIGHTS)
        entries = check_payloads(list_entries(hub, contract), contract, base)
        images, _ = decode(load_cases(table, classes=contract.classes), contract.preprocessing)
        with merging.opened(contract, base, [e.contribution for e in entries]) as material:
            judge = Judge(
                base_network(contract, base),
                images,
                torch.device("cpu"),
                selection.METRICS[plan.metric].score,
            )
            return selection.select(plan, material, judge)

    return carry_out


def soup_plan(accept="not-worse"):
    return selection.plan_soup(
        make_recipe({"method": "mean", "weights": "uniform"}, "test"), accept
    )


def scale_plan(*scales, metric="balanced_accuracy", grid=None, method="mean"):
    # Heads scale only where they are merged by the method.
    recipe = make_recipe({"method": method, "weights": "uniform", "head": "method"}, "test")
    return selection.plan_scales(recipe, scales, grid, metric)


def outcomes(found):
    return [(c.sites, round(6 * c.figure.value), c.added) for c in found.candidates]


SINGLE = [
    (("west",), 5, None),
    (("north",), 4, None),
    (("south",), 3, None),
    (("east",), 2, None),
    # The last image: R + 4 G; numbers 4 and 5: L + R / 2 and G + R / 2. All right.
    (("west", "north"), 6, True),
    # First image: R + R + 9 L is wrong, the rest is right.
    (("west", "north", "south"), 5, False),
]


def test_a_greedy_soup_worked_by_hand(run):
    found = run(soup_plan())
    assert outcomes(found) == [*SINGLE, (("west", "north", "east"), 6, True)]
    assert found.chosen is found.candidates[-1]


def test_the_released_code_leaves_out_what_makes_no_difference(run):
    found = run(soup_plan("better"))
    assert outcomes(found) == [*SINGLE, (("west", "north", "east"), 6, False)]
    assert found.chosen.sites == ("west", "north")


def test_equal_sites_of_a_soup_are_taken_by_name(run):
    equal = {name: LOGITS["west"] for name in ("south", "east", "north")}
    found = run(soup_plan(), equal)
    assert found.chosen.sites == ("east", "north", "south")


def test_a_soup_of_one_site_is_that_site(run):
    found = run(soup_plan(), {"west": LOGITS["west"]})
    assert outcomes(found) == [(("west",), 5, None)]


def test_scales_with_equal_figures_go_to_the_smaller(run):
    found = run(scale_plan(2.0, 1.0, 0.5, -1.0), {"west": LOGITS["west"]})
    # A factor above 0 never changes which logit is the largest; -1 makes it the smallest.
    assert [(c.recipe.scale, round(6 * c.figure.value)) for c in found.candidates] == [
        (0.5, 5),
        (-1.0, 0),
        (1.0, 5),
        (2.0, 5),
    ]
    assert found.chosen.recipe.scale == 0.5


def test_the_least_log_loss_is_chosen(run):
    scales = (0.5, 1.0, 2.0, 4.0)
    found = run(scale_plan(*scales, metric="log_loss"), {"west": LOGITS["west"]})
    # Five right with logits (s, 0, 0), one wrong.
    right, wrong = (lambda s: s - math.log(math.exp(s) + 2)), lambda s: -math.log(math.exp(s) + 2)
    expected = [-(5 * right(s) + wrong(s)) / 6 for s in scales]
    np.testing.assert_allclose([c.figure.value for c in found.candidates], expected, rtol=1e-5)
    assert found.chosen.recipe.scale == scales[int(np.argmin(expected))] == 2.0


def test_a_grid_tries_every_combination_and_of_equal_ones_the_smaller_scale(run):
    grid = {"alpha": [0.5, 1.0]}
    plan = scale_plan(4.6, 2.3, metric="log_loss", grid=grid, method="interpolate")
    found = run(plan, {"west": LOGITS["west"]})
    tried = [(c.recipe.options["alpha"], c.recipe.scale) for c in found.candidates]
    assert tried == [(0.5, 2.3), (0.5, 4.6), (1.0, 2.3), (1.0, 4.6)]
    # The loss is the least where e^s / (e^s + 2) = 5/6, at s = ln 10; s is alpha times the scale.
    figures = [c.figure.value for c in found.candidates]
    assert figures[1] == figures[2] == min(figures)
    assert found.chosen is found.candidates[2]


def test_the_figures_carry_an_interval_and_are_recorded(run):
    found = run(scale_plan(1.0), {"west": LOGITS["west"]})
    written = selection.record(found)
    (candidate,) = written["candidates"]
    assert candidate["value"] == pytest.approx(5 / 6)
    assert candidate["low"] < candidate["value"] < candidate["high"]
    assert (candidate["n"], candidate["sites"], candidate["chosen"]) == (6, ["west"], True)
    assert make_recipe(written["recipe"], "record") == found.chosen.recipe
    assert "too good" in written["note"]


STARTS = {
    "mean": {"method": "mean", "dtype": "bfloat16"},
    "ties": {"method": "ties", "scale": 0.7},
    "groups": {
        "method": "mean",
        "groups": [{"match": "*.weight", "method": "sum", "scale": 0.3}],
    },
    "lines": {"method": "sum", "lines": {"alpha": 0.5}},
    "measured lines": {"method": "sum", "lines": {}},
}


@pytest.mark.parametrize("held", [1, 10**9], ids=["one at a time", "all at once"])
@pytest.mark.parametrize("start", STARTS)
def test_states_are_the_very_merged_models(hub, contribute, tmp_path, held, start):
    for seed, name in enumerate(("north", "south")):
        contribute(name, seed=seed)
    contract, base = read_federation(hub.root), hub.fetch(BASE_WEIGHTS)
    contributions = [e.contribution for e in list_entries(hub, contract)]
    recipe, factors = make_recipe(STARTS[start], "test"), (0.3, 1.0, 1.7)
    with merging.opened(contract, base, contributions) as material:
        found = list(states(material, material.sources, recipe, factors, held=held))
    for factor, state in zip(factors, found, strict=True):
        out = tmp_path / f"at {factor}"
        merging.merge(contract, base, contributions, scaled(recipe, factor), out)
        with TensorFile(out / WEIGHTS) as file:
            written = dict(read_all(file))
        assert written.keys() == state.keys()
        for name, tensor in written.items():
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor, state[name]), name


def test_states_may_be_merged_on_a_device(hub, contribute):
    contribute("north")
    contract, device = read_federation(hub.root), Emulated()
    contributions = [e.contribution for e in list_entries(hub, contract)]
    recipe, base = make_recipe(STARTS["ties"], "test"), hub.fetch(BASE_WEIGHTS)
    with merging.opened(contract, base, contributions) as material:
        (here,) = states(material, material.sources, recipe, (1.0,))
        (there,) = states(material, material.sources, recipe, (1.0,), device=device)
    assert device.lanes
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_factor_is_of_every_scale_of_a_recipe():
    recipe = make_recipe({**STARTS["groups"], "scale": 0.5}, "test")
    half = scaled(recipe, 0.5)
    assert (half.scale, [group.scale for group in half.groups]) == (0.25, [0.15])
    assert make_recipe(half.model_dump(mode="json"), "test") == half


def test_outputs_that_are_not_finite_have_no_figure(hub, federation, table):
    base = hub.fetch(BASE_WEIGHTS)
    images, _ = decode(load_cases(table, classes=federation.classes), federation.preprocessing)
    model = base_network(federation, base)
    (head,) = federation.classifier
    state = {**model.state_dict(), f"{head}.bias": torch.full((3,), math.inf)}
    judge = Judge(model, images, torch.device("cpu"), selection.METRICS["macro_auroc"].score)
    figure = judge(state)
    assert math.isnan(figure.value)
    assert selection.METRICS["macro_auroc"].gain(figure) == -math.inf


def test_progress_counts_the_images_of_all_candidates(hub, federation, table):
    images, _ = decode(load_cases(table, classes=federation.classes), federation.preprocessing)
    model, seen = base_network(federation, hub.fetch(BASE_WEIGHTS)), []
    judge = Judge(
        model,
        images,
        torch.device("cpu"),
        selection.METRICS["balanced_accuracy"].score,
        candidates=2,
        progress=lambda done, of: seen.append((done, of)),
    )
    for _ in range(2):
        judge(dict(model.state_dict()))
    assert seen == [(0, 12), (6, 12), (12, 12)]


def cases(*splits):
    return [Case(f"{i}.png", Path(f"{i}.png"), 0, split=split) for i, split in enumerate(splits)]


def test_only_the_validation_split_is_taken():
    given = cases("train", "val", "test", "val")
    assert selection.validation_cases(given, "val", "t.csv") == [given[1], given[3]]


def test_all_images_are_taken_where_none_is_for_testing():
    for given in (cases(None, None), cases("train", "val")):
        assert selection.validation_cases(given, "all", "t.csv") == given


def test_data_without_validation_images_is_refused():
    sentence = (
        "t.csv has no image of the split 'val': name some in its column 'split', or take all its "
        "images with --split all."
    )
    for given in (cases(None, None), cases("train", "test")):
        with says(DataError, sentence):
            selection.validation_cases(given, "val", "t.csv")


def test_test_images_are_refused():
    sentence = (
        "t.csv has 2 images of the split 'test', which must not choose a model: leave --split all "
        "out, or take other rows with --where."
    )
    with says(DataError, sentence):
        selection.validation_cases(cases("val", "test", "test"), "all", "t.csv")


def test_a_metric_that_is_defined_nowhere_is_refused(run, table):
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    sentence = (
        "no candidate has a defined macro AUROC on these 2 images: give images of more classes, or "
        "take another --metric."
    )
    with says(DataError, sentence):
        run(scale_plan(1.0, metric="macro_auroc"), {"west": LOGITS["west"][:2]})


@pytest.mark.parametrize(
    "change",
    [
        {"method": "ties"},
        {"weights": "examples"},
        {"scale": 0.5},
        {"groups": [{"match": "*", "method": "ties"}]},
        {"lines": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_soup_of_anything_but_a_plain_mean_is_refused(change):
    recipe = make_recipe({"method": "mean", "weights": "uniform", **change}, "test")
    sentence = (
        "a greedy soup is the plain mean of the sites that it chooses: take the method 'mean' with "
        "the weights 'uniform', and no scale, groups or lines."
    )
    with says(UsageError, sentence):
        selection.plan_soup(recipe)


def test_a_grid_of_an_unknown_option_or_value_is_refused():
    ties = make_recipe({"method": "ties"}, "test")
    with says(
        RecipeError, "--grid, options of ties: unknown key 'densty'; did you mean 'density'?"
    ):
        selection.plan_scales(ties, grid={"densty": [0.1]})
    with pytest.raises(RecipeError, match="'density': input should be"):
        selection.plan_scales(ties, grid={"density": [0.1, 2.0]})


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_scales_that_are_not_finite_are_refused(scale):
    with says(UsageError, "--scales: every scale must be a finite number: correct it."):
        selection.plan_scales(make_recipe({"method": "mean"}, "test"), [1.0, scale])


def test_the_size_of_a_plan_is_the_number_of_candidates():
    assert scale_plan(1.0, 1.0, 2.0, grid={"alpha": [0.1, 0.2]}, method="interpolate").size(5) == 4
    assert soup_plan().size(5) == 9
