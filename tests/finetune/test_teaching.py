"""A merged model taught to a site's private model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from torch.nn import functional

from finetune import losses
from finetune.objectives import ClassObjective
from finetune.teaching import TaughtObjective
from merge_kit.checkpoints import WEIGHTS
from tests.finetune.pictures import images
from tests.finetune.test_personalising import merged, personalise  # noqa: F401
from tests.merge_kit.helpers import load

CONFIG = "steps: 6\nbatch_size: 8\nvalidations: 2\nhead_steps: 40\nlearning_rate: 0.001\n"


@pytest.fixture
def config(tmp_path):
    """A short training."""
    path = tmp_path / "training.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def elsewhere(tmp_path, ok):
    """A network of another kind, for other classes."""
    ok("init", tmp_path / "other", "--backbone", "test_vit", "--weights", "none",
       "--input-size", 48, "--model-arg", "img_size=48", "--crop-pct", 1,
       "--classes", "cyst,stone")  # fmt: skip
    return tmp_path / "other" / "base"


def test_the_loss_is_the_sites_own_and_the_divergence_over_all_classes():
    train = images([0, 1, 0, 1], seed=1)
    seen = torch.tensor([True, True, False])
    own = ClassObjective(train, train, seen)
    told = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    outputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = TaughtObjective(own, told, multi_label=False).loss(outputs, [1, 2], weighted=False)
    t, s = told[[1, 2]].softmax(dim=1), outputs.softmax(dim=1)
    apart = (t * (t / s).log()).sum(dim=1).mean()
    task = functional.cross_entropy(outputs[:, :2], torch.tensor([1, 0]))
    torch.testing.assert_close(found, task + apart)
    found.backward()
    assert (outputs.grad[:, 2] != 0).all()  # what the site lacks is learnt from the merged model


@pytest.mark.parametrize("several", [False, True])
def test_the_divergence_is_nothing_of_the_same_and_something_of_others(several):
    every = torch.ones(3, dtype=torch.bool)
    one, other = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
    same = losses.divergence(one, one, every, multi_label=several)
    assert float(same) == pytest.approx(0, abs=1e-7)
    assert float(losses.divergence(one, other, every, multi_label=several)) > 0.1


def test_the_divergence_of_findings_is_that_of_each():
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).unbind()
    seen = torch.tensor([True, False, True])
    p, q = theirs.sigmoid(), ours.sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = losses.divergence(ours, theirs, seen, multi_label=True)
    torch.testing.assert_close(found, each[:, seen].mean() * 2 / 2)


def test_a_private_model_of_another_kind_learns_all_classes(personalise, elsewhere, config):  # noqa: F811
    folder, said = personalise("--into", elsewhere, "--config", config)
    told = json.loads((folder / "config.json").read_text())
    assert (told["architecture"], len(told["label_names"])) == ("test_vit", 3)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    # North has no image of the third class; its row has learnt from the merged model.
    assert (model.head.weight[2] != 0).any()
    assert re.search(r"merged model +balanced accuracy \d\.\d{3}  loss", said)
    assert "private model before" not in said
    assert re.search(r"private model after +balanced accuracy \d\.\d{3}  loss", said)


def test_taught_again_it_is_the_same_and_starts_from_its_own_classifier(personalise, elsewhere,  # noqa: F811
                                                                         config):  # fmt: skip
    first, _ = personalise("--into", elsewhere, "--config", config)
    same, _ = personalise("--into", elsewhere, "--config", config, out="same")
    assert (first / WEIGHTS).read_bytes() == (same / WEIGHTS).read_bytes()
    _, said = personalise("--into", first, "--config", config, out="again")
    assert re.search(r"private model before +balanced accuracy", said)


def test_what_does_not_help_is_not_kept(personalise, elsewhere, tmp_path, config):  # noqa: F811
    first, _ = personalise("--into", elsewhere, "--config", config)
    config.write_text(CONFIG.replace("0.001", "10.0").replace("head_steps: 40", "head_steps: 0"))
    after, said = personalise("--into", first, "--config", config, out="worse")
    before, kept = load(first / WEIGHTS), load(after / WEIGHTS)
    assert "the weights after step 0" in said
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())


def test_a_killed_teaching_goes_on_to_the_same_bytes(personalise, merged, hospitals, elsewhere,  # noqa: F811
                                                     config, tmp_path):  # fmt: skip
    whole, _ = personalise("--into", elsewhere, "--config", config)
    arguments = [
        "personalise", tmp_path / "north", "--data", hospitals["north"], "--model", merged,
        "--into", elsewhere, "--config", config, "--out", tmp_path / "broken",
    ]  # fmt: skip
    command = [sys.executable, "-m", "merge_kit", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    places = tmp_path / "north" / "cache"
    end = time.monotonic() + 120
    while not list(places.glob("taught-*/checkpoint.pt")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if not (tmp_path / "broken").exists():
        assert list(places.glob("taught-*/checkpoint.pt"))
        again, _ = personalise("--into", elsewhere, "--config", config, out="broken")
        assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert not list(places.glob("taught-*/checkpoint.pt"))


def test_what_does_not_go_together_is_refused(personalise, elsewhere, config):  # noqa: F811
    said = personalise("--into", elsewhere, "--share", 0.5, code=2).stderr
    assert "--share is between weights, which --into does not mix: leave it out." in said
    said = personalise("--config", config, code=2).stderr
    assert "--config is of a training, which only --into does: leave it out." in said
    config.write_text("stepz: 3\n")
    said = personalise("--into", elsewhere, "--config", config, code=2).stderr
    assert "unknown key 'stepz'" in said
