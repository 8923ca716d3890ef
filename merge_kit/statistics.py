"""What sites may publish beside a vector (Fisher, Gram), and of a model that is there (moments,
norm statistics).

Checked as strictly as vectors: what names a tensor of the base must fit it, and its values must be
such as the figures can have.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal

import torch

from merge_kit import momentsfile, normstats, predictionsfile, vector
from merge_kit.errors import ContributionError, VectorError
from merge_kit.manifest import OF_A_MODEL, Kind
from merge_kit.parameters import Role
from merge_kit.schema import Digest, Document
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec
from merge_kit.vector import Origin

REMEDY = "the site must make its statistics again."
_MERGED = (Role.WEIGHT, Role.HEAD)


class StatisticsHeader(Origin):
    """What a file of statistics says of itself, in its one metadata key."""

    kind: Literal["fisher", "gram", "moments", "norms", "predictions"]
    about: Digest


def fisher_specs(
    expected: Mapping[str, TensorSpec], roles: Mapping[str, Role]
) -> dict[str, TensorSpec]:
    """What a diagonal Fisher holds of the tensors of a vector: weights and heads, float32."""
    return {name: spec for name, spec in expected.items() if roles[name] in _MERGED}


def gram_specs(
    expected: Mapping[str, TensorSpec], roles: Mapping[str, Role]
) -> dict[str, TensorSpec]:
    """What Gram matrices may hold: (d, d) float32 for a weight of shape (out, d) or (out, i, k, l),
    d = i k l.
    """
    return {
        name: TensorSpec(torch.float32, (columns, columns))
        for name, spec in fisher_specs(expected, roles).items()
        if name.endswith("weight") and (columns := _columns(spec.shape))
    }


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:]) if len(shape) in (2, 4) else 0


def check_header(file: TensorFile, kind: Kind, about: str | None, where: str) -> StatisticsHeader:
    """The header of a file of statistics, which must be what its manifest says.

    Raises
    ------
    VectorError
        The header breaks the format.
    ContributionError
        The file is of another kind or speaks of another vector.
    """
    header = vector.parse_header(file, StatisticsHeader, "holds no statistics")
    if header.kind != kind:
        raise ContributionError(
            f"{where} is announced as {kind} and holds {header.kind}: it is refused."
        )
    if header.about != about:
        of = "the backbone" if kind in OF_A_MODEL else "the vector"
        of = "the images" if kind == "predictions" else of
        raise ContributionError(
            f"{where} is announced for {of} {about} and holds the {kind} of {header.about}: "
            "it is refused."
        )
    return header


class Measured(Document):
    """What one reading of a file of statistics finds; it depends on the bytes alone."""

    sha256: Digest
    norm: float | None
    """L2 norm of all values; None when one is NaN or infinite."""
    sound: tuple[Kind, ...]
    """The kinds that the values can be of, as `check` says it."""


def measure(file: TensorFile) -> Measured:
    """Digest of the bytes and what `check` asks of the values, from one pass over a file.

    Memory is one tensor's.
    """
    digest, total, sound = hashlib.sha256(file.start), 0.0, {"fisher", "gram"}
    for name in file.in_file_order():
        tensor = file.read(name)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        total += float(tensor.double().square().sum())
        if bool((tensor < 0).any()):
            sound.discard("fisher")
        square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
        if not square or not torch.equal(tensor, tensor.T) or bool((tensor.diagonal() < 0).any()):
            sound.discard("gram")
    norm = math.sqrt(total) if math.isfinite(total) else None
    if _fault_of_moments(file) is None:
        sound.add("moments")
    if _fault_of_norms(file) is None:
        sound.add("norms")
    if _fault_of_predictions(file) is None:
        sound.add("predictions")
    return Measured.model_validate(
        {"sha256": f"sha256:{digest.hexdigest()}", "norm": norm, "sound": sorted(sound)}
    )


def _fault_of_moments(file: TensorFile) -> str | None:
    alike = (momentsfile.specs_like(file.specs, multi_label=flag) for flag in (False, True))
    if dict(file.specs) not in alike:
        return "holds no moments"
    return momentsfile.fault_of(file)


def _fault_of_norms(file: TensorFile) -> str | None:
    if not normstats.looks_so(file):
        return "holds no norm statistics"
    return normstats.fault(normstats.read(file))


def _fault_of_predictions(file: TensorFile) -> str | None:
    if not predictionsfile.looks_so(file.specs):
        return "holds no predictions"
    if found := predictionsfile.fault(file):
        return found
    header = vector.parse_header(file, StatisticsHeader, "holds no statistics")
    if predictionsfile.read(file).about != header.about:
        return "is of other images than it says"
    return None


def check_specs(
    file: TensorFile,
    kind: Kind,
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    *,
    multi_label: bool = False,
) -> None:
    """Compare names, shapes and dtypes with what the base asks for; as in `check`."""
    if kind in ("moments", "predictions"):
        heads = [n for n, r in roles.items() if r is Role.HEAD and n.endswith("weight")]
        classes, features = expected[heads[0]].shape[:2]
    if kind == "moments":
        momentsfile.check_specs(
            file.specs, features, classes, str(file.path), multi_label=multi_label
        )
    elif kind == "predictions":
        predictionsfile.check_specs(file.specs, classes, str(file.path))
    elif kind == "norms":
        normstats.check_specs(file.specs, expected, roles, str(file.path))
    elif kind == "fisher":
        vector.check_specs(file, fisher_specs(expected, roles))
    else:
        _check_gram_specs(file, gram_specs(expected, roles))


def check(
    file: TensorFile,
    kind: Kind,
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    *,
    multi_label: bool = False,
) -> float:
    """Check names, shapes, dtypes and every value; gives the L2 norm of all values.

    A Fisher diagonal has every weight and head of the base, finite and not negative. Gram matrices
    may be there for some weights only; each is finite and symmetric, its diagonal not negative.
    Moments and norm statistics are such as images can have given.

    Parameters
    ----------
    expected
        What a vector of this base holds.
    multi_label
        Moments are those of findings.

    Raises
    ------
    VectorError
        Names the tensor and what is wrong with it.
    """
    check_specs(file, kind, expected, roles, multi_label=multi_label)
    faults = {
        "moments": (_fault_of_moments, "calibrate"),
        "norms": (_fault_of_norms, "calibrate"),
        "predictions": (_fault_of_predictions, "run 'merge-kit predict-proxy'"),
    }
    if kind in faults and (fault := faults[kind][0](file)):
        raise VectorError(f"{file.path} {fault}: the site must {faults[kind][1]} again.")
    total = 0.0
    for name, tensor in vector.read_checked(file, REMEDY):
        if kind == "gram" and not torch.equal(tensor, tensor.T):
            raise VectorError(f"{file.path}: tensor '{name}' is not symmetric: {REMEDY}")
        squares = tensor.diagonal() if kind == "gram" else tensor
        if kind not in faults and (bad := int((squares < 0).sum())):
            where = "" if kind == "fisher" else " on its diagonal"
            raise VectorError(
                f"{file.path}: tensor '{name}' holds {bad} value(s) below 0{where}, "
                f"where squares belong: {REMEDY}"
            )
        total += float(tensor.double().square().sum())
    return math.sqrt(total)


def _check_gram_specs(file: TensorFile, allowed: Mapping[str, TensorSpec]) -> None:
    if not file.specs:
        raise VectorError(f"{file.path} holds no Gram matrix: {REMEDY}")
    for name, spec in file.specs.items():
        if name not in allowed:
            raise VectorError(
                f"{file.path} has the tensor '{name}', which is no linear or convolutional weight "
                "of the base."
            )
        if spec != allowed[name]:
            raise VectorError(
                f"{file.path}: tensor '{name}' is {spec}, the Gram matrix of this weight is "
                f"{allowed[name]}."
            )
