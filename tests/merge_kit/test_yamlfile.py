"""YAML files: what they may hold, and the line of what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from merge_kit.errors import RecipeError
from merge_kit.schema import Document, Place, parse
from merge_kit.yamlfile import LIMIT, dump_yaml, read_yaml, yaml_value
from tests.merge_kit.helpers import says


class Sample(Document):
    name: str
    rate: float | None = None
    listed: tuple[Any, ...] = ()


def test_a_document_comes_back(tmp_path):
    sample = Sample(name="north", rate=1e-300, listed=("1e-5", "no", "<<", "2026-01-01", "07", "é"))
    (tmp_path / "s.yaml").write_text(dump_yaml(sample), encoding="utf-8")
    file = read_yaml(tmp_path / "s.yaml", RecipeError)
    assert parse(Sample, file.data, file.place, RecipeError) == sample
    assert list(file.data) == ["name", "rate", "listed"]


def test_what_stands_twice_is_written_out():
    twice = ["a", "b"]
    assert "&" not in dump_yaml(Sample(name="x", listed=(twice, twice)))


def test_every_value_has_its_line(tmp_path):
    (tmp_path / "s.yaml").write_text("# why\na: 1\nb:\n  - c: 2\n    d:\n      - 3\n")
    file = read_yaml(tmp_path / "s.yaml", RecipeError)
    assert file.data == {"a": 1, "b": [{"c": 2, "d": [3]}]}
    assert file.place == Place(
        f"{tmp_path}/s.yaml",
        {(): 2, ("a",): 2, ("b",): 3, ("b", 0): 4, ("b", 0, "c"): 4, ("b", 0, "d"): 5}
        | {("b", 0, "d", 0): 6},
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1E+3", -1000.0),
        (".5e1", 5.0),
        ("'1e-5'", "1e-5"),
        ("3", 3),
        ("0.5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("no", False),
        ("null", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_plain_values(text, value):
    found = yaml_value(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["[", "*a", "!!set {a}", "{<<: {a: 1}}", "[" * 5000])
def test_what_is_no_value_of_the_command_line(text):
    with pytest.raises(ValueError, match=r"."):
        yaml_value(text)


BOMB = b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: 1\nb: [\n", ", line 3: not valid YAML."),
        (b"a: 1\n\tb: 2\n", ", line 2: not valid YAML."),
        (b"a: 1\nb: \xff\n", " is not UTF-8 text: save it as UTF-8."),
        (b"- a\n- b\n", " must hold keys and values (YAML mapping)."),
        (b"", " must hold keys and values (YAML mapping)."),
        (b"a: " + b"[" * 5000, ": not valid YAML."),
        (b"a: " + b"1" * 5000, ": not valid YAML."),
        (b"#" * (LIMIT + 1), f" is larger than {LIMIT} bytes: shorten it."),
        (
            b"a: !!python/object:os.system x\n",
            ", line 1: 'python/object:os.system' is no type of our files: leave it out.",
        ),
        (
            b"a: 1\nb:\n  c: 1\n  d: 1\n  c: 2\n",
            ", line 5: the key 'c' stands there already, in line 3: leave one of the two.",
        ),
        (BOMB, ", line 2: a reference (*name) has no place here: write it out."),
        (b"a: &a\n  b: *a\n", ", line 2: a reference (*name) has no place here: write it out."),
        (
            b"a: 1\n<<: {b: 2}\n",
            ", line 2: a merge key (<<) has no place here: write it out.",
        ),
        (b"a: 1\n7: 2\n", ", line 2: the key '7' is no text: put it in quotes."),
        (b"[a, b]: 2\n", ", line 1: the key of several values is no text: put it in quotes."),
    ],
    ids=[
        *("cut", "tab", "latin", "list", "empty", "deep", "digits", "large", "python", "twice"),
        *("bomb", "ring", "merge", "number", "sequence"),
    ],
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
