"""What all checked documents share."""

from __future__ import annotations

import json

import pytest

from merge_kit.errors import FederationError
from merge_kit.schema import Digest, Document, Place, SiteName, parse, suggestion
from tests.merge_kit.helpers import says


class Inner(Document):
    share: float = 0.5
    times: int = 1


class Sample(Document):
    name: SiteName
    digest: Digest | None = None
    inner: Inner = Inner()


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with says(FederationError, "here: unknown key 'nmae'; did you mean 'name'?"):
        parse(Sample, {"name": "north", "nmae": "x"}, "here", FederationError)


def test_an_unknown_key_like_no_other_gets_the_list():
    with says(FederationError, "here: unknown key 'zzz'; known are name, digest, inner."):
        parse(Sample, {"name": "north", "zzz": "x"}, "here", FederationError)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "here: the key 'name' is missing."),
        ([], "here: 'the document': input should be an object."),
        (
            {"name": "n", "inner": {"share": "x"}},
            "here: 'inner.share': input should be a valid number (got 'x').",
        ),
        (
            {"name": "n", "inner": {"share": True}},
            "here: 'inner.share': input should be a valid number (got True).",
        ),
        (
            {"name": "n", "inner": {"share": "0.5"}},
            "here: 'inner.share': input should be a valid number (got '0.5').",
        ),
        (
            {"name": "n", "inner": {"times": 2.0}},
            "here: 'inner.times': input should be a valid integer (got 2.0).",
        ),
        (
            {"name": "n", "inner": {"shrae": 1}},
            "here: unknown key 'inner.shrae'; did you mean 'share'?",
        ),
        (
            {"name": "n", "inner": {"share": float("nan")}},
            "here: 'inner.share': input should be a finite number (got nan).",
        ),
    ],
    ids=["missing", "list", "nested", "true", "text", "float", "nested unknown", "nan"],
)
def test_faults_are_told_in_one_sentence(data, sentence):
    with says(FederationError, sentence):
        parse(Sample, data, "here", FederationError)


@pytest.mark.parametrize("name", ["a", "0", "north-1", "a" * 63])
def test_site_names_that_are_accepted(name):
    assert parse(Sample, {"name": name}, "here", FederationError).name == name


@pytest.mark.parametrize(
    "name", ["", "North", "a_b", "-a", "a-", "a b", "../a", "a/b", "a\n", "é", "a" * 64, ".a"]
)
def test_site_names_that_are_refused(name):
    with says(
        FederationError,
        "here: 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
        f"(got {name!r}).",
    ):
        parse(Sample, {"name": name}, "here", FederationError)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "A" * 64, "md5:" + "0" * 64])
def test_malformed_digests_are_refused(digest):
    with pytest.raises(FederationError, match=r"^here: 'digest': string should match pattern"):
        parse(Sample, {"name": "a", "digest": digest}, "here", FederationError)


@pytest.mark.parametrize("odd", ["\x1b[2J", "\ud800", "a\nb", "\u202e"], ids=ascii)
@pytest.mark.parametrize("place", ["key", "value"])
def test_what_a_stranger_wrote_cannot_drive_the_terminal(odd, place):
    """Keys and values of a manifest are shown on a screen: no escapes, no half characters."""
    data = {"name": "a", odd: 1} if place == "key" else {"name": odd}
    with pytest.raises(FederationError) as caught:
        parse(Sample, data, "here", FederationError)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [{"name": "A" * 10_000}, {"name": "a", "A" * 10_000: 1}])
def test_a_huge_value_is_cut_in_the_sentence(data):
    with pytest.raises(FederationError) as caught:
        parse(Sample, data, "here", FederationError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("odd", ["\ud800", json.loads("[" * 300 + "]" * 300)], ids=["half", "deep"])
def test_what_json_cannot_hold_is_said(odd):
    sentence = "here holds a text that is no Unicode, or nests too deeply: correct it."
    with says(FederationError, sentence):
        parse(Sample, {"name": odd}, "here", FederationError)


def test_documents_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Sample(name="a").name = "b"


def test_suggestions():
    assert suggestion("tise", ["mean", "ties"]) == "; did you mean 'ties'?"
    assert suggestion("x", ["mean", "ties"]) == "; known are mean, ties."
    assert suggestion("x", []) == "."
    assert suggestion("x", [f"model{n}" for n in range(1000)]) == "."


def test_the_line_is_that_of_the_value_or_of_what_holds_it():
    place = Place("x.yaml", {(): 1, ("a",): 2, ("a", "b"): 3, ("a", "b", 0): 4})
    assert place.at() == "x.yaml"
    assert place.at("c") == "x.yaml"
    assert place.at("a", "b", 0) == "x.yaml, line 4"
    assert place.at("a", "b", 7, "c") == "x.yaml, line 3"
    assert place.inside("x.yaml, part", "a").at("b") == "x.yaml, part, line 3"
