"""Addresses of hubs as they stand in a federation's file: the same place, whoever reads them."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from merge_kit.errors import HubError

_FORMS = {
    "hf+https": "hf+https://host/owner/name",
    "hf+http": "hf+http://host/owner/name",
    "s3": "s3://bucket/folder",
    "gs": "gs://bucket/folder",
    "az": "az://container/folder",
    "sftp": "sftp://user@host/path",
}
_LONGEST = 1000
_REPOSITORY = 2
"""Parts of a repository's name: owner and name."""


def check_address(text: str) -> None:
    """Refuse what another machine could take for another place, and what holds a secret.

    Raises
    ------
    ValueError
        It is no absolute path and no full address, or holds a password or a query.
    """
    if len(text) > _LONGEST or not text.isprintable():
        raise ValueError(f"an address of a hub is one printable line of at most {_LONGEST} letters")
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not os.path.isabs(text) or os.path.normpath(text) != text or text == "/":
            raise ValueError("a hub in a folder is written as its absolute path")
        return
    if scheme not in _FORMS:
        raise ValueError(f"write the address in full, as {', '.join(_FORMS.values())} or a path")
    if any(mark in rest for mark in "\\ ?#"):
        raise ValueError("an address of a hub has no spaces, '?', '#' and backslashes in it")
    user, at, place = rest.rpartition("@")
    if (at and scheme != "sftp") or ":" in user or "@" in user:
        raise ValueError("an address of a hub holds no credentials: each reader has its own")
    host, *parts = place.split("/")
    if not host or not _has_port(text) or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"write the address as {_FORMS[scheme]}")
    if scheme.startswith("hf+") and len(parts) < _REPOSITORY:
        raise ValueError(f"write the address as {_FORMS[scheme]}")


def _has_port(text: str) -> bool:
    """Whether a port is a number, where there is one."""
    try:
        urlsplit(text.removeprefix("hf+")).port  # noqa: B018
    except ValueError:
        return False
    return True


def full_address(text: str) -> str:
    """The address of a hub that a user has named, as everybody else can read it: a folder by its
    absolute path, a repository with its server.

    Raises
    ------
    HubError
        It is no address of a hub.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        full = os.path.abspath(rest if separator else text)
    elif scheme in ("hf", "hf+https", "hf+http"):
        from merge_kit.hub.repository import named

        repository = named(text)
        full = f"hf+{repository.endpoint.address}/{repository.name}"
    else:
        full = text.rstrip("/")
    try:
        check_address(full)
    except ValueError as error:
        raise HubError(f"--hub: {error}.") from error  # not shown: it may hold credentials
    return full
