"""The contract that all sites share."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit.errors import BaseMismatchError, FederationError
from merge_kit.federation import Federation, check_base, parse_federation, read_federation
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.tensorfile import write_tensors
from merge_kit.yamlfile import dump_yaml
from tests.merge_kit.helpers import load, says, settle

KEYS = [
    "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
    "ed25519:PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=",
]
CONTRACT = {
    "format": 1,
    "name": "cells",
    "architecture": "resnet18",
    "model_args": {"drop_rate": 0.1},
    "classifier": ["fc"],
    "classes": ["round", "lobed"],
    "label_schema": 1,
    "preprocessing": {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "sixteen_bit": "full",
    },
    "weights_source": "random",
    "base_fingerprint": "sha256:" + "0" * 64,
}
SITE = {"name": "north", "public_key": KEYS[0]}


def make(**changes):
    return parse_federation({**CONTRACT, **changes}, "federation.yaml")


def test_the_contract_hash_is_golden():
    """It is the digest of the canonical JSON of everything but policy and sites."""
    assert make().contract_hash == sha256_bytes(canonical_json(CONTRACT))
    assert make().contract_hash == (
        "sha256:d29e192e10d45d4530cfd25f67daa600c3be9ba7c9dc895c340f483c3429e64a"
    )


@pytest.mark.parametrize(
    "change",
    [{"sites": [SITE]}, {"policy": {"minimum_class_count": 9, "maximum_norm": 2.0}}],
    ids=["sites", "policy"],
)
def test_sites_and_policy_may_change_under_a_contract(change):
    assert make(**change).contract_hash == make().contract_hash


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"classes": ["lobed", "round"]},
        {"label_schema": 2},
        {"model_args": {}},
        {"preprocessing": {**CONTRACT["preprocessing"], "crop_pct": 0.9}},
        {"base_fingerprint": "sha256:" + "1" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is_the_contract(change):
    assert make(**change).contract_hash != make().contract_hash


GROUPS = {"classes": ["round", "lobed", "granular"], "groups": {"dark": ["lobed", "granular"]}}


def test_groups_are_part_of_the_contract_and_change_nothing_where_there_are_none():
    assert make(groups={}).contract_hash == make().contract_hash
    assert "groups" not in make(groups={}).to_yaml()
    without = {**CONTRACT, "classes": GROUPS["classes"]}
    assert make(**GROUPS).contract_hash == sha256_bytes(canonical_json({**without, **GROUPS}))


def test_groups_survive_the_file_and_stand_in_the_models_configuration(tmp_path):
    (tmp_path / "federation.yaml").write_text(make(**GROUPS).to_yaml())
    found = read_federation(tmp_path)
    assert found == make(**GROUPS)
    assert found.labels.members("dark") == ("lobed", "granular")
    told = json.loads(found.model_config_json)["merge_kit"]
    assert told == {"sixteen_bit": "full", "groups": {"dark": ["lobed", "granular"]}}
    assert json.loads(make().model_config_json)["merge_kit"] == {"sixteen_bit": "full"}


def test_groups_that_are_no_tree_are_refused():
    sentence = "federation.yaml: 'the document': the group 'dark' names 'spiky', which is no class."
    with says(FederationError, sentence):
        make(**{**GROUPS, "groups": {"dark": ["lobed", "spiky"]}})


def test_the_preprocessing_hash_is_golden():
    assert make().preprocessing.hash == sha256_bytes(canonical_json(CONTRACT["preprocessing"]))
    assert make().preprocessing.hash == (
        "sha256:af6c4e8fb8af44fb7538a58abcf411d7699dae4bbb4166ad774a77d63d77f93c"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"clases": ["a", "b"]}, "unknown key 'clases'; did you mean 'classes'?"),
        (
            {"classes": ["a"]},
            "'classes': tuple should have at least 2 items after validation, not 1.",
        ),
        ({"classes": ["a", "b", "a"]}, "'the document': a class is named twice."),
        ({"classes": ["a", " a "]}, "'the document': a class is named twice."),
        (
            {"classes": ["a", " "]},
            "'classes.1': string should have at least 1 character (got ' ').",
        ),
        (
            {"sites": [SITE, {**SITE, "public_key": KEYS[1]}]},
            "'the document': a site is named twice.",
        ),
        (
            {"sites": [{**SITE, "public_key": "ed25519:AAAA"}]},
            "'sites.0.public_key': 'ed25519:AAAA' is no public key: it must read 'ed25519:' and 44 "
            "characters, as 'merge-kit join' prints it (got 'ed25519:AAAA').",
        ),
        ({"format": 2}, "'format': input should be 1 (got 2)."),
        (
            {"name": "Cells"},
            "'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside (got 'Cells').",
        ),
        (
            {"base_fingerprint": "0"},
            "'base_fingerprint': string should match pattern '^sha256:[0-9a-f]{64}$' (got '0').",
        ),
        (
            {"preprocessing": {"crop_pct": 1.5}},
            "'preprocessing.crop_pct': input should be less than or equal to 1 (got 1.5).",
        ),
        (
            {"preprocessing": {"std": [0.2, 0.0, 0.2]}},
            "'preprocessing.std.1': input should be greater than 0 (got 0.0).",
        ),
        (
            {"preprocessing": {"input_size": [3, 0, 32]}},
            "'preprocessing.input_size.1': input should be greater than 0 (got 0).",
        ),
        (
            {"preprocessing": {"interpolation": "cubic"}},
            "'preprocessing.interpolation': input should be 'bilinear', 'bicubic', 'nearest' or "
            "'lanczos' (got 'cubic').",
        ),
        (
            {"policy": {"minimum_class_count": 0}},
            "'policy.minimum_class_count': input should be greater than or equal to 1 (got 0).",
        ),
        (
            {"policy": {"maximum_norm": 0}},
            "'policy.maximum_norm': input should be greater than 0 (got 0).",
        ),
    ],
)
def test_faults_are_told_in_one_sentence(change, sentence):
    with says(FederationError, f"federation.yaml: {sentence}"):
        make(**change)


def test_a_missing_key_is_named():
    with says(FederationError, "federation.yaml: the key 'preprocessing' is missing."):
        parse_federation(
            {k: v for k, v in CONTRACT.items() if k != "preprocessing"}, "federation.yaml"
        )


def test_a_federation_file_comes_back(tmp_path):
    made = make(sites=[SITE], classes=["größer", "no"], policy={"maximum_norm": 3.5})
    (tmp_path / "federation.yaml").write_text(made.to_yaml(), encoding="utf-8")
    assert read_federation(tmp_path) == made


def test_a_folder_without_a_federation_is_named(tmp_path):
    with says(
        FederationError,
        f"{tmp_path} is not a federation: it has no federation.yaml; "
        "create one with 'merge-kit init'.",
    ):
        read_federation(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name: cells\nclasses: [a\nb: c\n", ", line 3: not valid YAML."),
        ("name: gr\xf6\xdfer\n".encode("latin-1"), " is not UTF-8 text: save it as UTF-8."),
        (b"just text", " must hold keys and values (YAML mapping)."),
    ],
    ids=["YAML", "latin", "text"],
)
def test_a_broken_federation_file_is_named(tmp_path, content, sentence):
    (tmp_path / "federation.yaml").write_bytes(content)
    with says(FederationError, f"{tmp_path}/federation.yaml{sentence}"):
        read_federation(tmp_path)


def test_admitting_keeps_the_sites_sorted_and_the_old_value():
    before = make()
    after = before.admit("south", KEYS[0]).admit("north", KEYS[1])
    assert [site.name for site in after.sites] == ["north", "south"]
    assert (after.key_of("north"), after.key_of("west")) == (KEYS[1], None)
    assert before.sites == ()
    assert Federation.model_validate(after.model_dump()) == after


def test_admitting_twice_changes_nothing():
    once = make().admit("north", KEYS[0])
    assert once.admit("north", KEYS[0]) is once


def test_another_key_for_an_admitted_name_is_refused():
    with says(
        FederationError,
        f"site 'north' is admitted with another key ({KEYS[0]}): "
        "choose another name; or, if it has a new key, replace the old one with --rotate.",
    ):
        make(sites=[SITE]).admit("north", KEYS[1])


@pytest.mark.parametrize(
    ("name", "key", "sentence"),
    [
        (
            "North",
            KEYS[0],
            "site 'North': 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
            "(got 'North').",
        ),
        (
            "north",
            "abc",
            "'abc' is no public key: it must read 'ed25519:' and 44 characters, "
            "as 'merge-kit join' prints it.",
        ),
    ],
    ids=["name", "key"],
)
def test_admitting_checks_name_and_key(name, key, sentence):
    with says(FederationError, sentence):
        make().admit(name, key)


def test_another_base_is_refused_with_both_fingerprints(hub, federation):
    weights = hub.fetch("base/model.safetensors")
    check_base(federation, weights, "the base")
    other = federation.model_copy(update={"base_fingerprint": "sha256:" + "0" * 64})
    with says(
        BaseMismatchError,
        f"the base has the fingerprint {federation.base_fingerprint}, the federation 'cells' "
        f"expects sha256:{'0' * 64}: fetch the base again.",
    ):
        check_base(other, weights, "the base")


def test_the_base_is_read_once_until_it_changes(hub, federation):
    weights = hub.fetch("base/model.safetensors")
    settle(weights.parent)
    found = [check_base(federation, weights, "x", again=again) for again in (False, False, True)]
    assert [checked.remembered for checked in found] == [False, True, False]
    write_tensors(weights, {**load(weights), "fc.bias": torch.ones(3)})
    with pytest.raises(BaseMismatchError):
        check_base(federation, weights, "x")


def test_the_file_on_the_hub_is_the_contract_in_order(hub, federation):
    assert hub.read("federation.yaml").decode() == dump_yaml(federation)
    assert list(Federation.model_fields)[:3] == ["format", "name", "architecture"]


def test_a_key_speaks_for_one_site_only(federation):
    admitted = federation.admit("north", KEYS[0])
    with says(
        FederationError,
        "this key is known as one of the site 'north': a key is used once, ask 'south' for theirs.",
    ):
        admitted.admit("south", KEYS[0])
