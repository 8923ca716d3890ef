"""What an object store says when it refuses, as one sentence.

The library's own texts show whatever the server wrote, and addresses that may be signed: nothing of
them is passed on but a status, an error code and a host, not even as the cause of an error.
"""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    InvalidPathError,
    NotSupportedError,
    PreconditionError,
)

from merge_kit.errors import HubError, UnreachableError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"(?:<Code>|\(code: )(\w{1,60})(?:</Code>|\))")
_HOST = re.compile(r"https?://(?:[^/\s@]*@)?([^/\s?@,)]+)")
_OBJECT = re.compile(r'[Pp]ath "(.*?)" contained|[Pp]ath "(.*?)":', re.S)
_MACHINE = re.compile(r"/latest/(api/token|meta-data)|metadata\.google\.internal|metadata/identity")
"""Where a machine in a cloud would be asked for credentials: there were none before."""
_BROKEN = re.compile(
    r"response body error|Got invalid \w+ response|hyper::Error\(\s*Parse\(|"
    r"source: (?:Header|Metadata) \{|"
    r"source: (?:ParseContentRange|NoContentRange|NotPartial|UnexpectedRange)\b|"
    r"not found: Error performing DELETE \S+uploadId="
)
"""In the library's words: of a body, of what should be XML, of headers, a range, an upload."""
_WRONG = {
    "AuthenticationFailed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}
_MISSING = {"ContainerNotFound", "NoSuchBucket"}
_WHERE_KEYS_ARE = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def is_broken(error: Exception) -> bool:
    """Whether an answer has begun and broken off, or makes no sense: the library leaves it at that,
    or takes an upload back whose end was not heard of, and finds none."""
    return bool(_BROKEN.search(str(error)))


def is_unknown(error: Exception) -> bool:
    """Whether nobody knows if what was asked has been done."""
    return "kind: Timeout" in str(error) or is_broken(error)


def unconditional(uri: str) -> HubError:
    """What is said of a storage that would overwrite."""
    return HubError(
        f"{uri} does not refuse to overwrite a file (conditional writes, If-None-Match and "
        "If-Match), so two publishers could destroy each other's work: use a storage that does, or "
        "a newer version of this one."
    )


def explained(error: Exception, uri: str, name: str, done: str, seconds: float) -> HubError:
    """The sentence for an error of the library, while the file `name` was to be `done`.

    `seconds` is how long one request may take.
    """
    text, where = str(error), f"{uri}/{name}" if name else uri
    host = found[1] if (found := _HOST.search(text)) else uri
    status = found[1] if (found := _STATUS.search(text)) else ""
    code = found[1] if (found := _CODE.search(text)) else ""
    if isinstance(error, InvalidPathError):
        found = _OBJECT.search(text)
        odd = (found[1] or found[2]) if found else ""
        odd = "".join(c if c.isprintable() else "?" for c in odd)
        return HubError(
            f"{where} holds an object with a name that no publisher writes, '{odd}': "
            "have it removed from the bucket."
        )
    if isinstance(error, FileNotFoundError) and code not in _MISSING:
        return HubError(f"{uri} has no file {name}: is it the right hub, and complete?")
    if isinstance(error, NotSupportedError) or (status == "501" and done == "written"):
        return unconditional(uri)
    if isinstance(error, (PreconditionError, AlreadyExistsError)) and code not in _MISSING:
        return HubError(f"{where} was changed meanwhile: run the same command again.")
    if _MACHINE.search(text):
        hint = _WHERE_KEYS_ARE[uri.partition(":")[0]]
        return UnreachableError(f"there are no credentials for {uri}: {hint}.")
    if not status and not code:
        return UnreachableError(_unheard(text, host, seconds))
    if told := _closed(status, code, host, uri):
        return UnreachableError(told)
    return HubError(_refused(status, code, host, where, done))


def _closed(status: str, code: str, host: str, uri: str) -> str | None:
    """A sentence where the whole storage is closed, now or to us; None where it is not."""
    said = f"{status} {code}".strip()
    if code == "RequestTimeTooSkewed":
        return f"{host} says that this machine's clock is wrong: set it, then try again."
    if code in _WRONG or status == "401":
        return f"{host} does not accept the credentials for {uri} ({said}): check or renew them."
    if code in _MISSING:
        bucket = uri.partition("://")[2].partition("/")[0]
        return f"{host} has no bucket '{bucket}': check the name, or have it created."
    if code in _ELSEWHERE or status in ("301", "307"):
        return f"{uri} lies in another region than was asked ({said}): set AWS_REGION to it."
    if (status in ("429", "408") or status.startswith("5")) and not _is_full(status, code):
        return f"{host} answers '{said}' each time: try again later."
    return None


def _is_full(status: str, code: str) -> bool:
    return code in _FULL or status == "507"


def _refused(status: str, code: str, host: str, where: str, done: str) -> str:
    """A sentence where one file is refused."""
    said = f"{status} {code}".strip()
    if status == "403" or code == "AccessDenied":
        return (
            f"{where} may not be {done} with these credentials ({said}): ask whoever runs the "
            "storage for the right to do so."
        )
    if _is_full(status, code):
        return f"{host} has no space left for {where}: make room there and run the command again."
    return f"{where} could not be {done}: {host} answers '{said}': ask whoever runs it."


def _unheard(text: str, host: str, seconds: float) -> str:
    """A sentence where no answer came."""
    if "BadScheme" in text:
        return (
            f"{host} would be asked without encryption: give an https:// address, or set "
            "AWS_ALLOW_HTTP=true where you trust the network."
        )
    if "InvalidCertificate" in text:
        return (
            f"{host} shows a certificate that this machine does not trust: check the address, or "
            "have SSL_CERT_FILE name the file with your organisation's certificate."
        )
    if "kind: Connect" in text:
        return f"{host} cannot be reached: check the address, the network and the firewall."
    if "kind: Timeout" in text:
        return f"{host} did not answer in {seconds:g} seconds: try again later."
    return f"the connection to {host} broke off again and again: run the same command again."
