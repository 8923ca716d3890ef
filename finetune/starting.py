"""The classifier that a site's training starts from: the federation's where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from finetune import network
from merge_kit.errors import MergeKitError, UsageError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.hub import open_hub
from merge_kit.reheading import find_measured, find_model
from merge_kit.site import COPY, Site, check_pinned, federation_on
from merge_kit.solving import HeadOptions, head_tensors, solve_from
from merge_kit.tensorfile import TensorFile, fingerprint, read_all, write_tensors

HEAD = "head.safetensors"
Start = Literal["auto", "federation", "own"]


@dataclass(frozen=True, slots=True)
class StartingHead:
    """A classifier that all sites start from, and keep."""

    tensors: dict[str, Tensor]
    """By name, as in the base."""
    told: str
    """Whose it is, in one sentence."""

    @property
    def digest(self) -> str:
        """By which manifests say that two sites started from the same one."""
        return fingerprint(sorted(self.tensors.items()))


def starting_head(site: Site, run: Path, start: Start) -> StartingHead | str:
    """The federation's classifier for the base, or one sentence on why there is none.

    It is solved from the moments of all admitted sites that lie on the hub now, and kept in the
    run's folder: a run that is resumed goes on with the one that it began with.

    Raises
    ------
    UsageError
        `start` is ``federation`` and there is none.
    """
    if start == "own":
        return "the site's own classifier, as asked for."
    path = run / HEAD
    if path.is_file():
        with TensorFile(path) as file:
            return StartingHead(dict(read_all(file)), "the federation's classifier, as it was.")
    try:
        tensors, count = _solved(site)
    except MergeKitError as error:
        reason = str(error)
        tensors, count = {}, 0
    else:
        reason = (
            "no site has calibrated the base yet ('merge-kit calibrate' before 'finetune' makes "
            "vectors that merge better)."
        )
    if not count:
        if start == "federation":
            raise UsageError(f"there is no classifier of the federation to start from: {reason}")
        return f"the site's own classifier: {reason}"
    write_tensors(path, tensors)
    who = "1 site" if count == 1 else f"{count} sites"
    return StartingHead(tensors, f"the federation's classifier, of {who}.")


def _solved(site: Site) -> tuple[dict[str, Tensor], int]:
    hub = open_hub(site.config.hub)
    federation = federation_on(hub)
    check_pinned(site.config, federation, hub.uri)
    base = find_model(hub, federation, None)
    found, _ = find_measured(hub, federation, base.backbone, skip_refused=True)
    if not found:
        return {}, 0
    with TensorFile(site.root / COPY / BASE_WEIGHTS) as file:
        tensors = head_tensors(solve_from(found, HeadOptions()).head, federation, file.specs)
    return tensors, len(found)


def put(head: StartingHead, model: nn.Module) -> None:
    """Give a model the classifier, which training then leaves as it is."""
    classifier = network.head_of(model)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            (value,) = (t for n, t in head.tensors.items() if n.endswith(f".{name}"))
            parameter.copy_(value)
            parameter.requires_grad_(False)
