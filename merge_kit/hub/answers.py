"""What a server of the Hugging Face Hub's protocol did wrong, as one sentence each."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Literal, TypeAlias

from huggingface_hub import __version__
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

from merge_kit.errors import UnreachableError
from merge_kit.hub import endpoint as servers
from merge_kit.hub.endpoint import Endpoint, without_secrets

AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""
LONGEST_WAIT = 300.0
Doing: TypeAlias = Literal["read", "write", "make"]
OVERTAKEN = frozenset({409, 412})
"""Answers to a commit whose parent is not the head any more."""


def status_of(error: BaseException) -> int | None:
    """The server's answer, where there is one."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    status = status_of(error)
    if status is not None:
        return status in AGAIN
    if isinstance(error, OfflineModeIsEnabled) or _reason(error, socket.gaierror):
        return False
    if "client has been closed" in str(error):  # by another thread, which lost its connection
        return True
    if _reason(error, JSONDecodeError):  # an answer was damaged on its way
        return True
    return "certificate" not in str(error) and "TransportError" in _kinds(error)


def asked_pause(error: BaseException) -> float:
    """Seconds that the server asks to wait, at most `LONGEST_WAIT`; 0 where it does not ask."""
    response = next((r for one in _chain(error) if (r := getattr(one, "response", None))), None)
    if response is None or status_of(error) not in AGAIN:
        return 0.0
    asked = response.headers.get("retry-after", "")
    if not asked.isdigit():
        found = re.search(r"\br=0;\s*t=(\d+)", response.headers.get("ratelimit", ""))
        asked = found[1] if found else "0"
    return min(float(asked), LONGEST_WAIT)


def explained(error: Exception, where: Endpoint, name: str, doing: Doing) -> UnreachableError:
    """The sentence for whoever is at the keyboard; `name` is the repository's."""
    return UnreachableError(_sentence(error, where, name, doing))


def discreet(error: Exception) -> RuntimeError:
    """What the library said, as a cause that tells no secrets."""
    told = " from ".join(f"{type(one).__name__}: {one}" for one in _chain(error))
    return RuntimeError(without_secrets(told)).with_traceback(error.__traceback__)


def _sentence(error: Exception, where: Endpoint, name: str, doing: Doing) -> str:
    host, status = where.shown, status_of(error)
    if status is not None:
        return _answered(status, error, where, name, doing)
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {host} is not asked: unset it."
    if _reason(error, socket.gaierror):
        return f"the host of {host} is not known: check HF_ENDPOINT and the network."
    kinds = _kinds(error)
    if "certificate" in str(error).lower():
        return (
            f"the certificate of {host} cannot be verified: give the file of your organisation's "
            "certificate authority as SSL_CERT_FILE."
        )
    if "TimeoutException" in kinds:
        return (
            f"{host} was silent for {servers.TIMEOUT:g} s, several times: try again later, or ask "
            "whoever runs it."
        )
    if "ConnectError" in kinds or "ProxyError" in kinds:
        return (
            f"{host} cannot be reached ({_first_line(error)}): check HF_ENDPOINT, the network and "
            "the proxy."
        )
    if "TransportError" in kinds:
        return (
            f"{host} broke the connection off, several times: run the same command again; what has "
            "arrived stays."
        )
    if "LFS batch" in str(error):
        return f"{host} takes no file ({_first_line(error, 1)}): ask whoever runs it."
    return (
        f"{host} answers in a way that huggingface_hub {__version__} does not understand "
        f"({type(error).__name__}: {_first_line(error)}): is HF_ENDPOINT right?"
    )


def _answered(status: int, error: Exception, where: Endpoint, name: str, doing: Doing) -> str:
    host, uri = where.shown, where.uri(name)
    if status == 401 and where.token is None:
        return (
            f"{host} shows no repository {name} to strangers: {how_to_log_in(where)}; if that is "
            "done, check the name."
        )
    if status == 401:
        return f"{host} does not know the token: make a new one there and set HF_TOKEN to it."
    if status == 403:
        return {
            "read": f"you may not read {uri}: ask its owner.",
            "write": f"you may not write to {uri}: ask its owner, or take a token that may write; "
            "a site can also propose with --create-pr.",
            "make": f"you may not make the repository {uri}: ask its owner, or take a token that "
            "may write.",
        }[doing]
    if isinstance(error, RevisionNotFoundError):
        return f"{uri} on {host} has no branch 'main': is it the right repository?"
    if status == 404:
        return (
            f"{host} has no repository {name} that you may see: check the name, and ask its owner "
            "to let you in."
        )
    if status == 429:
        return f"{host} has had too many requests of yours: try again in some minutes."
    if status in AGAIN:
        return f"{host} failed by itself ({status}), several times: try again later."
    return f"{host} refused with {status} ({_first_line(error)}): ask whoever runs it."


def how_to_log_in(where: Endpoint) -> str:
    """What to do for whom a server does not know."""
    if where.url == servers.HUGGING_FACE:
        return "log in with 'hf auth login', or set HF_TOKEN"
    return f"set HF_ENDPOINT to {where.address}, and HF_TOKEN to a token of this server"


def _first_line(error: BaseException, number: int = 0) -> str:
    found = (getattr(one, "server_message", None) for one in _chain(error))
    told = next(filter(None, found), None) or str(error)
    lines = [line for line in str(told).splitlines() if line.strip()] or [type(error).__name__]
    return without_secrets(lines[min(number, len(lines) - 1)]).strip()[:200]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _reason(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(one, kind) for one in _chain(error))


def _kinds(error: BaseException) -> set[str]:
    """Names of the classes: the library's transport is httpx or httpx2, by its version."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
