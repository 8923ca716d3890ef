"""The whole job through the commands, on a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from merge_kit import signing, site
from merge_kit.contributions import list_entries
from merge_kit.errors import UnreachableError
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub import create_hub, open_hub
from merge_kit.payloads import check_payloads
from tests.conftest import write_run
from tests.merge_kit.helpers import listing, load
from tests.merge_kit.hub.huggingface.conftest import NAME, OWNER, READER, uri_of
from tests.merge_kit.hub.huggingface.repos import Blob

URI = f"hf://{NAME}"


@pytest.fixture
def federation_uri(hub, server):
    """The tests' federation, put into the repository as `init` does it."""
    there = create_hub(URI)
    names = ("model.safetensors", "config.json")
    assert there.publish("base", {name: hub.root / "base" / name for name in names}) is True
    there.replace(FEDERATION_FILE, (hub.root / FEDERATION_FILE).read_bytes(), None)
    return URI


@pytest.fixture
def trained(federation_uri, ok, tmp_path, monkeypatch):
    """Join, admit and train: all but the training is the real thing."""

    def make(name, seed=0):
        monkeypatch.setenv("HF_TOKEN", READER)
        ok("join", URI, "--site", name, "--folder", tmp_path / name)
        joined = site.open_site(tmp_path / name)
        monkeypatch.setenv("HF_TOKEN", OWNER)
        ok("admit", URI, name, signing.public_key(joined.key_file))
        write_run(joined, tmp_path / name / "runs" / f"seed{seed}", seed=seed)
        return tmp_path / name / "runs" / f"seed{seed}"

    return make


@pytest.fixture
def published(trained, ok):
    """A published vector of a site."""

    def make(name, seed=0):
        run = trained(name, seed)
        ok("publish", run.parents[1], "--run", run)
        return run

    return make


def states(ok):
    return [
        (row["site"], row["state"])
        for row in json.loads(ok("status", URI, "--json"))["contributions"]
    ]


def test_init_makes_a_private_repository_and_puts_the_federation_into_it(
    ok, run_cli, server, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the coordinator's key lies where one is
    place, options = "hf://hospital/new", ("--backbone", "test_resnet", "--weights", "none",
                                           "--classes", "round,lobed")  # fmt: skip
    ok("init", place, *options)
    repo = server.repos["hospital/new"]
    assert repo.private
    assert set(repo.files()) == {".gitattributes", "federation.yaml", "base/config.json",
                                 "base/model.safetensors"}  # fmt: skip
    assert [commit.title for commit in repo.commits.values()] == [
        "initial commit", "Add base", "Change federation.yaml",
    ]  # fmt: skip
    assert "holds a federation already" in run_cli("init", place, *options).stderr
    assert len(repo.commits) == 3


def test_join_admit_publish_status_merge_and_verify(published, ok, tmp_path):
    for seed, name in enumerate(("north", "south"), 1):
        published(name, seed)
    assert states(ok) == [("north", "ready"), ("south", "ready")]
    said = ok("merge", URI, "--method", "sum", "--out", tmp_path / "merged")
    assert "sum of 2 contributions" in said
    ok("verify", tmp_path / "merged", "--hub", URI)
    run = tmp_path / "north" / "runs" / "seed1"
    assert "Already published" in ok("publish", tmp_path / "north", "--run", run)


def test_a_site_stays_with_the_server_that_it_joined(trained, ok, run_cli, server, monkeypatch):
    """Whatever HF_ENDPOINT says on a later day, nothing is sent elsewhere."""
    run = trained("north")
    assert site.open_site(run.parents[1]).config.hub == uri_of(server)
    monkeypatch.delenv("HF_ENDPOINT")
    refused = run_cli("publish", run.parents[1], "--run", run)
    assert refused.stderr.startswith(f"Error: {server.url[7:]} shows no repository {NAME} to stran")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    assert "Published" in ok("publish", run.parents[1], "--run", run)


def test_what_was_merged_from_a_hub_elsewhere_is_what_a_folder_gives(published, hub, ok, tmp_path):
    published("north")
    there = open_hub(URI)
    for entry in there.list("contributions/north"):
        place = f"contributions/north/{entry}"
        hub.publish(place, {name: there.fetch(f"{place}/{name}") for name in there.list(place)})
    hub.replace(FEDERATION_FILE, there.read(FEDERATION_FILE), hub.read(FEDERATION_FILE))
    ok("merge", URI, "--out", tmp_path / "a")
    ok("merge", hub.root, "--out", tmp_path / "b")
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_site_without_the_right_to_write_proposes(trained, ok, run_cli, server, monkeypatch):
    run = trained("north")
    monkeypatch.setenv("HF_TOKEN", READER)
    refused = run_cli("publish", run.parents[1], "--run", run)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: you may not write to {uri_of(server)}: ask its owner, or take a token that may "
        "write; a site can also propose with --create-pr.\n"
    )
    for _ in range(2):
        said = ok("publish", run.parents[1], "--run", run, "--create-pr")
        assert f"Proposed: {uri_of(server)}/contributions/north/" in said
        assert f"by {server.url}/{NAME}/discussions/1\n" in said
        assert "ask the coordinator to look at it and to merge it" in said
    assert states(ok) == []
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    assert states(ok) == [("north", "ready")]
    assert "Already published" in ok("publish", run.parents[1], "--run", run, "--create-pr")


def test_such_a_site_takes_back_in_the_same_way(trained, ok, server, monkeypatch):
    run = trained("north")
    ok("publish", run.parents[1], "--run", run)
    monkeypatch.setenv("HF_TOKEN", READER)
    said = ok("withdraw", run.parents[1], "--all", "--create-pr")
    assert f"by {server.url}/{NAME}/discussions/1\n  it counts until the coordinator" in said
    assert states(ok) == [("north", "ready")]
    HfApi(server.url, OWNER).merge_pull_request(NAME, 1)
    assert [state for _, state in states(ok)] == ["withdrawn"]


def test_withdrawing_says_that_the_history_keeps_the_tensors(published, ok, server):
    run = published("north")
    said = ok("withdraw", run.parents[1], "--all")
    assert (
        f"its tensors cannot be removed for good: {uri_of(server)} keeps what was deleted" in said
    )


def test_a_dry_run_proposes_nothing(trained, ok, server):
    run = trained("north")
    said = ok("publish", run.parents[1], "--run", run, "--create-pr", "--dry-run")
    assert "Dry run: nothing was sent" in said
    assert server.repos[NAME].pulls == []


def test_folders_have_no_pull_requests(trained, hub, run_cli):
    run = trained("north")
    result = run_cli("publish", run.parents[1], "--run", run, "--hub", hub.root, "--create-pr")
    assert result.exit_code == 2
    assert "--create-pr is for repositories on the Hugging Face Hub" in result.stderr


@pytest.mark.parametrize("part", ["manifest.json", "manifest.sig", "payload.safetensors"])
def test_a_hub_that_cannot_be_asked_makes_no_entry_unsound(published, server, federation, part):
    """Else --skip-refused would merge without a site whose line was bad for a moment."""
    published("north")
    there, base = open_hub(URI), open_hub(URI).fetch("base/model.safetensors")
    contract = site.federation_on(there)
    server.fault("GET", part, "status", 503, times=100)
    with pytest.raises(UnreachableError):
        check_payloads(list_entries(there, contract), contract, base)
    server.faults.clear()
    (entry,) = check_payloads(list_entries(there, contract), contract, base)
    assert entry.problem is None


def test_a_withdrawal_that_cannot_be_read_ends_the_work(published, server, ok, run_cli, tmp_path):
    run = published("north")
    published("south", 1)
    ok("withdraw", run.parents[1], "--all")
    server.fault("GET", "withdrawal.json", "status", 503, times=100)
    refused = run_cli("merge", URI, "--skip-refused", "--out", tmp_path / "m")
    assert refused.exit_code == 1
    assert "failed by itself (503)" in refused.stderr
    assert not (tmp_path / "m").exists()


# Merged models.

MODEL = "hospital/merged"


@pytest.fixture
def merged(contribute, hub, ok, tmp_path):
    """A merged model, from a federation in a folder."""
    contribute("north", seed=1)
    contribute("south", seed=2)
    ok("merge", hub.root, "--method", "sum", "--keep-sum", "--out", tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_model_is_loaded_by_its_name(merged, ok, server, tmp_path):
    said = ok("push", merged, MODEL)
    assert f"Pushed: {server.url}/{MODEL}\n" in said
    assert 'timm.create_model("hf-hub:hospital/merged", pretrained=True)' in said
    code = (
        "import timm, torch\n"
        f"model = timm.create_model('hf-hub:{MODEL}', pretrained=True)\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'loaded.pt')!r})\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    pushed = load(merged / "model.safetensors")
    assert loaded.keys() == pushed.keys()
    assert all(torch.equal(loaded[name], pushed[name]) for name in pushed)


def test_a_merged_model_is_private_whole_and_one_commit(merged, ok, server):
    ok("push", merged, f"hf://{MODEL}")
    repo = server.repos[MODEL]
    assert repo.private
    names = ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert sorted(set(repo.files()) - {".gitattributes"}) == names
    assert len(repo.commits) == 2
    for name in names[1:]:
        assert repo.files()[name].data == (merged / name).read_bytes()
    assert 'create_model("hf-hub:hospital/merged", pretrained=True)' in (
        repo.files()["README.md"].data.decode()
    )


def test_a_merged_model_is_found_by_what_its_card_says(merged, ok, server):
    ok("push", merged, MODEL, "--public", "--base-model", "timm/test_resnet.r160_in1k")
    card = yaml.safe_load(server.repos[MODEL].files()["README.md"].data.decode().split("---")[1])
    assert card["base_model"] == "timm/test_resnet.r160_in1k"
    assert card["base_model_relation"] == "merge"
    assert card["library_name"] == "timm"
    api = HfApi(server.url, token=False)
    for wanted in ("merge-kit", "timm", "base_model:merge:timm/test_resnet.r160_in1k",
                   ("merge", "medical")):  # fmt: skip
        assert [model.id for model in api.list_models(filter=wanted)] == [MODEL]
    assert list(api.list_models(filter="mergekit")) == []


def test_a_private_model_is_found_by_its_owner_alone(merged, ok, server):
    ok("push", merged, MODEL)
    found = {token: list(HfApi(server.url, token).list_models(filter="merge-kit"))
             for token in (OWNER, READER)}  # fmt: skip
    assert [len(found[token]) for token in (OWNER, READER)] == [1, 0]


def test_pushing_twice_sends_nothing(merged, ok, server):
    ok("push", merged, MODEL)
    assert f"There already: {server.url}/{MODEL}" in ok("push", merged, MODEL)
    assert len(server.repos[MODEL].commits) == 2


def test_another_model_gives_way_only_when_told(merged, hub, ok, run_cli, server, tmp_path):
    ok("push", merged, MODEL)
    ok("merge", hub.root, "--method", "mean", "--out", tmp_path / "other")
    refused = run_cli("push", tmp_path / "other", MODEL)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"Error: {MODEL} holds a model already: push to another name, or pass --replace; the "
        "repository's history keeps what gives way.\n"
    )
    ok("push", tmp_path / "other", MODEL, "--replace")
    weights = server.repos[MODEL].files()["model.safetensors"].data
    assert weights == (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_push_whose_answer_was_lost_is_not_made_twice(merged, ok, server):
    server.fault("POST", "/commit/", "lost")
    ok("push", merged, MODEL)
    assert len(server.repos[MODEL].commits) == 2


def refusals(merged, server, tmp_path):
    """What is refused: by name the arguments, the exit code and the sentence."""
    return {
        "a federation": (
            (merged, NAME), 2, f"{NAME} holds a federation: push models to one of their own."),
        "other files": (
            (merged, "hospital/notes"), 2,
            "hospital/notes holds other files (notes.txt): push to a repository of its own."),
        "a public repository": (
            (merged, "hospital/open"), 1,
            f"{uri_of(server, 'hospital/open')} is there already, and everybody may read it: make "
            "it private in its settings first, or choose another name."),
        "no merged model": (
            (tmp_path, MODEL), 1,
            f"{tmp_path} is no merged model: it has no provenance.json; give a folder that "
            "'merge-kit merge' made."),
        "no name": (
            (merged, "merged"), 1,
            "'merged' is no name of a repository: write it as owner/name, in letters, digits, '-', "
            "'_' and '.'."),
    }  # fmt: skip


@pytest.mark.parametrize(
    "what", ["a federation", "other files", "a public repository", "no merged model", "no name"]
)
def test_what_is_not_pushed(merged, run_cli, server, tmp_path, what):
    repo = server.repos[NAME]
    repo.add("main", {**repo.files(), FEDERATION_FILE: Blob(b"x")}, "init", "hospital")
    other = server.create("hospital/notes", writers="hospital")
    other.add("main", {**other.files(), "notes.txt": Blob(b"x")}, "notes", "hospital")
    server.create("hospital/open", writers="hospital", private=False)
    before = {name: len(repo.commits) for name, repo in server.repos.items()}
    arguments, code, sentence = refusals(merged, server, tmp_path)[what]
    result = run_cli("push", *arguments)
    assert (result.exit_code, result.stderr) == (code, f"Error: {sentence}\n")
    assert {name: len(repo.commits) for name, repo in server.repos.items()} == before


def test_other_weights_than_the_provenance_names_are_not_pushed(merged, run_cli, server):
    data = bytearray((merged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (merged / "model.safetensors").write_bytes(data)
    result = run_cli("push", merged, MODEL)
    assert result.stderr == (
        f"Error: {merged}/model.safetensors holds other weights than provenance.json names: merge "
        "again.\n"
    )
    assert MODEL not in server.repos


def test_a_model_that_timm_cannot_load_is_not_pushed(merged, run_cli, server):
    (merged / "config.json").unlink()
    result = run_cli("push", merged, MODEL)
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {merged} is no model that timm could load: it needs model.safetensors and a "
        "config.json that names the architecture.\n"
    )


def test_a_card_that_cannot_be_read_is_named(merged, run_cli, server):
    (merged / "README.md").write_text("---\ntags: [\n---\n")
    result = run_cli("push", merged, MODEL)
    assert result.exit_code == 1
    assert f"{merged}/README.md cannot be read as a model card" in result.stderr
