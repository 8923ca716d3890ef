"""What a site may measure on its own images for a merge: Fisher information and Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from finetune import network
from finetune.feed import draw_seed
from finetune.pixels import Images, centre
from merge_kit.errors import TrainingError, UsageError

Report = Callable[[int, int], None]
_BATCH = 16


def draw(size: int, examples: int, seed: int) -> list[int]:
    """At most `examples` of the numbers below `size`, in their order, drawn by a run's seed."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "statistics", 0))
    chosen: list[int] = torch.randperm(size, generator=generator)[:examples].tolist()
    return sorted(chosen)


def fisher(
    model: nn.Module, images: Images, seen: Tensor, device: torch.device, progress: Report
) -> dict[str, Tensor]:
    """The diagonal Fisher information (Matena and Raffel, arXiv 2111.09832, eq. 3):

    F_p = 1/n sum_x sum_y p(y|x) (d log p(y|x) / d theta_p)^2

    over the images x and, exactly, over the classes y. Gradients are squared for each image by
    itself: the square of a batch's sum has the products of different images in it. With the outputs
    z the gradient of log p(y|x) is J^T (e_y - p), J = dz / d theta, so it takes one pass forward
    and one back for each class.

    Parameters
    ----------
    seen
        (C,) bool: the classes that the site has trained; p is the softmax over these alone, as in
        the loss, so the head's rows of the others get 0.

    Returns
    -------
    dict
        float32 on the CPU for each parameter; squares are summed over classes in float32, over
        images in float64.
    """
    model = model.to(device).eval()
    trained = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    home = _home(device)
    totals = [torch.zeros(p.shape, dtype=torch.float64, device=home) for p in trained.values()]
    squares = [torch.zeros_like(p) for p in trained.values()]
    with _enough_memory(device):
        for index in range(len(images)):
            batch = centre(images.batch([index]).to(device), images.preprocessing)
            with torch.enable_grad():
                outputs = model(batch)[0, seen.to(device)]
            for directions, last in _directions(outputs):
                gradients = torch.autograd.grad(
                    outputs,
                    tuple(trained.values()),
                    directions,
                    retain_graph=not last,
                    allow_unused=True,
                )
                for square, gradient in zip(squares, gradients, strict=True):
                    if gradient is not None:
                        square.addcmul_(gradient, gradient)
            for total, square in zip(totals, squares, strict=True):
                total += square.to(home)
                square.zero_()
            progress(index + 1, len(images))
    means = [(total / len(images)).float().cpu() for total in totals]
    return dict(zip(trained, means, strict=True))


def _directions(outputs: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """sqrt(p_y) (e_y - p) for each class y, whose pullback squares to its share of the Fisher."""
    p = outputs.detach().cpu().double().softmax(dim=0)
    rows = p.sqrt()[:, None] * (torch.eye(len(p), dtype=torch.float64) - p)
    for y, row in enumerate(rows.float().to(outputs.device)):
        yield row, y == len(p) - 1


def grams(
    model: nn.Module, images: Images, device: torch.device, max_width: int, progress: Report
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Gram matrices of the inputs of linear layers (RegMean, arXiv 2212.09849, section 3.1).

    G = X^T X / rows for every nn.Linear and every nn.Conv2d of one group, X (rows, d) being what
    the weight is multiplied with: all tokens, or all unfolded patches with d = in * k * k. Sums run
    in float64.

    Parameters
    ----------
    max_width
        Layers with a larger d are left out.

    Returns
    -------
    tuple
        (d, d) float32, exactly symmetric, on the CPU, by the weight's name in the state dict; and a
        sentence for each layer that was left out; and the names of those with fewer rows than
        columns, whose matrices are singular.

    Raises
    ------
    UsageError
        No layer is left.
    """
    model = model.to(device)
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    widths = {name: weight[0].numel() for name, weight in weights.items()}
    watched = {name: weight for name, weight in weights.items() if widths[name] <= max_width}
    inputs = _Inputs(watched, _home(device))
    with _enough_memory(device), torch.no_grad(), inputs:
        for _ in network.logits_by_batch(model, images, device, _BATCH, "float32", progress):
            pass
    left_out = []
    for name, width in widths.items():
        if width > max_width:
            left_out.append(f"{name} has {width} input columns, above --max-width {max_width}.")
        elif name not in inputs.sums:
            left_out.append(f"{name} is not multiplied with an input as it stands.")
    if not inputs.sums:
        raise UsageError(f"no layer is left with --max-width {max_width}: give a larger one.")
    few = [name for name, rows in inputs.rows.items() if rows < widths[name]]
    found = {}
    for name in list(inputs.sums):
        gram = inputs.sums.pop(name) / inputs.rows[name]
        found[name] = ((gram + gram.T) / 2).float().cpu()
    return found, left_out, few


class _Inputs(TorchFunctionMode):
    """Adds up X^T X wherever one of some weights is multiplied with an input X.

    It watches the two functions that all layers end in. So padding, and layers that are used
    without being called, come out right; and a weight that its layer changes first, such as a
    standardised one, is not recognised: no Gram matrix would speak of the weight that is merged.
    """

    def __init__(self, weights: Mapping[str, Tensor], home: torch.device) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._home = home
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function is functional.linear:
            self._linear(*args, **given)
        elif function is functional.conv2d:
            self._conv2d(*args, **given)
        return function(*args, **given)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if id(weight) in self._names:
            self._add(weight, input.reshape(-1, input.shape[-1]).to(self._home).double().T)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        if id(weight) not in self._names:
            return
        if isinstance(padding, str):
            input, padding = _padded(input, weight, padding, dilation), 0
        for image in input:  # one at a time: unfolded, it is k * k times as large
            values = image[None].to(self._home).double()
            patches = functional.unfold(values, weight.shape[2:], dilation, padding, stride)
            self._add(weight, patches[0])

    def _add(self, weight: Tensor, columns: Tensor) -> None:
        name, width = self._names[id(weight)], columns.shape[0]
        if name not in self.sums:
            self.sums[name] = columns.new_zeros(width, width)
            self.rows[name] = 0
        self.sums[name].addmm_(columns, columns.T)
        self.rows[name] += columns.shape[1]


def _padded(input: Tensor, weight: Tensor, padding: str, dilation: Any) -> Tensor:
    """What conv2d does for ``same``: half of what the kernel overhangs, the smaller half first."""
    if padding == "valid":
        return input
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    down, right = (step * (size - 1) for step, size in zip(steps, weight.shape[2:], strict=True))
    sides = [right // 2, right - right // 2, down // 2, down - down // 2]
    return functional.pad(input, sides)


def _home(device: torch.device) -> torch.device:
    """Where float64 sums are kept: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{device} has too little memory for these statistics: give --device cpu."
        ) from error
