"""The classifier of a model on a hub, solved from the moments that sites published of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from merge_kit import findings, moments, momentsfile
from merge_kit.contributions import Contribution
from merge_kit.errors import ContributionError, VectorError
from merge_kit.federation import Federation
from merge_kit.findings import FindingMoments
from merge_kit.moments import Head, Moments, Priors
from merge_kit.momentsfile import AnyMoments
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

    moments: AnyMoments
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
    absent: Tensor | None = None
    """(C,): of findings the images that lack each."""
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


def solve(parts: Sequence[AnyMoments], options: HeadOptions) -> tuple[Head, HeadOptions]:
    """The classifier from the moments of sites, each in its place; and the options as they were.

    Of findings each row is solved from the images that know it, all with the same numbers.

    Raises
    ------
    VectorError
        There is no image.
    """
    total = _add(parts)
    if options.solver == "ridge":
        penalty = options.penalty
        if penalty == "auto":
            penalty = _least_error(_problems([total]))
        chosen = options.model_copy(update={"penalty": penalty})
        if isinstance(total, FindingMoments):
            return findings.ridge(total, penalty), chosen
        return moments.ridge(total, penalty), chosen
    shrinkage = options.shrinkage
    if shrinkage == "auto":
        several = [folds for one in _problems(parts) if len(folds := _folds(one)) > 1]
        shrinkage = ALONE
        if several:
            likelihoods = [moments.held_out(folds, SHRINKAGES) for folds in several]
            shrinkage = SHRINKAGES[int(torch.stack(likelihoods).sum(dim=0).argmax())]
    chosen = options.model_copy(update={"shrinkage": shrinkage})
    if isinstance(total, FindingMoments):
        return findings.discriminant(total, shrinkage, options.priors), chosen
    return moments.discriminant(total, shrinkage, options.priors), chosen


def _add(parts: Sequence[AnyMoments]) -> AnyMoments:
    of_findings = [part for part in parts if isinstance(part, FindingMoments)]
    if of_findings:
        return findings.add(of_findings)
    return moments.add([part for part in parts if isinstance(part, Moments)])


def _problems(parts: Sequence[AnyMoments]) -> list[list[Moments]]:
    """The moments of the parts with images: of all classes at once, or for each finding apart."""
    of_findings = [part for part in parts if isinstance(part, FindingMoments)]
    found = [[part for part in parts if isinstance(part, Moments)]]
    if of_findings:
        found = findings.apart(of_findings)
    return [[part for part in one if part.size] for one in found]


def _least_error(problems: Sequence[Sequence[Moments]]) -> float:
    """The penalty of the least generalised cross-validation error, every problem counting alike.

    None that comes near to interpolating one of them: see `generalised_cross_validation`.
    """
    totals = [total for one in problems for total in one]
    few = [_less_than_interpolating(total) for total in totals]
    penalties = [p for p in PENALTIES if all(p in kept for kept in few)] or [PENALTIES[-1]]
    errors = torch.zeros(len(penalties), dtype=torch.float64)
    for total in totals:
        spread = float((total.counts - total.counts.square() / total.size).sum()) / total.size
        if spread > 0 or len(totals) == 1:
            found = moments.generalised_cross_validation(total, penalties)
            errors += found / spread if len(totals) > 1 else found
    return penalties[int(errors.argmin())]


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


def read_parts(found: Sequence[Contribution]) -> dict[str, AnyMoments]:
    """The moments of each site; of several contributions of one site their sum.

    Raises
    ------
    TensorFileError
        A file changed after it was checked.
    """
    parts: dict[str, list[AnyMoments]] = {}
    for contribution in sorted(found, key=lambda c: c.id):
        with TensorFile(contribution.payload) as file:
            parts.setdefault(contribution.site, []).append(momentsfile.read(file))
            if contribution.checked:
                check_unchanged(file, contribution.checked)
    return {site: _add(those) for site, those in sorted(parts.items())}


def unseen_error(parts: Sequence[AnyMoments]) -> float | None:
    """As `moments.unseen_error`, of more than five sites in groups; of findings the mean over those
    that two sites know; None of one site, or where no finding is such."""
    several = [folds for one in _problems(parts) if len(folds := _folds(one)) > 1]
    if not several:
        return None
    return sum(moments.unseen_error(folds) for folds in several) / len(several)


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
    lacking = [part.absent for part in parts if isinstance(part, FindingMoments)]
    absent = torch.stack(lacking).sum(dim=0) if lacking else None
    moments_of = tuple(sorted(found, key=lambda c: c.id))
    return Solved(head, chosen, moments_of, counts, absent, own)


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
