"""Our rounds beside Flower's: the same replies of the same clients give the same average."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
flwr_app = pytest.importorskip("flwr.app")
strategies = pytest.importorskip("flwr.serverapp.strategy.fedavg")

from evaluate.experiments.rounds import average  # noqa: E402

COUNTS = torch.tensor([[10.0, 20.0, 0.0], [3.0, 0.0, 4.0], [50.0, 7.0, 6.0]]).double()


def states(seed):
    """What three clients send back, and what they began with."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 3), "norm.running_var": (4,), "fc.weight": (3, 4)}
    start, *found = (
        {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(4)
    )
    return start, found


def by_flower(found, images):
    """What FedAvg of Flower's server app makes of replies with these weights and images."""
    replies = [
        flwr_app.RecordDict(
            {
                "arrays": flwr_app.ArrayRecord(state),
                "metrics": flwr_app.MetricRecord({"num-examples": int(size)}),
            }
        )
        for state, size in zip(found, images, strict=True)
    ]
    arrays = strategies.aggregate_arrayrecords(replies, "num-examples")
    return arrays.to_torch_state_dict()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_body_is_averaged_as_flower_does_it(seed):
    start, found = states(seed)
    ours = average(found, start, COUNTS, "fc")
    theirs = by_flower(found, COUNTS.sum(dim=1).tolist())
    for name in ("conv.weight", "norm.running_var"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_where_all_know_all_classes_alike_the_classifier_is_flowers_too():
    start, found = states(2)
    counts = torch.tensor([[10.0] * 3, [30.0] * 3, [5.0] * 3]).double()
    ours, theirs = average(found, start, counts, "fc"), by_flower(found, [30, 90, 15])
    torch.testing.assert_close(ours["fc.weight"], theirs["fc.weight"])


def test_a_class_that_one_client_lacks_is_not_its_to_average():
    start, found = states(3)
    ours = average(found, start, COUNTS, "fc")
    theirs = by_flower(found, COUNTS.sum(dim=1).tolist())
    assert not torch.allclose(ours["fc.weight"][2], theirs["fc.weight"][2], atol=1e-3)
    expected = (4 * found[1]["fc.weight"][2] + 6 * found[2]["fc.weight"][2]) / 10
    torch.testing.assert_close(ours["fc.weight"][2], expected)
