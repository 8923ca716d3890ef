"""Hubs: where contributions lie."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

from merge_kit.errors import HubError, MissingExtraError, UsageError
from merge_kit.hub.base import READERS, Hub, places
from merge_kit.hub.folder import FolderHub

__all__ = [
    "READERS",
    "FolderHub",
    "Hub",
    "by_pull_request",
    "create_hub",
    "create_missing",
    "is_there",
    "open_hub",
    "places",
    "pull_request_of",
    "shows_cards",
]

_OBJECT_STORES = ("s3", "gs", "az")


def open_hub(uri: str) -> Hub:
    """Open the hub that a user named.

    A folder, as a path or a file:// URI; ``hf://owner/name``, a repository on the Hugging Face Hub
    (``hf+https://host/owner/name`` with another server); ``s3://bucket/prefix`` (or ``gs://``,
    ``az://``), a place in an object store; or ``sftp://user@host/path``.

    Raises
    ------
    HubError
        The folder does not exist, the URI is malformed, or the scheme is not supported.
    MissingExtraError
        What the storage needs is not installed.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme in ("hf", "hf+https", "hf+http") and separator:
        from merge_kit.hub.huggingface import open_repository

        return open_repository(uri)
    if separator and scheme in _OBJECT_STORES:
        return _object_hub(uri)
    if separator and scheme == "sftp":
        return _sftp_hub(uri)
    if separator and scheme != "file":
        raise HubError(
            f"'{uri}': there are no hubs of the kind '{scheme}'; there are folders (a path, or "
            "file://), hf://, s3://, gs://, az:// and sftp://."
        )
    path = Path(rest if separator else uri)
    if not path.is_dir():
        raise HubError(f"the hub {path} is not there: check the path, or mount the share.")
    return FolderHub(path.absolute())


def create_hub(uri: str) -> Hub:
    """Open a place for a new federation; a repository that is not there is made, and is private."""
    hub = open_hub(uri)
    _create(hub)
    return hub


def _create(hub: Hub) -> None:
    create = getattr(hub, "create", None)
    if create is not None:
        create()


def is_there(hub: Hub) -> bool:
    """Whether an opened hub is there: a repository may still have to be made."""
    exists = getattr(hub, "exists", None)
    return exists is None or bool(exists())


def create_missing(hub: Hub) -> None:
    """Make a repository where it is not there, private; one that is there stays as it is."""
    if not is_there(hub):
        _create(hub)


@runtime_checkable
class Described(Hub, Protocol):
    """A hub that people look at by pages: those that the README.md files make."""

    def is_described(self, card: bytes) -> bool:
        """Whether the page at its top is this one already, or is not ours to write."""

    def describe(self, card: bytes) -> None:
        """Put the page at its top."""


def shows_cards(hub: Hub) -> TypeGuard[Described]:
    """Whether people look at what lies there by pages."""
    return isinstance(hub, Described)


def by_pull_request(hub: Hub) -> Hub:
    """The same hub for whom may not write to it: what is published is proposed as pull requests.

    Raises
    ------
    UsageError
        The hub has none.
    """
    propose = getattr(hub, "by_pull_request", None)
    if propose is None:
        raise UsageError(
            f"--create-pr is for repositories on the Hugging Face Hub (hf://owner/name), and "
            f"{hub.uri} is none: leave it out."
        )
    proposing: Hub = propose()
    return proposing


def pull_request_of(hub: Hub, folder: str) -> str | None:
    """The address of the pull request with which an entry waits; None where it does not."""
    proposed: dict[str, str] = getattr(hub, "proposed", {})
    return proposed.get(folder)


def _object_hub(uri: str) -> Hub:
    try:
        from merge_kit.hub.objects import ObjectHub
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "obstore":
            raise
        raise MissingExtraError("s3", "a hub in an object store") from error
    return ObjectHub(uri)


def _sftp_hub(uri: str) -> Hub:
    try:
        import asyncssh  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("sftp", "a hub on an SFTP server") from error
    from merge_kit.hub.sftp import SftpHub

    return SftpHub(uri)
