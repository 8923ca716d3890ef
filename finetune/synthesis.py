"""Images out of noise, by inverting networks with batch norm (DeepInversion, arXiv 1912.08795).

Batch norm remembers the mean and the variance of every layer's inputs over the training images.
Noise is changed until the networks find a class in it that it is to show, and until it gives each
layer inputs of the remembered mean and variance. FedISCA (MICCAI 2023, doi
10.1007/978-3-031-43895-0_49) has teachers of a federation inverted so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from finetune import ensembling
from finetune.distillation import Synthesis
from finetune.normalizing import norm_layers
from finetune.pixels import middle, normalise, stored_size
from merge_kit.errors import TrainingError
from merge_kit.federation import Preprocessing

_COMPETING = 3.0
"""Temperature at which networks and student are compared, as in the authors' code."""


@dataclass(frozen=True, slots=True)
class Inverted:
    """One of the networks that a batch of images is made from."""

    model: nn.Module
    """Frozen, in evaluation mode, on the device; its outputs begin with those of the classes."""
    rows: tuple[int, ...]
    """For each of its K classes the federation's, -1 where that has none."""
    known: Tensor
    """(C,) bool."""
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, eq=False)
class Brief:
    """What a batch of images is to show, and to whom."""

    networks: Sequence[Inverted]
    weights: Tensor
    """How much each network counts, as for `ensembling.combined`: (N, 1, 1 or C)."""
    targets: Tensor
    """(b,) int64, each a class that one of the networks knows."""
    preprocessing: Preprocessing
    """How the images are kept: of the side that is decoded, drawn in the space of its colours."""
    student: nn.Module | None = None
    """Frozen, in evaluation mode, on the device: sees images as `preprocessing` says, and gives
    (b, C) logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A batch of b images, as it was after each of S stages."""

    pixels: Tensor
    """(S, b, side, side, 3) uint8 on the CPU; the last stage is the finished one."""
    before: Tensor
    """(b,) float32: how probable the networks together find the target class in the noise."""
    after: Tensor
    """(b,) float32: the same in the finished image."""


def feature_distance(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the inputs of one batch norm layer are from what it remembers: R_feature, section
    3.2. The sum of the Euclidean distances of the means and of the variances over all channels.

    Parameters
    ----------
    values
        (n, C, ...), the layer's inputs; the variance over them is the biased one.
    mean, variance
        (C,), the layer's running statistics.
    """
    each = values.transpose(0, 1).flatten(1)
    away = each.mean(dim=1) - mean, each.var(dim=1, unbiased=False) - variance
    return torch.stack([torch.linalg.vector_norm(part) for part in away]).sum()


def total_variation(images: Tensor) -> Tensor:
    """R_TV of images (n, 3, h, w): the Euclidean norms of the differences of all pixels from their
    neighbours to the right, below and along both diagonals, added up, as in the authors' code."""
    across = images[..., :, :-1] - images[..., :, 1:]
    down = images[..., :-1, :] - images[..., 1:, :]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    parts = [torch.linalg.vector_norm(part) for part in (across, down, rising, falling)]
    return torch.stack(parts).sum()


def mean_length(images: Tensor) -> Tensor:
    """R_l2 of images (n, 3, h, w): the mean of their Euclidean norms."""
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths.mean()


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """R_compete, section 3.3: 1 less the Jensen-Shannon divergence, in nats, of the probabilities
    at a temperature of 3; 1 for whoever says the same, 1 - ln 2 at least.

    Parameters
    ----------
    first, second
        (n, C) finite logits.
    """
    p, q = ((logits / _COMPETING).log_softmax(dim=1) for logits in (first, second))
    middle = torch.logaddexp(p, q) - math.log(2)
    each = [(logs.exp() * (logs - middle)).sum(dim=1) for logs in (p, q)]
    return 1 - (each[0] + each[1]).mean() / 2


def ensemble(outputs: Sequence[Tensor], networks: Sequence[Inverted], weights: Tensor) -> Tensor:
    """What the networks say together, (n, C) float32 as `ensembling.combined` has it, from the
    outputs (n, K or more) of each; minus infinity for a class that none knows."""
    device, classes = outputs[0].device, len(networks[0].known)
    spread = []
    for one, said in zip(networks, outputs, strict=True):
        told = [index for index, row in enumerate(one.rows) if row >= 0]
        into = torch.tensor([one.rows[index] for index in told], device=device)
        blank = said.new_zeros(len(said), classes)
        spread.append(blank.index_copy(1, into, said[:, told]))
    known = torch.stack([one.known for one in networks]).to(device)
    return ensembling.combined(torch.stack(spread), known, weights.to(device))


def synthesise(
    brief: Brief,
    settings: Synthesis,
    seed: int,
    device: torch.device,
    report: Callable[[int], None] | None = None,
) -> Made:
    """One batch of images; on the CPU the same every time.

    Minimises by Adam, from noise, the cross-entropy of what the networks together say with the
    targets and, each by its weight in `settings`, the distance of the statistics summed over all
    batch norm layers of all networks, the total variation, the mean length and, where there is a
    student, how much it agrees with the networks. At each step the images are rolled by a few
    pixels; after it they are cut to the colours that exist.

    Parameters
    ----------
    report
        Called after each step with the number of steps that are done.

    Raises
    ------
    TrainingError
        The loss is not finite, or the device has too little memory.
    """
    generator = torch.Generator().manual_seed(seed)
    side, count = stored_size(brief.preprocessing), len(brief.targets)
    reach = round(settings.jitter * side)
    ends = {round(settings.steps * n / settings.stages) for n in range(1, settings.stages + 1)}
    # Drawn on the CPU: the same noise on every device.
    images = torch.randn(count, 3, side, side, generator=generator).to(device)
    images = _existing(images, brief.preprocessing)
    before = _probabilities(brief, _stored(images, brief.preprocessing), device)
    optimizer = torch.optim.Adam([images.requires_grad_()], lr=settings.learning_rate)
    kept = []
    for step in range(1, settings.steps + 1):
        moved = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        try:
            loss = _loss(brief, images.roll(moved, dims=(2, 3)), settings)
            (images.grad,) = torch.autograd.grad(loss, images)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{device} has too little memory to make {count} images at once: give a smaller "
                "'batch_size' under 'synthesis'."
            ) from error
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(
                f"the loss of synthesis is not finite at step {step}: lower 'learning_rate' under "
                "'synthesis'."
            )
        optimizer.step()
        with torch.no_grad():
            images.copy_(_existing(images, brief.preprocessing))
        if step in ends:
            kept.append(_stored(images.detach(), brief.preprocessing))
        if report:
            report(step)
    return Made(torch.stack(kept), before, _probabilities(brief, kept[-1], device))


def _loss(brief: Brief, images: Tensor, settings: Synthesis) -> Tensor:
    """Of images (b, 3, side, side) in the colours of `brief.preprocessing`."""
    with _watched(brief.networks) as distances:
        said = _answers(brief, images)
    loss = functional.cross_entropy(said, brief.targets.to(said.device))
    loss = loss + settings.statistics * torch.stack(distances).sum()
    loss = loss + settings.variation * total_variation(images)
    loss = loss + settings.length * mean_length(images)
    if brief.student is None:
        return loss
    theirs = brief.student(_seen(images, brief.preprocessing, brief.preprocessing))
    known = said.isfinite().all(dim=0)
    return loss + settings.competition * agreement(said[:, known], theirs[:, known])


@contextmanager
def _watched(networks: Sequence[Inverted]) -> Iterator[list[Tensor]]:
    """The distance of every batch norm layer's statistics, as the networks look at images."""
    found: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        found.append(feature_distance(inputs[0], module.running_mean, module.running_var))

    with ExitStack() as stack:
        for one in networks:
            for layer in norm_layers(one.model).values():
                stack.callback(layer.register_forward_pre_hook(look).remove)
        yield found


def _answers(brief: Brief, images: Tensor) -> Tensor:
    said = [
        one.model(_seen(images, brief.preprocessing, one.preprocessing)) for one in brief.networks
    ]
    return ensemble(said, brief.networks, brief.weights)


@torch.no_grad()
def _probabilities(brief: Brief, stored: Tensor, device: torch.device) -> Tensor:
    """(b,) float32 on the CPU: how probable the networks find the targets in kept images."""
    pixels = stored.permute(0, 3, 1, 2).to(device)
    said = _answers(brief, normalise(pixels, brief.preprocessing)).cpu()
    return said.softmax(dim=1).gather(1, brief.targets[:, None])[:, 0]


def _seen(images: Tensor, ours: Preprocessing, theirs: Preprocessing) -> Tensor:
    """Images in our colours and of our stored size as a network with a preprocessing of its own
    sees them at evaluation."""
    if theirs.hash != ours.hash:
        side = stored_size(theirs)
        pixels = _pixels(images, ours)
        if side != images.shape[-1]:
            pixels = functional.interpolate(
                pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False
            )
        images = normalise(pixels, theirs)
    return middle(images, theirs).contiguous(memory_format=torch.channels_last)


def _existing(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Cut to the colours that exist."""
    return normalise(_pixels(images, preprocessing).clamp(0, 255), preprocessing)


def _stored(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(b, side, side, 3) uint8 on the CPU."""
    pixels = _pixels(images, preprocessing).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def _pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """0 to 255, what `normalise` takes; not rounded."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (images * std + mean) * 255
