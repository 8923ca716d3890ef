"""Opening a bucket of an object store, whoever runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from merge_kit.errors import HubError
from merge_kit.hub import aws
from merge_kit.hub.base import check_name

Store = S3Store | GCSStore | AzureStore
_VENDORS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a slow or broken line is borne with."""

    timeout: float = 120.0
    """Seconds for one request, which carries `PIECE` bytes at most."""
    connect: float = 10.0
    """Seconds until a host answers at all."""
    retries: int = 4
    """How often a request that broke off, or was answered 5xx, is repeated."""
    pause: float = 0.25
    """Seconds before the first repetition; each further one waits twice as long."""


def parts_of(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and prefix of a hub's address.

    Raises
    ------
    HubError
        It is no such address.
    """
    scheme, _, rest = uri.partition("://")
    form = f"{scheme}://bucket/folder"
    if any(mark in rest for mark in "@?#"):  # the address is not shown: it may hold credentials
        raise HubError(
            f"the address of a hub is written as {form} and nothing more: credentials are given by "
            "environment variables."
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not bucket:
        raise HubError(f"'{uri}' names no bucket: write it as {form}.")
    if prefix:
        check_name(prefix)
    return scheme, bucket, prefix


def open_store(scheme: str, bucket: str, prefix: str, patience: Patience) -> Store:
    """The store behind an address; nothing is asked of it yet.

    Raises
    ------
    HubError
        What the environment says of it is contradictory.
    """
    open_line = os.environ.get(f"{_VENDORS[scheme]}_ALLOW_HTTP", "").lower()
    options: Any = {
        "prefix": prefix or None,
        "client_options": {  # where some are given, the library reads none in the environment
            "allow_http": open_line in ("1", "true", "yes", "on"),
            "timeout": timedelta(seconds=patience.timeout),
            "connect_timeout": timedelta(seconds=patience.connect),
        },
        "retry_config": {
            "max_retries": patience.retries,
            "backoff": {
                "init_backoff": timedelta(seconds=patience.pause),
                "max_backoff": timedelta(seconds=16),
                "base": 2,
            },
        },
    }
    try:
        if scheme == "gs":
            return GCSStore(bucket, **options)
        if scheme == "az":
            return AzureStore(bucket, **options)
        copies = os.environ.get("AWS_COPY_IF_NOT_EXISTS") or "multipart"
        config: Any = {
            **aws.settings(), "conditional_put": "etag", "copy_if_not_exists": copies,
        }  # fmt: skip
        return S3Store(bucket, config=config, **options)
    except (BaseError, ValueError):
        raise HubError(
            f"{scheme}://{bucket} cannot be opened with the settings that the environment gives: "
            "docs/hubs.md names the variables."
        ) from None
