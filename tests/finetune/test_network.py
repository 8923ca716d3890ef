"""The backbone at a site: loaded whole or refused, read at the classifier's input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from finetune import network
from finetune.pixels import centre
from merge_kit.errors import MergeKitError, UsageError, VectorError
from merge_kit.tensorfile import write_tensors
from tests.finetune.pictures import SMALL, images

CPU = torch.device("cpu")
PICTURES = images([0, 1, 2, 0, 1])


@pytest.fixture
def base(hub) -> Path:
    """A timm folder with a small convolutional network."""
    return hub.root / "base"


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    return timm.create_model(name, num_classes=3, **size).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_features_are_what_the_classifier_is_given(name):
    model = backbone(name)
    found = network.features(model, PICTURES, CPU, batch_size=2)
    with torch.no_grad():
        inputs = centre(PICTURES.batch(range(5)), SMALL)
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
        through_head = network.head_of(model)(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        through_head, network.logits(model, PICTURES, CPU), rtol=1e-4, atol=1e-5
    )


def test_features_leave_no_hook_behind():
    model = backbone("test_resnet")
    network.features(model, PICTURES, CPU)
    assert not network.head_of(model)._forward_pre_hooks


def test_predicting_leaves_the_model_in_evaluation_mode_and_unchanged():
    model = backbone("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = []
    found = network.logits(model, PICTURES, CPU, batch_size=2, progress=lambda *at: done.append(at))
    assert found.shape == (5, 3)
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_network_without_class_outputs_is_refused():
    with pytest.raises(MergeKitError, match="is it a classifier"):
        network.logits(nn.Conv2d(3, 3, 1), PICTURES, CPU)


def test_loading_gives_the_weights_of_the_folder(base):
    from safetensors.torch import load_file

    model = network.load(base)
    stored = load_file(base / "model.safetensors")
    assert not model.training
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], t) for name, t in model.state_dict().items())


def test_a_folder_with_odd_characters_is_loaded(base, tmp_path):
    odd = Path(shutil.copytree(base, tmp_path / "run #1 of 50% (a?b)"))
    assert network.load(odd).state_dict().keys() == network.load(base).state_dict().keys()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("architecture: test_resnet")


def _config_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "resnet999"}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def _weights_of_another_model(folder: Path) -> None:
    write_tensors(folder / "model.safetensors", {"fc.weight": torch.zeros(3, 7)})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_config, "is no model: it has no config.json; give a timm folder"),
        (_config_is_no_json, "cannot be loaded by timm: "),
        (_config_is_no_object, "cannot be loaded by timm: "),
        (_unknown_architecture, "cannot be loaded by timm: .*resnet999"),
        (_no_weights, "cannot be loaded by timm: "),
        (_truncated_weights, "cannot be loaded by timm: "),
        (_weights_of_another_model, "cannot be loaded by timm: "),
    ],
)
def test_what_timm_cannot_load_gives_a_sentence_with_the_folder(base, damage, sentence):
    damage(base)
    with pytest.raises(VectorError, match=f"^{base} {sentence}") as caught:
        network.load(base)
    assert "\n" not in str(caught.value)


def _step(model: nn.Module, norm: str) -> dict[str, torch.Tensor]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    network.training_mode(model, norm)
    model(centre(PICTURES.batch(range(5)), SMALL)).sum().backward()
    changed = {n: b for n, b in model.named_buffers() if not torch.equal(before[n], b)}
    return {name: changed[name] for name in changed if name in before}


def test_frozen_norm_keeps_its_running_statistics():
    model = backbone("test_resnet")
    assert _step(model, "frozen") == {}
    assert model.training
    norms = [p for n, p in model.named_parameters() if "bn" in n]
    assert all(p.grad is not None for p in norms)


def test_updated_norm_changes_its_running_statistics():
    model = backbone("test_resnet")
    changed = _step(model, "update")
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:x"])
def test_a_device_that_is_not_there_gives_a_sentence(name):
    with pytest.raises(UsageError, match=f"^the device '{name}' is not there: use --device auto"):
        network.choose_device(name)


def test_auto_chooses_a_device_that_computes():
    assert float(torch.ones(2, device=network.choose_device("auto")).sum()) == 2
    assert network.choose_device("cpu") == CPU


def test_bfloat16_is_used_only_when_asked_for_on_a_cpu():
    linear, inputs = nn.Linear(4, 2), torch.ones(1, 4)
    kinds = {}
    for precision in ("auto", "float32", "bfloat16"):
        with network.autocast(CPU, precision):
            kinds[precision] = linear(inputs).dtype
    assert kinds == {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


def test_chunks_cover_everything_once():
    assert [list(part) for part in network.chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(network.chunks(0, 2)) == []
