"""The contract that all sites share: read, validate, hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from merge_kit import signing
from merge_kit.configuration import ModelConfig
from merge_kit.errors import BaseMismatchError, FederationError, VectorError
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.keys import AdmittedSite, RetiredKey, RevokedKey, same_key_twice
from merge_kit.labelspace import LabelSpace
from merge_kit.remembered import Checked, look
from merge_kit.schema import Digest, Document, Place, SiteName, parse
from merge_kit.tensorfile import TensorFile, fingerprint, read_all
from merge_kit.yamlfile import dump_yaml, read_yaml

FEDERATION_FILE = "federation.yaml"
BASE_WEIGHTS = "base/model.safetensors"
BASE_CONFIG = "base/config.json"


def _is_one_line(text: str) -> str:
    # These reach terminals, model cards and reports: no escape, no line of another's making.
    if not text.isprintable():
        raise ValueError("control characters, line ends and invisible characters are not allowed")
    return text


ClassName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=100, strip_whitespace=True),
    AfterValidator(_is_one_line),
]
OneLine = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_is_one_line)]
Channels = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0)]


class Preprocessing(Document):
    """How an image becomes the input of the network; sites must do the same."""

    input_size: tuple[Pixels, Pixels, Pixels] = (3, 224, 224)
    mean: Channels = (0.485, 0.456, 0.406)
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    sixteen_bit: Literal["full", "minmax"] = "full"

    @field_validator("input_size")
    @classmethod
    def _is_square_colour(cls, size: tuple[int, int, int]) -> tuple[int, int, int]:
        if size[0] != 3 or size[1] != size[2] or size[1] < 16:
            raise ValueError("must be 3 channels and a square of at least 16 pixels")
        return size

    @property
    def hash(self) -> str:
        """Digest by which contributions say that they preprocessed alike."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json")))


class Bounds(Document):
    """What a federation, or a site, asks of each contribution; null for no bound."""

    maximum_norm: float | None = Field(default=None, gt=0)
    """Largest L2 norm of a vector."""
    minimum_examples: int | None = Field(default=None, ge=1)
    """Fewest training images, by the counts that are published ("<N" counts as 1)."""
    maximum_epsilon: float | None = Field(default=None, gt=0)
    """Largest epsilon of differential privacy; what states none is refused."""


class Policy(Bounds):
    """What the federation asks of each contribution."""

    minimum_class_count: int = Field(default=5, ge=1)
    """A class count below this is published as "<N"."""


def preprocessing_of(config: ModelConfig) -> Preprocessing:
    """What a model's config.json says of how images become its input.

    Raises
    ------
    VectorError
        It is no configuration of timm's, or a value is out of its range.
    """
    try:
        seen = dict(config.data["pretrained_cfg"])
        own = dict(config.data.get("merge_kit", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise VectorError(f"{config.path} is no timm configuration ({error}).") from error
    own.pop("groups", None)
    own.pop("multi_label", None)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    values = {**own, **{key: seen[key] for key in keys if key in seen}}
    return parse(Preprocessing, values, str(config.path), VectorError)


def groups_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Groups of classes that a model's config.json names.

    Raises
    ------
    VectorError
        They are no names.
    """
    try:
        groups = config.data.get("merge_kit", {}).get("groups", {})
        return {name: tuple(members) for name, members in groups.items()}
    except (TypeError, AttributeError) as error:
        raise VectorError(f"{config.path} is no timm configuration ({error}).") from error


def is_multi_label(config: ModelConfig) -> bool:
    """Whether a model's config.json says that an image may have several of its classes, or none.

    Raises
    ------
    VectorError
        It says neither yes nor no.
    """
    own = config.data.get("merge_kit", {})
    found = own.get("multi_label", False) if isinstance(own, dict) else None
    if not isinstance(found, bool):
        raise VectorError(
            f"{config.path} is no timm configuration ('multi_label' is neither true nor false)."
        )
    return found


_FIXED = {
    "format",
    "name",
    "architecture",
    "model_args",
    "classifier",
    "classes",
    "groups",
    "label_schema",
    "multi_label",
    "preprocessing",
    "weights_source",
    "base_fingerprint",
    "coordinator",
}
_LATER = {"groups", "multi_label", "coordinator", "serial", "retired", "revoked", "signature"}
"""Fields that older contracts do not have: left out where they are empty."""


class Federation(Document):
    """The contract. Policy, sites and keys may change, all else is fixed for good: see
    `contract_hash`."""

    format: Literal[1] = 1
    name: SiteName
    architecture: OneLine
    model_args: dict[str, Any] = Field(default_factory=dict)
    classifier: tuple[str, ...]
    classes: tuple[ClassName, ...] = Field(min_length=2)
    groups: dict[ClassName, tuple[ClassName, ...]] = Field(default_factory=dict)
    """Names of several classes or groups at once, for sites with coarser labels."""
    multi_label: bool = False
    """The classes are findings: an image has any number of them, or none."""
    label_schema: int = 1
    preprocessing: Preprocessing
    weights_source: OneLine
    base_fingerprint: Digest
    policy: Policy = Policy()
    sites: tuple[AdmittedSite, ...] = ()
    retired: tuple[RetiredKey, ...] = ()
    """Keys that sites have replaced: what they had signed by then counts."""
    revoked: tuple[RevokedKey, ...] = ()
    """Keys that nothing counts of any more."""
    coordinator: str | None = None
    """The key that signs this file; None where nobody does."""
    serial: int = Field(default=0, ge=0)
    """How often the file has been signed: an older one is not taken for the present one."""
    signature: str | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Federation:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        if len({site.name for site in self.sites}) != len(self.sites):
            raise ValueError("a site is named twice")
        if twice := same_key_twice(self.sites, self.retired, self.revoked):
            raise ValueError(f"the key {twice} is named twice")
        hubs = list(self.own_hubs.values())
        if shared := next((hub for hub in hubs if hubs.count(hub) > 1), None):
            raise ValueError(f"the hub {shared} is named for two sites")
        LabelSpace(self.classes, self.groups)
        if self.groups and self.multi_label:
            raise ValueError(
                "'groups' are for images of one class each, 'multi_label' for images of several"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_an_empty_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A contract must keep the hash that it had before there were groups, or findings.
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if key not in _LATER or value}

    @property
    def labels(self) -> LabelSpace:
        """The labels that a site's images may have."""
        return LabelSpace(self.classes, self.groups)

    @property
    def contract_hash(self) -> str:
        """Digest of what can never change; every vector names it.

        Policy, sites and their keys are left out: they change while contributions stay valid.
        """
        fixed = self.model_dump(mode="json", include=_FIXED)
        return sha256_bytes(canonical_json(fixed))

    @property
    def model_config_json(self) -> str:
        """The config.json by which ``timm.create_model("local-dir:...")`` rebuilds the model.

        It is always made from the contract: the file on a hub is covered by no fingerprint.
        """
        seen = self.preprocessing
        own: dict[str, Any] = {"sixteen_bit": seen.sixteen_bit}
        if self.groups:
            own["groups"] = {name: list(members) for name, members in self.groups.items()}
        if self.multi_label:
            own["multi_label"] = True
        config = {
            "architecture": self.architecture,
            "num_classes": len(self.classes),
            "label_names": list(self.classes),
            "model_args": self.model_args,
            "pretrained_cfg": {
                "input_size": list(seen.input_size),
                "mean": list(seen.mean),
                "std": list(seen.std),
                "interpolation": seen.interpolation,
                "crop_pct": seen.crop_pct,
                "crop_mode": "center",
                "num_classes": len(self.classes),
                "classifier": self.classifier[0]
                if len(self.classifier) == 1
                else list(self.classifier),
                "custom_load": False,
            },
            "merge_kit": own,
        }
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    def key_of(self, site: str) -> str | None:
        """Public key of an admitted site, or None."""
        return next((s.public_key for s in self.sites if s.name == site), None)

    def keys_of(self, site: str) -> frozenset[str]:
        """The keys by which a site speaks, or has spoken before it replaced them."""
        known = (*self.sites, *self.retired)
        return frozenset(one.public_key for one in known if one.name == site)

    def hub_of(self, site: str) -> str | None:
        """Address of the hub that a site has of its own; None where it has none."""
        return self.own_hubs.get(site)

    @property
    def own_hubs(self) -> dict[str, str]:
        """Addresses of the hubs that sites have of their own, by site."""
        admitted = {site.name for site in self.sites}
        gone = [one for one in self.revoked if one.name not in admitted]
        return {one.name: one.hub for one in (*gone, *self.sites) if one.hub}

    def revocation_of(self, key: str) -> RevokedKey | None:
        """When and whose a key was that counts no more; None where it was not revoked."""
        return next((gone for gone in self.revoked if gone.public_key == key), None)

    def admit(self, site: str, key: str) -> Federation:
        """The federation with one more site; one that was out keeps the hub that it had.

        Raises
        ------
        FederationError
            The name or key is malformed, or known otherwise.
        """
        known = self.key_of(site)
        if known == key:
            return self
        if known is not None:
            raise FederationError(
                f"site '{site}' is admitted with another key ({known}): choose another name; or, "
                "if it has a new key, replace the old one with --rotate."
            )
        signing.parse_public_key(key)
        everybody = (*self.sites, *self.retired, *self.revoked)
        if twin := next((one.name for one in everybody if one.public_key == key), None):
            raise FederationError(
                f"this key is known as one of the site '{twin}': a key is used once, ask '{site}' "
                "for theirs."
            )
        told = {"name": site, "public_key": key, "hub": self.hub_of(site)}
        newcomer = parse(AdmittedSite, told, f"site '{site}'", FederationError)
        sites = tuple(sorted((*self.sites, newcomer), key=lambda s: s.name))
        return self.model_copy(update={"sites": sites})

    def with_hub(self, site: str, address: str | None) -> Federation:
        """The federation in which an admitted site has another hub of its own, or none.

        Raises
        ------
        FederationError
            The address is malformed, or another site's.
        """
        if self.hub_of(site) == address:
            return self
        if twin := next((name for name, hub in self.own_hubs.items() if hub == address), None):
            raise FederationError(
                f"{address} is the hub of the site '{twin}': each site has one of its own, as it "
                "speaks for itself alone."
            )
        told = {"name": site, "public_key": self.key_of(site), "hub": address}
        changed = parse(AdmittedSite, told, f"site '{site}'", FederationError)
        sites = tuple(changed if one.name == site else one for one in self.sites)
        return self.model_copy(update={"sites": sites})

    def to_sign(self) -> bytes:
        """What the coordinator signs: all but the signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def to_yaml(self) -> str:
        """The text of federation.yaml."""
        return dump_yaml(self)


def parse_federation(data: Mapping[str, Any], where: str | Place) -> Federation:
    """Check the content of a federation.yaml."""
    return parse(Federation, data, where, FederationError)


def read_federation(folder: Path) -> Federation:
    """Read and check the contract in a federation's folder.

    Raises
    ------
    FederationError
        `folder` holds no federation, or one that breaks the format.
    """
    path = folder / FEDERATION_FILE
    if not path.is_file():
        raise FederationError(
            f"{folder} is not a federation: it has no {FEDERATION_FILE}; "
            "create one with 'merge-kit init'."
        )
    file = read_yaml(path, FederationError)
    return parse_federation(file.data, file.place)


class BaseTensors(Document):
    """What reading the base's file finds."""

    fingerprint: Digest


def _fingerprinted(file: TensorFile) -> BaseTensors:
    return BaseTensors(fingerprint=fingerprint(read_all(file)))


def check_base(
    federation: Federation, weights: Path, where: str, *, again: bool = False
) -> Checked:
    """Compare the base weights with the fingerprint in the contract; `where` names them.

    Relies on an earlier reading of the same file unless `again`.

    Raises
    ------
    BaseMismatchError
        They are not the weights that the federation was created with.
    """
    with TensorFile(weights) as file:
        found, checked = look(file, BaseTensors, _fingerprinted, again=again)
    if found.fingerprint != federation.base_fingerprint:
        raise BaseMismatchError(
            f"{where} has the fingerprint {found.fingerprint}, the federation '{federation.name}' "
            f"expects {federation.base_fingerprint}: fetch the base again."
        )
    return checked
