"""Publishers that are killed at any moment, and start again."""

from __future__ import annotations

from tests.merge_kit.hub.huggingface.conftest import NAME, uri_of
from tests.merge_kit.hub.killing import publish_all


def test_all_entries_arrive_whole_and_once_whoever_is_killed(server, tmp_path):
    payloads = [tmp_path / str(number) for number in range(8)]
    for number, path in enumerate(payloads):
        path.write_bytes(bytes([number]) * 300_000)
    for method, part in (("PUT", "/lfs/"), ("POST", "/commit/")):  # so that there is a middle
        server.fault(method, part, "slow", 0.1, times=16)
    stories = publish_all(uri_of(server), payloads, doomed=4, window=0.6, seed=1)
    assert sum(story.kills for story in stories) > 0
    repo, folders = server.repos[NAME], [f"contributions/s{number}/e" for number in range(8)]
    expected = {}
    for folder, path in zip(folders, payloads, strict=True):
        expected |= {f"{folder}/payload.safetensors": path.read_bytes(),
                     f"{folder}/manifest.sig": b"s", f"{folder}/manifest.json": b"m"}  # fmt: skip
    found = {path: blob.data for path, blob in repo.files().items() if path != ".gitattributes"}
    assert found == expected
    titles = sorted(commit.title for commit in repo.commits.values())
    assert titles == sorted(["initial commit", *(f"Add {folder}" for folder in folders)])
