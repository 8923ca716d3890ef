"""Moments as they travel: tensors in a safetensors file, checked before they are used.

Those of findings have a further first dimension: the patterns in which they were annotated. A site
may send means of groups of its images in the place of sums: see `merge_kit.classmeans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from merge_kit import classmeans
from merge_kit.classmeans import GroupMeans
from merge_kit.errors import VectorError
from merge_kit.findings import FindingMoments
from merge_kit.moments import Moments
from merge_kit.tensorfile import Tensors
from merge_kit.tensorheader import TensorSpec

AnyMoments: TypeAlias = Moments | FindingMoments
_GRAM, _SUMS, _COUNTS = "gram", "sums", "counts"
_ANNOTATED, _SIZES, _TOTALS = "annotated", "sizes", "totals"
_MEANS, _LABELS = "means", "labels"
NAMES = {_GRAM, _SUMS, _COUNTS}
_ROUNDING = 1e-9


def specs(features: int, classes: int) -> dict[str, TensorSpec]:
    """What a file of moments holds: the lower triangle of the Gram matrix row by row, float64
    (d (d + 1) / 2,); the sums, float64 (C, d); the counts, int64 (C,).
    """
    return {
        _COUNTS: TensorSpec(torch.int64, (classes,)),
        _GRAM: TensorSpec(torch.float64, (features * (features + 1) // 2,)),
        _SUMS: TensorSpec(torch.float64, (classes, features)),
    }


def mean_specs(groups: int, features: int, classes: int) -> dict[str, TensorSpec]:
    """What a file of means holds: of each group the mean of its features, float32 (G, d), its
    class, int64 (G,), ascending, and the number of its images, int64 (G,); the counts, int64 (C,).
    """
    return {
        _COUNTS: TensorSpec(torch.int64, (classes,)),
        _LABELS: TensorSpec(torch.int64, (groups,)),
        _MEANS: TensorSpec(torch.float32, (groups, features)),
        _SIZES: TensorSpec(torch.int64, (groups,)),
    }


def finding_specs(patterns: int, features: int, classes: int) -> dict[str, TensorSpec]:
    """What a file of moments of findings holds, by pattern: which are annotated, uint8 (P, C), in
    ascending order; the number of images, int64 (P,); of those that have each finding, int64
    (P, C); the lower triangle of the Gram matrix, float64 (P, d (d + 1) / 2); the sum of the
    features, float64 (P, d), and of those that have each finding, float64 (P, C, d).
    """
    return {
        _ANNOTATED: TensorSpec(torch.uint8, (patterns, classes)),
        _COUNTS: TensorSpec(torch.int64, (patterns, classes)),
        _GRAM: TensorSpec(torch.float64, (patterns, features * (features + 1) // 2)),
        _SIZES: TensorSpec(torch.int64, (patterns,)),
        _SUMS: TensorSpec(torch.float64, (patterns, classes, features)),
        _TOTALS: TensorSpec(torch.float64, (patterns, features)),
    }


def to_tensors(moments: AnyMoments | GroupMeans) -> dict[str, Tensor]:
    """The tensors of the file."""
    if isinstance(moments, GroupMeans):
        return {
            _COUNTS: moments.counts.long(),
            _LABELS: moments.labels.long(),
            _MEANS: moments.means,
            _SIZES: moments.sizes.long(),
        }
    if isinstance(moments, FindingMoments):
        rows, columns = _triangle(moments.totals.shape[1])
        return {
            _ANNOTATED: moments.annotated.to(torch.uint8),
            _COUNTS: moments.positives.long(),
            _GRAM: moments.grams[:, rows, columns],
            _SIZES: moments.sizes.long(),
            _SUMS: moments.present,
            _TOTALS: moments.totals,
        }
    rows, columns = _triangle(moments.sums.shape[1])
    return {
        _COUNTS: moments.counts.long(),
        _GRAM: moments.gram[rows, columns],
        _SUMS: moments.sums,
    }


def read(file: Tensors) -> AnyMoments:
    """The moments in a file whose tensors are as `specs`, `mean_specs` or `finding_specs` has them;
    those that follow from means."""
    if _ANNOTATED in file.specs:
        return _read_findings(file)
    if _MEANS in file.specs:
        return classmeans.to_moments(_read_means(file))
    sums, packed = file.read(_SUMS), file.read(_GRAM)
    rows, columns = _triangle(sums.shape[1])
    gram = sums.new_empty(sums.shape[1], sums.shape[1])
    gram[rows, columns] = gram[columns, rows] = packed
    return Moments(gram, sums, file.read(_COUNTS).double())


def _read_means(file: Tensors) -> GroupMeans:
    return GroupMeans(*(file.read(name) for name in (_MEANS, _LABELS, _SIZES, _COUNTS)))


def _read_findings(file: Tensors) -> FindingMoments:
    packed, totals = file.read(_GRAM), file.read(_TOTALS)
    rows, columns = _triangle(totals.shape[1])
    grams = totals.new_empty(len(totals), totals.shape[1], totals.shape[1])
    grams[:, rows, columns] = grams[:, columns, rows] = packed
    return FindingMoments(
        file.read(_ANNOTATED).bool(),
        grams,
        totals,
        file.read(_SIZES).double(),
        file.read(_SUMS),
        file.read(_COUNTS).double(),
    )


def specs_like(found: Mapping[str, TensorSpec], *, multi_label: bool) -> dict[str, TensorSpec]:
    """What a file of moments holds that has as many features and classes, and patterns."""
    means, counts = found.get(_MEANS), found.get(_COUNTS)
    if not multi_label and means and counts:
        plain = len(means.shape) == 2 and len(counts.shape) == 1
        return mean_specs(*means.shape, *counts.shape) if plain else {}
    sums = found.get(_SUMS)
    shape = sums.shape if sums else ()
    if len(shape) != (3 if multi_label else 2):
        return {}
    return finding_specs(shape[0], shape[2], shape[1]) if multi_label else specs(shape[1], shape[0])


def check_specs(
    found: Mapping[str, TensorSpec],
    features: int,
    classes: int,
    where: str,
    *,
    multi_label: bool = False,
) -> None:
    """Compare names, shapes and dtypes.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    expected = specs(features, classes)
    if multi_label:
        told = found.get(_SIZES)
        patterns = told.shape[0] if told and len(told.shape) == 1 else 1
        expected = finding_specs(patterns, features, classes)
    elif _MEANS in found:
        shape = found[_MEANS].shape
        expected = mean_specs(shape[0] if shape else 1, features, classes)
    check_exactly(found, expected, where, "which moments do not have")


def check_exactly(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, TensorSpec],
    where: str,
    of_others: str,
) -> None:
    """Compare what a site has measured of a model with what it has to be; `of_others` says in an
    error what is wrong with a tensor that should not be there.

    Raises
    ------
    VectorError
        Names the tensor.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise VectorError(f"{where} lacks the tensor '{name}': the site must calibrate again.")
        if name not in expected:
            raise VectorError(f"{where} has the tensor '{name}', {of_others}.")
        if found[name] != expected[name]:
            raise VectorError(
                f"{where}: tensor '{name}' is {found[name]}, for this backbone it is "
                f"{expected[name]}."
            )


def fault_of(file: Tensors) -> str | None:
    """What no images can have given in a file whose tensors are as `read` asks, or None."""
    # Of means nothing is squared here: what follows from them fits itself.
    return classmeans.fault(_read_means(file)) if _MEANS in file.specs else fault(read(file))


def fault(moments: AnyMoments) -> str | None:
    """What no images can have given, or None.

    By the Cauchy-Schwarz inequality each feature's sum of squares is at least that of its classes'
    means; were it less, a head could be made to say anything.
    """
    if isinstance(moments, FindingMoments):
        return _fault_of_findings(moments)
    counts, sums, squares = moments.counts, moments.sums, moments.gram.diagonal()
    if not all(bool(t.isfinite().all()) for t in (sums, moments.gram)):
        return "holds NaN or infinite values"
    if bool((counts < 0).any()) or bool((sums[counts <= 0] != 0).any()):
        return "holds counts that do not fit its sums"
    if not moments.size:
        return "is of no image"
    explained = (sums.square() / counts.clamp(min=1)[:, None]).sum(dim=0)
    if bool((squares < explained - _ROUNDING * squares.abs().clamp(min=1)).any()):
        return "holds sums of squares that are too small for its sums"
    return None


def _fault_of_findings(moments: FindingMoments) -> str | None:
    annotated, totals, present = moments.annotated, moments.totals, moments.present
    if not all(bool(t.isfinite().all()) for t in (moments.grams, totals, present)):
        return "holds NaN or infinite values"
    if not moments.size:
        return "is of no image"
    if not torch.equal(torch.unique(annotated, dim=0), annotated):
        return "holds patterns that are not in ascending order, or one twice"
    if not bool(annotated.any(dim=1).all()) or bool((moments.sizes <= 0).any()):
        return "holds a pattern of no class or of no image"
    count, size = moments.positives, moments.sizes[:, None].expand_as(moments.positives)
    if bool((count[~annotated] != 0).any()) or bool((present[~annotated] != 0).any()):
        return "holds sums of classes that it says are not annotated"
    absent = totals[:, None, :] - present
    squares = moments.grams.diagonal(dim1=1, dim2=2)[:, None, :]
    slack = _ROUNDING * squares.abs().clamp(min=1) * size[:, :, None]
    wrong = (count < 0) | (count > size) | (present != 0).any(dim=2) & (count == 0)
    wrong |= (absent.square() > slack).any(dim=2) & (count == size)
    if bool(wrong.any()):
        return "holds counts that do not fit its sums"
    explained = present.square() / count.clamp(min=1)[:, :, None]
    explained = explained + absent.square() / (size - count).clamp(min=1)[:, :, None]
    if bool((squares < explained - _ROUNDING * squares.abs().clamp(min=1)).any()):
        return "holds sums of squares that are too small for its sums"
    return None


def _triangle(features: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(features, features)
    return rows, columns
