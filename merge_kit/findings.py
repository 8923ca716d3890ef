"""Classifiers of findings in closed form, where each site may have annotated only some of them.

A finding is a problem of two classes, present and absent, over the images in which it was
annotated. Images in which the same findings were annotated share their Gram matrix: a site tells
one for each such pattern. Added up by pattern, these are the sums over all images, so that each
finding's row is that of the pooled images that know it (see `merge_kit.moments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_kit import moments
from merge_kit.errors import VectorError
from merge_kit.moments import Head, Moments, Priors


@dataclass(frozen=True, slots=True, eq=False)
class FindingMoments:
    """Sums over n images in P patterns, sorted by pattern; float64 but for `annotated`.

    Attributes
    ----------
    annotated
        (P, C) bool: the findings that were annotated in a pattern's images, different in each.
    grams
        (P, d, d): sum of phi phi^T over the images of each pattern.
    totals
        (P, d): sum of phi over them.
    sizes
        (P,): their number.
    present
        (P, C, d): sum of phi over those that have each finding.
    positives
        (P, C): their number.
    """

    annotated: Tensor
    grams: Tensor
    totals: Tensor
    sizes: Tensor
    present: Tensor
    positives: Tensor

    @property
    def size(self) -> float:
        """n, the number of images."""
        return float(self.sizes.sum())

    @property
    def counts(self) -> Tensor:
        """(C,): images that have each finding."""
        return self.positives.sum(dim=0)

    @property
    def absent(self) -> Tensor:
        """(C,): images that lack each finding."""
        return (self.annotated * self.sizes[:, None] - self.positives).sum(dim=0)

    def of(self, finding: int) -> Moments:
        """The moments of two classes, absent and present, of the images that know a finding."""
        rows = self.annotated[:, finding]
        size, total = self.sizes[rows].sum(), self.totals[rows].sum(dim=0)
        count = self.positives[rows, finding].sum()
        present = self.present[rows, finding].sum(dim=0)
        absent = total - present if size > count else torch.zeros_like(total)  # of no image: exact
        return Moments(
            self.grams[rows].sum(dim=0),
            torch.stack([absent, present]),
            torch.stack([size - count, count]),
        )

    def problems(self) -> Iterator[tuple[int, Moments]]:
        """Each finding that is known of some image, and its moments."""
        for finding in self.annotated.any(dim=0).nonzero().flatten().tolist():
            yield finding, self.of(finding)


def measure(features: Tensor, targets: Tensor) -> FindingMoments:
    """The moments of images; those of which nothing was annotated are in none of them.

    Parameters
    ----------
    features
        (n, d) of any float dtype.
    targets
        (n, C) integers: 1 present, 0 absent, -1 not annotated.

    Raises
    ------
    VectorError
        Shapes or targets that do not fit.
    """
    fits = features.dim() == targets.dim() == 2 and len(features) == len(targets)
    if not fits or bool(((targets < -1) | (targets > 1)).any()):
        raise VectorError(
            f"features of shape {tuple(features.shape)} and targets of shape "
            f"{tuple(targets.shape)} do not fit each other, or a target is none of 1, 0 and -1: "
            "pass a row of targets for each row of features."
        )
    exact, known = features.double(), targets >= 0
    patterns, which = torch.unique(known, dim=0, return_inverse=True)
    kept = patterns.any(dim=1)
    parts = [exact[which == place] for place in kept.nonzero().flatten().tolist()]
    marks = [targets[which == place] == 1 for place in kept.nonzero().flatten().tolist()]
    classes, width = targets.shape[1], features.shape[1]
    return FindingMoments(
        patterns[kept],
        _stacked([part.T @ part for part in parts], width, width),
        _stacked([part.sum(dim=0) for part in parts], width),
        torch.tensor([len(part) for part in parts], dtype=torch.float64),
        _stacked(
            [m.double().T @ part for m, part in zip(marks, parts, strict=True)], classes, width
        ),
        _stacked([m.sum(dim=0).double() for m in marks], classes),
    )


def _stacked(parts: Sequence[Tensor], *shape: int) -> Tensor:
    return torch.stack(list(parts)) if parts else torch.zeros(0, *shape, dtype=torch.float64)


def add(parts: Sequence[FindingMoments]) -> FindingMoments:
    """The moments of all images of several sites, each pattern summed in the order given.

    Raises
    ------
    VectorError
        None is given, or they are of other numbers of features or findings.
    """
    shapes = {tuple(part.present.shape[1:]) for part in parts}
    if len(shapes) != 1:
        found = " and ".join(f"{c} findings x {d} features" for c, d in sorted(shapes)) or "nothing"
        raise VectorError(f"moments of {found} cannot be added: take those of one model.")
    every = torch.cat([part.annotated for part in parts])
    patterns, which = torch.unique(every, dim=0, return_inverse=True)

    def total(values: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(values))
        return whole.new_zeros(len(patterns), *whole.shape[1:]).index_add_(0, which, whole)

    return FindingMoments(
        patterns,
        total([part.grams for part in parts]),
        total([part.totals for part in parts]),
        total([part.sizes for part in parts]),
        total([part.present for part in parts]),
        total([part.positives for part in parts]),
    )


def ridge(found: FindingMoments, penalty: float) -> Head:
    """Ridge regression of 1 (present) and -1 (absent), a finding each; see `moments.ridge`.

    A finding that no image knows has a row of zeros.

    Raises
    ------
    VectorError
        There is no image.
    """
    return _each(found, lambda two: moments.ridge(two, penalty))


def discriminant(found: FindingMoments, shrinkage: float, priors: Priors = "uniform") -> Head:
    """Linear discriminant analysis of present against absent, a finding each: the outputs are
    logits; see `moments.discriminant`.

    A finding that no image knows, or that all have or lack that do, has a row of zeros.

    Raises
    ------
    VectorError
        There is no image.
    """

    def solve(two: Moments) -> Head | None:
        both = bool((two.counts > 0).all())
        return moments.discriminant(two, shrinkage, priors) if both else None

    return _each(found, solve)


def _each(found: FindingMoments, solve: Callable[[Moments], Head | None]) -> Head:
    """A row for each finding: by how much present is above absent."""
    if not found.size:
        raise VectorError("there is no image to make a head of: take at least one site's moments.")
    classes, width = found.present.shape[1:]
    weight = torch.zeros(classes, width, dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    for finding, two in found.problems():
        if head := solve(two):
            weight[finding] = head.weight[1] - head.weight[0]
            bias[finding] = head.bias[1] - head.bias[0]
    return Head(weight, bias)


def apart(parts: Sequence[FindingMoments]) -> list[list[Moments]]:
    """For each finding that is known of some image the moments of the sites that know it."""
    classes = parts[0].annotated.shape[1] if parts else 0
    found = [
        [part.of(finding) for part in parts if bool(part.annotated[:, finding].any())]
        for finding in range(classes)
    ]
    return [those for those in found if those]
