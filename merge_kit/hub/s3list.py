"""Listing an S3 bucket whatever its objects are called.

The library behind `objects` reads no page of a listing on which there is a name that it would not
write itself (an empty part, ``..``, control characters). Whoever may write to one folder of a
bucket could so hide all others. Here such a bucket is asked in the store's own words, signed as
Amazon describes (Signature Version 4), with the keys that the environment or a profile gives.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as Xml
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import quote, unquote_plus, urlsplit

from obstore.exceptions import GenericError

from merge_kit.hub import aws
from merge_kit.hub.objectstores import Patience

_LARGEST = 32 * 2**20
"""Bytes above which no answer is a page of a listing: a name has 1024 at most, a page 1000."""
_NOTHING = hashlib.sha256(b"").hexdigest()
_DAMAGED = (OSError, HTTPException, Xml.ParseError, ValueError, LookupError)
"""What an answer that is none is read as; the last two are of encodings that it names."""
_TRUE = ("1", "true", "yes", "on")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A signature is for one host."""

    def redirect_request(self, *_: object) -> None:
        """See `urllib.request.HTTPRedirectHandler`."""


@dataclass(frozen=True, slots=True)
class Lister:
    """A bucket, and who asks for its names."""

    url: str
    """Of the bucket."""
    region: str
    key: str | None
    """None where the bucket is public, and nothing is signed."""
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def keys(self, prefix: str, patience: Patience) -> Iterator[str]:
        """Names of all objects that begin with `prefix`, in pages of a thousand.

        What is not UTF-8 in a name is shown by surrogates, which are not printable.

        Raises
        ------
        GenericError
            The store does not answer, or refuses; the text has its status and code.
        """
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
        while True:
            page = self._page(query, patience)
            encoded = _text(page, "EncodingType") == "url"
            for row in page.iterfind("{*}Contents/{*}Key"):
                name = row.text or ""
                yield unquote_plus(name, errors="surrogateescape") if encoded else name
            further = _text(page, "NextContinuationToken")
            if _text(page, "IsTruncated") != "true" or not further:
                return
            query["continuation-token"] = further

    def _page(self, query: Mapping[str, str], patience: Patience) -> Xml.Element:
        opener = urllib.request.build_opener(_NoRedirect)
        for attempt in range(patience.retries + 1):
            try:
                with opener.open(self._request(query), timeout=patience.timeout) as answer:
                    return Xml.fromstring(answer.read(_LARGEST))
            except urllib.error.HTTPError as error:
                with error, suppress(OSError, HTTPException):
                    told = f"status code: {error.code} "
                    told += repr(error.read(_LARGEST))
                if error.code < 500 and error.code not in (408, 429):
                    raise GenericError(f"{self.url}: {told}") from None
            except TimeoutError:
                told = "kind: Timeout"
            except _DAMAGED:  # also an answer that broke off
                told = "broke off"
            if attempt < patience.retries:
                time.sleep(patience.pause * 2**attempt)
        raise GenericError(f"{self.url}: {told}") from None

    def _request(self, query: Mapping[str, str]) -> urllib.request.Request:
        asked = "&".join(f"{k}={quote(v, safe='')}" for k, v in sorted(query.items()))
        url, path = f"{self.url}?{asked}", urlsplit(self.url).path or "/"
        if self.key is None:
            return urllib.request.Request(url)
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers = {"host": urlsplit(self.url).netloc, "x-amz-content-sha256": _NOTHING,
                   "x-amz-date": moment}  # fmt: skip
        if self.token:
            headers["x-amz-security-token"] = self.token
        named = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join(("GET", path, asked, lines, named, _NOTHING))
        scope = f"{moment[:8]}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        signing = f"AWS4{self.secret}".encode()
        for part in scope.split("/"):
            signing = hmac.digest(signing, part.encode(), "sha256")
        text = "\n".join(("AWS4-HMAC-SHA256", moment, scope, digest))
        signature = hmac.digest(signing, text.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.key}/{scope}, SignedHeaders={named}, "
            f"Signature={signature}"
        )
        return urllib.request.Request(url, headers=headers)


def lister(bucket: str) -> Lister | None:
    """How a bucket can be asked; None where only the library finds the keys (in Amazon's cloud).

    Raises
    ------
    HubError
        What the environment says is contradictory: see `aws.settings`.
    """
    said = aws.settings()
    for name in ("access_key_id", "secret_access_key", "session_token", "region"):
        if value := os.environ.get(f"AWS_{name.upper()}"):
            said[name] = value
    region = said.get("region") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = said.get("endpoint", f"https://s3.{region}.amazonaws.com").rstrip("/")
    hosted = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in _TRUE
    if hosted and "endpoint" not in said:
        endpoint = f"https://{bucket}.s3.{region}.amazonaws.com"
    url = endpoint if hosted else f"{endpoint}/{bucket}"
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE:
        return Lister(url, region, None)
    if "access_key_id" not in said or "@" in url:
        return None
    return Lister(
        url, region, said["access_key_id"], said["secret_access_key"], said.get("session_token", "")
    )


def _text(page: Xml.Element, name: str) -> str:
    return page.findtext(f"{{*}}{name}") or ""
