"""What a server of the Hugging Face Hub's protocol did wrong, as one sentence each."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from huggingface_hub import __version__
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

from merge_kit.errors import UnreachableError
from merge_kit.hub import endpoint as servers
from merge_kit.hub.endpoint import Endpoint, without_secrets

AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""
LONGEST_WAIT = 300.0
_CODES = frozenset({"EntryNotFound", "GatedRepo", "RepoNotFound", "RevisionNotFound"})
"""What a 404 says in its headers is not there; one that says none of these was damaged."""
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)
"""What the library lets through where an answer is no JSON, or other JSON than it expects."""
Doing: TypeAlias = Literal["read", "write", "make"]
OVERTAKEN = frozenset({409, 412})
"""Answers to a commit whose parent is not the head any more."""


def status_of(error: BaseException) -> int | None:
    """The server's answer, where there is one."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    status = status_of(error)
    if status is not None:
        said_nothing = status == 404 and _code(error) not in _CODES
        return status in AGAIN or said_nothing or _has_expired(error) or _is_spoilt_upload(error)
    if isinstance(error, OfflineModeIsEnabled) or _reason(error, socket.gaierror):
        return False
    if "client has been closed" in str(error):  # by another thread, which lost its connection
        return True
    if "certificate" in str(error):
        return False
    # An answer may be damaged on its way: the library reads them as if they never were.
    return _reason(error, _DAMAGED) or bool({"TransportError", "DecodingError"} & _kinds(error))


def asked_pause(error: BaseException) -> float:
    """Seconds that the server asks to wait, at most `LONGEST_WAIT`; 0 where it does not ask."""
    response = _response(error)
    if response is None or status_of(error) not in AGAIN:
        return 0.0
    asked = response.headers.get("retry-after", "")
    if not re.fullmatch("[0-9]{1,9}", asked):
        found = re.search(r"\br=0;\s*t=([0-9]{1,9})", response.headers.get("ratelimit", ""))
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
    if _has_expired(error):
        return (
            f"{host} gives addresses that have expired when they are used: its clock, or that of "
            "its storage, is wrong; ask whoever runs it."
        )
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
    if status == 400 or _is_spoilt_upload(error):
        return (
            f"{host} finds a request wrong ({status}, {_first_line(error)}): run the same command "
            "again, it may have been damaged on its way; ask whoever runs it if it stays so."
        )
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


def _response(error: BaseException) -> Any:
    # One that is an error is false, so it is compared with None.
    found = (getattr(one, "response", None) for one in _chain(error))
    return next((response for response in found if response is not None), None)


def _code(error: BaseException) -> str:
    return str(_response(error).headers.get("x-error-code", ""))


def _has_expired(error: BaseException) -> bool:
    """Whether a storage did not take an address any more that was signed for a time."""
    response = _response(error)
    if response is None or response.status_code != 403:
        return False
    try:
        return b"expired" in response.content
    except RuntimeError:  # of an answer that was not read to its end
        return False


def _is_spoilt_upload(error: BaseException) -> bool:
    """Whether a file, or the address that it was to go to, was damaged on its way."""
    response = _response(error)
    if response is None or response.status_code not in (400, 404):
        return False
    return response.request.method == "PUT" or "/info/lfs/verify" in response.url.path


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _reason(
    error: BaseException, kind: type[BaseException] | tuple[type[BaseException], ...]
) -> bool:
    return any(isinstance(one, kind) for one in _chain(error))


def _kinds(error: BaseException) -> set[str]:
    """Names of the classes: the library's transport is httpx or httpx2, by its version."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
