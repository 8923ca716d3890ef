"""What a student lowers, by hand; and the recipe that says how."""

from __future__ import annotations

import math

import pytest
import torch

from finetune import network
from finetune.distillation import (
    Distillation,
    Synthesis,
    make_distillation,
    read_distillation,
)
from finetune.distilling import DistilledObjective, Lesson, split, told_of
from finetune.options import TrainingOptions
from merge_kit.errors import DataError, RecipeError
from merge_kit.recipe import make_recipe, shipped_recipes
from tests.finetune.pictures import images
from tests.merge_kit.helpers import says


def lesson(logits, features=None):
    logits = torch.tensor(logits, dtype=torch.float64)
    cases = images([0] * len(logits)).cases
    return Lesson(logits, features, (1.0,), cases, tuple(map(str, range(len(cases)))), ())


@pytest.fixture
def model(hub):
    return network.load(hub.root / "base")


def objective(model, logits, told=None, **changes):
    recipe = make_distillation({"method": "distill", **changes}, "test")
    return DistilledObjective(model, lesson(logits), lesson(told or logits), recipe)


def test_the_loss_by_hand(model):
    found = objective(model, [[2.0, 0.0], [0.0, 0.0]], temperature=2.0)
    p, outputs = 1 / (1 + math.exp(-1)), torch.tensor([[0.0, 0.0]])
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    loss = found.loss(outputs, [0], weighted=False)
    assert float(loss) == pytest.approx(4 * divergence, rel=1e-5)
    assert float(found.loss(outputs, [1], weighted=False)) == pytest.approx(0, abs=1e-7)


def test_it_is_zero_for_whoever_says_the_same(model):
    logits = [[3.0, -1.0, 0.5], [0.0, 1.0, 2.0]]
    found = objective(model, logits)
    moved = torch.tensor(logits) + 7  # a constant says nothing
    assert float(found.loss(moved, None, weighted=False)) == pytest.approx(0, abs=1e-6)
    assert found.validation_loss(moved) == pytest.approx(0, abs=1e-6)


def test_a_class_that_nobody_knows_is_not_learnt(model):
    found = objective(model, [[1.0, 0.0, -math.inf]])
    loss = found.loss(torch.tensor([[1.0, 0.0, -50.0]]), [0], weighted=False)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(float(found.loss(torch.zeros(1, 3), [0], weighted=False)))


def test_rare_classes_count_by_what_teachers_find_most_probable(model):
    found = objective(model, [[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert found.chances.tolist() == pytest.approx([1 / 3] * 3 + [1.0])
    outputs = torch.tensor([[1.0, 0.0]] * 3 + [[5.0, 0.0]])
    last = float(found.loss(outputs[3:], [3], weighted=False))
    assert float(found.loss(outputs, None, weighted=True)) == pytest.approx(last / 2, rel=1e-5)
    assert float(found.loss(outputs, None, weighted=False)) == pytest.approx(last / 4, rel=1e-5)


def test_agreement_is_what_is_judged(model):
    found = objective(model, [[1.0, 0.0]], told=[[0.0, 2.0], [3.0, 0.0]])
    truth, chances = found.judged(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]))
    assert truth.tolist() == [1, 0]
    assert chances.flatten().tolist() == pytest.approx([0.5, 0.5, 0.75, 0.25])


def test_features_add_their_distance(model):
    theirs = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    recipe = make_distillation({"method": "distill", "features": 0.5}, "test")
    heard = lesson([[0.0, 0.0, 0.0]] * 2, theirs)
    found = DistilledObjective(model, heard, heard, recipe)
    seen = images([0, 1])
    batch = torch.from_numpy(seen.pixels).permute(0, 3, 1, 2).float() / 255
    outputs = model(batch).detach() * 0
    own = network.head_of(model)
    kept = []
    own.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].flatten(1)))
    model(batch)
    length = theirs.square().sum(dim=1).mean()
    expected = 0.5 * ((kept[0] - theirs).square().sum(dim=1) / length).mean()
    loss = found.loss(outputs, [0, 1], weighted=False).detach()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_images_are_held_back_by_the_seed():
    found = lesson([[float(n), 0.0] for n in range(20)])
    train, held = split(found, 0.25, 3)
    assert (len(train.cases), len(held.cases)) == (15, 5)
    rows = sorted([*train.logits[:, 0].tolist(), *held.logits[:, 0].tolist()])
    assert rows == list(range(20))
    again, other = split(found, 0.25, 3), split(found, 0.25, 4)
    assert torch.equal(again[1].logits, held.logits)
    assert not torch.equal(other[1].logits, held.logits)
    assert len(split(found.take([0, 1]), 0.01, 0)[1].cases) == 1
    with says(DataError, "one image is not enough to learn from and to check by: give more."):
        split(found.take([0]), 0.5, 0)


def test_images_that_belong_together_are_held_back_together():
    found = lesson([[float(n), 0.0] for n in range(20)])
    kin = [str(n // 4) for n in range(20)]
    train, held = split(found, 0.3, 3, kin)
    rows = [[int(n) for n in part.logits[:, 0].tolist()] for part in (train, held)]
    assert sorted(rows[0] + rows[1]) == list(range(20))
    assert [len(part) for part in rows] == [12, 8]
    assert not {n // 4 for n in rows[0]} & {n // 4 for n in rows[1]}
    alone = split(found, 0.3, 3, list(range(20)))
    assert torch.equal(alone[1].logits, split(found, 0.3, 3)[1].logits)
    with says(DataError, "one image is not enough to learn from and to check by: give more."):
        split(found, 0.5, 0, ["a"] * 20)


def test_shipped_recipes_of_distillation_are_read():
    for name in ("distill", "distill-small"):
        found = read_distillation(shipped_recipes()[name])
        assert found.options().steps >= 200
    assert (found.start, found.student.name) == (None, "mobilenetv3_small_050")
    synthetic = read_distillation(shipped_recipes()["distill-synthetic"])
    assert synthetic.synthesis == Synthesis(images=100)
    assert synthetic.options() == Distillation().options()


def test_defaults_of_the_student_are_not_a_sites():
    found = Distillation()
    assert found.merge().method == "mean"
    assert found.options() == TrainingOptions(steps=200, head_steps=0, head="own", flip="both")
    told = told_of(found)
    assert told["training"]["batch_size"] == 32


BAD = {
    "few images": (
        {"synthesis": {"images": 1}},
        "test: 'synthesis.images': input should be greater than or equal to 2 (got 1).",
    ),
    "synthesis": (
        {"synthesis": {"stepps": 3}},
        "test: unknown key 'synthesis.stepps'; did you mean 'steps'?",
    ),
    "stages": (
        {"synthesis": {"stages": 5, "steps": 4}},
        "test: 'synthesis': 5 stages take as many steps at least.",
    ),
    "key": ({"temprature": 2}, "test: unknown key 'temprature'; did you mean 'temperature'?"),
    "training": (
        {"training": {"stepps": 3}},
        "test: unknown key 'stepps'; did you mean 'steps'?",
    ),
    "start": (
        {"start": {"method": "maen"}},
        "test, start: unknown method 'maen'; did you mean 'mean'?",
    ),
    "both": (
        {"start": {"method": "mean"}, "student": {"name": "x"}},
        "test: 'the document': 'start' merges weights of the federation's backbone, which a "
        "'student' of its own does not have: leave one of them out.",
    ),
    "none": (
        {"start": None},
        "test: 'the document': 'start' is null, and there is no 'student': give one of them.",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=list(BAD))
def test_a_wrong_recipe_gives_its_sentence(changes, sentence):
    with says(RecipeError, sentence):
        make_distillation({"method": "distill", **changes}, "test")


def test_other_commands_say_who_runs_it():
    with pytest.raises(RecipeError, match="'distill' takes images and is not a merge of weights"):
        make_recipe({"method": "distill"}, "test")
