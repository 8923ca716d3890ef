"""What all checked documents share."""

from __future__ import annotations

import pytest

from merge_kit.errors import FederationError, RecipeError
from merge_kit.schema import Digest, Document, SiteName, dump_yaml, parse, read_yaml, suggestion
from tests.merge_kit.helpers import says


class Inner(Document):
    share: float = 0.5


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
        ([], "here: 'the document': input should be a valid dictionary or instance of Sample."),
        (
            {"name": "n", "inner": {"share": "x"}},
            "here: 'inner.share': input should be a valid number, unable to parse string as a "
            "number (got 'x').",
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
    ids=["missing", "list", "nested", "nested unknown", "nan"],
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


def test_documents_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Sample(name="a").name = "b"


def test_suggestions():
    assert suggestion("tise", ["mean", "ties"]) == "; did you mean 'ties'?"
    assert suggestion("x", ["mean", "ties"]) == "; known are mean, ties."
    assert suggestion("x", []) == "."
    assert suggestion("x", [f"model{n}" for n in range(1000)]) == "."


def test_yaml_comes_back(tmp_path):
    sample = Sample(name="north", digest="sha256:" + "0" * 64)
    (tmp_path / "s.yaml").write_text(dump_yaml(sample), encoding="utf-8")
    data = read_yaml(tmp_path / "s.yaml", RecipeError)
    assert parse(Sample, data, "here", RecipeError) == sample
    assert list(data) == ["name", "digest", "inner"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: 1\nb: [\n", ", line 3: not valid YAML."),
        (b"a: 1\n\tb: 2\n", ", line 2: not valid YAML."),
        (b"a: 1\nb: \xff\n", " is not UTF-8 text: save it as UTF-8."),
        (b"- a\n- b\n", " must hold keys and values (YAML mapping)."),
        (b"", " must hold keys and values (YAML mapping)."),
        (b"a: !!python/object:os.system x\n", ", line 1: not valid YAML."),
        (b"a: 2026-13-45\n", ": not valid YAML."),
        (b"a: " + b"[" * 5000, ": not valid YAML."),
    ],
    ids=["cut", "tab", "latin", "list", "empty", "python", "date", "deep"],
)
def test_bad_yaml_is_named(tmp_path, content, sentence):
    (tmp_path / "r.yaml").write_bytes(content)
    with says(RecipeError, f"{tmp_path}/r.yaml{sentence}"):
        read_yaml(tmp_path / "r.yaml", RecipeError)


def test_a_missing_or_odd_yaml_file_is_named(tmp_path):
    with says(RecipeError, f"{tmp_path}/no.yaml does not exist: check the path."):
        read_yaml(tmp_path / "no.yaml", RecipeError)
    with says(RecipeError, f"{tmp_path} cannot be read: Is a directory."):
        read_yaml(tmp_path, RecipeError)
