"""Publishers that are killed at any moment, and start again."""

from __future__ import annotations

from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER
from tests.merge_kit.hub.huggingface.publishers import check, race


def test_all_entries_arrive_whole_and_once_whoever_is_killed(server, tmp_path):
    for method, part in (("PUT", "/lfs/"), ("POST", "/commit/")):  # so that there is a middle
        server.fault(method, part, "slow", 0.1, times=16)
    found = race(server, NAME, OWNER, count=8, kill=4, within=0.6, size=300_000, seed=1,
                 cache=tmp_path)  # fmt: skip
    assert found.killed > 0
    assert set(found.answers.values()) <= {"True", "False"}
    check(server, NAME, count=8, size=300_000)
