"""What a site says about its contribution."""

from __future__ import annotations

import hashlib
import json

import pytest

from merge_kit.errors import ContributionError
from merge_kit.files import canonical_json
from merge_kit.manifest import (
    Manifest,
    count_of,
    parse_manifest,
    read_draft,
    suppress,
    suppressed_counts,
)
from tests.merge_kit.helpers import says

DIGEST = "sha256:" + "0" * 64
CONTENT = {
    "format": 1,
    "kind": "vector",
    "site": "north",
    "federation": DIGEST,
    "base": "sha256:" + "1" * 64,
    "payload": {"sha256": "sha256:" + "2" * 64, "size": 8, "norm": 1.5},
    "class_counts": {"round": 20, "lobed": "<5", "größer": 0},
    "training": {
        "steps": 10,
        "epochs": 2,
        "optimizer": "adamw",
        "learning_rate": 0.0001,
        "seed": -1,
    },
    "preprocessing": "sha256:" + "3" * 64,
    "validation": {
        "balanced_accuracy": {"value": 0.8, "low": 0.7, "high": 0.9},
        "macro_auroc": {"value": None, "low": None, "high": None},
    },
    "privacy": None,
    "software": {
        "merge_kit": "0.1.0",
        "python": "3.11.7",
        "torch": "2.15.0+cpu",
        "timm": "1.0.31",
    },
    "created_at": "2026-11-23T12:00:00Z",
    "supersedes": None,
}


def changed(path, value):
    """CONTENT with the value at a path such as ``training.steps`` replaced, as JSON."""
    content = json.loads(canonical_json(CONTENT))
    *parents, last = path.split(".")
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    return content


def test_the_canonical_bytes_are_golden():
    manifest = parse_manifest(canonical_json(CONTENT), "here")
    data = manifest.to_bytes()
    assert data == canonical_json(CONTENT)
    assert data.startswith(b'{"base":"sha256:1111')
    assert '"class_counts":{"größer":0,"lobed":"<5","round":20}'.encode() in data
    assert b'"learning_rate":0.0001' in data


def test_the_id_is_golden():
    manifest = parse_manifest(canonical_json(CONTENT), "here")
    assert manifest.id == hashlib.sha256(canonical_json(CONTENT)).hexdigest()
    assert manifest.id == "d5d82eacc165bc522cd99940b839f479497966616ca789e2b10b3936d0e93309"


def test_statistics_name_the_vector_that_they_are_about():
    """Golden: the one new field of the manifest, and its id."""
    content = {**CONTENT, "kind": "fisher", "about": "sha256:" + "4" * 64}
    manifest = parse_manifest(canonical_json(content), "here")
    assert manifest.to_bytes() == canonical_json(content)
    assert manifest.to_bytes().startswith(b'{"about":"sha256:4444')
    assert manifest.id == "f03db29ecf36948e8ab97cdc0b8ed22f663756031b54894a493a091b08b79b5b"


def test_counts_of_groups_and_of_other_classes_stand_only_where_there_are_any():
    plain = parse_manifest(canonical_json(CONTENT), "here")
    assert plain.group_counts is None
    assert not {"group_counts", "other_images"} & set(json.loads(plain.to_bytes()))
    told = {**CONTENT, "group_counts": {"dark": 9}, "other_images": 7}
    assert parse_manifest(canonical_json(told), "here").to_bytes() == canonical_json(told)


def test_every_count_of_images_is_hidden_below_the_minimum():
    told = {
        "class_counts": {"round": 3}, "group_counts": {"dark": 4, "pale": 0}, "other_images": 2
    }  # fmt: skip
    assert suppressed_counts(told, 5) == {
        "class_counts": {"round": "<5"},
        "group_counts": {"dark": "<5", "pale": 0},
        "other_images": "<5",
    }
    assert suppressed_counts({"class_counts": {"round": 5}, "other_images": None}, 5) == {
        "class_counts": {"round": 5},
        "other_images": None,
    }


@pytest.mark.parametrize(
    "changes",
    [{"kind": "gram"}, {"kind": "gram", "about": None}, {"about": DIGEST}],
    ids=["left out", "null", "of a vector"],
)
def test_statistics_without_a_vector_and_vectors_with_one_are_refused(changes):
    with says(
        ContributionError,
        "here: 'the document': statistics name the vector that they are about, "
        "a vector names none.",
    ):
        parse_manifest(canonical_json({**CONTENT, **changes}), "here")


@pytest.mark.parametrize("field", ["site", "payload.sha256", "class_counts.round", "supersedes"])
def test_the_id_changes_with_every_field(field):
    value = {"site": "south", "class_counts.round": 21}.get(field, DIGEST)
    other = parse_manifest(canonical_json(changed(field, value)), "here")
    assert other.id != parse_manifest(canonical_json(CONTENT), "here").id


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(CONTENT, ensure_ascii=False).encode(),
        canonical_json(CONTENT) + b"\n",
        canonical_json(CONTENT).replace(b'"norm":1.5', b'"norm":1.50'),
        canonical_json(CONTENT).replace("größer".encode(), b"gr\\u00f6\\u00dfer"),
        canonical_json(CONTENT).replace(b',"privacy":null', b""),
        canonical_json({**CONTENT, "about": None}),
    ],
    ids=[
        "spaces",
        "line end",
        "digits",
        "escape",
        "default left out",
        "empty about",
    ],
)
def test_bytes_that_are_not_canonical_are_refused(data):
    with says(
        ContributionError,
        "here is not in canonical form: it was not written by merge-kit, or changed afterwards.",
    ):
        parse_manifest(data, "here")


def test_a_key_twice_is_named():
    with says(ContributionError, "here names the key 'site' twice: it is refused."):
        parse_manifest(canonical_json(CONTENT)[:-1] + b',"site":"north"}', "here")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("user", "root", "unknown key 'user'; known are "),
        ("training.host", "gpu1", "unknown key 'training.host'; known are steps,"),
        ("training.optimizer", "/home/x", "'training.optimizer': string should match pattern"),
        ("software.torch", "2.0 (root@host)", "'software.torch': string should match pattern"),
        ("site", "North", "'site': a name has 1 to 63 characters"),
        (
            "kind",
            "image",
            "'kind': input should be 'vector', 'fisher', 'gram', 'moments', 'norms' or "
            "'predictions' "
            "(got 'image').",
        ),
        ("kind", "moments", "'the document': statistics name the vector that they are about"),
        ("training", None, "'the document': 'training' and 'validation' are of a vector"),
        ("payload.norm", -1.0, "'payload.norm': input should be greater than or equal to 0"),
        ("training.steps", -1, "'training.steps': input should be greater than or equal to 0"),
        ("training.steps", 10**400, "'training.steps': input should be less than or equal to"),
        ("class_counts.round", -1, "'class_counts.round"),
        ("class_counts.round", 10**400, "'class_counts.round"),
        ("class_counts.round", "<0", "'class_counts.round"),
        ("class_counts.round", "<" + "9" * 5000, "'class_counts.round"),
        ("class_counts.round", "many", "'class_counts.round"),
        ("created_at", "2026-11-23T12:00:00+01:00", "'created_at': string should match pattern"),
        ("created_at", "2026-11-23T12:00:00.5Z", "'created_at': string should match pattern"),
        ("created_at", "٢٠٢٦-11-23T12:00:00Z", "'created_at': string should match pattern"),
        ("created_at", "2026-13-45T12:00:00Z", "'created_at': "),
        ("privacy", {"epsilon": 0.0, "delta": 1e-5}, "'privacy.epsilon': input should be greater"),
        ("supersedes", "0" * 64, "'supersedes': string should match pattern"),
    ],
)
def test_a_manifest_says_nothing_but_what_it_should(field, value, sentence):
    """No path, host or user fits into any field, and no number breaks the arithmetic."""
    with pytest.raises(ContributionError) as caught:
        parse_manifest(canonical_json(changed(field, value)), "here")
    assert str(caught.value).startswith(f"here: {sentence}")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 200_000], ids=["empty", "cut", "bytes", "deep"]
)
def test_what_is_not_json_is_refused(data):
    with says(ContributionError, "here is not JSON: ask the site to publish again."):
        parse_manifest(data, "here")


def test_a_huge_manifest_is_refused_before_it_is_parsed():
    with says(ContributionError, "here has 1048577 bytes, above 1048576: refused."):
        parse_manifest(b" " * (2**20 + 1), "here")


def test_nan_is_refused():
    data = canonical_json(CONTENT).replace(b'"norm":1.5', b'"norm":NaN')
    with pytest.raises(ContributionError, match=r"^here is not JSON: ask the site"):
        parse_manifest(data, "here")


def test_small_counts_are_suppressed_and_zero_stays_zero():
    counts = {"a": 0, "b": 1, "c": 4, "d": 5, "e": 6}
    assert suppress(counts, 5) == {"a": 0, "b": "<5", "c": "<5", "d": 5, "e": 6}
    assert suppress(counts, 1) == counts


def test_a_hidden_count_stays_hidden_behind_the_larger_minimum():
    assert suppress({"a": "<5", "b": "<9", "c": 6}, 7) == {"a": "<7", "b": "<9", "c": "<7"}


@pytest.mark.parametrize(("count", "number"), [(0, 0), (7, 7), ("<5", 2.5), ("<2", 1), ("<10", 5)])
def test_a_suppressed_count_stands_for_the_middle(count, number):
    """The mean of 1 to N - 1 is N / 2."""
    assert count_of(count) == number


def test_a_draft_is_a_manifest_without_what_it_replaces(tmp_path):
    content = {k: v for k, v in CONTENT.items() if k != "supersedes"}
    (tmp_path / "draft").write_text(json.dumps(content))
    draft = read_draft(tmp_path / "draft")
    assert Manifest(**draft.model_dump()) == parse_manifest(canonical_json(CONTENT), "here")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, " does not exist: the run is not finished; run 'merge-kit finetune' again."),
        (b"{", " is not JSON: run 'merge-kit finetune' again."),
        (b"{}", ": the key 'site' is missing."),
    ],
    ids=["missing", "cut", "empty"],
)
def test_a_broken_draft_is_named(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "draft").write_bytes(content)
    with says(ContributionError, f"{tmp_path}/draft{sentence}"):
        read_draft(tmp_path / "draft")
