"""Losses of a site that has not seen every class of the federation, or not told all apart.

A label counts the federation's classes, then its groups of classes. `meaning` (L, C) bool says
which classes each label stands for; None where every label is a class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def seen_classes(labels: Tensor, classes: int, meaning: Tensor | None = None) -> Tensor:
    """(C,) bool: whether a class occurs in `labels`, by itself or within a group that occurs."""
    if meaning is None:
        return torch.bincount(labels, minlength=classes) > 0
    return meaning[labels].any(dim=0)


def loss_on_seen(
    outputs: Tensor,
    labels: Tensor,
    seen: Tensor,
    label_weights: Tensor | None,
    meaning: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the classes that the site has seen.

    The others take no part in the softmax, so their head rows get a gradient of exactly zero. Of an
    image whose label is a group it is -log of the sum of the probabilities of the group's classes,
    the likelihood of what is known of it. `label_weights` (L,) makes it the weighted mean.
    """
    if meaning is None:
        position = torch.cumsum(seen.long(), dim=0) - 1
        weights = None if label_weights is None else label_weights[seen]
        return functional.cross_entropy(outputs[:, seen], position[labels], weight=weights)
    known = outputs[:, seen]
    others = ~meaning[:, seen][labels]
    losses = known.logsumexp(dim=1) - known.masked_fill(others, -torch.inf).logsumexp(dim=1)
    if label_weights is None:
        return losses.mean()
    weights = label_weights[labels]
    return (weights * losses).sum() / weights.sum()


def divergence(outputs: Tensor, told: Tensor, seen: Tensor, *, multi_label: bool) -> Tensor:
    """Kullback-Leibler divergence from what another network says to what this one does.

    Both are logits (b, C); of classes that the site has seen. Of findings it is the mean over them.
    The mean over the images, a scalar; `told` gets no gradient.
    """
    ours, theirs = outputs[:, seen], told[:, seen].detach()
    if multi_label:
        ours, theirs = torch.stack([ours, -ours]), torch.stack([theirs, -theirs])
        logs, others = functional.logsigmoid(ours), functional.logsigmoid(theirs)
        return (others.exp() * (others - logs)).sum(dim=0).mean()
    logs, others = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
    return functional.kl_div(logs, others, reduction="batchmean", log_target=True)


def rarity(labels: Tensor, meaning: Tensor | None = None) -> Tensor:
    """(L,) float64: by which images count so that the classes that occur count alike.

    1 / n of a class with n images, infinite for n = 0. An image of a group counts as an equal share
    of an image of each of its classes, and gets the mean of what their images get: all images of a
    class, and the shares in it, weigh 1 together.
    """
    if meaning is None:
        return 1.0 / torch.bincount(labels).double()
    shares = _shares(meaning)
    counts = torch.bincount(labels, minlength=len(meaning)).double() @ shares
    return shares @ (1.0 / counts.where(counts > 0, torch.inf))


def label_weights(labels: Tensor, seen: Tensor, meaning: Tensor | None = None) -> Tensor:
    """(L,) float32: weights in the proportions of `rarity`, averaging 1 over the images."""
    if meaning is None:
        counts = torch.bincount(labels, minlength=len(seen)).float()
        return len(labels) / (seen.sum() * counts)
    found = rarity(labels, meaning)
    return (found * (len(labels) / found[labels].sum())).float()


def _shares(meaning: Tensor) -> Tensor:
    """(L, C) float64: of each class in an image of each label."""
    return meaning.double() / meaning.sum(dim=1, keepdim=True)
