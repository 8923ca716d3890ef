"""A running hub of the tests, with an empty repository and its people."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from merge_kit.hub import repository
from merge_kit.hub.endpoint import Endpoint
from merge_kit.hub.huggingface import HuggingFaceHub
from merge_kit.hub.repository import Repository
from tests.merge_kit.hub.huggingface.server import HubServer

OWNER, READER, STRANGER = "hf_ownerstoken", "hf_sitestoken", "hf_strangerstoken"
NAME = "hospital/federation"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client library uploads in a way that its transport finds outdated."""
    for item in items:
        if __package__.replace(".", "/") in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"))


@pytest.fixture(scope="session")
def _running() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def server(
    _running: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> HubServer:
    """A hub that the environment names, with an empty repository of `OWNER`, which `READER` may
    read; pauses between tries are short."""
    _running.tokens = {OWNER: "hospital", READER: "site", STRANGER: "stranger"}
    _running.clear()
    _running.create(NAME, writers="hospital", readers="site")
    monkeypatch.setenv("HF_ENDPOINT", _running.url)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(repository, "PAUSES", (0.01, 0.01, 0.02, 0.02))
    monkeypatch.setattr(repository, "FIRST_PAUSE", 0.02)
    # Read at import, as all of the library's variables.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    at_once = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", at_once)
    return _running


def opened(
    server: HubServer, token: str | None = OWNER, name: str = NAME, url: str = ""
) -> HuggingFaceHub:
    """The repository as a hub."""
    return HuggingFaceHub(Repository(name, Endpoint(url or server.url, token)))


def uri_of(server: HubServer, name: str = NAME) -> str:
    """How a repository of the server is written, wherever HF_ENDPOINT leads."""
    return f"hf+{server.url}/{name}"
