"""What a merged model says it was made of, read strictly: the file may come from anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from merge_kit.contributions import Trust
from merge_kit.devices import CPU
from merge_kit.errors import ProvenanceError
from merge_kit.manifest import Version
from merge_kit.methods.base import Statistics
from merge_kit.schema import Digest, Document, SiteName, parse
from merge_kit.strictjson import read_json

PROVENANCE = "provenance.json"
PROVENANCE_LIMIT = 64 << 20
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, StringConstraints(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
SignatureText = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
DeviceName = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,100}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
FolderName = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class Contract(Document):
    """The federation that the model belongs to."""

    name: SiteName
    hash: Digest


class Stated(Document):
    """A contribution, as a model's provenance names it; also moments that a classifier is of."""

    id: Id
    site: SiteName
    payload: Digest
    trust: Trust
    public_key: Key | None
    signature: SignatureText | None

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.site}/{self.id[:12]}"


class Ingredient(Stated):
    """A contribution that was merged."""

    weight: float
    statistics: dict[Statistics, Id] = Field(default_factory=dict)
    """Contributions that were used beside the vector, by kind."""


class OwnImages(Document):
    """Images at the merger: how many, and a digest of the sorted digests of their contents."""

    count: int = Field(ge=1)
    sha256: Digest


class HeadRecord(Document):
    """How the classifier was solved."""

    about: Digest
    """Fingerprint of the backbone."""
    options: dict[str, Any]
    moments: tuple[Stated, ...]
    images: OwnImages | None = None
    """Labelled ones that lay at the merger."""

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> HeadRecord:
        if len({part.id for part in self.moments}) != len(self.moments):
            raise ValueError("moments are named twice")
        if not self.moments and self.images is None:
            raise ValueError("a classifier comes from moments, or from images")
        return self


class NormRecord(Document):
    """Where norm statistics were measured again, on the merged weights."""

    about: Digest
    """Fingerprint of what was measured: of the backbone by sites, of the model by the merger."""
    sums: tuple[Stated, ...] = ()
    """What sites published."""
    images: OwnImages | None = None

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> NormRecord:
        if bool(self.sums) == (self.images is not None):
            raise ValueError("norm statistics come from sites, or from images")
        if len({part.id for part in self.sums}) != len(self.sums):
            raise ValueError("norm statistics are named twice")
        return self


class OtherTeacher(Document):
    """A model that taught and is no contribution."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    fingerprint: Digest
    weight: float


class StatedTeacher(Stated):
    """Predictions that taught."""

    about: Digest
    """Of the set of images that they are of."""
    weight: float


class Synthesised(Document):
    """Images that were made from the teachers, as the recipe says under 'synthesis'."""

    probability: float = Field(ge=0, le=1)
    """Mean probability, by the teachers that an image was made from, of the class that it is to
    show."""


class DistilRecord(Document):
    """What a distilled model learnt from, beside the contributions."""

    start: Digest
    """Fingerprint of the weights that it started from."""
    other_backbone: ModelName | None = None
    """The timm name of a student that is not of the federation's backbone."""
    images: OwnImages
    """Without labels."""
    synthesised: Synthesised | None = None
    """Where the images were made from the teachers themselves."""
    labelled: OwnImages | None = None
    """By which it was learnt how much each teacher counts."""
    others: tuple[OtherTeacher, ...] = ()
    predictions: tuple[StatedTeacher, ...] = ()
    """Of models that stay at their sites."""


class Refused(Document):
    """An entry of the hub that was left out; whoever put it there chose its names."""

    site: FolderName
    id: FolderName


class Versions(Document):
    """What merged."""

    merge_kit: Version
    torch: Version
    device: DeviceName = CPU.name


class Provenance(Document):
    """provenance.json of a merge of a hub's contributions."""

    format: Literal[1]
    federation: Contract
    base: Digest
    merged: Digest
    """Fingerprint of the merged tensors."""
    recipe: dict[str, Any] | None
    """None where the backbone is the base's."""
    contributions: tuple[Ingredient, ...]
    refused: tuple[Refused, ...]
    software: Versions
    head: HeadRecord | None = None
    """Where the classifier was solved from moments."""
    norms: NormRecord | None = None
    """Where norm statistics were measured again, before that."""
    distilled: DistilRecord | None = None
    """Where a student learnt what the contributions' models say; then `recipe` is a distillation's,
    and a contribution's weight its share of what was said."""

    @field_validator("contributions")
    @classmethod
    def _each_once(cls, found: tuple[Ingredient, ...]) -> tuple[Ingredient, ...]:
        if len({part.id for part in found}) != len(found):
            raise ValueError("a contribution is named twice")
        return found

    @model_validator(mode="after")
    def _something_was_made(self) -> Provenance:
        if self.distilled:
            taught = self.contributions or self.distilled.others or self.distilled.predictions
            if self.recipe is None or not taught:
                raise ValueError("a distilled model has a recipe and teachers")
            return self
        if bool(self.contributions) != (self.recipe is not None):
            raise ValueError("a recipe goes with contributions")
        if self.recipe is None and (self.head is None or self.norms):
            raise ValueError("contributions are missing")
        return self

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """What was merged, in the order of the file."""
        return self.contributions


class PlainInput(Document):
    """A checkpoint, or a task vector, that was merged."""

    name: SiteName
    kind: Literal["checkpoint", "vector"]
    fingerprint: Digest
    """Of its tensors, in whatever files they lie."""
    weight: float

    @property
    def id(self) -> str:
        """The digits of the fingerprint: what a merge sorts by."""
        return self.fingerprint.removeprefix("sha256:")

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.name}/{self.id[:12]}"


class PlainProvenance(Document):
    """provenance.json of a merge of plain checkpoints: names and fingerprints, no signatures."""

    format: Literal[1]
    base: Digest
    merged: Digest
    """Fingerprint of the merged tensors."""
    recipe: dict[str, Any]
    inputs: tuple[PlainInput, ...] = Field(min_length=1)
    software: Versions
    norms: NormRecord | None = None
    """Where norm statistics were measured again."""

    @field_validator("inputs")
    @classmethod
    def _each_once(cls, found: tuple[PlainInput, ...]) -> tuple[PlainInput, ...]:
        if len({one.fingerprint for one in found}) != len(found):
            raise ValueError("a fingerprint is named twice")
        if len({one.name for one in found}) != len(found):
            raise ValueError("a name is given twice")
        return found

    @property
    def ingredients(self) -> tuple[PlainInput, ...]:
        """What was merged, in the order of the file."""
        return self.inputs


def read_provenance(folder: Path) -> Provenance | PlainProvenance:
    """Read and check the provenance of a merged model; the key 'federation' tells which it is.

    Raises
    ------
    ProvenanceError
        The folder has none, or it breaks the format.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise ProvenanceError(
            f"{folder} is no merged model: it has no {PROVENANCE}; give a folder that "
            "'merge-kit merge' made."
        )
    try:
        with path.open("rb") as file:
            raw = file.read(PROVENANCE_LIMIT + 1)
    except OSError as error:
        raise ProvenanceError(f"{path} cannot be read: {error.strerror}.") from error
    if len(raw) > PROVENANCE_LIMIT:
        raise ProvenanceError(f"{path} has more than {PROVENANCE_LIMIT} bytes: it is refused.")
    otherwise = f"{path} is not sound JSON: it was changed or damaged."
    data = read_json(raw, str(path), ProvenanceError, otherwise)
    if isinstance(data, dict) and "federation" not in data:
        return parse(PlainProvenance, data, str(path), ProvenanceError)
    return parse(Provenance, data, str(path), ProvenanceError)
