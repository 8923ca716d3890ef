"""`--create-pr` wherever a site publishes what it has just made: seen when it is merged."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from merge_kit import signing, site
from merge_kit.hub import create_hub
from merge_kit.runs import latest_run
from tests.finetune.pictures import draw, write_table
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER, uri_of

URI = f"hf://{NAME}"
TRAINING = ("--steps", 1, "--batch-size", 8, "--validations", 1, "--head-steps", 5)


@pytest.fixture
def joined(hub, server, ok, tmp_path, monkeypatch):
    """A site that may not write to the hub."""
    there = create_hub(URI)
    names = ("model.safetensors", "config.json")
    there.publish("base", {name: hub.root / "base" / name for name in names})
    there.replace("federation.yaml", hub.read("federation.yaml"), None)
    ok("join", URI, "--site", "north", "--folder", tmp_path / "north")
    found = site.open_site(tmp_path / "north")
    ok("admit", URI, "north", signing.public_key(found.key_file))
    monkeypatch.setenv("HF_TOKEN", READER)
    return found.root


@pytest.fixture
def table(tmp_path):
    """The site's images; networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield write_table(tmp_path / "images", {"round": 6, "lobed": 6, "granular": 6}, seed=1)
    torch.set_num_threads(threads)


@pytest.fixture
def commands(joined, table, ok, tmp_path):
    """What is run at the site, for each command."""

    def made(command):
        if command == "calibrate":
            return (command, joined, "--data", table)
        ok("finetune", joined, "--data", table, *TRAINING)
        proxy = tmp_path / "proxy"
        proxy.mkdir()
        for number, pixels in enumerate(draw([0, 1, 2], seed=7)):
            Image.fromarray(pixels).save(proxy / f"{number}.png")
        return (command, joined, "--model", latest_run(joined) / "model", "--data", proxy)

    return made


@pytest.mark.parametrize("command", ["calibrate", "predict-proxy"])
def test_what_was_made_is_proposed_and_counts_when_it_is_merged(commands, ok, server, command):
    told = commands(command)
    said = ok(*told, "--publish", "--create-pr")
    assert f"Proposed: {uri_of(server)}/contributions/north/" in said
    assert f"by {server.url}/{NAME}/discussions/1\n" in said
    assert "ask the coordinator to look at it and to merge it" in said
    there = server.repos[NAME]
    assert not [path for path in there.files() if path.startswith("contributions/")]
    assert ok("status", URI, "--pull-requests").startswith(
        f"May be merged: {server.url}/{NAME}/discussions/1 adds contributions/north/"
    )
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    names = [path for path in there.files() if path.startswith("contributions/north/")]
    assert len(names) == 4  # with its card


@pytest.mark.parametrize("command", ["calibrate", "predict-proxy"])
def test_it_says_how_to_publish_and_not_that(joined, run_cli, server, tmp_path, command):
    (tmp_path / "x").mkdir()
    more = ("--model", tmp_path / "x") if command == "predict-proxy" else ()
    result = run_cli(command, joined, "--data", tmp_path / "x", *more, "--create-pr")
    assert result.exit_code == 2
    assert result.stderr == ("Error: --create-pr says how to publish: give --publish with it.\n")
    assert server.repos[NAME].pulls == []


@pytest.mark.parametrize("command", ["calibrate", "predict-proxy"])
def test_folders_have_no_pull_requests(commands, run_cli, hub, command):
    result = run_cli(*commands(command), "--publish", "--create-pr", "--hub", hub.root)
    assert result.exit_code == 2
    assert "--create-pr is for repositories on the Hugging Face Hub" in result.stderr
    assert list(hub.list("contributions")) == []


def test_a_withdrawal_cannot_be_proposed_to_a_folder(joined, run_cli, hub):
    result = run_cli("withdraw", joined, "--all", "--create-pr", "--hub", hub.root)
    assert result.exit_code == 2
    assert "--create-pr is for repositories on the Hugging Face Hub" in result.stderr
