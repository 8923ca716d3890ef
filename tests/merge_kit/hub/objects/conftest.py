"""A real S3 server, buckets on it, and a proxy before it that breaks what it is told to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from merge_kit.hub import objects
from merge_kit.hub.objects import ObjectHub
from merge_kit.hub.objectstores import Patience
from merge_kit.remembered import VARIABLE
from tests.merge_kit.hub.objects.proxy import Proxy

ROOT = Path(__file__).resolve().parents[4]
QUICK = Patience(timeout=3, connect=1, retries=2, pause=0.02)
SMALLEST_PART = 5 * 2**20
"""Bytes below which a store takes no part but the last."""
LARGE = bytes(range(256)) * (SMALLEST_PART // 256) + b"and a rest"
SECRET = "the-secret-of-a-test"
OpenHub = Callable[..., ObjectHub]


def start_server(**environment: str) -> tuple[subprocess.Popen[str], int]:
    """A server of its own, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.merge_kit.hub.objects.server"],
        cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout
    return process, int(process.stdout.readline())


def stop_server(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=20)


def client(port: int, service: str = "s3") -> Any:
    """Another program's client on the same server."""
    return boto3.client(
        service, endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="another", aws_secret_access_key="program",
    )  # fmt: skip


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """The port of an S3 server that asks nobody for a right."""
    process, port = start_server()
    yield port
    stop_server(process)


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's own, and the credentials of a test."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def line(server: int, surroundings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What lies between this machine and the server."""
    with Proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def other(server: int) -> Any:
    """Another program that uses the same server."""
    return client(server)


@pytest.fixture
def bucket(other: Any) -> str:
    """A new bucket."""
    name = f"bucket-{uuid4().hex}"
    other.create_bucket(Bucket=name)
    return name


@pytest.fixture
def uri(bucket: str) -> str:
    """A place in a new bucket, for a hub."""
    return f"s3://{bucket}/some/folder"


_ENVIRONMENT = threading.Lock()


@pytest.fixture
def open_apart(tmp_path: Path, uri: str, line: Proxy) -> OpenHub:
    """Open a hub as another process would: with no cache in common."""

    def opened(where: str = uri, patience: Patience | None = QUICK) -> ObjectHub:
        with _ENVIRONMENT, pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, str(tmp_path / "caches" / uuid4().hex))
            return ObjectHub(where, patience)

    return opened


@pytest.fixture
def hub(open_apart: OpenHub) -> ObjectHub:
    """An empty hub."""
    return open_apart()


@pytest.fixture
def again(open_apart: OpenHub) -> OpenHub:
    """The same place once more."""
    return open_apart


@pytest.fixture
def keys(other: Any, bucket: str) -> Callable[[], list[str]]:
    """All that lies in the bucket, hidden or not, and the uploads that were not finished."""

    def found() -> list[str]:
        prefix = "some/folder/"
        pages = other.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        names = [one["Key"] for page in pages for one in page.get("Contents", [])]
        uploads = other.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        names += [f"unfinished {one['Key']}" for one in uploads]
        return sorted(name.replace(prefix, "") for name in names)

    return found


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A payload that goes in parts, as small as they may be."""
    monkeypatch.setattr(objects, "PIECE", SMALLEST_PART)
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    return path
