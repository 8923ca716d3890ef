"""Linear classifiers in closed form, from sums over images that sites can add up.

Of features phi(x) (d,) of a frozen network a site needs to tell G = sum phi phi^T, and for each
class the sum of phi and the number of images. Added up these are the sums over all images, so the
head that follows is that of the pooled images: for every split, every order, after any withdrawal
(AFL, arXiv 2405.16240; Fed3R, ICML 2024, without its normalised columns).

Few images give themselves away: the sum of a class of one image is that image's features, and G of
fewer images than features spans them. What may be told is for the federation's policy to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge_kit.errors import VectorError
from merge_kit.methods.regression import divide

Priors = Literal["uniform", "counts"]
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the mean eigenvalue of the features' scatter."""
_UNSEEN = 0.5
"""Images that a class without any counts for in a prior."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over n images, float64.

    Attributes
    ----------
    gram
        (d, d): sum of phi phi^T over all images.
    sums
        (C, d): sum of phi over the images of each class.
    counts
        (C,): images of each class.
    """

    gram: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def size(self) -> float:
        """n, the number of images."""
        return float(self.counts.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear classifier: outputs weight phi + bias, (C, d) and (C,) float64."""

    weight: Tensor
    bias: Tensor


def measure(features: Tensor, labels: Tensor, classes: int) -> Moments:
    """The moments of images with one label each.

    Parameters
    ----------
    features
        (n, d) of any float dtype.
    labels
        (n,) integers in [0, classes).

    Raises
    ------
    VectorError
        Shapes or labels that do not fit.
    """
    fits = features.dim() == 2 and labels.shape == features.shape[:1]
    if not fits or bool(((labels < 0) | (labels >= classes)).any()):
        raise VectorError(
            f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)} "
            f"do not fit each other, or a label is none of the {classes} classes: pass one label "
            "for each row."
        )
    exact = features.double()
    sums = exact.new_zeros(classes, exact.shape[1]).index_add_(0, labels, exact)
    counts = torch.bincount(labels, minlength=classes).to(exact)
    gram = exact.T @ exact
    # Some libraries give two last digits for one product: a file holds the lower triangle.
    return Moments(gram.tril() + gram.tril(-1).T, sums, counts)


def add(parts: Sequence[Moments]) -> Moments:
    """The moments of all images of several sites, summed in the order given.

    Floating-point sums depend on their order: sort the sites by id, and the bytes do not.

    Raises
    ------
    VectorError
        None is given, or they are of other numbers of features or classes.
    """
    shapes = {tuple(part.sums.shape) for part in parts}
    if len(shapes) != 1:
        found = " and ".join(f"{c} classes x {d} features" for c, d in sorted(shapes)) or "nothing"
        raise VectorError(f"moments of {found} cannot be added: take those of one model.")
    first, *others = parts
    total = Moments(first.gram.clone(), first.sums.clone(), first.counts.clone())
    for part in others:
        total.gram.add_(part.gram)
        total.sums.add_(part.sums)
        total.counts.add_(part.counts)
    return total


def ridge(moments: Moments, penalty: float) -> Head:
    """Ridge regression of one-hot labels on the features, the bias not penalised.

    W = B (S + penalty I)^-1 with S and B the sums of (phi - m)(phi - m)^T and y (phi - m)^T, m the
    mean of phi; b = mean of y - W m. With penalty 0 and a singular S it is the pseudo-inverse's.
    A class without images has a row of zeros.

    Raises
    ------
    VectorError
        There is no image.
    """
    _, mean, scatter, cross = _centred(moments)
    scatter.diagonal().add_(penalty)
    weight = divide(cross, scatter)
    return Head(weight, moments.counts / moments.size - weight @ mean)


def generalised_cross_validation(moments: Moments, penalties: Sequence[float]) -> Tensor:
    """What `ridge` errs by on images that it has not seen, estimated from the moments alone.

    (RSS / n) / (1 - df / n)^2 for each penalty, df = 1 + tr S (S + penalty I)^-1 (Golub, Heath and
    Wahba 1979, doi:10.1080/00401706.1979.10489751). Infinite where df reaches n. (K,) float64.

    Near-duplicates among the images make penalties look good that nearly interpolate them: do not
    choose among those with df near n.

    Raises
    ------
    VectorError
        There is no image.
    """
    size, _, scatter, cross = _centred(moments)
    values, vectors = torch.linalg.eigh(scatter)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    values = values[kept]
    explained = (cross @ vectors[:, kept]).square().sum(dim=0) / values
    spread = float((moments.counts - moments.counts.square() / size).sum())
    # What no penalty explains, and what is left free at any: with more features than images both
    # are 0, and differences of large sums would be noise in their place.
    rest, free = max(0.0, spread - float(explained.sum())), size - 1 - len(values)
    found = []
    for penalty in penalties:
        lost = penalty / (values + penalty)
        error = rest + float((explained * lost.square()).sum())
        degrees = free + float(lost.sum())
        found.append(error * size / degrees**2 if degrees > 0 else float("inf"))
    return torch.tensor(found, dtype=torch.float64)


def discriminant(moments: Moments, shrinkage: float, priors: Priors = "uniform") -> Head:
    """Linear discriminant analysis: normal features of one covariance within all classes.

    W = M C^-1 and b = log prior - diag(M C^-1 M^T) / 2 with the classes' means M and C = (1 -
    shrinkage) S / n + shrinkage tr(S / n) / d I, S being the scatter within classes, G - sum_c n_c
    m_c m_c^T. Its outputs are logits: their softmax is the probability of each class.

    With equal priors every class counts alike, whatever its share of the images. A class without
    images gets the mean of all, and the prior of half an image.

    Parameters
    ----------
    shrinkage
        In [0, 1].

    Raises
    ------
    VectorError
        There is no image.
    """
    means, within = _classes(moments)
    size, seen = moments.size, moments.counts > 0
    level = float(within.diagonal().mean())
    covariance = within.mul_(1 - shrinkage)
    covariance.diagonal().add_(shrinkage * level)
    weight = divide(means, covariance)
    share = moments.counts if priors == "counts" else seen * (size / max(int(seen.sum()), 1))
    prior = share.where(seen, _UNSEEN) / size
    return Head(weight, prior.log() - (weight * means).sum(dim=1) / 2)


def _classes(moments: Moments) -> tuple[Tensor, Tensor]:
    """The mean of each class, or of all for one without images, (C, d); and S / n (d, d)."""
    size, mean = _mean(moments)
    seen = moments.counts > 0
    own = moments.sums / moments.counts.where(seen, 1.0)[:, None]
    return torch.where(seen[:, None], own, mean), (moments.gram - own.T @ moments.sums) / size


def _centred(moments: Moments) -> tuple[float, Tensor, Tensor, Tensor]:
    """n, the mean of phi (d,), and the sums about it of phi phi^T (d, d) and y phi^T (C, d)."""
    size, mean = _mean(moments)
    scatter = moments.gram - size * torch.outer(mean, mean)
    return size, mean, scatter, moments.sums - torch.outer(moments.counts, mean)


def _mean(moments: Moments) -> tuple[float, Tensor]:
    """n and the mean of phi (d,)."""
    size = moments.size
    if not size:
        raise VectorError("there is no image to make a head of: take at least one site's moments.")
    return size, moments.sums.sum(dim=0) / size


def _left_out(parts: Sequence[Moments], alone: str) -> Iterator[tuple[Moments, Moments]]:
    """Each part with images and the sum of all others; `alone` is said where there is one."""
    parts = [part for part in parts if part.size]
    if len(parts) < 2:
        raise VectorError(alone)
    for index, left in enumerate(parts):
        yield left, add([part for other, part in enumerate(parts) if other != index])


def held_out(parts: Sequence[Moments], shrinkages: Sequence[float]) -> Tensor:
    """How well each shrinkage of `discriminant` describes images of sites that it has not seen.

    The log-likelihood, per image, of the features of each part under the normal classes of all the
    others; it needs no image, for sum_i (phi_i - m_y)^T C^-1 (phi_i - m_y) follows from moments.
    Other than `generalised_cross_validation` it sees what differs between sites, and is not misled
    by near-duplicates within one. (K,) float64. Costs an eigendecomposition for each part.

    Raises
    ------
    VectorError
        There are fewer than two parts with images.
    """
    alone = "shrinkage cannot be chosen from one site: give it as a number."
    totals = torch.zeros(len(shrinkages), dtype=torch.float64)
    for left, rest in _left_out(parts, alone):
        means, within = _classes(rest)
        values, vectors = torch.linalg.eigh(within)
        cross = left.sums.T @ means
        errors = left.gram - cross - cross.T + (means * left.counts[:, None]).T @ means
        along = ((vectors.T @ errors) * vectors.T).sum(dim=1)
        for place, shrinkage in enumerate(shrinkages):
            spread = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
            totals[place] -= (left.size * spread.log().sum() + (along / spread).sum()) / 2
    return totals / sum(part.size for part in parts)


def unseen_error(parts: Sequence[Moments]) -> float:
    """How far a linear classifier is off at a site that it has not been made of.

    Each part is left out in turn; the mean over its images of |y - W phi - b|^2, with `ridge` on
    the others and y the one-hot label, follows from its moments; the mean over the parts, for the
    penalty of a grid that gives the least. 0 is perfect; of C classes alike, knowing nothing gives
    1 - 1 / C. It compares backbones, whatever the scale of their features, without an image.

    Raises
    ------
    VectorError
        There are fewer than two parts with images.
    """
    alone = "what is lost at an unseen site shows only with two sites or more."
    found = []
    for left, rest in _left_out(parts, alone):
        _, _, scatter, _ = _centred(rest)
        level = float(scatter.diagonal().mean())
        heads = (ridge(rest, penalty * level) for penalty in _PENALTIES)
        found.append([_squared_error(head, left) / left.size for head in heads])
    return float(torch.tensor(found, dtype=torch.float64).mean(dim=0).min())


def _squared_error(head: Head, found: Moments) -> float:
    """sum |y - W phi - b|^2 over the images of the moments."""
    weight, bias, total = head.weight, head.bias, found.sums.sum(dim=0)
    crossed = (weight * found.sums).sum() + bias @ found.counts
    squares = ((weight @ found.gram) * weight).sum() + 2 * bias @ (weight @ total)
    return float(found.size - 2 * crossed + squares + found.size * bias @ bias)
