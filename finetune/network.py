"""The federation's backbone at a site: load, split into body and head, predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.pixels import Images, centre
from merge_kit import devices
from merge_kit.backbone import classifier_of
from merge_kit.errors import MergeKitError, VectorError


def load(folder: Path) -> nn.Module:
    """Load a plain timm folder (config.json and model.safetensors), in evaluation mode.

    Raises
    ------
    VectorError
        timm cannot build the model, or the weights do not fit it.
    """
    if not (folder / "config.json").is_file():
        raise VectorError(f"{folder} is no model: it has no config.json; give a timm folder.")
    try:
        with _plain_name(folder) as plain:
            model: nn.Module = timm.create_model(f"local-dir:{plain}", pretrained=True)
    except (
        RuntimeError,
        ValueError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        detail = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise VectorError(f"{folder} cannot be loaded by timm: {detail}") from error
    return model.eval()


@contextmanager
def _plain_name(folder: Path) -> Iterator[Path]:
    """The folder under a name that timm before 1.0.31 does not cut as it cuts a URL."""
    if not set("#?%") & set(str(folder)):
        yield folder
        return
    with TemporaryDirectory() as place:
        link = Path(place) / "model"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def head_of(model: nn.Module) -> nn.Module:
    """The classifier."""
    return classifier_of(model, type(model).__name__)


def width_of(model: nn.Module) -> int:
    """How many numbers the classifier is given."""
    head = head_of(model)
    return int(getattr(head, "in_features", 0) or getattr(head, "in_channels"))  # noqa: B009


def with_classes(model: nn.Module, classes: int) -> nn.Module:
    """The model with a classifier of zeros for another number of classes, in place."""
    old = head_of(model)
    place = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = place.rpartition(".")
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
    elif isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    setattr(model.get_submodule(parent), leaf, new)
    return model.eval()


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises
    ------
    UsageError
        The named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return devices.existing(name, "use --device auto")


def resolved(precision: str, device: torch.device) -> str:
    """``auto`` is bfloat16 on a GPU that computes in it, else float32."""
    if precision != "auto":
        return precision
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bfloat16 where it is asked for, or with ``auto`` on a GPU that computes in it."""
    wanted = resolved(precision, device) == "bfloat16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted):
        yield


def training_mode(model: nn.Module, norm: str) -> None:
    """Training mode; unless with ``update`` every batch norm keeps and uses the base's statistics.

    A site's batches are small and skewed: their statistics are noise that no merge can undo.
    """
    model.train()
    if norm != "update":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@torch.no_grad()
def features(
    model: nn.Module,
    images: Images,
    device: torch.device,
    *,
    batch_size: int = 64,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What the classifier is given for each image, from the centre view: (n, ...) float32.

    Read at the classifier's input, so that it is right for every backbone and pooling.
    """
    collected: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        collected.append(inputs[0].float().cpu())

    hook = head_of(model).register_forward_pre_hook(keep)
    try:
        for _ in logits_by_batch(model, images, device, batch_size, precision, progress):
            pass
    finally:
        hook.remove()
    return torch.cat(collected)


@torch.no_grad()
def logits(
    model: nn.Module,
    images: Images,
    device: torch.device,
    *,
    batch_size: int = 64,
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The model's outputs for each image, from the centre view: (n, C) float32 on the CPU."""
    return torch.cat(list(logits_by_batch(model, images, device, batch_size, precision, progress)))


def logits_by_batch(
    model: nn.Module,
    images: Images,
    device: torch.device,
    batch_size: int,
    precision: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    """Outputs of one batch after the other, the model in evaluation mode."""
    model.eval()
    for indices in chunks(len(images), batch_size):
        batch = centre(images.batch(indices).to(device), images.preprocessing)
        with autocast(device, precision):
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise MergeKitError("the model gives no (images, classes) output: is it a classifier?")
        yield outputs.float().cpu()
        if progress:
            progress(indices[-1] + 1, len(images))


def chunks(size: int, length: int) -> Iterator[Sequence[int]]:
    """0 to size - 1 in runs of at most `length`."""
    return (range(start, min(start + length, size)) for start in range(0, size, length))
