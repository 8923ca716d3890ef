"""Creating a federation: the folder that `init` writes, and sends where the hub is no folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_kit import backbone, signing
from merge_kit.errors import BaseMismatchError, FederationError, UsageError
from merge_kit.federation import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    FEDERATION_FILE,
    Federation,
    Policy,
    check_base,
    parse_federation,
    read_federation,
)
from merge_kit.files import new_folder, sha256_file, write_atomic
from merge_kit.hub import Hub, create_hub
from merge_kit.labelspace import LabelSpace
from merge_kit.tensorfile import fingerprint_file, write_tensors
from merge_kit.trust import check_latest, signed


@contextmanager
def place_of(hub: str) -> Iterator[Path]:
    """A folder for `create`: the one that a user named; or one that is sent to the hub that the
    user named, when the block ends without an error.

    Raises
    ------
    MergeKitError
        The hub cannot be reached, or holds a federation, or another base, already.
    """
    scheme, separator, rest = hub.partition("://")
    if not separator or scheme == "file":
        folder = Path(rest if separator else hub)
        yield folder
        check_latest(read_federation(folder), str(folder.absolute()), created=True)
        return
    opened = create_hub(hub)
    if opened.has(FEDERATION_FILE):
        raise UsageError(
            f"{opened.uri} holds a federation already: choose another place, or join this one."
        )
    with TemporaryDirectory(prefix="merge-kit-") as scratch:
        folder = Path(scratch) / "hub"
        yield folder
        _send(folder, opened)


def _send(folder: Path, hub: Hub) -> None:
    """The contract goes last: whoever is killed has created nothing, and starts again."""
    files = {Path(name).name: folder / name for name in (BASE_WEIGHTS, BASE_CONFIG)}
    if not hub.publish(Path(BASE_WEIGHTS).parent.as_posix(), files):
        there, federation = hub.fetch(BASE_WEIGHTS), read_federation(folder)
        try:
            check_base(federation, there, f"{hub.uri}/{BASE_WEIGHTS}")
            same = hub.read(BASE_CONFIG) == (folder / BASE_CONFIG).read_bytes()
        except BaseMismatchError:
            same = False
        if not same:
            raise FederationError(
                f"{hub.uri} holds another base already, of a federation that was never finished: "
                "remove it, or choose another place."
            )
    hub.replace(FEDERATION_FILE, (folder / FEDERATION_FILE).read_bytes(), None)
    check_latest(read_federation(folder), hub.uri, created=True)


def create(
    folder: Path,
    *,
    name: str,
    architecture: str,
    classes: Sequence[str],
    weights: str,
    model_args: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    policy: Policy,
    groups: Mapping[str, Sequence[str]] | None = None,
    multi_label: bool = False,
    seed: int = 0,
    allow_pickle: bool = False,
    key_file: Path | None = None,
) -> Federation:
    """Write a federation folder: the contract and the base.

    Parameters
    ----------
    weights
        ``pretrained``, ``none``, or the path of a local file: see `backbone.build`.
    preprocessing
        Values that replace the backbone's own data config; None leaves one as it is.
    groups
        Names for several classes at once: see `labelspace.LabelSpace`.
    multi_label
        An image has any number of the classes, or none.
    key_file
        The coordinator's private key, which is made if it is not there; None for a federation that
        nobody signs.

    Raises
    ------
    MergeKitError
        The folder exists, the backbone is unknown, the weights do not fit, a name is malformed.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another folder or remove this one.")
    if len(set(classes)) != len(classes):
        twice = next(c for c in classes if list(classes).count(c) > 1)
        raise FederationError(f"the class '{twice}' is named twice: name each class once.")
    tree = {name: tuple(members) for name, members in (groups or {}).items()}
    if tree and multi_label:
        raise UsageError(
            "--group is for images of one class each: leave it out with --multi-label, and name "
            "what a coarse label says as a class of its own."
        )
    try:
        LabelSpace(tuple(classes), tree)
    except ValueError as fault:  # before the backbone is fetched
        raise UsageError(f"--group: {fault}: correct it.") from fault
    model = backbone.build(
        architecture,
        classes,
        weights=weights,
        model_args=model_args,
        seed=seed,
        allow_pickle=allow_pickle,
    )
    chosen = backbone.preprocessing_of(model, preprocessing)
    classifier = backbone.classifier_names(model)
    with new_folder(folder) as draft:
        write_tensors(draft / BASE_WEIGHTS, model.state_dict(), ("format", "pt"))
        federation = parse_federation(
            {
                "name": name,
                "architecture": architecture,
                "model_args": dict(model_args),
                "classifier": classifier,
                "classes": tuple(classes),
                "groups": tree,
                "multi_label": multi_label,
                "preprocessing": chosen.model_dump(mode="json"),
                "weights_source": _source(architecture, weights, model),
                "base_fingerprint": fingerprint_file(draft / BASE_WEIGHTS),
                "policy": policy.model_dump(mode="json"),
                "coordinator": _coordinator(key_file) if key_file else None,
            },
            "the new federation",
        )
        if key_file:
            federation = signed(federation, key_file)
        write_atomic(draft / BASE_CONFIG, federation.model_config_json)
        write_atomic(draft / FEDERATION_FILE, federation.to_yaml())
    return federation


def _source(architecture: str, weights: str, model: Any) -> str:
    if weights == backbone.PRETRAINED:
        return str(model.pretrained_cfg.get("hf_hub_id") or f"timm {architecture}")
    if weights == backbone.NO_WEIGHTS:
        return "random"
    return f"local file {sha256_file(Path(weights))}"


def _coordinator(key_file: Path) -> str:
    return signing.public_key(key_file) if key_file.exists() else signing.create_key(key_file)
