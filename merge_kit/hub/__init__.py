"""Hubs: where contributions lie."""

from __future__ import annotations

from pathlib import Path

from merge_kit.errors import HubError
from merge_kit.hub.base import Hub
from merge_kit.hub.folder import FolderHub

__all__ = ["FolderHub", "Hub", "open_hub"]


def open_hub(uri: str) -> Hub:
    """Open the hub that a user named.

    A folder, as a path or a file:// URI; or ``hf://owner/name``, a repository on the Hugging Face
    Hub.

    Raises
    ------
    HubError
        The folder does not exist, or the scheme is not supported.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme == "hf" and separator:
        from merge_kit.hub.huggingface import open_repository

        return open_repository(uri)
    if separator and scheme != "file":
        raise HubError(f"'{uri}': hubs of the kind '{scheme}' are not supported; use a folder.")
    path = Path(rest if separator else uri)
    if not path.is_dir():
        raise HubError(f"the hub {path} is not there: check the path, or mount the share.")
    return FolderHub(path.absolute())
