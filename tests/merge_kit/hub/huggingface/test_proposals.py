"""Pull requests that touch more than their site's own files: named, never called harmless."""

from __future__ import annotations

import io
import json

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from merge_kit import proposals, signing, site
from merge_kit.errors import UsageError
from merge_kit.hub import create_hub, open_hub
from merge_kit.hub.base import Hub
from merge_kit.site import federation_on
from tests.conftest import write_run
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER
from tests.merge_kit.hub.huggingface.repos import Blob

URI = f"hf://{NAME}"


@pytest.fixture
def north(hub, server, ok, tmp_path, monkeypatch):
    """A site that has proposed a vector; everything else on the hub is there."""
    there = create_hub(URI)
    names = ("model.safetensors", "config.json")
    there.publish("base", {name: hub.root / "base" / name for name in names})
    there.replace("federation.yaml", hub.read("federation.yaml"), None)
    ok("join", URI, "--site", "north", "--folder", tmp_path / "north")
    joined = site.open_site(tmp_path / "north")
    ok("admit", URI, "north", signing.public_key(joined.key_file))
    write_run(joined, joined.root / "runs" / "one", seed=1)
    monkeypatch.setenv("HF_TOKEN", READER)
    ok("publish", joined.root, "--run", joined.root / "runs" / "one", "--create-pr")
    return joined


def propose(server, *operations):
    """A pull request as anybody can open it; gives its address."""
    api = HfApi(server.url, READER)
    made = api.create_commit(
        NAME, list(operations), commit_message="Add contributions/north/x", create_pr=True
    )
    return made.pr_url


def add(path, data=b"x"):
    return CommitOperationAdd(path, io.BytesIO(data))


def address(server, number):
    return f"{server.url}/{NAME}/discussions/{number}"


def test_a_pull_request_of_a_site_may_be_merged(north, server, ok):
    said = ok("status", URI, "--pull-requests")
    assert said.startswith(f"May be merged: {address(server, 1)} adds contributions/north/")
    assert "Do not" not in said
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    assert ok("status", URI, "--pull-requests") == "No pull request is open.\n"


def test_what_was_added_meanwhile_is_not_the_pull_requests_doing(north, server, ok):
    open_hub(f"hf+{server.url}/{NAME}")
    api = HfApi(server.url, OWNER)
    api.create_commit(NAME, [add("contributions/south/y/manifest.json")], commit_message="z")
    said = ok("status", URI, "--pull-requests")
    assert said.startswith("May be merged: ")
    assert "south" not in said


TOUCHES = {
    "federation": (
        [add("federation.yaml")],
        "it has changed federation.yaml, which is nothing that a site adds",
    ),
    "base": (
        [CommitOperationDelete("base/config.json")],
        "it has removed base/config.json, which is nothing that a site adds",
    ),
    "another file": (
        [add("contributions/north/x/run.sh")],
        "it has added contributions/north/x/run.sh, which is nothing that a site adds",
    ),
    "readme": ([add("README.md")], "it has added README.md, which is nothing that a site adds"),
    "two sites": (
        [add("contributions/north/x/manifest.json"), add("withdrawals/south/x/withdrawal.json")],
        "it speaks for several sites: north, south",
    ),
    "unsound": (
        [add("contributions/north/x/manifest.json")],
        "contributions/north/x/manifest.json is not JSON: ask the site to publish again",
    ),
}


@pytest.mark.parametrize("what", TOUCHES)
def test_a_pull_request_that_touches_more_than_its_own(north, server, ok, what):
    operations, problem = TOUCHES[what]
    bad = propose(server, *operations)
    said = ok("status", URI, "--pull-requests")
    assert f"Do not merge {bad}: {problem}.\n" in said
    assert f"May be merged: {address(server, 1)} adds contributions/north/" in said
    told = json.loads(ok("status", URI, "--pull-requests", "--json"))
    assert {one["address"]: one["problem"] for one in told} == {
        address(server, 1): None, bad: problem,
    }  # fmt: skip


def test_a_pull_request_that_changes_what_another_site_published(north, server, ok):
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    (entry,) = open_hub(URI).list("contributions/north")
    path = f"contributions/north/{entry}/manifest.json"
    bad = propose(server, add(path))
    said = ok("status", URI, "--pull-requests")
    assert said == (
        f"Do not merge {bad}: it has changed {path}, which is nothing that a site adds.\n"
    )


def test_a_pull_request_of_a_stranger(north, server, ok, tmp_path):
    ok("join", URI, "--site", "mallory", "--folder", tmp_path / "m")
    joined = site.open_site(tmp_path / "m")
    write_run(joined, joined.root / "runs" / "one", seed=2)
    ok("publish", joined.root, "--run", joined.root / "runs" / "one", "--create-pr")
    said = ok("status", URI, "--pull-requests")
    (line,) = [line for line in said.splitlines() if line.startswith("Do not merge")]
    assert line.startswith(f"Do not merge {address(server, 2)}: contributions/mallory/")
    assert line.endswith(" is not admitted.")


def test_a_page_in_a_pull_request_that_does_not_follow_from_its_manifest(north, server, ok):
    """People would take it for one of the federation's."""
    (number,) = server.repos[NAME].pulls
    proposed = server.repos[NAME].files("refs/pr/1")
    (page,) = [path for path in proposed if path.endswith("/README.md")]
    changed = {**proposed, page: Blob(b"[more](https://elsewhere.example)")}
    server.repos[NAME].add("refs/pr/1", changed, number["title"], "site")
    assert ok("status", URI, "--pull-requests") == (
        f"Do not merge {address(server, 1)}: {page} is not the card that follows from its "
        "manifest.\n"
    )


def test_a_withdrawal_in_a_pull_request(north, server, ok):
    """The site's own may be merged; one that somebody else has signed may not."""
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    ok("withdraw", north.root, "--all", "--create-pr")
    said = ok("status", URI, "--pull-requests")
    assert said.startswith(f"May be merged: {address(server, 2)} adds withdrawals/north/")
    (entry,) = open_hub(URI).list("contributions/north")
    place = f"withdrawals/north/{entry}"
    bad = propose(server, add(f"{place}/withdrawal.json"), add(f"{place}/withdrawal.sig"))
    said = ok("status", URI, "--pull-requests")
    assert f"Do not merge {bad}: {place} is no withdrawal: ask site 'north'.\n" in said


def test_other_hubs_have_none(hub):
    with says(
        UsageError,
        f"--pull-requests is for repositories on the Hugging Face Hub, and {hub.uri} is none: "
        "leave it out.",
    ):
        there: Hub = hub
        list(proposals.proposals(there, federation_on(hub)))
