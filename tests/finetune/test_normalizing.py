"""What batch norm layers are given."""

from __future__ import annotations

import pytest
import timm
import torch

from finetune.normalizing import norm_layers, norm_sums
from finetune.pixels import centre
from merge_kit import normstats
from merge_kit.errors import VectorError
from tests.finetune.pictures import images
from tests.merge_kit.helpers import says

CPU = torch.device("cpu")


def network(name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3).eval()


def test_the_first_layer_gets_what_the_first_convolution_gives():
    model, pictures = network(), images([0, 1, 2, 1] * 20)
    found = norm_sums(model, pictures, CPU)
    name, layer = next(iter(norm_layers(model).items()))
    given = []
    layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(centre(pictures.batch(range(80)), pictures.preprocessing))
    (every,) = given
    mean, variance = normstats.statistics(found[name])
    values = every.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(mean, values.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, values.var(dim=1), rtol=1e-5, atol=1e-6)


def test_with_them_a_layer_gives_what_its_batch_would_give():
    model, pictures = network(), images([0, 1, 2] * 8)
    state = model.state_dict()
    specs = {n: normstats.TensorSpec(t.dtype, tuple(t.shape)) for n, t in state.items()}
    sums = norm_sums(model, pictures, CPU)
    restored = normstats.running_statistics(sums, specs)
    for layer, found in sums.items():  # a batch is normalised by its biased variance
        restored[f"{layer}.running_var"] *= (found.count - 1) / found.count
    by_batch = network().train()
    inputs = centre(pictures.batch(range(24)), pictures.preprocessing)
    with torch.no_grad():
        expected = by_batch(inputs)
        model.load_state_dict({**state, **restored})
        found = model.eval()(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_not_changed():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm_sums(model, images([0, 1] * 3), CPU)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert {layer.momentum for layer in norm_layers(model).values()} == {0.1}


def test_the_same_images_give_the_same_bits():
    first, again = (norm_sums(network(), images([0, 1, 2] * 30), CPU) for _ in range(2))
    assert all(torch.equal(first[n].squares, again[n].squares) for n in first)


def test_what_has_no_statistics_is_refused():
    with pytest.raises(VectorError, match="this backbone has no batch norm"):
        norm_sums(network("test_vit"), images([0, 1]), CPU)
    with says(VectorError, "one image has no spread: norm statistics take at least two."):
        norm_sums(network(), images([0]), CPU)
