"""Hubs: where contributions lie."""

from __future__ import annotations

from pathlib import Path

from merge_kit.errors import HubError, MissingExtraError
from merge_kit.hub.base import Hub
from merge_kit.hub.folder import FolderHub

__all__ = ["FolderHub", "Hub", "open_hub"]

_OBJECT_STORES = ("s3", "gs", "az")


def open_hub(uri: str) -> Hub:
    """Open the hub that a user named: a folder, as a path or a file:// URI, or another storage.

    Raises
    ------
    HubError
        The folder does not exist, or the scheme is not supported.
    MissingExtraError
        What the storage needs is not installed.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme in _OBJECT_STORES:
        return _object_hub(uri)
    if separator and scheme != "file":
        raise HubError(f"'{uri}': hubs of the kind '{scheme}' are not supported; use a folder.")
    path = Path(rest if separator else uri)
    if not path.is_dir():
        raise HubError(f"the hub {path} is not there: check the path, or mount the share.")
    return FolderHub(path.absolute())


def _object_hub(uri: str) -> Hub:
    try:
        from merge_kit.hub.objects import ObjectHub
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "obstore":
            raise
        raise MissingExtraError("s3", "a hub in an object store") from error
    return ObjectHub(uri)
