"""What a site says about its contribution; nothing else about the site ever leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from merge_kit.errors import ContributionError
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.schema import Digest, Document, SiteName, Timestamp, parse
from merge_kit.strictjson import read_json

Kind = Literal["vector", "fisher", "gram", "moments", "norms", "predictions"]
OF_A_MODEL: tuple[Kind, ...] = ("moments", "norms", "predictions")
"""What a site measures of a model that is there, or what a model of its own says: nothing that was
trained travels."""
LARGEST = 10**12  # numbers from outside stay within what floats and tensors can hold
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Number | Annotated[str, StringConstraints(pattern=r"^<[1-9][0-9]{0,8}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+!_-]{1,40}$")]
MANIFEST_LIMIT = 1 << 20
_OPTIONAL = (
    *("about", "absent_counts", "group_counts", "images", "other_images"),
    *("training", "validation", "compression"),
)


class Payload(Document):
    """The tensors that the manifest speaks for."""

    sha256: Digest
    size: int = Field(ge=0)
    norm: float = Field(ge=0)
    """L2 norm: of a vector over weights and heads, of statistics over all values."""


class Training(Document):
    """How the vector was trained."""

    steps: Number
    epochs: Number
    optimizer: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")]
    learning_rate: float = Field(gt=0)
    seed: int
    head: Digest | None = None
    """Of the federation's classifier that training started from and kept; None for the site's own.
    """

    @model_serializer(mode="wrap")
    def _without_an_empty_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As in `Draft`.
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if key != "head" or value is not None}


class Estimate(Document):
    """A figure with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None


class Validation(Document):
    """The site's own figures on its own validation images."""

    balanced_accuracy: Estimate
    macro_auroc: Estimate


class Software(Document):
    """Versions that made the vector."""

    merge_kit: Version
    python: Version
    torch: Version
    timm: Version


class Privacy(Document):
    """Differential privacy of the training, per image."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class Compression(Document):
    """What a vector gave up to be smaller."""

    method: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.:+]{1,40}$")]
    """As on the command line; see `merge_kit.compressing`."""
    error: float = Field(ge=0)
    """L2 norm of what was given up over that of the whole, over the weights of the body."""


class Draft(Document):
    """What a site's command knows of what it made; `publish` adds what that replaces."""

    format: Literal[1] = 1
    kind: Kind = "vector"
    about: Digest | None = None
    """Of statistics: digest of the payload of the vector that they speak of; of moments and norm
    statistics the fingerprint of the backbone; of predictions the digest of the set of images. A
    vector lacks it."""
    site: SiteName
    federation: Digest
    base: Digest
    payload: Payload
    class_counts: dict[str, Count]
    group_counts: dict[str, Count] | None = None
    """Training images whose label names a group of classes; None where there are none."""
    other_images: Count | None = None
    """Training images of classes that the federation does not have; None where there are none."""
    absent_counts: dict[str, Count] | None = None
    """Where an image may have several classes: training images that are known to lack each; None
    where each image has one class."""
    images: Count | None = None
    """Where an image may have several classes: training images in which any was annotated."""
    training: Training | None = None
    """What is `OF_A_MODEL` lacks it."""
    preprocessing: Digest
    validation: Validation | None = None
    """What is `OF_A_MODEL` lacks it."""
    privacy: Privacy | None = None
    compression: Compression | None = None
    """None where the vector is whole."""
    software: Software
    created_at: Timestamp

    @model_validator(mode="after")
    def _kind_fits(self) -> Draft:
        if (self.kind == "vector") != (self.about is None):
            raise ValueError("statistics name the vector that they are about, a vector names none")
        if {self.training is None, self.validation is None} != {self.kind in OF_A_MODEL}:
            raise ValueError(
                "'training' and 'validation' are of a vector, what is measured of a model has none"
            )
        if self.compression and self.kind != "vector":
            raise ValueError("'compression' is of a vector")
        return self

    @model_serializer(mode="wrap")
    def _without_an_empty_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A vector's manifest must keep the bytes, and so the id, that it had before statistics.
        fields: dict[str, Any] = serialize(self)
        absent = [k for k in _OPTIONAL if fields[k] is None]
        return {key: value for key, value in fields.items() if key not in absent}


class Manifest(Draft):
    """A published manifest."""

    supersedes: Digest | None = None

    def to_bytes(self) -> bytes:
        """The canonical bytes: what is signed, stored and hashed."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """Content hash of the contribution: the manifest names the payload's digest."""
        return sha256_bytes(self.to_bytes()).removeprefix("sha256:")


def suppress(counts: Mapping[str, int | str], minimum: int) -> dict[str, int | str]:
    """Class counts as they may leave a site: a count from 1 to minimum - 1 becomes "<minimum".

    Zero stays zero: whether a site has seen a class decides whose head rows are merged. A count
    that is hidden already stays hidden, behind the larger of the two minimums.
    """
    return {name: _suppress(count, minimum) for name, count in counts.items()}


def _suppress(count: int | str, minimum: int) -> int | str:
    if isinstance(count, str):
        return f"<{max(int(count[1:]), minimum)}"
    return count if count == 0 or count >= minimum else f"<{minimum}"


def suppressed_counts(fields: Mapping[str, Any], minimum: int) -> dict[str, Any]:
    """Fields of a manifest in which all that counts images may leave a site; see `suppress`."""
    told = dict(fields)
    for name in ("class_counts", "group_counts", "absent_counts"):
        if told.get(name) is not None:
            told[name] = suppress(told[name], minimum)
    for name in ("other_images", "images"):
        if told.get(name) is not None:
            told[name] = _suppress(told[name], minimum)
    return told


def count_of(count: int | str) -> float:
    """A published count as a number; "<N" stands for the middle of 1 to N - 1."""
    return count if isinstance(count, int) else int(count[1:]) / 2


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check a manifest's bytes.

    Raises
    ------
    ContributionError
        Too large, not JSON, an unknown or missing field, or not in canonical form.
    """
    if len(data) > MANIFEST_LIMIT:
        raise ContributionError(f"{where} has {len(data)} bytes, above {MANIFEST_LIMIT}: refused.")
    otherwise = f"{where} is not JSON: ask the site to publish again."
    content = read_json(data, where, ContributionError, otherwise)
    manifest = parse(Manifest, content, where, ContributionError)
    if manifest.to_bytes() != data:
        raise ContributionError(
            f"{where} is not in canonical form: it was not written by merge-kit, "
            "or changed afterwards."
        )
    return manifest


def read_draft(path: Path, command: str = "finetune") -> Draft:
    """Read the draft that a command left in a run folder."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ContributionError(
            f"{path} does not exist: the run is not finished; run 'merge-kit {command}' again."
        ) from None
    otherwise = f"{path} is not JSON: run 'merge-kit {command}' again."
    data = read_json(raw, str(path), ContributionError, otherwise)
    return parse(Draft, data, str(path), ContributionError)
