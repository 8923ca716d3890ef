"""Low-rank adaptation: a weight learns only a product of two thin matrices (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finetune import network
from finetune.feed import draw_seed
from merge_kit.depth import block_of
from merge_kit.errors import UsageError
from merge_kit.forms import Factors, product

LAYERS = ("qkv", "proj", "fc1", "fc2")
"""What timm calls the linear layers of a block that are adapted."""
_INSIDE = ".parametrizations.weight."


class Adapter(nn.Module):
    """W + alpha / r B A (section 4.1): A (r, n) is drawn, B (m, r) is 0, so that training starts
    from W itself.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.scale = alpha / rank
        self.A = nn.Parameter(drawn.to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return torch.addmm(weight, self.B, self.A, alpha=self.scale)


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Adapt the linear layers of the blocks that are trained; all else of the body is frozen.

    Raises
    ------
    UsageError
        There are no such layers, or the rank is larger than one of them.
    """
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in LAYERS
        and block_of(f"{name}.weight") is not None
        and module.weight.requires_grad
    }
    if not chosen:
        raise UsageError(
            f"--lora adapts linear layers called {', '.join(LAYERS)} in blocks, and "
            f"{type(model).__name__} has none to train: leave --lora out for this backbone."
        )
    largest = min(min(layer.weight.shape) for layer in chosen.values())
    if rank > largest:
        raise UsageError(f"--lora {rank} is larger than a layer: give a rank of at most {largest}.")
    head = {id(p) for p in network.head_of(model).parameters()}
    for parameter in model.parameters():
        if id(parameter) not in head:
            parameter.requires_grad_(False)
    for index, layer in enumerate(chosen.values()):
        adapter = Adapter(layer.weight, rank, alpha, draw_seed(seed, "lora", index))
        parametrize.register_parametrization(layer, "weight", adapter)


def remove(model: nn.Module) -> None:
    """Give the layers their plain weights of the base back."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def _adapters(model: nn.Module) -> Iterator[Adapter]:
    return (module for module in model.modules() if isinstance(module, Adapter))


@torch.no_grad()
def pull(model: nn.Module, distance: float) -> None:
    """Add the gradient of distance / 2 |alpha / r B A|^2: the pull of `levers.pull` on the adapted
    weights, not on their factors.
    """
    for adapter in _adapters(model):
        change = adapter.scale * adapter.B @ adapter.A
        if adapter.B.grad is not None and adapter.A.grad is not None:
            adapter.B.grad.add_(change @ adapter.A.T, alpha=distance * adapter.scale)
            adapter.A.grad.add_(adapter.B.T @ change, alpha=distance * adapter.scale)


def plain(
    state: Mapping[str, Tensor], rank: int, alpha: float
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """A state dict without adapters, and what each adapted weight has learnt.

    The weights are base + product, of the very product that whoever reads the vector computes.
    """
    dense: dict[str, Tensor] = {}
    factors: dict[str, Factors] = {}
    for key, tensor in state.items():
        layer, inside, what = key.partition(_INSIDE)
        if not inside:
            dense[key] = tensor
        elif what == "original":
            name = f"{layer}.weight"
            left = state[f"{layer}{_INSIDE}0.B"] * (alpha / rank)
            factors[name] = Factors(left.contiguous(), state[f"{layer}{_INSIDE}0.A"].contiguous())
            dense[name] = tensor + product(factors[name])
    return dense, factors
