"""The classifier of a model on a hub, solved from the moments that sites published of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit import moments, momentsfile
from merge_kit.contributions import Contribution
from merge_kit.errors import ContributionError, VectorError
from merge_kit.federation import Federation
from merge_kit.moments import Head, Moments, Priors
from merge_kit.remembered import check_unchanged
from merge_kit.schema import Digest, Document
from merge_kit.tensorfile import Fingerprint, TensorFile, Tensors
from merge_kit.tensorheader import TensorSpec

SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
"""What `auto` chooses among."""
ALONE = 0.3
"""The shrinkage of `auto` where there is one site; what several have chosen on real images."""
PENALTIES = tuple(10.0**k for k in range(-2, 7))
_FOLDS = 5


class HeadOptions(Document):
    """How a classifier is solved; nothing is left to a default when it is written down."""

    solver: Literal["discriminant", "ridge"] = "discriminant"
    """Linear discriminant analysis, whose outputs are logits; or ridge regression on the labels."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Of the discriminant's covariance; auto takes what describes the images of sites best that it
    has not been made of."""
    priors: Priors = "uniform"
    """Classes alike, or by their counts."""
    penalty: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Of the ridge; auto takes the least generalised cross-validation error."""


class Backbone(Document):
    """What reading a model's file finds: the fingerprint of all but its classifier."""

    fingerprint: Digest


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """Moments of labelled images that lie at the merger, which count like a site's."""

    moments: Moments
    digest: str
    """Of the sorted digests of their contents."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A classifier, and what it was made of."""

    head: Head
    options: HeadOptions
    """With the numbers that `auto` chose."""
    moments: tuple[Contribution, ...]
    """Sorted by id."""
    counts: Tensor
    """(C,): images of each class."""
    own: Own | None = None


def backbone_of(file: Tensors, classifier: Sequence[str]) -> Backbone:
    """The fingerprint of a model's tensors without its classifier's.

    Features depend on nothing else: a model whose classifier was solved again has the same one.
    """
    found = Fingerprint()
    heads = {f"{module}.{leaf}" for module in classifier for leaf in ("weight", "bias")}
    for name, spec in file.specs.items():
        if name not in heads:
            found.begin(name, spec)
            found.values(file.read(name).reshape(-1))
    return Backbone(fingerprint=str(found))


def solve(parts: Sequence[Moments], options: HeadOptions) -> tuple[Head, HeadOptions]:
    """The classifier from the moments of sites, each in its place; and the options as they were.

    Raises
    ------
    VectorError
        There is no image.
    """
    total = moments.add(parts)
    if options.solver == "ridge":
        penalty = options.penalty
        if penalty == "auto":
            penalties = _less_than_interpolating(total)
            errors = moments.generalised_cross_validation(total, penalties)
            penalty = penalties[int(errors.argmin())]
        chosen = options.model_copy(update={"penalty": penalty})
        return moments.ridge(total, penalty), chosen
    shrinkage = options.shrinkage
    if shrinkage == "auto":
        folds = _folds([part for part in parts if part.size])
        shrinkage = ALONE
        if len(folds) > 1:
            shrinkage = SHRINKAGES[int(moments.held_out(folds, SHRINKAGES).argmax())]
    chosen = options.model_copy(update={"shrinkage": shrinkage})
    return moments.discriminant(total, shrinkage, options.priors), chosen


def _less_than_interpolating(total: Moments) -> list[float]:
    """Penalties that do not come near to interpolating: see `generalised_cross_validation`."""
    mean = total.sums.sum(dim=0) / total.size
    values = torch.linalg.eigvalsh(total.gram - total.size * torch.outer(mean, mean)).clamp(min=0)
    kept = [p for p in PENALTIES if float((values / (values + p)).sum()) <= total.size / 2]
    return kept or [PENALTIES[-1]]


def _folds(parts: Sequence[Moments]) -> list[Moments]:
    """At most five groups of whole sites, of about equal sizes."""
    if len(parts) <= _FOLDS:
        return list(parts)
    groups: list[list[Moments]] = [[] for _ in range(_FOLDS)]
    for part in sorted(parts, key=lambda part: -part.size):
        min(groups, key=lambda group: sum(p.size for p in group)).append(part)
    return [moments.add(group) for group in groups]


def read_parts(found: Sequence[Contribution]) -> dict[str, Moments]:
    """The moments of each site; of several contributions of one site their sum.

    Raises
    ------
    TensorFileError
        A file changed after it was checked.
    """
    parts: dict[str, list[Moments]] = {}
    for contribution in sorted(found, key=lambda c: c.id):
        with TensorFile(contribution.payload) as file:
            parts.setdefault(contribution.site, []).append(momentsfile.read(file))
            if contribution.checked:
                check_unchanged(file, contribution.checked)
    return {site: moments.add(those) for site, those in sorted(parts.items())}


def unseen_error(parts: Sequence[Moments]) -> float | None:
    """As `moments.unseen_error`, of more than five sites in groups; None of one site."""
    folds = _folds([part for part in parts if part.size])
    return moments.unseen_error(folds) if len(folds) > 1 else None


def solve_from(
    found: Sequence[Contribution], options: HeadOptions, own: Own | None = None
) -> Solved:
    """As `solve`, from contributions that have been checked, and from the merger's own images.

    Raises
    ------
    ContributionError
        There is none of either.
    TensorFileError
        A file changed after it was checked.
    """
    if not found and own is None:
        raise ContributionError(
            "no site has published moments of this model: sites make them with "
            "'merge-kit calibrate' and 'merge-kit publish'; labelled images of your own may stand "
            "in, with --data."
        )
    parts = [*read_parts(found).values(), *([own.moments] if own else ())]
    head, chosen = solve(parts, options)
    counts = torch.stack([part.counts for part in parts]).sum(dim=0)
    return Solved(head, chosen, tuple(sorted(found, key=lambda c: c.id)), counts, own)


def head_tensors(
    head: Head, federation: Federation, specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """The classifier's tensors by name, in the shapes and dtypes of the model's.

    Raises
    ------
    VectorError
        The model's classifier has no bias.
    """
    module = federation.classifier[0]
    found = {f"{module}.weight": head.weight, f"{module}.bias": head.bias}
    if f"{module}.bias" not in specs:
        raise VectorError(
            f"the classifier '{module}' has no bias, which a solved one needs: choose a backbone "
            "whose classifier has one."
        )
    return {n: v.reshape(specs[n].shape).to(specs[n].dtype) for n, v in found.items()}
