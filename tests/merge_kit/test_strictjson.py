"""JSON of which every reader finds the same."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune
import merge_kit
from merge_kit.errors import ProvenanceError
from merge_kit.files import canonical_json
from merge_kit.strictjson import RepeatedKeyError, loads, read_json
from tests.merge_kit.helpers import quick, says

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
).filter(lambda value: "Infinity" not in json.dumps(value))


@quick
@given(values)
def test_what_has_each_key_once_is_read_as_it_is(value):
    assert loads(canonical_json(value)) == value


@quick
@given(st.text(), values, values, st.lists(st.sampled_from(["list", "object"]), max_size=4))
def test_a_key_twice_is_found_at_any_depth(key, one, other, around):
    name = json.dumps(key)
    text = f'{{"before":1,{name}:{json.dumps(one)},{name}:{json.dumps(other)}}}'
    if key == "before":
        text = text.replace('"before":1,', "", 1)
    for kind in around:
        text = f"[{text}]" if kind == "list" else f'{{"x":{text}}}'
    with pytest.raises(RepeatedKeyError):
        loads(text)


def test_an_escape_makes_no_other_key():
    with pytest.raises(RepeatedKeyError):
        loads(b'{"a":1,"\\u0061":2}')


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[Infinity]", '{"a":-Infinity}', "[" * 100_000, b"\xff", "1 2"]
)
def test_what_is_no_json_has_its_own_sentence(text):
    with says(ProvenanceError, "it is none."):
        read_json(text, "here", ProvenanceError, "it is none.")


def test_the_key_is_named_and_drives_no_terminal():
    with says(ProvenanceError, "here names the key '\\x1b[2J' twice: it is refused."):
        read_json('{"\\u001b[2J":1,"\\u001b[2J":1}', "here", ProvenanceError, "it is none.")


def test_nothing_from_outside_is_read_otherwise():
    """What a run keeps of itself in the site's own folder is read as JSON of any kind."""
    own = {"run.py", "runlog.py", "run_statistics.py", "strictjson.py"}
    found = set()
    for package in (merge_kit, finetune):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("loads", "load"):
                    if isinstance(node.value, ast.Name) and node.value.id == "json":
                        found.add(path.name)
    assert found == own
