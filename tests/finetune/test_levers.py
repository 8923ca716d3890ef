"""What keeps a vector mergeable: what is trained, how far it goes, and what is averaged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finetune import levers, network, training
from finetune.options import TrainingOptions
from merge_kit.depth import depths
from merge_kit.errors import UsageError
from tests.finetune.test_training import make_task, run  # noqa: F401
from tests.merge_kit.helpers import says


@pytest.fixture
def changed(make_task, run):  # noqa: F811
    """Train with options; gives the names of the parameters that have moved, and how far."""

    def go(**options):
        task = make_task(head_steps=0, **options)
        start = {n: p.detach().clone() for n, p in task.model.named_parameters()}
        trained, _ = run(task)
        gaps = {n: float((trained.state[n] - p).norm()) for n, p in start.items()}
        return {n: gap for n, gap in gaps.items() if gap}

    return go


def test_all_is_trained_by_default(changed, make_task):  # noqa: F811
    assert set(changed()) == {n for n, _ in make_task().model.named_parameters()}


def test_only_the_last_blocks_are_trained(changed, make_task):  # noqa: F811
    names = [n for n, _ in make_task().model.named_parameters()]
    deep = depths(names)
    last = {n for n in names if (d := deep[n]) is not None and d >= 0.5}
    assert 0 < len(last) < len(names)
    assert set(changed(blocks=0.5)) == last | {"fc.weight", "fc.bias"}


def test_fixed_norm_layers_keep_their_weights(changed, make_task):  # noqa: F811
    model = make_task().model
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
        for leaf in ("weight", "bias")
    }  # fmt: skip
    found = set(changed(norm="fixed"))
    assert norms
    assert found == {n for n, _ in model.named_parameters()} - norms


def test_with_nothing_to_train_the_way_out_is_said(make_task):  # noqa: F811
    model = nn.Sequential()
    model.fc = nn.Linear(4, 3)
    model.pretrained_cfg = {"classifier": "fc"}
    model.fc.requires_grad_(False)
    with says(UsageError, "nothing is left to train: give larger --blocks, or another --norm."):
        levers.freeze(model, TrainingOptions(norm="fixed"))


def test_a_pull_keeps_the_vector_short(changed):
    def length(found):
        return sum(gap**2 for name, gap in found.items() if not name.startswith("fc."))

    assert length(changed(distance=100.0, steps=8)) < 0.9 * length(changed(steps=8))


def test_the_pull_is_the_gradient_of_half_the_squared_distance(make_task):  # noqa: F811
    model = make_task().model
    anchor = levers.anchor_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    wanted = sum(
        (p - anchor[n]).square().sum() for n, p in model.named_parameters() if n in anchor
    ) * (0.3 / 2)
    names = [n for n, _ in model.named_parameters() if n in anchor]
    expected = torch.autograd.grad(wanted, [dict(model.named_parameters())[n] for n in names])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    levers.pull(model, anchor, 0.3)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
    assert not network.head_of(model).weight.grad.any()


def test_a_climb_goes_up_the_gradient_and_comes_back():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).square().sum().backward()
    before = copy.deepcopy(layer.state_dict())
    gradient = torch.cat([p.grad.reshape(-1) for p in layer.parameters()])
    descend = levers.climb(layer, 0.5)
    step = torch.cat([(p - before[n]).reshape(-1) for n, p in layer.named_parameters()]).detach()
    torch.testing.assert_close(step, 0.5 * gradient / gradient.norm())
    assert all(p.grad is None for p in layer.parameters())
    descend()
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_sharpness_and_momentum_free_steps_change_the_weights(changed):
    plain = changed()
    assert changed(sharpness=0.05) != plain
    assert changed(optimizer="sgd") != plain


def test_the_average_is_the_mean_of_what_was_added():
    layer, mean = nn.Linear(2, 1), levers.Average()
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(layer.weight, value)
        mean.add(layer)
    with mean.put(layer):
        assert layer.weight.tolist() == [[3.0, 3.0]]
    assert layer.weight.tolist() == [[6.0, 6.0]]


def test_without_steps_to_average_the_weights_stay():
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    with levers.Average().put(layer):
        assert torch.equal(layer.weight, before)


def test_averaged_weights_are_those_of_the_last_steps(make_task, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    add = levers.Average.add

    def watched(self, model):
        seen.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        add(self, model)

    monkeypatch.setattr(levers.Average, "add", watched)
    task = make_task(head_steps=0, steps=4, validations=1, average=0.5)
    state = training.train(task, tmp_path / "c.pt", lambda event: None).state
    assert len(seen) == 2
    for name, tensor in state.items():
        if tensor.is_floating_point():
            mean = (seen[0][name].double() + seen[1][name].double()) / 2
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_run_that_was_stopped_goes_on_to_the_same_average(make_task, tmp_path):  # noqa: F811
    options = {"head_steps": 0, "steps": 6, "validations": 3, "average": 0.7}
    whole = training.train(make_task(**options), tmp_path / "a.pt", lambda event: None)

    class Stopped(Exception):
        pass

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == 4:
            raise Stopped

    with pytest.raises(Stopped):
        training.train(make_task(**options), tmp_path / "b.pt", stop)
    again = training.train(make_task(**options), tmp_path / "b.pt", lambda event: None)
    assert all(torch.equal(again.state[n], t) for n, t in whole.state.items())
