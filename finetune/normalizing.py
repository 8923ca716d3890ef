"""What the batch norm layers of a model are given by images that nobody has to label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.pixels import Images, centre
from merge_kit.errors import VectorError
from merge_kit.normstats import NormSums

_BATCH = 64


def norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def norm_sums(
    model: nn.Module,
    images: Images,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NormSums]:
    """Sums over the inputs of every batch norm layer, from the centre view of each image.

    Batches are mixed by a fixed seed, of about equal sizes, and every layer normalises each by the
    batch's own statistics: the running ones are of other weights, and what lies behind them would
    be measured wrongly (PreciseBN, arXiv 2105.07576, section 3.1). The model is not changed.

    Raises
    ------
    VectorError
        The model has no batch norm, or there is only one image.
    """
    layers = norm_layers(model)
    if not layers:
        raise VectorError(
            "this backbone has no batch norm: it keeps no statistics of images, and there is "
            "nothing to measure or to restore."
        )
    if len(images) < 2:
        raise VectorError("one image has no spread: norm statistics take at least two.")
    found = {name: _Sums() for name in layers}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = order.tensor_split(-(-len(images) // _BATCH))
    with _by_batch(model, layers, found):
        done = 0
        for indices in batches:
            inputs = centre(images.batch(indices.tolist()).to(device), images.preprocessing)
            model(inputs.contiguous(memory_format=torch.channels_last))
            done += len(indices)
            if progress:
                progress(done, len(images))
    return {name: one.result() for name, one in found.items()}


class _Sums:
    """Of one layer, as batches come."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """One batch (n, C, ...)."""
        values = inputs[0].transpose(0, 1).flatten(1)
        # On some GPUs float64 does not exist: the sums of one batch are exact enough in float32.
        exact = values.double() if values.device.type != "mps" else values.float()
        sums, squares = exact.sum(dim=1).cpu(), exact.square().sum(dim=1).cpu()
        self.sums = sums.double() if self.sums is None else self.sums + sums
        self.squares = squares.double() if self.squares is None else self.squares + squares
        self.count += values.shape[1]

    def result(self) -> NormSums:
        """All of them."""
        assert self.sums is not None
        assert self.squares is not None
        return NormSums(self.count, self.sums, self.squares)


@contextmanager
def _by_batch(
    model: nn.Module, layers: dict[str, _BatchNorm], found: dict[str, _Sums]
) -> Iterator[None]:
    """Evaluation mode but for the norm layers, whose running statistics stay as they are."""
    model.eval()
    momenta = {name: module.momentum for name, module in layers.items()}
    counters = {
        name: module.num_batches_tracked.clone()
        for name, module in layers.items()
        if module.num_batches_tracked is not None
    }
    hooks = [module.register_forward_pre_hook(found[name].add) for name, module in layers.items()]
    for module in layers.values():
        module.train()
        module.momentum = 0.0
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            module.eval()
            module.momentum = momenta[name]
            if name in counters and module.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(counters[name])
