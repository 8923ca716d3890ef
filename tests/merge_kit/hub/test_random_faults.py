"""Faults at random between a client and a hub; tests/benchmarks/faults.py runs a thousand."""

from __future__ import annotations

import pytest

from tests.benchmarks.faults import run


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
@pytest.mark.parametrize("kind", ["objects", "huggingface"])
def test_nothing_is_lost_and_nothing_damaged_is_accepted(kind, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = run(kind, faults=40, seed=3)
    assert found["faults in all"] == 40
    assert len(found["faults"]) >= 8
    assert found["entries published, whole, once"] > 5
