"""The base of a federation: a timm backbone with one head for the whole label space.

This is the one module of merge_kit that imports timm; only `init` needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from merge_kit.errors import FederationError, UsageError
from merge_kit.federation import Preprocessing
from merge_kit.schema import parse, suggestion
from merge_kit.tensorfile import TensorFile, read_all

PRETRAINED = "pretrained"
NO_WEIGHTS = "none"


def build(
    architecture: str,
    classes: Sequence[str],
    *,
    weights: str | Path = PRETRAINED,
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
) -> nn.Module:
    """Build the backbone with a head of zeros, one row a class.

    Zeros are the same on every machine, favour no class, and leave the row of a class that nobody
    has seen neutral.

    Parameters
    ----------
    weights
        ``pretrained`` (the Hugging Face Hub or its cache), ``none`` (random, from `seed`), or a
        safetensors file of a state dict under timm's names; its head is not used.
    allow_pickle
        Read a pickled checkpoint with torch's weights-only loader.

    Raises
    ------
    UsageError
        timm has no such model, or the model takes no such argument.
    FederationError
        The weights do not fit, or cannot be had.
    """
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm {timm.__version__} has no model '{architecture}'"
            f"{suggestion(architecture, timm.list_models())}"
        )
    arguments = dict(model_args or {})
    torch.manual_seed(seed)
    model: nn.Module
    try:
        if weights == NO_WEIGHTS:
            model = timm.create_model(architecture, num_classes=len(classes), **arguments)
        elif weights == PRETRAINED:
            model = _from_hub(architecture, len(classes), arguments)
        else:
            state = _read_state(Path(weights), allow_pickle)
            model = _from_state(architecture, len(classes), arguments, state, Path(weights))
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"model '{architecture}' cannot be built with these arguments ({error}): "
            "check --model-arg and --input-size."
        ) from error
    for parameter in classifier_of(model, architecture).parameters():
        nn.init.zeros_(parameter)
    return model.float().eval()


def _from_hub(architecture: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(
            architecture, pretrained=True, num_classes=classes, **arguments
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise FederationError(
            f"the pretrained weights of '{architecture}' cannot be had "
            f"({str(error).splitlines()[0]}): check the network, or give a local file with "
            "--weights."
        ) from error
    return model


def _from_state(
    architecture: str,
    classes: int,
    arguments: Mapping[str, Any],
    state: dict[str, torch.Tensor],
    path: Path,
) -> nn.Module:
    plain = timm.create_model(architecture, num_classes=classes, **arguments)
    head = tuple(f"{name}." for name in classifier_names(plain))
    expected = {n for n in plain.state_dict() if not n.startswith(head)}
    given = {n for n in state if not n.startswith(head)}
    counters = {n for n in expected if n.endswith("num_batches_tracked")}
    if missing := sorted(expected - given - counters):
        raise FederationError(
            f"{path} lacks the tensor '{missing[0]}' ({len(missing)} in all) of '{architecture}': "
            "is it another architecture?"
        )
    if extra := sorted(given - expected):
        raise FederationError(
            f"{path} has the tensor '{extra[0]}' ({len(extra)} in all), which '{architecture}' "
            "does not have: is it another architecture?"
        )
    # timm's own loader resamples position embeddings for other input sizes.
    body = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    source_head = next((t.shape[0] for n, t in body.items() if n.startswith(head)), classes)
    overlay = {"state_dict": body, "custom_load": False, "num_classes": source_head}
    overlay["label_offset"] = 0
    try:
        model: nn.Module = timm.create_model(
            architecture,
            pretrained=True,
            num_classes=classes,
            pretrained_cfg_overlay=overlay,
            **arguments,
        )
    except (RuntimeError, KeyError) as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise FederationError(f"{path} does not fit '{architecture}': {detail}") from error
    return model


def _read_state(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        with TensorFile(path) as file:
            return dict(read_all(file))
    if not path.is_file():
        raise FederationError(f"{path} does not exist: check --weights.")
    if not allow_pickle:
        raise FederationError(
            f"{path} is not a safetensors file: pickled checkpoints can run code and are refused; "
            "pass --allow-pickle to convert it with torch's weights-only loader."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FederationError(
            f"{path} cannot be read by torch's weights-only loader: it holds more than tensors; "
            "convert it to safetensors where you trust it."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise FederationError(f"{path} holds no state dict: export one with model.state_dict().")
    return state


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of the classifier, from timm's own configuration."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def classifier_of(model: nn.Module, architecture: str) -> nn.Module:
    """The one linear module that turns features into classes.

    Raises
    ------
    UsageError
        The backbone has several classifiers, or none that is linear.
    """
    names = classifier_names(model)
    modules = dict(model.named_modules())
    if len(names) != 1 or not isinstance(modules.get(names[0]), nn.Linear | nn.Conv2d):
        raise UsageError(
            f"'{architecture}' has no single linear classifier (it has {', '.join(names)}): "
            "choose a backbone with one."
        )
    found: nn.Module = modules[names[0]]
    return found


def preprocessing_of(model: nn.Module, overrides: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing from the model's own data config; `overrides` replace single values.

    Raises
    ------
    FederationError
        A value is out of its range.
    """
    config = resolve_model_data_config(model)
    values = {
        key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")
    }
    if values["interpolation"] not in ("bilinear", "bicubic", "nearest", "lanczos"):
        values["interpolation"] = "bicubic"
    values.update({key: value for key, value in overrides.items() if value is not None})
    return parse(Preprocessing, values, "the preprocessing", FederationError)
