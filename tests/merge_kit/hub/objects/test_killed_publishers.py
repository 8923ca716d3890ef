"""kill -9 at any moment, on eight publishers at once: the same command goes on."""

from __future__ import annotations

import hashlib

import pytest

from merge_kit.hub.objects import PIECE
from tests.merge_kit.hub.killing import publish_all, unbroken


@pytest.mark.parametrize("size", [200_000, PIECE + 100_000], ids=["small", "large"])
def test_all_contributions_are_there_once_and_whole_and_nothing_else(
    uri, line, again, tmp_path, keys, size
):
    payloads = [tmp_path / str(number) for number in range(8)]
    for number, path in enumerate(payloads):
        path.write_bytes(bytes([number]) * size)
    window = unbroken(uri, payloads[0])
    stories = publish_all(uri, payloads, doomed=4, window=2 * window, seed=size)
    assert sum(story.kills for story in stories) > 0
    hub = again()
    expected = ["first", *(f"s{number}" for number in range(8))]
    assert list(hub.list("contributions")) == expected
    for number, path in enumerate(payloads):
        assert list(hub.list(f"contributions/s{number}")) == ["e"]
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        assert hub.fetch(f"contributions/s{number}/e/payload.safetensors", digest)
    left = [name for name in keys() if not name.startswith("unfinished")]
    assert len(left) == 3 * 9  # who started again has removed what the killed one left hidden
