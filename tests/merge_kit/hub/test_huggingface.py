"""A hub on the Hugging Face Hub: the contract, and what is its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from merge_kit.hub.endpoint import Endpoint
from merge_kit.hub.huggingface import HuggingFaceHub
from merge_kit.hub.repository import Repository
from tests.merge_kit.hub.contract import RemoteContract
from tests.merge_kit.hub.hf_server import HubServer

TOKEN, READER, STRANGER = "hf_coordinator", "hf_site", "hf_stranger"
NAME = "hospital/federation"
# The client library uploads in a way that its transport finds outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    """A server for this module."""
    with HubServer() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch, tmp_path):
    """The server, with an empty repository; this process has no cache in common with others."""
    running.tokens = {TOKEN: "hospital", READER: "site", STRANGER: "stranger"}
    running.repos, running.objects, running.faults, running.log = {}, {}, [], []
    running.create(NAME, writers="hospital", readers="site")
    return running


def opened(server, token=TOKEN, name=NAME):
    return HuggingFaceHub(Repository(name, Endpoint(server.url, token)))


class TestHuggingFace(RemoteContract):
    """The contract."""

    @pytest.fixture
    def hub(self, server):
        return opened(server)

    @pytest.fixture
    def again(self, server, monkeypatch, tmp_path_factory):
        def make():
            monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            return opened(server)

        return make
