"""What a merge would take, without doing it."""

from __future__ import annotations

import pytest
import torch

from merge_kit import engine
from merge_kit.errors import RecipeError
from merge_kit.estimate import Row, estimate
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from tests.merge_kit.helpers import says

TENSORS = {
    "blocks.0.w": torch.zeros(256, 512),
    "blocks.1.w": torch.zeros(256, 512),
    "bn.num_batches_tracked": torch.tensor(0),
    "bn.running_mean": torch.zeros(3),
    "bn.running_var": torch.zeros(3),
    "head.weight": torch.zeros(2, 5),
    "table": torch.tensor([1, 2]),
}

ROWS_OF_THE_HEAD = "rows from the sites that know the class"


@pytest.fixture
def expect(open_file):
    """The estimate for three random vectors over a base of zeros."""
    generator = torch.Generator().manual_seed(0)
    base = open_file(TENSORS)
    sources = []
    for index in range(3):
        tensors = {
            name: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in TENSORS.items()
            if name != "table"
        }
        sources.append(engine.Source(f"{index}", f"s{index}", open_file(tensors), (1.0, 1.0), 1))
    roles = roles_of(base.specs, ("head",))
    return lambda **recipe: estimate(base, sources, roles, make_recipe(recipe, "test"))


def test_every_tensor_is_in_one_row(expect):
    found = expect(method="ties", groups=[{"match": "blocks.1.*", "method": "mean"}])
    assert found.rows == (
        Row("weights", "ties", 1, 131_072),
        Row("group 1", "mean", 1, 131_072),
        Row("head", ROWS_OF_THE_HEAD, 1, 10),
        Row("norm mean", "pooled", 1, 3),
        Row("norm variance", "pooled", 1, 3),
        Row("counter", "the largest", 1, 1),
        Row("constant", "as in the base", 1, 2),
    )
    assert expect(method="ties", head="method").rows[0] == Row("weights", "ties", 3, 262_154)


@pytest.mark.parametrize(
    ("method", "readings"), [("mean", 1.0), ("median", 1.0), ("ties", 2.0), ("karcher", 2.0)]
)
def test_readings_are_counted(expect, method, readings):
    assert expect(method=method).readings == readings


def test_output_is_what_the_merged_weights_take(expect):
    values = 2 * 131_072 + 3 + 3 + 10
    assert expect(method="mean").output == 4 * values + 8 + 2 * 8
    assert expect(method="mean", dtype="bfloat16").output == 2 * values + 8 + 2 * 8


def test_what_a_method_does_not_take_is_in_a_row_of_its_own(expect):
    found = expect(method="tsv-m", head="method", groups=[{"match": "head.*", "method": "mean"}])
    assert found.rows[:2] == (Row("weights", "tsv-m", 2, 262_144), Row("group 1", "mean", 1, 10))
    found = expect(method="ace", groups=[{"match": "blocks.*", "method": "mean"}])
    assert [row.treatment for row in found.rows[:2]] == ["mean", ROWS_OF_THE_HEAD]


def test_masks_and_the_running_sum_take_their_room(expect):
    found = expect(method="emr")
    assert found.masks == 3 * 2 * 131_072 // 8
    assert expect(method="mean").masks == 0
    assert expect(method="mean").running_sum == 8 * 2 * 131_072


def test_whole_tensors_need_more_memory_than_blocks(expect):
    """Half of the 131072 values of a tensor are a block."""
    blocks, whole = expect(method="mean").memory, expect(method="tsv-m").memory
    assert whole / blocks == pytest.approx(2.0)
    assert expect(method="mean").seconds > 0


def test_what_cannot_be_merged_is_refused_as_a_merge_would(expect):
    with says(
        RecipeError,
        "'slerp' merges at most 2 vectors, there are 3: choose with --site, or take another "
        "method.",
    ):
        expect(method="slerp")


def test_a_vector_may_be_zero_where_the_trial_looks(open_file):
    """A site that has frozen all but the first of 40 blocks."""
    names = [f"blocks.{number:02}.w" for number in range(40)]
    base = open_file({name: torch.zeros(256, 256) for name in names})
    sources = [
        engine.Source(
            f"{index}",
            f"s{index}",
            open_file({n: torch.full((256, 256), float(index or n == names[0])) for n in names}),
            (1.0,),
            1,
        )
        for index in range(2)
    ]
    recipe = make_recipe({"method": "nuslerp"}, "test")
    roles = roles_of(base.specs, ())
    assert len(list(engine.merge(base, sources, roles, recipe))) == len(names)
    assert estimate(base, sources, roles, recipe).readings == 2.0


def test_statistics_are_read_too_and_gram_matrices_lie_in_memory(open_file):
    base = open_file({"fc.weight": torch.zeros(8, 512), "fc.bias": torch.zeros(8)})
    vector = {"fc.weight": torch.ones(8, 512), "fc.bias": torch.ones(8)}
    gram = {"fc.weight": torch.eye(512)}
    sources = [
        engine.Source(f"{n}", f"s{n}", open_file(vector), (1.0,), 1, {"gram": open_file(gram)})
        for n in range(2)
    ]
    roles = roles_of(base.specs, ())
    found = estimate(base, sources, roles, make_recipe({"method": "regmean"}, "test"))
    plain = estimate(base, sources, roles, make_recipe({"method": "tsv-m"}, "test"))
    assert found.statistics == 2 * 4 * 512 * 512
    assert found.memory - plain.memory >= 2 * 4 * 512 * 512
    assert [(row.treatment, row.tensors) for row in found.rows] == [
        ("regmean", 1),
        ("the weighted mean, regmean takes none of these", 1),
    ]
