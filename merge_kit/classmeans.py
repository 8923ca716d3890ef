"""Moments from means alone: much smaller than sums of squares, and nearly as good.

A site shares the images of each class out to groups and sends the mean of each group. Sums and
counts follow exactly. The scatter within the classes is estimated: the mean of m features of one
covariance has that covariance over m, so groups' means spread around their class's by what single
images do, over m (FedCOF, arXiv 2412.14326, which takes one mean of a class from each of many
sites; here few sites send several each).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit.errors import UsageError
from merge_kit.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class GroupMeans:
    """Means of groups of images of one class each.

    Attributes
    ----------
    means
        (G, d) float32: the mean of phi over each group.
    labels
        (G,) int64: the class of each, ascending.
    sizes
        (G,) int64: images of each.
    counts
        (C,) int64: images of each class.
    """

    means: Tensor
    labels: Tensor
    sizes: Tensor
    counts: Tensor


def measure(features: Tensor, labels: Tensor, classes: int, size: int) -> GroupMeans:
    """Share the images of each class out to as many groups of at least `size` as they fill.

    Who is with whom is drawn, by a fixed seed. A class of fewer images makes one group.

    Parameters
    ----------
    features
        (n, d) of any float dtype.
    labels
        (n,) integers in [0, classes).
    """
    generator = torch.Generator().manual_seed(0)
    means, own, sizes = [], [], []
    for label in range(classes):
        there = features[labels == label].double()
        if not len(there):
            continue
        there = there[torch.randperm(len(there), generator=generator)]
        for part in torch.tensor_split(there, max(1, len(there) // size)):
            means.append(part.mean(dim=0).float())
            own.append(label)
            sizes.append(len(part))
    return GroupMeans(
        torch.stack(means),
        torch.tensor(own),
        torch.tensor(sizes),
        torch.bincount(labels, minlength=classes),
    )


def to_moments(found: GroupMeans) -> Moments:
    """The moments of all the images, with an estimate of their scatter within the classes.

    With S the sum over the groups of m (mean - class mean)(...)^T the estimate is S (n - K) / (G -
    K), for n images in G groups of K classes: without bias where every class has one covariance.
    Where no class has two groups nothing is known of it: such means are refused (`fault`), for a
    scatter of 0 would pass for knowledge.
    """
    weights, means = found.sizes.double(), found.means.double()
    counts = found.counts.double()
    sums = means.new_zeros(len(counts), means.shape[1])
    sums.index_add_(0, found.labels, means * weights[:, None])
    own = sums / counts.clamp(min=1)[:, None]
    apart = (means - own[found.labels]) * weights.sqrt()[:, None]
    scatter = apart.T @ apart
    free = _free(found)
    scatter *= (float(counts.sum()) - (len(means) - free)) / free if free else 0.0
    return Moments(scatter + own.T @ sums, sums, counts)


def fault(found: GroupMeans) -> str | None:
    """What no images can have given, or None."""
    if not bool(found.means.isfinite().all()):
        return "holds NaN or infinite values"
    labels, sizes, classes = found.labels, found.sizes, len(found.counts)
    if not len(labels):
        return "is of no image"
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        return f"holds a mean of none of the {classes} classes"
    if bool((labels[1:] < labels[:-1]).any()):
        return "holds classes that are not in ascending order"
    if bool((sizes < 1).any()):
        return "holds a mean of no image"
    if not torch.equal(torch.bincount(labels, sizes.double(), classes).long(), found.counts):
        return "holds counts that do not fit its groups"
    if not _free(found):
        return "holds one group of each class, from which no scatter follows"
    return None


def _free(found: GroupMeans) -> int:
    """How many groups there are beyond one of each class."""
    return len(found.labels) - int((found.counts > 0).sum())


def check_size(size: int, minimum: int) -> None:
    """Refuse groups of fewer images than the policy asks for.

    Raises
    ------
    UsageError
        Names both.
    """
    if size < minimum:
        raise UsageError(
            f"--means {size}: the federation's policy asks for groups of at least {minimum} "
            "images, since the mean of few gives their features away: give a larger number."
        )
