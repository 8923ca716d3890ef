"""A repository for each site, beside the federation's: the whole job, and the pages people see."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import HfApi

from merge_kit import signing, site
from merge_kit.contributions import list_entries
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub import create_hub, open_hub
from tests.conftest import write_run
from tests.merge_kit.helpers import listing
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER, uri_of
from tests.merge_kit.hub.huggingface.repos import Blob

URI = f"hf://{NAME}"
OWN = "site/cells"
"""Of `READER`, who may only read the federation's repository; `OWNER` may read it, once that was
allowed."""
FILES = {"manifest.json", "manifest.sig", "payload.safetensors"}


@pytest.fixture
def federation_uri(hub, server):
    there = create_hub(URI)
    names = ("model.safetensors", "config.json")
    there.publish("base", {name: hub.root / "base" / name for name in names})
    there.replace(FEDERATION_FILE, (hub.root / FEDERATION_FILE).read_bytes(), None)
    return URI


@pytest.fixture
def joined(federation_uri, ok, tmp_path):
    """`north`, which is admitted with a repository of its own."""
    ok("join", URI, "--site", "north", "--folder", tmp_path / "north")
    found = site.open_site(tmp_path / "north")
    ok("admit", URI, "north", signing.public_key(found.key_file), "--hub", f"hf://{OWN}")
    return found


@pytest.fixture
def publish(joined, ok, server, monkeypatch):
    """Publish one more vector as the site, with its own token."""

    def make(seed=1, *options):
        run = joined.root / "runs" / f"seed{seed}"
        write_run(joined, run, seed=seed)
        monkeypatch.setenv("HF_TOKEN", READER)
        said = ok("publish", joined.root, "--run", run, *options)
        monkeypatch.setenv("HF_TOKEN", OWNER)
        if OWN in server.repos:
            server.repos[OWN].readers.add("hospital")
        return said

    return make


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Go on as on a machine that has copied nothing yet."""
    return lambda: monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path / "another"))


def test_the_coordinators_file_has_its_address_in_full(joined, server):
    told = yaml.safe_load(server.repos[NAME].files()[FEDERATION_FILE].data)
    assert told["sites"][0]["hub"] == uri_of(server, OWN)


def test_publishing_makes_it_private_and_needs_no_right_to_write_elsewhere(publish, server):
    before = dict(server.repos[NAME].commits)
    said = publish()
    assert f"Published: {uri_of(server, OWN)}/contributions/north/" in said
    repo = server.repos[OWN]
    assert repo.private
    assert {path.rpartition("/")[2] for path in repo.files()} == {
        ".gitattributes", "README.md", *FILES,
    }  # fmt: skip
    assert server.repos[NAME].commits == before
    sent = [(method, token) for method, path, token in server.log if path.endswith("/commit/main")]
    assert all(token != f"Bearer {OWNER}" or method != "POST" for method, token in sent[-2:])


def test_a_dry_run_makes_nothing(publish, server):
    said = publish(1, "--dry-run")
    assert f"nothing was sent to {uri_of(server, OWN)}/contributions/north/" in said
    assert "a card       README.md" in said
    assert OWN not in server.repos


def test_who_may_not_make_it_is_told_so(joined, run_cli, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)  # of another owner
    run = joined.root / "runs" / "seed1"
    write_run(joined, run, seed=1)
    refused = run_cli("publish", joined.root, "--run", run)
    assert refused.exit_code == 1
    assert "you may not make the repository" in refused.stderr


def test_status_merge_verify_withdraw_and_remerge(publish, joined, ok, run_cli, server, tmp_path,
                                                  monkeypatch):  # fmt: skip
    publish()
    told = json.loads(ok("status", URI, "--json"))
    assert [(row["site"], row["state"]) for row in told["contributions"]] == [("north", "ready")]
    ok("merge", URI, "--method", "sum", "--out", tmp_path / "merged")
    ok("verify", tmp_path / "merged", "--hub", URI)
    ok("pull", URI, tmp_path / "copy")
    monkeypatch.setenv("HF_TOKEN", READER)
    said = ok("withdraw", joined.root, "--all")
    monkeypatch.setenv("HF_TOKEN", OWNER)
    assert f"cannot be removed for good: {uri_of(server, OWN)} keeps what was deleted" in said
    assert f"Described: {uri_of(server, OWN)}/README.md" in said
    assert "Nothing of site `north`" in server.repos[OWN].files()["README.md"].data.decode()
    told = json.loads(ok("status", URI, "--json"))
    assert [row["state"] for row in told["contributions"]] == ["withdrawn"]
    refused = run_cli("remerge", URI, tmp_path / "merged")
    assert "nothing is left of" in refused.stderr


def test_a_repository_that_nobody_has_let_us_into_stops_a_merge(publish, run_cli, server, tmp_path):
    publish()
    server.repos[OWN].readers.clear()
    refused = run_cli("merge", URI, "--out", tmp_path / "merged")
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: the hub of site 'north', {uri_of(server, OWN)}, cannot be asked ("
        f"{server.url[7:]} has no repository {OWN} that you may see: check the name, and ask its "
        "owner to let you in): try again, or leave the site out with --exclude north.\n"
    )


@pytest.mark.parametrize("part", [f"/api/models/{OWN}", "manifest.json", "payload.safetensors"])
def test_a_line_that_fails_halfway_leaves_status_and_stops_a_merge(
    publish, elsewhere, ok, run_cli, server, tmp_path, part
):
    publish()
    elsewhere()
    server.fault("GET", part, "status", 503, times=1000)
    refused = run_cli("merge", URI, "--skip-refused", "--out", tmp_path / "merged")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("or leave the site out with --exclude north.\n")
    told = json.loads(ok("status", URI, "--json"))
    assert list(told["not_asked"]) == ["north"]
    assert told["contributions"] == []


def test_it_is_asked_a_few_times_only(publish, elsewhere, server):
    publish(1)
    publish(2)
    elsewhere()
    there = open_hub(URI)
    contract = site.federation_on(there)
    server.log.clear()
    assert len(list_entries(there, contract)) == 2
    asked = [path for _, path, _ in server.log if OWN in path]
    listings = [path for path in asked if "/api/models/" in path]
    assert len(listings) == 3  # its latest commit twice, and what is in it once
    assert len(asked) == 3 + 2 * 2  # and of each contribution the manifest and the signature


def test_without_such_repositories_nothing_else_is_asked(federation_uri, server):
    there = open_hub(URI)
    contract = site.federation_on(there)
    server.log.clear()
    assert list_entries(there, contract) == []
    assert len(server.log) == 2


# Pages.


def card_of(repo, path="README.md"):
    text = repo.files()[path].data.decode()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_page_of_a_sites_repository_is_found_and_says_what_lies_there(publish, server):
    publish(1)
    publish(2)
    data, text = card_of(server.repos[OWN])
    assert data == {
        "library_name": "merge-kit", "tags": ["merge-kit", "task-vector", "medical", "cells"],
    }  # fmt: skip
    api = HfApi(server.url, READER)
    assert OWN in [model.id for model in api.list_models(filter="merge-kit")]
    manifests = [
        json.loads(blob.data) for path, blob in server.repos[OWN].files().items()
        if path.endswith("manifest.json")
    ]  # fmt: skip
    assert len(manifests) == 2
    (latest,) = [one for one in manifests if one["supersedes"]]
    assert latest["supersedes"][7:19] not in text  # what was replaced
    assert "| round | 20 |" in text
    assert "0.800 (0.700 to 0.900)" in text
    assert len([c for c in server.repos[OWN].commits.values() if c.title.startswith("Add")]) == 2


def test_a_hidden_count_stays_hidden_on_the_page(joined, ok, server, monkeypatch):
    run = joined.root / "runs" / "few"
    write_run(joined, run, counts={"round": 3, "lobed": 0, "granular": 40})
    monkeypatch.setenv("HF_TOKEN", READER)
    ok("publish", joined.root, "--run", run)
    _, text = card_of(server.repos[OWN])
    assert "| round | \\<5 |\n| lobed | 0 |\n| granular | 40 |\n" in text


def test_on_the_federations_repository_each_contribution_has_its_page_in_the_same_commit(
    federation_uri, ok, server, tmp_path, hub
):
    ok("join", URI, "--site", "south", "--folder", tmp_path / "south")
    south = site.open_site(tmp_path / "south")
    ok("admit", URI, "south", signing.public_key(south.key_file))
    write_run(south, south.root / "runs" / "a", seed=2)
    count = len(server.repos[NAME].commits)
    ok("publish", south.root, "--run", south.root / "runs" / "a")
    repo = server.repos[NAME]
    assert len(repo.commits) == count + 1
    (page,) = [path for path in repo.files() if path.endswith("README.md")]
    folder = page.rpartition("/")[0]
    assert {path.rpartition("/")[2] for path in repo.files() if folder in path} == {
        "README.md", *FILES,
    }  # fmt: skip
    assert f"# south: vector {folder.rpartition('/')[2][:12]}\n" in card_of(repo, page)[1]
    assert "README.md" in ok("audit-log", "show", south.root)
    ok("merge", URI, "--out", tmp_path / "before")
    repo.add("main", {**repo.files(), page: Blob(b"anything")}, "defaced", "hospital")
    ok("merge", URI, "--out", tmp_path / "after")  # nobody reads it
    for name in listing(tmp_path / "before"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    ok("pull", URI, tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("contributions/*/*/README.md"))
    assert "Already published" in ok("publish", south.root, "--run", south.root / "runs" / "a")
    ok("withdraw", south.root, "--all")
    assert page not in repo.files()
