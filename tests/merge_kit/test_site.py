"""A site's working folder."""

from __future__ import annotations

import shutil

import pytest
import torch

from merge_kit import signing, site
from merge_kit.errors import BaseMismatchError, FederationError, HubError
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub import FolderHub
from merge_kit.tensorfile import fingerprint_file, write_tensors
from tests.merge_kit.helpers import listing, load, says


def test_joining_copies_and_checks_the_base_and_makes_a_key(hub, tmp_path, federation):
    joined = site.join(hub, "north", tmp_path / "north")
    assert joined.name == "north"
    assert joined.federation == federation
    weights = joined.base_folder / "model.safetensors"
    assert fingerprint_file(weights) == federation.base_fingerprint
    assert listing(joined.base_folder) == ["config.json", "model.safetensors"]
    public = (tmp_path / "north" / site.PUBLIC_KEY_FILE).read_text().strip()
    assert signing.public_key(joined.key_file) == public
    assert joined.key_file.stat().st_mode & 0o777 == 0o600


def test_joining_twice_changes_nothing(hub, tmp_path):
    first = site.join(hub, "north", tmp_path / "north")
    key = first.key_file.read_bytes()
    assert site.join(hub, "north", tmp_path / "north") == first
    assert first.key_file.read_bytes() == key


def test_what_is_opened_is_what_was_joined(hub, tmp_path):
    joined = site.join(hub, "north", tmp_path / "north")
    assert site.open_site(tmp_path / "north") == joined


def test_the_folder_of_another_site_is_refused(hub, tmp_path):
    site.join(hub, "north", tmp_path / "north")
    with says(
        FederationError,
        f"{tmp_path}/north is the folder of site 'north' on the hub {hub.root}: "
        "choose another folder with --folder.",
    ):
        site.join(hub, "south", tmp_path / "north")


def test_a_malformed_name_is_refused_and_leaves_nothing(hub, tmp_path):
    before = listing(tmp_path)
    with says(
        FederationError,
        "site 'North': 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
        "(got 'North').",
    ):
        site.join(hub, "North", tmp_path / "north")
    assert listing(tmp_path) == before


def test_a_hub_without_a_federation_is_named(tmp_path):
    with says(
        FederationError,
        f"{tmp_path} is not a federation: it has no federation.yaml; "
        "create one with 'merge-kit init'.",
    ):
        site.join(FolderHub(tmp_path), "north", tmp_path / "north")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [", ", line 1: not valid YAML."),
        (b"\xff", " is not UTF-8 text: save it as UTF-8."),
        (b"a: 1\na: 2", ", line 2: the key 'a' stands there already, in line 1: leave one of the "
         "two."),
        (b"a: &a [1]\nb: [*a, *a]", ", line 2: a reference (*name) has no place here: write it "
         "out."),
        (b"[" * 5000, ": not valid YAML."),
    ],
    ids=["cut", "bytes", "twice", "reference", "deep"],
)  # fmt: skip
def test_a_broken_contract_on_the_hub_is_named(hub, tmp_path, content, sentence):
    hub.replace(FEDERATION_FILE, content, hub.read(FEDERATION_FILE))
    with says(FederationError, f"{hub.root}/{FEDERATION_FILE}{sentence}"):
        site.join(hub, "north", tmp_path / "north")


def test_a_base_that_is_not_the_contracts_is_refused_and_leaves_nothing(hub, tmp_path, federation):
    weights = hub.root / "base" / "model.safetensors"
    write_tensors(weights, {**load(weights), "fc.bias": torch.ones(3)})
    with says(
        BaseMismatchError,
        f"{weights} has the fingerprint {fingerprint_file(weights)}, the federation 'cells' "
        f"expects {federation.base_fingerprint}: fetch the base again.",
    ):
        site.join(hub, "north", tmp_path / "north")
    assert listing(tmp_path) == ["hub"]


def test_an_incomplete_hub_is_named(hub, tmp_path):
    (hub.root / "base" / "model.safetensors").unlink()
    sentence = f"{hub.root} has no file base/model.safetensors: is it the right hub, and complete?"
    with says(HubError, sentence):
        site.join(hub, "north", tmp_path / "north")
    assert listing(tmp_path) == ["hub"]


def test_the_model_config_is_the_contracts_whatever_lies_on_the_hub(hub, tmp_path, federation):
    """No fingerprint covers the file on the hub."""
    (hub.root / "base" / "config.json").write_text('{"architecture": "resnet18"}')
    joined = site.join(hub, "north", tmp_path / "north")
    config = (joined.base_folder / "config.json").read_text()
    assert config == federation.model_config_json


def test_a_folder_that_is_no_sites_is_named(tmp_path):
    with says(
        FederationError,
        f"{tmp_path} is not a site's folder: it has no site.yaml; run 'merge-kit join' first.",
    ):
        site.open_site(tmp_path)


def test_a_copy_of_the_contract_that_was_changed_is_refused(hub, tmp_path, federation):
    joined = site.join(hub, "north", tmp_path / "north")
    other = federation.model_copy(update={"label_schema": 2})
    (joined.root / "federation" / FEDERATION_FILE).write_text(other.to_yaml())
    with says(
        FederationError,
        f"{joined.root}/federation holds the contract {other.contract_hash}, site 'north' joined "
        f"{federation.contract_hash}: ask the coordinator, and join again if the change is wanted.",
    ):
        site.open_site(joined.root)


def test_a_site_can_be_moved(hub, tmp_path):
    site.join(hub, "north", tmp_path / "north")
    shutil.move(tmp_path / "north", tmp_path / "elsewhere")
    moved = site.open_site(tmp_path / "elsewhere")
    assert signing.public_key(moved.key_file).startswith("ed25519:")
