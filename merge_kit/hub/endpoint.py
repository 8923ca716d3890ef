"""Servers that speak the Hugging Face Hub's protocol, and which token belongs to which of them.

The client library sends the user's token wherever it is pointed: to a server that a listing's next
page, a redirect or an upload's verification names too. Here a token leaves for its own server only.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_session, get_token

from merge_kit.errors import HubError

HUGGING_FACE = "https://huggingface.co"
TIMEOUT = 60.0
"""Seconds for which a server may be silent."""
_PORTS = {"http": 80, "https": 443}
_HOMES: dict[str, set[tuple[str, str, int | None]]] = {}
"""The servers that each token may be sent to."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, with the token that belongs to it."""

    url: str
    token: str | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """Its name for a sentence, without anything secret."""
        return self.address.removeprefix("https://").removeprefix("http://")

    @property
    def address(self) -> str:
        """Its address without anything secret."""
        return without_secrets(self.url)

    def uri(self, name: str) -> str:
        """How a repository there is written: the same, wherever and whenever it is opened."""
        return f"hf://{name}" if self.url == HUGGING_FACE else f"hf+{self.address}/{name}"

    @property
    def authorization(self) -> str | bool:
        """What the client library takes for "this token, or none": None would be the user's."""
        return self.token or False


def chosen() -> Endpoint:
    """The server that the environment names, Hugging Face's own if none.

    HF_TOKEN belongs to the server that HF_ENDPOINT names. A token that 'hf auth login' has stored
    was given out by huggingface.co, and goes nowhere else.

    Raises
    ------
    HubError
        HF_ENDPOINT is no address.
    """
    asked = os.environ.get("HF_ENDPOINT", "").strip() or HUGGING_FACE
    url = asked.rstrip("/")
    if not _is_address(url):
        raise HubError(
            f"HF_ENDPOINT is '{without_secrets(asked)}', which is no address: write it as "
            "https://hub.example.org."
        )
    token = get_token() if url == HUGGING_FACE else os.environ.get("HF_TOKEN", "").strip()
    return Endpoint(url, token or None)


def at(address: str) -> Endpoint:
    """The server at an address; with a token only if it is the one that the environment names.

    Raises
    ------
    HubError
        It is no address, or HF_ENDPOINT is none.
    """
    if not _is_address(address):
        raise HubError(
            f"'{without_secrets(address)}' is no address of a server: write the hub as "
            "hf+https://hub.example.org/owner/name."
        )
    own = chosen()
    return own if own.address == address else Endpoint(address)


def prepare_session(endpoint: Endpoint) -> None:
    """Make the client library's session guard the token, and wait no longer than it should.

    To be called before each use: the library makes a new session after some faults.
    """
    if endpoint.token:
        _HOMES.setdefault(endpoint.token, set()).add(_origin(endpoint.url))
    session = get_session()
    hooks = session.event_hooks
    if _before_sending not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _before_sending]}


def _before_sending(request: Any) -> None:
    """Take a token out of a request to another server than its own; and wait for no answer for
    ever, as the library would for most."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    homes = _HOMES.get(token)
    if homes is not None and _origin(str(request.url)) not in homes:
        del request.headers["authorization"]
    limits = request.extensions.get("timeout") or {}
    if not any(limits.values()):
        limits = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT)
        request.extensions["timeout"] = limits


def _origin(url: str) -> tuple[str, str, int | None]:
    place = urlsplit(url)
    return place.scheme, place.hostname or "", place.port or _PORTS.get(place.scheme)


def _is_address(url: str) -> bool:
    try:
        place = urlsplit(url)
        _ = place.port  # may be malformed
    except ValueError:
        return False
    return place.scheme in _PORTS and bool(place.hostname) and " " not in url


def without_secrets(text: str) -> str:
    """A text whose addresses have lost their passwords, and the queries that signatures stand in;
    on one line, and without what would drive a terminal."""
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1", text)
    text = re.sub(r"(\w+://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)
    for token in _HOMES:
        text = text.replace(token, "<token>")
    return "".join(c if c.isprintable() else " " for c in text)


class _Discreet(logging.Filter):
    """Keep secrets out of what the client library logs, and what we ask for on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        text = record.getMessage()
        record.msg, record.args = without_secrets(text), ()
        return "not supported by Xet" not in text and "Skipping to prevent empty commit" not in text


for _name in ("_commit_api", "hf_api", "lfs", "utils._http"):
    logging.getLogger(f"huggingface_hub.{_name}").addFilter(_Discreet())
