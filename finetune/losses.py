"""Losses of a site that has not seen every class of the federation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def seen_classes(labels: Tensor, classes: int) -> Tensor:
    """(C,) bool: whether a class occurs in `labels`."""
    return torch.bincount(labels, minlength=classes) > 0


def loss_on_seen(
    outputs: Tensor, labels: Tensor, seen: Tensor, class_weights: Tensor | None
) -> Tensor:
    """Cross-entropy over the classes that the site has seen.

    The others take no part in the softmax, so their head rows get a gradient of exactly zero.
    """
    position = torch.cumsum(seen.long(), dim=0) - 1
    return functional.cross_entropy(outputs[:, seen], position[labels], weight=class_weights)


def class_weights(labels: Tensor, seen: Tensor) -> Tensor:
    """Weights of the seen classes, inverse to their counts, averaging 1 over the images."""
    counts = torch.bincount(labels, minlength=len(seen))[seen].float()
    return counts.sum() / (len(counts) * counts)
