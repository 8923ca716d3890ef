"""Training in rounds against the same steps by hand."""

from __future__ import annotations

import pytest
import torch

from evaluate.experiments import rounds
from finetune import losses, network, training
from finetune.cases import load_cases
from finetune.options import TrainingOptions
from finetune.run import prepare
from finetune.tasks import Task
from merge_kit import site as sites
from tests.finetune.pictures import write_table
from tests.merge_kit.helpers import load

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(steps=2, batch_size=8, head_steps=0, augment="none", flip="none")
COUNTS = {"north": (8, 4, 0), "south": (3, 5, 10)}


@pytest.fixture
def clients(hub, tmp_path):
    """Two joined sites with decoded images."""
    found = []
    for seed, (name, counts) in enumerate(COUNTS.items()):
        joined = sites.join(hub, name, tmp_path / name)
        classes = joined.federation.classes
        table = write_table(
            tmp_path / "i" / name, dict(zip(classes, counts, strict=True)), seed=seed
        )
        found.append(rounds.Client(joined, prepare(joined, load_cases(table, classes=classes))))
    return found


def by_hand(client, state, options):
    """One site's part of a round."""
    model = network.load(client.site.base_folder)
    model.load_state_dict(state)
    labels = client.material.train.labels()
    task = Task(model, client.material.train, client.material.validation,
                losses.seen_classes(labels, 3), options, CPU)  # fmt: skip
    place = client.site.root / "by-hand.pt"
    place.unlink(missing_ok=True)
    return training.train(task, place, lambda event: None).state


def test_fedavg_is_the_mean_by_examples_and_head_rows_by_class(hub, clients, tmp_path):
    rounds.run(clients, "fedavg", 1, OPTIONS, CPU, tmp_path / "out")
    found, base = (
        load(tmp_path / "out" / "model.safetensors"),
        load(hub.root / "base/model.safetensors"),
    )
    options = OPTIONS.model_copy(update={"select": "last", "warmup": 0.0, "validations": 1})
    north, south = (by_hand(client, base, options) for client in clients)
    share = 12 / 30
    name = "conv1.0.weight"
    expected = share * north[name].double() + (1 - share) * south[name].double()
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)
    for row, shares in enumerate([(8 / 11, 3 / 11), (4 / 9, 5 / 9), (0, 1)]):
        rows = shares[0] * north["fc.weight"][row] + shares[1] * south["fc.weight"][row]
        torch.testing.assert_close(found["fc.weight"][row], rows, rtol=1e-4, atol=1e-6)


def test_what_was_stopped_goes_on_to_the_same_weights(clients, tmp_path):
    rounds.run(clients, "fedavg", 2, OPTIONS, CPU, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(done, of):
        raise Stopped

    with pytest.raises(Stopped):
        rounds.run(clients, "fedavg", 2, OPTIONS, CPU, tmp_path / "cut", progress=stop)
    assert not (tmp_path / "cut").exists()
    begun = []
    rounds.run(clients, "fedavg", 2, OPTIONS, CPU, tmp_path / "cut",
               progress=lambda done, of: begun.append(done))  # fmt: skip
    assert begun == [2]
    whole, cut = (load(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(cut[n], t) for n, t in whole.items())


def test_fedprox_stays_closer_to_the_common_weights(hub, clients, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PROXIMAL", 100.0)
    base, gaps = load(hub.root / "base/model.safetensors"), {}
    for strategy in ("fedavg", "fedprox"):
        options = OPTIONS.model_copy(update={"steps": 6})
        rounds.run(clients, strategy, 1, options, CPU, tmp_path / strategy)
        found = load(tmp_path / strategy / "model.safetensors")
        gaps[strategy] = float((found["conv1.0.weight"] - base["conv1.0.weight"]).norm())
    assert gaps["fedprox"] < gaps["fedavg"]


def test_an_existing_folder_is_left_alone(clients, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(Exception, match="mine exists already: choose another --out"):
        rounds.run(clients, "fedavg", 1, OPTIONS, CPU, tmp_path / "mine", replace=True)
