"""Fixtures of the tests of hubs on SFTP servers; the server starts when it is first asked for."""

from __future__ import annotations

import threading

import pytest

from merge_kit.errors import HubError
from merge_kit.hub import open_hub
from merge_kit.remembered import VARIABLE
from tests.merge_kit.hub.sftp.sshd import Line, running


@pytest.fixture(scope="session")
def _sshd(tmp_path_factory):
    with running(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def sshd(_sshd, monkeypatch):
    """A server; the user's own keys, agent and cache are left alone, and copies are not shared."""
    monkeypatch.setenv("HOME", str(_sshd.home))
    for name in ("SSH_AUTH_SOCK", "MERGE_KIT_SFTP_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLE, "off")
    return _sshd


@pytest.fixture
def opened():
    """Open hubs until the test ends."""
    hubs = []

    def make(uri):
        hubs.append(open_hub(uri))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def root(tmp_path):
    """The hub's folder, as the server sees it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def place(sshd, root, opened):
    """An empty folder on the server."""
    return opened(sshd.uri(root))


@pytest.fixture
def line_to():
    """Lay lines to servers, that can be cut."""
    lines = []

    def lay(server):
        lines.append(Line(server.port))
        return lines[-1]

    yield lay
    for line in lines:
        line.close()


@pytest.fixture
def line(sshd, line_to):
    """A line to the server."""
    return line_to(sshd)


@pytest.fixture
def far(sshd, root, line, opened):
    """The hub at the other end of that line."""
    return opened(sshd.uri(root, line.port))


@pytest.fixture
def at_once():
    """Run something in threads that begin together: what they gave, and what they said."""

    def start(number, go):
        barrier, gave, said = threading.Barrier(number), [], []

        def run(index):
            barrier.wait()
            try:
                gave.append(go(index))
            except HubError as error:
                said.append(str(error))

        threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return gave, said

    return start
