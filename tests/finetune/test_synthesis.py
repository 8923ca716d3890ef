"""What synthesised images lower, against plain loops; and that networks find in them what they are
to show.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import ensembling, network
from finetune.distillation import Synthesis
from finetune.pixels import Images, centre, resize
from finetune.synthesis import (
    Brief,
    Inverted,
    _loss,
    _seen,
    _watched,
    agreement,
    ensemble,
    feature_distance,
    mean_length,
    normalise,
    synthesise,
    total_variation,
)
from merge_kit.errors import TrainingError
from tests.finetune.pictures import SMALL, draw
from tests.merge_kit.helpers import says

CPU = torch.device("cpu")
EVERY = torch.ones(3, dtype=torch.bool)
ALIKE = torch.ones(1, 1, 1)
relaxed = settings(deadline=None, max_examples=40)
shapes = st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
seeds = st.integers(0, 2**16)


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@relaxed
@given(shapes, seeds)
def test_the_distance_is_zero_for_the_statistics_themselves_and_for_no_others(shape, seed):
    values = drawn(shape, seed) * 3 + 1
    channels = [values[:, c].flatten() for c in range(shape[1])]
    mean = torch.stack([channel.mean() for channel in channels])
    variance = torch.stack([channel.square().mean() - channel.mean() ** 2 for channel in channels])
    assert float(feature_distance(values, mean, variance)) == pytest.approx(0, abs=1e-12)
    away, apart = drawn(shape[1:2], seed + 1), drawn(shape[1:2], seed + 2)
    found = float(feature_distance(values, mean + away, variance + apart))
    expected = math.sqrt(sum(a**2 for a in away.tolist()))
    expected += math.sqrt(sum(a**2 for a in apart.tolist()))
    assert found == pytest.approx(expected)
    assert found > 0


@relaxed
@given(shapes, seeds)
def test_total_variation_is_that_of_a_plain_loop(shape, seed):
    images = drawn(shape, seed)
    sums = {"across": 0.0, "down": 0.0, "rising": 0.0, "falling": 0.0}
    n, c, height, width = shape
    for i, j, y, x in np.ndindex(n, c, height, width):
        here = float(images[i, j, y, x])
        if x + 1 < width:
            sums["across"] += (here - float(images[i, j, y, x + 1])) ** 2
        if y + 1 < height:
            sums["down"] += (here - float(images[i, j, y + 1, x])) ** 2
        if x + 1 < width and y + 1 < height:
            sums["falling"] += (here - float(images[i, j, y + 1, x + 1])) ** 2
        if x >= 1 and y + 1 < height:
            sums["rising"] += (here - float(images[i, j, y + 1, x - 1])) ** 2
    expected = sum(math.sqrt(each) for each in sums.values())
    assert float(total_variation(images)) == pytest.approx(expected)
    assert float(total_variation(images[:, :, :1, :1].expand(shape))) == pytest.approx(0)


@relaxed
@given(shapes, seeds)
def test_the_mean_length_is_that_of_a_plain_loop(shape, seed):
    images = drawn(shape, seed)
    lengths = [math.sqrt(sum(v**2 for v in image.flatten().tolist())) for image in images]
    assert float(mean_length(images)) == pytest.approx(sum(lengths) / len(lengths))


@relaxed
@given(st.integers(1, 4), st.integers(2, 5), seeds)
def test_agreement_is_whole_for_whoever_says_the_same(count, classes, seed):
    first, second = (drawn((count, classes), seed + place) * 20 for place in (0, 1))
    assert float(agreement(first, first + 7)) == pytest.approx(1)
    found = float(agreement(first, second))
    assert found == pytest.approx(float(agreement(second, first)))
    assert 1 - math.log(2) - 1e-12 <= found <= 1 + 1e-12


def test_agreement_by_hand():
    """Probabilities of 3/4 and 1/4 against 1/4 and 3/4, their middle being a half."""
    first = torch.tensor([[3 * math.log(3.0), 0.0]], dtype=torch.float64)
    kept = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(agreement(first, first.flip(1))) == pytest.approx(1 - kept)
    far = torch.tensor([[3000.0, 0.0]], dtype=torch.float64)
    assert float(agreement(far, far.flip(1))) == pytest.approx(1 - math.log(2))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_small_differences(seed):
    images = drawn((2, 2, 3, 3), seed).requires_grad_()
    mean, variance = drawn((2,), seed + 10), drawn((2,), seed + 11).abs()
    assert torch.autograd.gradcheck(lambda x: feature_distance(x, mean, variance), images)
    assert torch.autograd.gradcheck(total_variation, images)
    assert torch.autograd.gradcheck(mean_length, images)
    other = drawn((2, 4), seed + 12)
    logits = drawn((2, 4), seed + 13).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: agreement(x, other), logits)


@pytest.fixture
def model():
    """A network with batch norm whose classes say something of an image's colours."""
    torch.manual_seed(3)
    made = timm.create_model("test_resnet", num_classes=3).eval()
    torch.nn.init.normal_(network.head_of(made).weight, std=1.0)
    return made.requires_grad_(False)


def brief(model, targets=(0, 1, 2) * 3, *, preprocessing=SMALL, **changes):
    one = Inverted(model, (0, 1, 2), EVERY, preprocessing)
    told = Brief([one], ALIKE, torch.tensor(targets), preprocessing)
    return replace(told, **changes)


SHORT = Synthesis(images=9, steps=40, learning_rate=0.1, statistics=0.01, stages=1)
SHORTER = SHORT.model_copy(update={"steps": 8})


def test_what_networks_say_is_what_an_ensemble_of_them_says():
    """Two networks; the second has other classes first, one of them unknown, and features."""
    known = torch.tensor([[True, True, False], [True, False, True]])
    first, second = drawn((4, 3), 0), drawn((4, 5), 1)
    networks = [
        Inverted(torch.nn.Identity(), (0, 1, 2), known[0], SMALL),
        Inverted(torch.nn.Identity(), (2, -1, 0), known[1], SMALL),
    ]
    weights = torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(2)).double()
    spread = [
        ensembling.spread(first, (0, 1, 2), 3),
        ensembling.spread(second[:, :3], (2, -1, 0), 3),
    ]
    expected = ensembling.combined(torch.stack(spread), known, weights)
    torch.testing.assert_close(ensemble([first, second], networks, weights), expected)


def test_the_loss_is_the_sum_of_its_parts(model):
    told = brief(model, student=model)
    images = drawn((9, 3, 32, 32), 5).float()
    outputs = model(images)
    with _watched(told.networks) as distances:
        model(images)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(distances) == len(layers)
    parts = {
        "statistics": sum(map(float, distances)),
        "variation": float(total_variation(images)),
        "length": float(mean_length(images)),
        "competition": 1.0,
    }
    target = float(torch.nn.functional.cross_entropy(outputs, told.targets))
    nothing = dict.fromkeys(parts, 0.0)
    assert float(_loss(told, images, Synthesis(**nothing))) == pytest.approx(target, rel=1e-5)
    for name, part in parts.items():
        found = float(_loss(told, images, Synthesis(**{**nothing, name: 0.5})))
        assert found == pytest.approx(target + part / 2, rel=1e-4), name
    assert not any(m._forward_pre_hooks for m in layers)


def test_the_gradient_of_the_whole_loss(model):
    """Along a direction, against a difference of two losses in double precision."""
    told = brief(model.double(), targets=(0, 2))
    choices = Synthesis(statistics=1.0, variation=0.1, length=0.1)
    images, step = drawn((2, 3, 32, 32), 6).requires_grad_(), 1e-6
    (gradient,) = torch.autograd.grad(_loss(told, images, choices), images)
    way = drawn((2, 3, 32, 32), 7)
    with torch.no_grad():
        ahead, behind = (_loss(told, images + sign * step * way, choices) for sign in (1, -1))
    assert float((gradient * way).sum()) == pytest.approx(
        float(ahead - behind) / (2 * step), rel=1e-4
    )


def test_networks_find_what_the_images_are_to_show(model):
    made = synthesise(brief(model), SHORT, 0, CPU)
    assert made.pixels.shape == (1, 9, 32, 32, 3)
    assert float(made.before.mean()) < 0.4
    assert float(made.after.mean()) > 0.65
    told = centre(made.pixels[0].permute(0, 3, 1, 2), SMALL)
    said = model(told).softmax(dim=1)[range(9), torch.tensor([0, 1, 2] * 3)]
    torch.testing.assert_close(said, made.after, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_that_batch_norm_keeps(model):
    """Of images of some colour; with a larger weight of their distance they come nearer."""
    pictures = torch.from_numpy(draw([0] * 16, seed=5)).permute(0, 3, 1, 2)
    _remember(model, normalise(pictures, SMALL))
    told, found = brief(model), []
    for weight in (0.0, 1.0):
        made = synthesise(told, SHORT.model_copy(update={"statistics": weight}), 0, CPU)
        with _watched(told.networks) as distances:
            model(normalise(made.pixels[0].permute(0, 3, 1, 2), SMALL))
        found.append(sum(map(float, distances)))
    assert found[1] < 0.5 * found[0]


def _remember(model, images):
    """Give every batch norm layer, from the first to the last, its inputs' statistics."""

    def keep(layer, inputs):
        values = inputs[0].transpose(0, 1).flatten(1)
        layer.running_mean.copy_(values.mean(dim=1))
        layer.running_var.copy_(values.var(dim=1, unbiased=False))

    hooks = [
        layer.register_forward_pre_hook(keep)
        for layer in model.modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()


def test_images_are_kept_on_their_way(model):
    """What a stage keeps is what a shorter synthesis ends with."""
    long = SHORTER.model_copy(update={"stages": 4})
    made = synthesise(brief(model), long, 0, CPU)
    assert made.pixels.shape == (4, 9, 32, 32, 3)
    for stage in (1, 2, 4):
        short = SHORTER.model_copy(update={"steps": 2 * stage})
        assert torch.equal(
            synthesise(brief(model), short, 0, CPU).pixels[0], made.pixels[stage - 1]
        )
    uneven = SHORTER.model_copy(update={"steps": 5, "stages": 3})
    assert len(synthesise(brief(model), uneven, 0, CPU).pixels) == 3


def test_the_seed_decides_and_every_step_is_told(model):
    steps = []
    first = synthesise(brief(model), SHORTER, 0, CPU, steps.append)
    assert steps == list(range(1, 9))
    assert torch.equal(synthesise(brief(model), SHORTER, 0, CPU).pixels, first.pixels)
    assert not torch.equal(synthesise(brief(model), SHORTER, 1, CPU).pixels, first.pixels)
    still = SHORTER.model_copy(update={"jitter": 0.0})
    assert not torch.equal(synthesise(brief(model), still, 0, CPU).pixels, first.pixels)


def test_images_may_be_new_to_a_student(model):
    """Where the student says what the network says of most images, those are sought that differ."""
    torch.manual_seed(4)
    other = timm.create_model("test_resnet", num_classes=3).eval().requires_grad_(False)
    torch.nn.init.normal_(network.head_of(other).weight, std=1.0)
    found = []
    for weight in (0.0, 20.0):
        choices = SHORT.model_copy(update={"competition": weight, "statistics": 0.0})
        made = synthesise(brief(model, student=other), choices, 0, CPU)
        seen = centre(made.pixels[0].permute(0, 3, 1, 2), SMALL)
        found.append(float(agreement(model(seen), other(seen))))
    assert found[1] < found[0] - 0.01


WIDE = SMALL.model_copy(update={"crop_pct": 0.8})


def test_a_network_sees_the_middle_of_what_is_kept(model):
    """As it will when the image is decoded: pixel by pixel where sizes agree."""
    made = synthesise(brief(model, preprocessing=WIDE), SHORTER, 0, CPU)
    assert made.pixels.shape[2:4] == (40, 40)
    batch = made.pixels[0].permute(0, 3, 1, 2)
    torch.testing.assert_close(
        _seen(normalise(batch, WIDE), WIDE, WIDE), centre(batch, WIDE), rtol=0, atol=0
    )


def test_a_network_of_another_size_and_other_colours_sees_what_it_will_be_given():
    """Within what the two ways to make an image smaller differ by."""
    other = SMALL.model_copy(
        update={"input_size": (3, 24, 24), "mean": (0.2, 0.5, 0.4), "std": (0.3, 0.5, 0.7),
                "interpolation": "bilinear"}
    )  # fmt: skip
    smooth = torch.nn.functional.interpolate(
        torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255, size=40,
        mode="bilinear", align_corners=False,
    )  # fmt: skip
    pixels = smooth.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shown = np.stack([resize(Image.fromarray(one), other) for one in pixels])
    expected = centre(Images((), shown, other).batch([0, 1]), other)
    found = _seen(normalise(smooth.round(), WIDE), WIDE, other)
    assert found.shape == (2, 3, 24, 24)
    assert float((found - expected).abs().max()) < 2 / 255 / 0.3


def test_a_network_that_gives_no_numbers_is_told(model):
    network.head_of(model).weight.fill_(math.nan)
    with says(
        TrainingError,
        "the loss of synthesis is not finite at step 1: lower 'learning_rate' under 'synthesis'.",
    ):
        synthesise(brief(model), SHORTER, 0, CPU)
