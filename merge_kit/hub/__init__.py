"""Hubs: where contributions lie."""

from __future__ import annotations

from pathlib import Path

from merge_kit.errors import HubError, MissingExtraError
from merge_kit.hub.base import Hub
from merge_kit.hub.folder import FolderHub

__all__ = ["FolderHub", "Hub", "open_hub"]


def open_hub(uri: str) -> Hub:
    """Open the hub that a user named: a folder, as a path or a file:// URI, or an sftp:// URI.

    Raises
    ------
    HubError
        The folder does not exist, the URI is malformed, or the scheme is not supported.
    MissingExtraError
        The library for this kind of hub is not installed.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "sftp":
        return _sftp(uri)
    if separator and scheme != "file":
        raise HubError(f"'{uri}': hubs of the kind '{scheme}' are not supported; use a folder.")
    path = Path(rest if separator else uri)
    if not path.is_dir():
        raise HubError(f"the hub {path} is not there: check the path, or mount the share.")
    return FolderHub(path.absolute())


def _sftp(uri: str) -> Hub:
    try:
        import asyncssh  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("sftp", "a hub on an SFTP server") from error
    from merge_kit.hub.sftp import SftpHub

    return SftpHub(uri)
