"""Local superior soups: what members are, what pulls and pushes them, and what is published."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finetune import network, training
from finetune.options import TrainingOptions
from finetune.soup import Soup
from merge_kit.errors import UsageError
from tests.finetune.test_training import make_task, run  # noqa: F401
from tests.merge_kit.helpers import says

ALONE = TrainingOptions(soup=3, soup_affinity=0.0, soup_diversity=0.0)


@pytest.fixture
def layer():
    return nn.Linear(2, 1, bias=False)


def put(layer, *values):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))


def member(*values):
    return {"weight": torch.tensor([values])}


def test_members_share_the_steps():
    soup = Soup({}, ALONE, 10)
    assert [step for step in range(1, 11) if soup.is_border(step)] == [3, 6, 10]
    assert [soup.begun(step) for step in (0, 2, 3, 5, 6, 9)] == [0, 0, 3, 3, 6, 6]
    assert soup.longest == 4


def test_fewer_steps_than_members_are_refused():
    with says(
        UsageError,
        "--soup 3 takes a step for each member, and there are 2 in all: give more --steps or a "
        "smaller --soup.",
    ):
        Soup({}, ALONE, 2)


def test_a_member_that_is_complete_leaves_the_mean_behind(layer):
    soup = Soup({}, ALONE, 9)
    for values, mean in (((1.0, 2.0), [1.0, 2.0]), ((3.0, 0.0), [2.0, 1.0])):
        put(layer, *values)
        soup.add(layer)
        assert layer.weight.tolist() == [mean]
    put(layer, 8.0, 1.0)
    with soup.put(layer):
        assert layer.weight.tolist() == [[4.0, 1.0]]
    assert layer.weight.tolist() == [[8.0, 1.0]]


def test_gradients_are_found_at_a_random_point_between_the_members(layer):
    """At m = sum_j w_j theta_j + w theta the loss |m|^2 has the gradient 2 m, by theta 2 w m."""
    soup = Soup({}, ALONE, 9)
    soup.members = [member(4.0, 0.0), member(0.0, 4.0)]
    points = []
    for step in range(200):
        put(layer, 0.0, 0.0)
        layer.weight.grad = None
        with soup.between(layer, step):
            a, b = (layer.weight / 4)[0].tolist()
            points.append((a, b))
            layer.weight.square().sum().backward()
        own = 1 - a - b
        torch.testing.assert_close(layer.weight.grad, own * torch.tensor([[8 * a, 8 * b]]))
        assert layer.weight.tolist() == [[0.0, 0.0]]
    shares = torch.tensor([(a, b, 1 - a - b) for a, b in points])
    assert shares.min() >= 0
    torch.testing.assert_close(shares.mean(dim=0), torch.full((3,), 1 / 3), atol=0.06, rtol=0)
    # Uniform on a triangle: each share has the variance 1 / 18.
    torch.testing.assert_close(shares.var(dim=0), torch.full((3,), 1 / 18), atol=0.015, rtol=0)


def test_the_first_member_is_trained_where_it_is(layer):
    put(layer, 3.0, 4.0)
    with Soup({}, ALONE, 9).between(layer, 0):
        assert layer.weight.tolist() == [[3.0, 4.0]]


def test_members_are_pulled_to_the_start_and_pushed_apart(layer):
    options = TrainingOptions(soup=3, soup_affinity=2.0, soup_diversity=6.0)
    soup = Soup(member(0.0, 0.0), options, 9)
    soup.members = [member(3.0, 0.0), member(3.0, 8.0)]
    put(layer, 3.0, 4.0)
    layer.weight.grad = torch.zeros(1, 2)
    soup.steer(layer)
    # 2 (3, 4) / 5 for the start; -6 / 2 times (0, 1) and (0, -1) for the members, which cancel.
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[1.2, 1.6]]))
    soup.members = soup.members[:1]
    soup.steer(layer)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[2.4, 3.2 - 6.0]]))


def test_where_a_distance_is_nothing_it_has_no_gradient(layer):
    soup = Soup(member(3.0, 4.0), TrainingOptions(soup=2), 9)
    put(layer, 3.0, 4.0)
    layer.weight.grad = torch.zeros(1, 2)
    soup.steer(layer)
    assert layer.weight.grad.tolist() == [[0.0, 0.0]]


SOUP = {"soup": 3, "steps": 6, "head_steps": 0, "validations": 1}


def test_the_mean_of_the_members_is_published(make_task, tmp_path, monkeypatch):  # noqa: F811
    members = []
    add = Soup.add

    def watched(self, model):
        members.append({n: p.detach().clone() for n, p in model.named_parameters()})
        add(self, model)

    monkeypatch.setattr(Soup, "add", watched)
    state = training.train(make_task(**SOUP), tmp_path / "c.pt", lambda event: None).state
    assert len(members) == 3
    for name in members[0]:
        mean = torch.stack([m[name].double() for m in members]).mean(dim=0)
        torch.testing.assert_close(state[name].double(), mean, rtol=1e-5, atol=1e-7)
    assert not torch.equal(members[0]["conv1.0.weight"], members[1]["conv1.0.weight"])


def test_every_member_has_a_learning_rate_that_rises_and_falls(make_task, run):  # noqa: F811
    _, events = run(make_task(**{**SOUP, "steps": 12, "warmup": 0.25}))
    rates = [event["lr"] for event in events if event["event"] == "step"]
    assert len(rates) == 12
    assert rates[:4] == rates[4:8] == rates[8:]
    assert rates[0] < rates[1] > rates[3]


@pytest.fixture
def checkpoints(make_task, tmp_path):  # noqa: F811
    """What was saved after each step; members end after the steps 2, 4 and 6."""
    found = {}

    def keep(event):
        if event["event"] == "checkpoint":
            found[event["step"]] = torch.load(tmp_path / "c.pt", weights_only=True)

    training.train(make_task(**{**SOUP, "validations": 6}), tmp_path / "c.pt", keep)
    return found


def test_every_member_begins_without_moments(checkpoints):
    states = {step: saved["optimizer"]["state"] for step, saved in checkpoints.items()}
    assert {step for step, state in states.items() if not state} == {0, 2, 4, 6}


def test_within_a_member_the_mean_with_it_is_the_candidate(checkpoints):
    saved = checkpoints[3]
    (first,) = saved["soup"]
    for name, member in first.items():
        now = saved["model"][name]
        assert not torch.equal(now, member)
        torch.testing.assert_close(saved["best"]["state"][name], (member + now) / 2)


def test_coefficients_change_how_far_members_go(make_task, run):  # noqa: F811
    def length(**options):
        task = make_task(**{**SOUP, "steps": 12, "learning_rate": 1e-3, **options})
        start = {n: p.detach().clone() for n, p in task.model.named_parameters()}
        state = run(task)[0].state
        gaps = (state[n] - p for n, p in start.items() if not n.startswith("fc."))
        return math.sqrt(sum(float(gap.square().sum()) for gap in gaps))

    free = length(soup_affinity=0.0, soup_diversity=0.0)
    assert length(soup_affinity=30.0, soup_diversity=0.0) < 0.9 * free
    assert length(soup_affinity=0.0, soup_diversity=30.0) != free


def test_a_soup_goes_with_sharpness_distance_and_accumulation(make_task, run):  # noqa: F811
    more = {"sharpness": 0.05, "distance": 0.1, "accumulate": 2}
    plain, other = run(make_task(**SOUP))[0], run(make_task(**{**SOUP, **more}))[0]
    assert any(not torch.equal(t, other.state[n]) for n, t in plain.state.items())


def test_rows_of_unseen_classes_and_statistics_stay(make_task, run):  # noqa: F811
    task = make_task(labels=(0, 1) * 6, **SOUP)
    before = {n: t.detach().clone() for n, t in task.model.state_dict().items()}
    head = network.head_of(task.model).weight[2].detach().clone()
    state = run(task)[0].state
    assert torch.equal(state["fc.weight"][2], head)
    for name, tensor in before.items():
        if "running" in name:
            assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 5])
def test_a_soup_that_was_stopped_goes_on_to_the_same_bytes(make_task, tmp_path, stopped_at):  # noqa: F811
    options = {**SOUP, "validations": 6}
    whole = training.train(make_task(**options), tmp_path / "a.pt", lambda event: None)

    class Stopped(Exception):
        pass

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == stopped_at:
            raise Stopped

    with pytest.raises(Stopped):
        training.train(make_task(**options), tmp_path / "b.pt", stop)
    again = training.train(make_task(**options), tmp_path / "b.pt", lambda event: None)
    assert all(torch.equal(again.state[n], t) for n, t in whole.state.items())
