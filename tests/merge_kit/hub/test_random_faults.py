"""Faults at random between a client and a hub; tests/benchmarks/faults.py runs a thousand."""

from __future__ import annotations

import pytest

from tests.benchmarks.faults import run


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
@pytest.mark.parametrize(("kind", "faults"), [("objects", 14), ("huggingface", 24)])
def test_nothing_is_lost_and_nothing_damaged_is_accepted(kind, faults, monkeypatch):
    """Whoever would not try again would give up where the line broke and nothing was damaged."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = run(kind, faults=faults, seed=3)
    assert found["faults in all"] == faults
    assert len(found["faults"]) >= 6
    assert found["entries published, whole, once"] >= 3
    assert found["given up though nothing was damaged"] == 0
