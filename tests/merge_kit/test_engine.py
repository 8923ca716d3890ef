"""A method run over many vectors, each entry by its role."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from merge_kit import engine
from merge_kit.errors import NonFiniteError, RecipeError, VectorError
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import specs_of
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import assemble, says

BASE = {
    "body.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "bn.running_mean": torch.tensor([1.0]),
    "bn.running_var": torch.tensor([2.0]),
    "bn.num_batches_tracked": torch.tensor(100),
    "head.weight": torch.tensor([[10.0], [20.0], [30.0]]),
    "table": torch.tensor([5, 6]),
}
ROLES = roles_of(specs_of(BASE), ("head",))
NORTH = {
    "body.weight": torch.tensor([[1.0, 0.0], [-2.0, 4.0]]),
    "bn.running_mean": torch.tensor([-1.0]),
    "bn.running_var": torch.tensor([0.0]),
    "bn.num_batches_tracked": torch.tensor(7),
    "head.weight": torch.tensor([[1.0], [2.0], [3.0]]),
}
SOUTH = {
    "body.weight": torch.tensor([[5.0, 4.0], [2.0, 0.0]]),
    "bn.running_mean": torch.tensor([3.0]),
    "bn.running_var": torch.tensor([0.0]),
    "bn.num_batches_tracked": torch.tensor(30),
    "head.weight": torch.tensor([[5.0], [8.0], [9.0]]),
}


@pytest.fixture
def sources(open_file):
    """Two sites: 1 and 3 images of the first class, the second only in the south."""
    return [
        engine.Source("a", "north", open_file(NORTH), (1.0, 0.0, 0.0), 10),
        engine.Source("b", "south", open_file(SOUTH), (1.0, 2.0, 0.0), 30),
    ]


@pytest.fixture
def merge(open_file):
    """Merge by a recipe given as keywords."""
    base = open_file(BASE)

    def run(sources, method="mean", **recipe):
        complete = make_recipe({"method": method, **recipe}, "test")
        return assemble(
            engine.merge(base, sources, ROLES, complete), engine.merged_specs(base.specs, complete)
        )

    return run


def test_weights_are_merged_by_the_method(merge, sources):
    """Weights 1 and 3 of 4 examples: 1 + (1 * 1 + 3 * 5) / 4 = 5, and so on."""
    assert merge(sources)["body.weight"].tolist() == [[5.0, 5.0], [4.0, 5.0]]
    assert merge(sources, "sum")["body.weight"].tolist() == [[7.0, 6.0], [3.0, 8.0]]
    assert merge(sources, weights="uniform")["body.weight"].tolist() == [[4.0, 4.0], [3.0, 6.0]]


def test_ties_keeps_elects_and_averages(merge, sources):
    """Density 1, signs +, +, tie, +; the majority is +, so 2 beats -2: 3, 4, 2, 4."""
    merged = merge(sources, "ties", options={"density": 1.0})["body.weight"]
    assert merged.tolist() == [[4.0, 6.0], [5.0, 8.0]]


def test_scale_is_of_the_weights_alone(merge, sources):
    once, half = merge(sources), merge(sources, scale=0.5)
    assert half["body.weight"].tolist() == [[3.0, 3.5], [3.5, 4.5]]
    assert all(torch.equal(once[name], half[name]) for name in once if name != "body.weight")


@pytest.mark.parametrize(
    ("norm", "mean", "variance"),
    [
        # means 0 and 4, variances 2 and 2, examples 1 and 3: 3, and 2 + (9 + 3 * 1) / 4 = 5
        ("pooled", 3.0, 5.0),
        ("average", 2.0, 2.0),
        ("base", 1.0, 2.0),
    ],
)
def test_norm_statistics_by_their_own_rule(merge, sources, norm, mean, variance):
    merged = merge(sources, "sum", norm=norm, scale=3.0)
    assert (merged["bn.running_mean"].item(), merged["bn.running_var"].item()) == (mean, variance)


def test_norm_statistics_without_examples_are_pooled_alike(merge, sources):
    empty = [replace(source, class_counts=(0.0, 0.0, 0.0)) for source in sources]
    assert merge(empty, weights="uniform")["bn.running_mean"].item() == 2.0


def test_head_rows_come_from_the_sites_that_have_seen_the_class(merge, sources):
    """Row 0: 10 + (1 + 5) / 2; row 1: 20 + 8, the south alone; row 2: nobody, the base's."""
    assert merge(sources, "sum")["head.weight"].tolist() == [[13.0], [28.0], [30.0]]


def test_head_rows_by_the_method_when_the_recipe_says_so(merge, sources):
    merged = merge(sources, "sum", head="method")["head.weight"]
    assert merged.tolist() == [[16.0], [30.0], [42.0]]


def test_counters_take_the_largest_and_tables_stay(merge, sources):
    merged = merge(sources)
    assert merged["bn.num_batches_tracked"].tolist() == 130
    assert merged["bn.num_batches_tracked"].dtype == torch.int64
    assert merged["table"].tolist() == [5, 6]


@pytest.mark.parametrize("method", ["mean", "sum"])
def test_one_source_gives_back_its_own_model(merge, sources, method):
    seen = replace(sources[0], class_counts=(3.0, 1.0, 1.0))
    merged = merge([seen], method)
    for name, difference in NORTH.items():
        assert torch.equal(merged[name], BASE[name] + difference), name


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_merging_equals_gives_the_same(merge, sources, method):
    same = [replace(sources[0], id=id, class_counts=(3.0, 1.0, 1.0)) for id in "abc"]
    options = {"density": 1.0} if method == "ties" else {}
    for name, tensor in merge(same, method, options=options).items():
        torch.testing.assert_close(tensor, BASE[name] + NORTH.get(name, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [
        ("uniform", [1.0, 1.0]),
        # 4 and 16 of 20 examples, times 2 sites
        ("examples", [0.4, 1.6]),
        # 2 and 4 of 6, times 2
        ("sqrt-examples", [2 / 3, 4 / 3]),
        # FedNova: p = .2, .8; steps 10, 40; mean steps .2 * 10 + .8 * 40 = 34;
        # .2 * 34 / 10 = .68 and .8 * 34 / 40 = .68, times 2
        ("steps", [1.36, 1.36]),
    ],
)
def test_weights_by_a_rule(sources, scheme, weights):
    north = replace(sources[0], class_counts=(4.0, 0.0, 0.0), steps=10)
    south = replace(sources[1], class_counts=(6.0, 10.0, 0.0), steps=40)
    recipe = make_recipe({"method": "mean", "weights": scheme}, "test")
    assert engine.weigh([north, south], recipe).shares == pytest.approx(weights, rel=2e-9)


def test_more_steps_for_the_same_images_weigh_less(sources):
    """FedNova: p = .5, .5; steps 10, 30; mean 20; .5 * 20 / 10 = 1 and .5 * 20 / 30 = 1/3."""
    alike = [replace(source, class_counts=(4.0, 0.0, 0.0)) for source in sources]
    recipe = make_recipe({"method": "mean", "weights": "steps"}, "test")
    assert engine.weigh(alike, recipe).shares == pytest.approx([2.0, 2 / 3], rel=2e-9)


@pytest.mark.parametrize(
    ("method", "weights"), [("mean", [0.5, 1.5]), ("ties", [0.5, 1.5]), ("sum", [2.0, 6.0])]
)
def test_explicit_weights_average_1_except_for_the_sum(sources, method, weights):
    recipe = make_recipe({"method": method, "weights": {"north": 2, "south": 6}}, "test")
    assert engine.weigh(sources, recipe).shares == weights


def test_a_sum_may_take_negative_weights(merge, sources):
    """Task negation: 1 + 1 - 5 = -3."""
    merged = merge(sources, "sum", weights={"north": 1.0, "south": -1.0})
    assert merged["body.weight"][0, 0].item() == -3.0


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"north": 1}, "site 'south' has no weight: give each contributing site one weight."),
        (
            {"north": 1, "south": 1, "west": 1},
            "site 'west' has a weight but no contribution: give each contributing site one weight.",
        ),
        (
            {"north": 0, "south": 0},
            "the weights must be 0 or more, and their sum at least 1e-8: correct 'weights'.",
        ),
        (
            {"north": 2, "south": -1},
            "the weights must be 0 or more, and their sum at least 1e-8: correct 'weights'.",
        ),
    ],
)
def test_explicit_weights_that_do_not_fit_are_refused(merge, sources, weights, sentence):
    with says(RecipeError, sentence):
        merge(sources, weights=weights)


def test_rules_that_need_figures_say_which_are_missing(sources):
    empty = [replace(source, class_counts=(0.0, 0.0, 0.0)) for source in sources]
    recipe = make_recipe({"method": "mean"}, "test")
    sentence = "no site reports an example: weigh them with 'weights: uniform'."
    with says(RecipeError, sentence):
        engine.weigh(empty, recipe)
    idle = [sources[0], replace(sources[1], steps=0)]
    recipe = make_recipe({"method": "mean", "weights": "steps"}, "test")
    with says(RecipeError, "a site reports 0 steps: weigh them with 'weights: examples'."):
        engine.weigh(idle, recipe)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_floats_are_stored_in_the_recipes_dtype(merge, sources, dtype):
    merged = merge(sources, dtype=dtype)
    wanted = getattr(torch, dtype)
    floats = {name for name, tensor in merged.items() if tensor.is_floating_point()}
    assert floats == {"body.weight", "bn.running_mean", "bn.running_var", "head.weight"}
    assert all(merged[name].dtype == wanted for name in floats)
    recipe = make_recipe({"method": "mean", "dtype": dtype}, "test")
    assert specs_of(merged) == engine.merged_specs(specs_of(BASE), recipe)


def test_sums_run_in_float64_and_are_rounded_once(open_file):
    """Base 0; 1e8 + 1 - 1e8 would be 0 in float32."""
    made = [
        engine.Source(f"{i}", f"s{i}", open_file({"w": torch.tensor([v])}), (1.0,), 1)
        for i, v in enumerate([1e8, 1.0, -1e8])
    ]
    roles = roles_of({"w": TensorSpec(torch.float32, (1,))}, ())
    recipe = make_recipe({"method": "sum"}, "test")
    (merged,) = engine.merge(open_file({"w": torch.zeros(1)}), made, roles, recipe)
    assert merged.values.item() == 1.0


def test_weights_are_applied_in_float64(merge, sources):
    """1 + (2 * 1 + 1 * 5) / 3, to the last digits."""
    merged = merge(sources, weights={"north": 2.0, "south": 1.0}, dtype="float64")
    assert merged["body.weight"][0, 0].item() == pytest.approx(1 + 7 / 3, rel=1e-15)


def test_a_merged_value_that_overflows_is_refused_by_name(merge, sources):
    with says(
        NonFiniteError,
        "the merged model: tensor 'body.weight' holds 4 value(s) that are NaN or infinite: "
        "choose a smaller scale, or a wider dtype.",
    ):
        merge(sources, scale=1e6, dtype="float16")


def test_a_vector_that_makes_a_variance_negative_is_refused_by_name(merge, open_file):
    bad = {**NORTH, "bn.running_var": torch.tensor([-3.0])}
    source = engine.Source("a", "north", open_file(bad), (1.0, 0.0, 0.0), 10)
    with says(
        VectorError,
        "site 'north': its vector makes the running variance 'bn.running_var' negative, which no "
        "training can: leave it out with --exclude north.",
    ):
        merge([source])


def test_a_method_that_needs_more_or_fewer_vectors_says_so(merge, sources):
    third = replace(sources[0], id="c", site="west")
    sentence = (
        "'slerp' merges at most 2 vectors, there are 3: choose with --site, or take another method."
    )
    with says(RecipeError, sentence):
        merge([*sources, third], "slerp")
    sentence = (
        "'model-stock' needs at least 2 vectors, there is 1: wait for more sites, or take another "
        "method."
    )
    with says(RecipeError, sentence):
        merge(sources[:1], "model-stock")


def test_more_attackers_than_krum_can_tell_apart_are_refused(merge, sources):
    sentence = (
        "'krum' cannot be used: 1 attacker(s) among 2 cannot be told apart, at least 5 vectors are "
        "needed: lower 'attackers' or wait for more sites."
    )
    with says(RecipeError, sentence):
        merge(sources, "krum")


def test_images_that_are_in_no_class_count_count_in_weights_and_rows_only_where_they_may(
    merge, sources
):
    """South: a task of its own, 3 images; then a coarse site that alone knows the third class."""
    north = replace(sources[0], class_counts=(1.0, 0.0, 0.0))
    other = replace(sources[1], class_counts=(0.0, 0.0, 0.0), other_images=3.0)
    merged = merge([north, other], weights="examples")
    expected = (
        BASE["body.weight"] + (NORTH["body.weight"] + 3 * SOUTH["body.weight"]) / 4
    ).tolist()
    assert merged["body.weight"].tolist() == expected
    assert (merged["head.weight"] - BASE["head.weight"]).flatten().tolist() == [1.0, 0.0, 0.0]
    coarse = replace(other, group_shares=(1.5, 0.0, 1.5))
    merged = merge([north, coarse], weights="examples")
    assert merged["body.weight"].tolist() == expected
    assert (merged["head.weight"] - BASE["head.weight"]).flatten().tolist() == [1.0, 0.0, 9.0]


def test_a_vector_of_zeros_has_no_direction(merge, sources, open_file):
    nothing = {name: torch.zeros_like(tensor) for name, tensor in NORTH.items()}
    idle = engine.Source("z", "idle", open_file(nothing), (1.0, 1.0, 1.0), 10)
    sentence = (
        "site 'idle': its vector is all zeros in what 'multislerp' merges ('body.weight') "
        "and has no direction: leave it out with --exclude idle, or merge these tensors by another "
        "method."
    )
    with says(VectorError, sentence):
        merge([*sources, idle], "multislerp")
    # Elsewhere it only pulls towards the base.
    assert merge([*sources, idle], "median")["body.weight"].tolist() == [[2.0, 2.0], [3.0, 4.0]]


def test_a_site_that_krum_refuses_has_no_say_in_heads_and_statistics(merge, sources, open_file):
    wild = {n: t + 1000 if t.is_floating_point() else t for n, t in NORTH.items()}
    made = [replace(sources[0], id=f"{i}", site=f"s{i}") for i in range(4)]
    hostile = engine.Source("9", "wild", open_file(wild), (50.0, 50.0, 50.0), 10)
    merged = merge([*made, hostile], "multi-krum")
    assert merged["head.weight"][0].item() == 11.0
    assert merged["bn.running_mean"].item() == 0.0


def test_a_site_that_the_rule_of_a_group_refuses_has_no_say_there_either(merge, sources, open_file):
    wild = {n: t + 1000 if t.is_floating_point() else t for n, t in NORTH.items()}
    made = [replace(sources[0], id=f"{i}", site=f"s{i}") for i in range(4)]
    hostile = engine.Source("9", "wild", open_file(wild), (50.0, 50.0, 50.0), 10)
    groups = [{"match": "body.*", "method": "multi-krum"}]
    merged = merge([*made, hostile], "mean", groups=groups)
    assert merged["head.weight"][0].item() == 11.0
    assert merged["bn.running_mean"].item() == 0.0


def test_a_tensor_of_several_blocks_is_merged_whole(open_file):
    """Three blocks; the mean of 0, 1, 2 ... and its double is 1.5 times it."""
    ramp = torch.arange(150_000, dtype=torch.float32)
    made = [
        engine.Source(f"{i}", f"s{i}", open_file({"w": ramp * (i + 1)}), (1.0,), 1)
        for i in range(2)
    ]
    roles = roles_of({"w": TensorSpec(torch.float32, (150_000,))}, ())
    recipe = make_recipe({"method": "mean"}, "test")
    parts = list(engine.merge(open_file({"w": torch.ones(150_000)}), made, roles, recipe))
    assert [part.begin for part in parts] == [0, 65536, 131072]
    assert torch.equal(torch.cat([part.values for part in parts]), 1 + 1.5 * ramp)


DEEP = {
    "blocks.0.w": torch.zeros(2),
    "blocks.1.w": torch.zeros(2),
    "blocks.2.w": torch.zeros(2),
    "stem.w": torch.zeros(2),
}


@pytest.fixture
def merge_deep(open_file):
    """Two sites whose every tensor is (1, 2) and (3, -2), over a base of zeros."""
    base = open_file(DEEP)
    made = [
        engine.Source(i, f"s{i}", open_file(dict.fromkeys(DEEP, torch.tensor(v))), (1.0,), 1)
        for i, v in (("a", [1.0, 2.0]), ("b", [3.0, -2.0]))
    ]
    roles = roles_of(base.specs, ())

    def run(**recipe):
        complete = make_recipe(recipe, "test")
        parts = engine.merge(base, made, roles, complete)
        return {n: v.tolist() for n, v in assemble(parts, base.specs).items()}

    return run


def test_groups_of_parameters_have_their_own_method_weights_and_scale(merge_deep):
    """Sum everywhere; the stem: 2 times the mean with weights 3 and 1; block 1: the larger."""
    merged = merge_deep(
        method="sum",
        groups=[
            {"match": "stem.*", "method": "mean", "weights": {"sa": 3, "sb": 1}, "scale": 2},
            {"match": ["blocks.1.*", "nothing"], "method": "magmax"},
            {"match": "*", "depth": [0.9, 1], "method": "sum", "scale": 0.5},
        ],
    )
    assert merged == {
        "blocks.0.w": [4.0, 0.0],
        "blocks.1.w": [3.0, -2.0],
        "blocks.2.w": [2.0, 0.0],
        "stem.w": [3.0, 2.0],
    }


def test_the_first_group_that_fits_counts(merge_deep):
    merged = merge_deep(
        method="sum",
        groups=[
            {"match": "blocks.0.*", "method": "sum", "scale": 2},
            {"match": "blocks.*", "method": "sum", "scale": 3},
        ],
    )
    assert [v[0] for v in merged.values()] == [8.0, 12.0, 12.0, 4.0]


def test_a_group_that_takes_nothing_is_refused(merge_deep):
    sentence = (
        "group 2 of the recipe (block.*) takes no tensor: correct its 'match' or 'depth', or put "
        "it before the group that takes them."
    )
    groups = [{"match": "stem.*", "method": "sum"}, {"match": "block.*", "method": "mean"}]
    with says(RecipeError, sentence):
        merge_deep(method="sum", groups=groups)


def test_layers_are_scaled_by_their_depth(merge_deep):
    """LiNeS: alpha + beta l / (L - 1) with alpha 0.5 and beta 1; the stem takes alpha."""
    merged = merge_deep(method="sum", scale=2.0, lines={"alpha": 0.5, "beta": 1.0})
    assert [v[0] for v in merged.values()] == [4.0, 8.0, 12.0, 4.0]


def test_the_papers_alpha_follows_from_the_lengths(merge_deep):
    """Sum: |sum|_1 / |tau_M|_1 / N = 1 / 2; mean: tau_M is half of the sum, so alpha = 1."""
    merged = merge_deep(method="sum", lines={"beta": 0.0})
    assert [v[0] for v in merged.values()] == [2.0] * 4
    merged = merge_deep(method="mean", lines={"beta": 0.0})
    assert [v[0] for v in merged.values()] == [2.0] * 4
