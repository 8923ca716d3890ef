"""The training loop: what it may change, how far it goes, and that it can be repeated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune import feed, losses, network, training
from finetune.options import TrainingOptions
from finetune.tasks import Task, train_head
from finetune.training import Trained
from merge_kit.errors import TrainingError
from tests.finetune.pictures import images

CPU = torch.device("cpu")
QUICK = TrainingOptions(
    steps=4, validations=2, batch_size=8, head_steps=20, select="last", augment="none", warmup=0
)


@pytest.fixture
def make_task(hub):
    """A task on the federation's base; its head is not zero, so that any change of it shows."""

    def make(labels=(0, 1, 2) * 6, **options: Any) -> Task:
        model = network.load(hub.root / "base")
        torch.manual_seed(5)
        nn.init.normal_(network.head_of(model).weight, std=0.1)
        train, validation = images(labels, seed=1), images([0, 1, 2] * 3, seed=2)
        seen = losses.seen_classes(train.labels(), 3)
        return Task(model, train, validation, seen, QUICK.model_copy(update=options), CPU)

    return make


@pytest.fixture
def run(tmp_path: Path):
    """Train in a fresh place; gives the result and the events."""

    def run(task: Task) -> tuple[Trained, list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []

        def report(event: Mapping[str, Any]) -> None:
            events.append(dict(event))

        place = tmp_path / f"run{len(list(tmp_path.iterdir()))}" / "checkpoint.pt"
        return training.train(task, place, report), events

    return run


def ignore(event: Mapping[str, Any]) -> None:
    """A report that nobody reads."""


def step_losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


def same(one: Trained, other: Trained) -> bool:
    return all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def base_head(task: Task) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in network.head_of(task.model).named_parameters()}


# The loss


def test_seen_classes_are_those_with_an_image():
    assert losses.seen_classes(torch.tensor([2, 0, 2]), 4).tolist() == [True, False, True, False]


def test_the_loss_by_hand():
    outputs = torch.tensor([[1.0, 50.0, 3.0], [0.5, -50.0, 0.0]])
    labels, seen = torch.tensor([2, 0]), torch.tensor([True, False, True])
    first = -math.log(math.exp(3) / (math.exp(1) + math.exp(3)))
    second = -math.log(math.exp(0.5) / (math.exp(0.5) + 1))
    found = float(losses.loss_on_seen(outputs, labels, seen, None))
    assert found == pytest.approx((first + second) / 2)
    weights = torch.tensor([3.0, torch.nan, 1.0])  # nobody asks for that of class 1
    weighted = float(losses.loss_on_seen(outputs, labels, seen, weights))
    assert weighted == pytest.approx((1 * first + 3 * second) / 4)


def test_unseen_classes_get_a_gradient_of_exactly_zero():
    outputs = torch.randn(6, 4, requires_grad=True)
    seen = torch.tensor([True, False, True, True])
    losses.loss_on_seen(outputs, torch.tensor([0, 2, 3, 0, 2, 3]), seen, None).backward()
    assert (outputs.grad[:, 1] == 0).all()
    assert (outputs.grad[:, seen] != 0).all()


def test_label_weights_by_hand():
    labels, seen = torch.tensor([0, 0, 0, 2]), torch.tensor([True, False, True])
    weights = losses.label_weights(labels, seen)[seen]
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert float(weights[0] * 3 + weights[1] * 1) / 4 == pytest.approx(1)


# The order of the images


def test_an_epoch_takes_every_image_once():
    options = QUICK.model_copy(update={"balance": "none"})
    order = feed.epoch_order(torch.zeros(50, dtype=torch.int64), 0, options)
    assert sorted(order.tolist()) == list(range(50))


def test_sampling_draws_the_classes_alike():
    labels = torch.tensor([0] * 900 + [1] * 60 + [2] * 40)
    options = QUICK.model_copy(update={"balance": "sampling"})
    drawn = Counter(labels[feed.epoch_order(losses.rarity(labels)[labels], 0, options)].tolist())
    assert all(280 < drawn[label] < 390 for label in range(3))


@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_epochs_differ_and_can_be_repeated(balance):
    labels = torch.ones(40, dtype=torch.float64)
    options = QUICK.model_copy(update={"balance": balance})
    order = feed.epoch_order
    assert torch.equal(order(labels, 3, options), order(labels, 3, options))
    assert not torch.equal(order(labels, 3, options), order(labels, 4, options))
    other = options.model_copy(update={"seed": 1})
    assert not torch.equal(order(labels, 3, options), order(labels, 3, other))


def test_no_two_streams_of_a_run_share_a_seed():
    # torch's generator on the CPU uses the lower 32 bits of a seed.
    purposes = ("order", "augment", "model", "lora", "soup")
    seeds, steps = range(10), range(2000)
    drawn = {feed.draw_seed(s, p, t) % 2**32 for p in purposes for s in seeds for t in steps}
    assert len(drawn) == len(purposes) * 10 * 2000


# The head


def test_the_head_learns_on_frozen_features(make_task):
    task = make_task(head_steps=200)
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    train_head(task, ignore)
    changed = {n for n, t in task.model.state_dict().items() if not torch.equal(before[n], t)}
    right = network.logits(task.model, task.train, CPU).argmax(dim=1) == task.train.labels()
    assert changed == {"fc.weight", "fc.bias"}
    assert right.float().mean() > 0.8


def test_no_head_steps_leave_the_head_alone(make_task):
    task = make_task(head_steps=0)
    before = base_head(task)
    train_head(task, ignore)
    assert all(torch.equal(before[n], p) for n, p in base_head(task).items())


def test_head_decay_keeps_the_head_small(make_task):
    free, held = make_task(head_decay=0.0), make_task(head_decay=1.0)
    for task in (free, held):
        train_head(task, ignore)
    assert base_head(held)["weight"].norm() < 0.8 * base_head(free)["weight"].norm()


# What the network's training may change


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
def test_rows_of_unseen_classes_get_exactly_no_change(make_task, run, ema, balance):
    task = make_task([0, 2] * 8, weight_decay=0.5, learning_rate=0.01, ema=ema, balance=balance)
    before = base_head(task)
    trained, _ = run(task)
    for name in ("weight", "bias"):
        after = trained.state[f"fc.{name}"]
        assert torch.equal(after[1], before[name][1])
        assert (after[[0, 2]] != before[name][[0, 2]]).any()


def test_frozen_norm_keeps_the_bases_statistics(make_task, run):
    task = make_task()
    before = {n: b.clone() for n, b in task.model.named_buffers()}
    trained, _ = run(task)
    assert all(torch.equal(trained.state[name], tensor) for name, tensor in before.items())
    assert not torch.equal(trained.state["conv1.0.weight"], make_task().model.conv1[0].weight)


def test_updated_norm_counts_the_batches(make_task, run):
    trained, _ = run(make_task(norm="update"))
    assert trained.state["bn1.num_batches_tracked"] == 4
    assert not torch.equal(trained.state["bn1.running_mean"], make_task().model.bn1.running_mean)


def test_updated_norm_stands_a_last_batch_of_one_image(make_task, run):
    trained, _ = run(make_task([0, 1, 2] * 3, norm="update"))  # nine images: a batch of 8, one of 1
    assert trained.steps == 4
    assert all(torch.isfinite(t).all() for t in trained.state.values())


def test_training_lowers_the_loss(make_task, run):
    task = make_task(steps=40, learning_rate=3e-3, head_steps=5)
    _, events = run(task)
    found = step_losses(events)
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


# How far and how fast


def test_steps_say_how_long(make_task, run):
    trained, events = run(make_task(steps=5))
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5]
    assert (trained.steps, trained.epochs) == (5, 2)  # 18 images are 3 steps an epoch


def test_epochs_replace_steps(make_task, run):
    trained, events = run(make_task(steps=1, epochs=1.5, accumulate=2))
    assert len(step_losses(events)) == 3  # 18 images are 2 steps of 2 x 8
    assert (trained.steps, trained.epochs) == (3, 2)


def test_no_steps_train_the_head_alone(make_task, run):
    task = make_task(steps=0)
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    trained, events = run(task)
    changed = {n for n, t in trained.state.items() if not torch.equal(before[n], t)}
    assert changed == {"fc.weight", "fc.bias"}
    assert (trained.steps, trained.epochs, step_losses(events)) == (0, 0, [])


@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
def test_two_accumulated_halves_are_one_batch(make_task, run, balance):
    labels = [0] * 11 + [1] * 5 + [2] * 2
    whole, events = run(make_task(labels, batch_size=16, balance=balance))
    halves, parts = run(make_task(labels, batch_size=8, accumulate=2, balance=balance))
    assert step_losses(parts) == pytest.approx(step_losses(events), rel=1e-4)
    for name, tensor in whole.state.items():
        # Adam divides by the size of a gradient: where that is nearly 0, rounding may show.
        torch.testing.assert_close(halves.state[name], tensor, rtol=0, atol=2e-5)


def test_the_learning_rate_rises_then_falls_as_a_cosine_to_nothing(make_task, run):
    _, events = run(make_task(steps=20, warmup=0.5, learning_rate=1e-3))
    rates = [e["lr"] for e in events if e["event"] == "step"]
    cosine = [5e-4 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == pytest.approx(cosine)


def first_moves(trained: Trained, before: Mapping[str, torch.Tensor]) -> list[float]:
    """Largest change in the stem, in a middle block and in the last one."""
    moved = {n: float((t - before[n]).abs().max()) for n, t in trained.state.items()}
    return [max(moved[n] for n in moved if n.startswith(p)) for p in ("conv1", "layer2", "layer4")]


def test_layer_decay_moves_early_layers_less(make_task, run):
    common = {"steps": 1, "weight_decay": 0.0, "head_steps": 0, "learning_rate": 1e-3}
    moves = {}
    for decay in (1.0, 0.5):
        task = make_task(**common, layer_decay=decay)
        before = {n: t.clone() for n, t in task.model.state_dict().items()}
        moves[decay] = first_moves(run(task)[0], before)
    # The first step of Adam moves each weight by the learning rate, whatever its gradient.
    assert moves[1.0] == pytest.approx([1e-3] * 3, rel=0.02)
    stem, middle, last = moves[0.5]
    assert stem < 0.6 * middle
    assert middle < 0.6 * last
    assert last < 0.6e-3


def test_weights_of_the_moving_average_by_hand(make_task, run):
    start, _ = run(make_task(steps=0))
    after, _ = run(make_task(steps=1))
    average, _ = run(make_task(steps=1, ema=0.75))
    for name, tensor in average.state.items():
        if tensor.is_floating_point():
            expected = 0.75 * start.state[name] + 0.25 * after.state[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)


def test_training_stops_when_nothing_gets_better(make_task, run):
    task = make_task(
        steps=12, validations=12, patience=3, learning_rate=1e-12, select="balanced_accuracy"
    )
    trained, events = run(task)
    assert len(step_losses(events)) < 12
    checks = [e for e in events if e["event"] == "validation"]
    assert trained.steps == checks[-1]["best_step"]
    assert checks[-1]["step"] - trained.steps == 3


@pytest.mark.parametrize(("select", "kept"), [("balanced_accuracy", 0), ("last", 4)])
def test_the_best_weights_are_kept_or_the_last(make_task, run, select, kept):
    ruinous = make_task(select=select, learning_rate=0.5, head_steps=200, clip_norm=None)
    trained, events = run(ruinous)
    figures = {e["step"]: e["balanced_accuracy"] for e in events if e["event"] == "validation"}
    assert figures[0] > figures[4]
    assert trained.steps == kept
    ruinous.model.load_state_dict(trained.state)
    again = training.validate(ruinous.model, ruinous, ignore)
    assert again.balanced_accuracy == pytest.approx(figures[kept])


def test_the_model_that_is_validated_is_the_average(make_task, run):
    task = make_task(steps=2, validations=1, ema=0.9, learning_rate=0.01)
    trained, events = run(task)
    task.model.load_state_dict(trained.state)
    again = training.validate(task.model, task, ignore)
    last = [e for e in events if e["event"] == "validation"][-1]
    assert last["validation_loss"] == pytest.approx(again.loss, rel=1e-5)


def test_the_loss_of_unknown_classes_in_validation_is_left_out(make_task):
    task = make_task([0, 2] * 8)
    outputs = network.logits(task.model, task.validation, CPU)
    labels = task.validation.labels()
    known = labels != 1
    expected = functional.cross_entropy(outputs[known][:, [0, 2]], labels[known] // 2)
    figures = training.validate(task.model, task, ignore)
    assert figures.loss == pytest.approx(float(expected), rel=1e-5)
    assert figures.balanced_accuracy <= 2 / 3


@pytest.mark.parametrize(
    ("validations", "message"),
    [
        (1, "^the loss is not finite at step 2: lower --learning-rate, or use --precision"),
        (4, "^the outputs on the validation images are not finite: lower --learning-rate, or"),
    ],
)
def test_numbers_that_are_not_finite_give_a_sentence(make_task, run, validations, message):
    task = make_task(learning_rate=1e30, clip_norm=None, validations=validations)
    with pytest.raises(TrainingError, match=message):
        run(task)


# Repeating and resuming


@pytest.mark.parametrize("options", [{}, {"augment": "strong", "ema": 0.5, "norm": "update"}])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(make_task, run, options):
    first, events = run(make_task(**options))
    torch.rand(7)  # what was drawn elsewhere has no say
    second, repeated = run(make_task(**options))
    other, _ = run(make_task(**options, seed=1))
    assert same(first, second)
    assert events == repeated
    assert not same(first, other)


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(500)], ids=["empty", "text", "zip"]
)
def test_a_damaged_checkpoint_gives_a_sentence(make_task, tmp_path, content):
    place = tmp_path / "checkpoint.pt"
    place.write_bytes(content)
    with pytest.raises(TrainingError, match=f"^{place} cannot be read: remove it to start"):
        training.train(make_task(), place, ignore)


@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_truncated_checkpoint_gives_a_sentence(make_task, tmp_path, left):
    place = tmp_path / "checkpoint.pt"
    training.train(make_task(), place, ignore)
    data = place.read_bytes()
    place.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(TrainingError, match=f"^{place} cannot be read: remove it to start"):
        training.train(make_task(), place, ignore)


@pytest.mark.parametrize("state", [{"step": 1}, [1, 2]], ids=["too little", "no mapping"])
def test_a_checkpoint_of_something_else_gives_a_sentence(make_task, tmp_path, state):
    place = tmp_path / "checkpoint.pt"
    torch.save(state, place)
    with pytest.raises(TrainingError, match=f"^{place} cannot be read: remove it to start"):
        training.train(make_task(), place, ignore)


def test_a_checkpoint_of_another_network_gives_a_sentence(make_task, tmp_path):
    place = tmp_path / "checkpoint.pt"
    training.train(make_task(), place, ignore)
    task = make_task()
    wider = replace(task, model=_with_more_classes(task.model))
    with pytest.raises(TrainingError, match=f"^{place} cannot be read: remove it to start"):
        training.train(wider, place, ignore)


def _with_more_classes(model: nn.Module) -> nn.Module:
    model.reset_classifier(4)
    return model
