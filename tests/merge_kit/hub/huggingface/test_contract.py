"""The contract of all hubs, on the Hugging Face Hub."""

from __future__ import annotations

import pytest

from tests.merge_kit.hub.contract import RemoteContract
from tests.merge_kit.hub.huggingface.conftest import opened


class TestHuggingFace(RemoteContract):
    """The contract."""

    @pytest.fixture
    def hub(self, server):
        """An empty repository."""
        return opened(server)

    @pytest.fixture
    def again(self, server, monkeypatch, tmp_path_factory):
        """The same repository, with a cache of its own."""

        def make():
            monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
            return opened(server)

        return make
