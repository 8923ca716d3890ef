"""Fisher information and Gram matrices, against slow transcriptions of their formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional

from finetune.pixels import Images, centre
from finetune.statistics import draw, fisher, grams
from merge_kit.errors import UsageError
from tests.finetune.pictures import SMALL, images
from tests.merge_kit.helpers import quick, says

CPU = torch.device("cpu")
ALL = torch.ones(3, dtype=torch.bool)
PICTURES = images([0, 1, 2, 0])


def silent(done: int, of: int) -> None:
    """Nobody watches."""


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    return timm.create_model(name, num_classes=3, **size).eval()


def some(pictures: Images, *indices: int) -> Images:
    cases = tuple(pictures.cases[i] for i in indices)
    return Images(cases, pictures.pixels[list(indices)], pictures.preprocessing)


def inputs_of(pictures: Images) -> torch.Tensor:
    """(n, 3, 32, 32) float64: what the network is given."""
    return centre(pictures.batch(range(len(pictures))), SMALL).double()


# Which images


@quick
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_a_draw_is_of_different_images_in_their_order(size, examples, seed):
    chosen = draw(size, examples, seed)
    assert len(chosen) == min(size, examples)
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < size for index in chosen)
    assert draw(size, examples, seed) == chosen


def test_a_draw_depends_on_the_seed_and_favours_nobody():
    draws = [draw(10, 5, seed) for seed in range(200)]
    assert draws[0] != draws[1]
    assert np.bincount(np.concatenate(draws), minlength=10) == pytest.approx(100, abs=30)


# Fisher


def literal_fisher(model: nn.Module, pictures: Images, seen: torch.Tensor) -> dict:
    """F_p = 1/n sum_x sum_y p(y|x) (d log p(y|x) / d theta_p)^2, one gradient after the other."""
    model = copy.deepcopy(model).double().eval()
    found = {name: np.zeros(tuple(p.shape)) for name, p in model.named_parameters()}
    for image in inputs_of(pictures):
        for y in range(int(seen.sum())):
            model.zero_grad()
            logs = functional.log_softmax(model(image[None])[0][seen], dim=0)
            logs[y].backward()
            chance = math.exp(float(logs[y].detach()))
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name] += chance * parameter.grad.numpy() ** 2
    return {name: values / len(pictures) for name, values in found.items()}


def assert_like(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype is torch.float32
        np.testing.assert_allclose(
            found[name].numpy(), values, rtol=1e-3, atol=1e-4 * np.abs(values).max(), err_msg=name
        )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("seen", [[True, True, True], [True, False, True]], ids=["all", "two"])
def test_fisher_is_the_formula(name, seen):
    model, seen = backbone(name), torch.tensor(seen)
    expected = literal_fisher(model, PICTURES, seen)
    assert_like(fisher(model, PICTURES, seen, CPU, silent), expected)


class MeanColour(nn.Module):
    """Softmax regression on the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.idle = nn.Parameter(torch.ones(2))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.fc(batch.mean(dim=(2, 3)))


def test_fisher_of_softmax_regression_is_known():
    """1[y = c] - p_c has the variance p_c (1 - p_c) over y, so F = E p_c (1 - p_c) x_j^2."""
    torch.manual_seed(0)
    model = MeanColour()
    x = inputs_of(PICTURES).mean(dim=(2, 3)).numpy()
    z = x @ model.fc.weight.detach().double().numpy().T + model.fc.bias.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    spread = p * (1 - p)
    expected = {
        "fc.weight": np.einsum("nc,nj->cj", spread, x**2) / 4,
        "fc.bias": spread.mean(axis=0),
        "idle": np.zeros(2),
    }
    assert_like(fisher(model, PICTURES, ALL, CPU, silent), expected)


def test_fisher_of_images_together_is_the_mean_of_each_alone():
    """The square of a batch's gradient would have the products of different images in it."""
    model = backbone("test_resnet")
    alone = [fisher(model, some(PICTURES, i), ALL, CPU, silent) for i in range(4)]
    together = fisher(model, PICTURES, ALL, CPU, silent)
    for name, values in together.items():
        mean = torch.stack([each[name].double() for each in alone]).mean(dim=0)
        torch.testing.assert_close(values.double(), mean, rtol=1e-6, atol=0)


def test_the_head_rows_of_a_class_that_is_not_there_get_zero():
    found = fisher(
        backbone("test_resnet"), PICTURES, torch.tensor([True, True, False]), CPU, silent
    )
    assert (found["fc.weight"][2] == 0).all()
    assert (found["fc.weight"][:2] > 0).any(dim=1).all()
    assert found["fc.bias"][2] == 0


def test_one_class_alone_leaves_nothing_to_learn():
    found = fisher(
        backbone("test_resnet"), PICTURES, torch.tensor([True, False, False]), CPU, silent
    )
    assert all((values == 0).all() for values in found.values())


def test_fisher_is_the_same_on_every_run_and_leaves_the_model_alone():
    """Batch norm keeps its statistics even if the model comes in training mode."""
    model = backbone("test_resnet").train()
    before = copy.deepcopy(model.state_dict())
    done = []
    first = fisher(model, PICTURES, ALL, CPU, lambda *at: done.append(at))
    second = fisher(model, PICTURES, ALL, CPU, silent)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_weight_under_two_names_counts_under_both():
    class Tied(MeanColour):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(batch.mean(dim=(2, 3))).tanh())

    found = fisher(Tied(), PICTURES, ALL, CPU, silent)
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert (found["first.weight"] > 0).any()


# Gram


class Layer(nn.Module):
    """One convolution, and a classifier behind it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.fc = nn.Linear(conv.out_channels, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(batch).mean(dim=(2, 3)))


def patches(image: np.ndarray, kernel: tuple, stride: tuple, dilation: tuple, pad: tuple):
    """X (rows, d) of one padded image, patch by patch; `pad` is top, bottom, left, right."""
    image = np.pad(image, ((0, 0), pad[:2], pad[2:]))
    high, wide = (dilation[i] * (kernel[i] - 1) + 1 for i in range(2))
    return np.stack(
        [
            image[:, y : y + high : dilation[0], x : x + wide : dilation[1]].ravel()
            for y in range(0, image.shape[1] - high + 1, stride[0])
            for x in range(0, image.shape[2] - wide + 1, stride[1])
        ]
    )


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (0, 0, 0, 0)),
    "padded": (nn.Conv2d(3, 4, 3, padding=1), (1, 1, 1, 1)),
    "strided": (nn.Conv2d(3, 4, (5, 3), stride=(3, 2), padding=(2, 1), bias=False), (2, 2, 1, 1)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 2, 2, 2)),
    "pointwise": (nn.Conv2d(3, 4, 1, stride=2), (0, 0, 0, 0)),
    "same": (nn.Conv2d(3, 4, (4, 2), padding="same"), (1, 2, 0, 1)),
    "same, dilated": (nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 1)), (1, 2, 1, 1)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (0, 0, 0, 0)),
    "as TensorFlow pads": (Conv2dSame(3, 4, 3, stride=2), (0, 1, 0, 1)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_gram_of_a_convolution_is_that_of_its_patches(name):
    conv, pad = CONVOLUTIONS[name]
    found, left_out, _ = grams(Layer(conv).eval(), PICTURES, CPU, 100, silent)
    x = np.concatenate(
        [
            patches(image.numpy(), conv.kernel_size, conv.stride, conv.dilation, pad)
            for image in inputs_of(PICTURES)
        ]
    )
    np.testing.assert_allclose(
        found["conv.weight"].numpy(), x.T @ x / len(x), rtol=1e-6, atol=1e-6 * (x**2).mean()
    )
    assert found["conv.weight"].dtype is torch.float32
    assert left_out == []


def test_the_gram_of_a_linear_layer_is_that_of_its_inputs():
    torch.manual_seed(0)
    x = inputs_of(PICTURES).mean(dim=(2, 3)).numpy()
    found, _, _ = grams(MeanColour().eval(), PICTURES, CPU, 100, silent)
    assert found.keys() == {"fc.weight"}
    np.testing.assert_allclose(found["fc.weight"].numpy(), x.T @ x / 4, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "tf_mobilenetv3_small_minimal_100"]
)
def test_a_gram_gives_the_size_of_its_layers_outputs(name):
    """For the outputs Y = X W^T of a layer E |y|^2 = trace(W G W^T): only its own inputs fit."""
    model, measured = backbone(name), {}

    def is_conv(module):
        return isinstance(module, nn.Conv2d)

    def measure(module, _, output):
        axis = 1 if is_conv(module) else output.dim() - 1
        shape = [-1 if i == axis else 1 for i in range(output.dim())]
        output = output if module.bias is None else output - module.bias.reshape(shape)
        measured.setdefault(module, []).append(output.double().square().sum(dim=axis))

    layers = {
        f"{n}.weight": m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (is_conv(m) and m.groups == 1)
    }
    for module in layers.values():
        module.register_forward_hook(measure)
    found, left_out, _ = grams(model, PICTURES, CPU, 4608, silent)
    assert found.keys() == layers.keys()
    assert left_out == []
    for weight, gram in found.items():
        w = layers[weight].weight.detach().double().flatten(1)
        size = torch.cat([part.flatten() for part in measured[layers[weight]]]).mean()
        assert float(torch.trace(w @ gram.double() @ w.T)) == pytest.approx(float(size), rel=1e-4)


def test_grams_are_exactly_symmetric_and_the_same_on_every_run():
    model = backbone("test_resnet")
    first, _, _ = grams(model, PICTURES, CPU, 4608, silent)
    second, _, _ = grams(model, PICTURES, CPU, 4608, silent)
    for name, gram in first.items():
        assert torch.equal(gram, gram.T)
        assert (gram.diagonal() >= 0).all()
        assert torch.equal(gram, second[name])


def test_the_gram_of_images_together_is_the_mean_of_each_alone():
    """Each image has as many rows; more images than one batch holds."""
    model, pictures = backbone("test_vit"), images([0, 1, 2] * 6)
    together, _, _ = grams(model, pictures, CPU, 4608, silent)
    halves = [
        grams(model, some(pictures, *part), CPU, 4608, silent)[0]
        for part in (range(9), range(9, 18))
    ]
    for name, gram in together.items():
        mean = (halves[0][name].double() + halves[1][name].double()) / 2
        torch.testing.assert_close(gram.double(), mean, rtol=1e-4, atol=1e-6 * float(mean.max()))


def test_wide_layers_are_left_out_and_named():
    found, left_out, _ = grams(backbone("test_resnet"), PICTURES, CPU, 1000, silent)
    assert max(len(gram) for gram in found.values()) <= 1000
    assert "layer4.0.conv1.weight has 1728 input columns, above --max-width 1000." in left_out
    assert {text.split()[0] for text in left_out} & found.keys() == set()


def test_a_weight_that_is_standardised_first_is_left_out_and_named():
    """The layer multiplies its inputs with another matrix than the one that is merged."""
    model = backbone("test_nfnet")
    found, left_out, _ = grams(model, PICTURES, CPU, 4608, silent)
    sentence = "stem.conv1.weight is not multiplied with an input as it stands."
    assert sentence in left_out
    assert "head.fc.weight" in found


def test_grouped_convolutions_have_no_gram():
    found, left_out, _ = grams(backbone("test_convnext"), PICTURES, CPU, 4608, silent)
    names = [name for name in (*found, *left_out) if "conv_dw" in name]
    assert names == []
    assert "stages.0.blocks.0.mlp.fc1.weight" in found


def test_where_no_layer_is_left_the_option_is_named():
    with says(UsageError, "no layer is left with --max-width 2: give a larger one."):
        grams(MeanColour().eval(), PICTURES, CPU, 2, silent)


def test_layers_with_fewer_rows_than_columns_are_named():
    """A linear layer sees one row an image, a convolution one a pixel."""
    found, _, few = grams(backbone("test_resnet"), PICTURES, CPU, 4608, silent)
    assert set(few) < set(found)
    assert "fc.weight" in few
    assert "conv1.0.weight" not in few
