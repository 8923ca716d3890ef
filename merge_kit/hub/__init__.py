"""Hubs: where contributions lie."""

from __future__ import annotations

from pathlib import Path

from merge_kit.errors import HubError, UsageError
from merge_kit.hub.base import Hub
from merge_kit.hub.folder import FolderHub

__all__ = ["FolderHub", "Hub", "by_pull_request", "create_hub", "open_hub", "pull_request_of"]


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


def create_hub(uri: str) -> Hub:
    """Open a place for a new federation; a repository that is not there is made, and is private."""
    hub = open_hub(uri)
    create = getattr(hub, "create", None)
    if create is not None:
        create()
    return hub


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
