"""Names of what is merged, and each content once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_kit import vector
from merge_kit.errors import UsageError
from merge_kit.files import canonical_json
from merge_kit.inputs import choose, each_once, named_apart, open_input
from merge_kit.schema import Document, SiteName, parse
from merge_kit.tensorfile import write_tensors
from tests.merge_kit.helpers import says


class Named(Document):
    name: SiteName


@pytest.fixture
def opened(tmp_path):
    """Write a checkpoint, open it as a user names it; {} stands for the folder of all."""
    with ExitStack() as stack:

        def run(text, file=None, metadata=None):
            path = tmp_path / (file or text)
            place = path if path.suffix == ".safetensors" else path / "model.safetensors"
            write_tensors(place, {"w": torch.ones(1)}, metadata)
            return open_input(Path(text.format(tmp_path) if file else path), stack)

        yield run


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("north", "north"),
        ("Sankt Gallen_2", "sankt-gallen-2"),
        ("Zürich", "zurich"),
        ("best.safetensors", "best"),
        ("west/model.safetensors", "west"),
        ("west/model", "west"),
        ("run.v2/checkpoint-500", "checkpoint-500"),
        ("...", "checkpoint"),
        ("日本", "checkpoint"),
        ("x" * 62 + "--" + "y" * 30, "x" * 62),
    ],
)
def test_a_checkpoint_is_called_after_its_file_or_folder(opened, path, name):
    found = opened(path)
    assert found.name == name
    assert not found.given
    assert parse(Named, {"name": found.name}, "test", UsageError).name == name


def test_a_name_may_be_given(opened, tmp_path):
    found = opened("south={}/a", "a")
    assert (found.name, found.path, found.given) == ("south", tmp_path / "a", True)


def test_a_path_may_hold_an_equals_sign(opened, tmp_path):
    found = opened("lr=3")
    assert (found.name, found.path, found.given) == ("lr-3", tmp_path / "lr=3", False)


def test_a_name_that_is_not_legal_is_refused(opened, tmp_path):
    with says(
        UsageError,
        f"A B={tmp_path}/a: 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
        "(got 'A B').",
    ):
        opened("A B={}/a", "a")


def test_a_vector_is_called_after_its_site(opened):
    zeros = "sha256:" + "0" * 64
    header = vector.VectorHeader(base=zeros, federation=zeros, site="east")
    metadata = (vector.METADATA_KEY, canonical_json(header.model_dump()).decode())
    found = opened("x.safetensors", metadata=metadata)
    assert (found.name, found.header) == ("east", header)


def numbered(opened, *names):
    """Inputs with these names, the n-th with the content n; NAME= where the user gave it."""
    one = opened("a")
    return [
        replace(one, name=n.rstrip("="), given=n.endswith("="), fingerprint=f"sha256:{i}")
        for i, n in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a", "a", "a-2"], ["a", "a-2", "a-2-2"]),
        (["a", "a="], ["a-2", "a"]),
        (["x" * 63] * 2, ["x" * 63, "x" * 58 + "-2"]),
    ],
)
def test_equal_names_are_numbered(opened, names, expected):
    assert [one.name for one in named_apart(numbered(opened, *names))] == expected


def test_names_that_the_user_gave_are_not_numbered(opened):
    with says(UsageError, "two checkpoints are called 'a': tell them apart with NAME=PATH."):
        named_apart(numbered(opened, "a=", "a="))


def test_equal_contents_count_once_whatever_their_order(opened, tmp_path):
    b, c, a = numbered(opened, "b", "c=", "a")
    b, c = (replace(one, fingerprint="sha256:7", path=tmp_path / one.name) for one in (b, c))
    for order in ([a, b, c], [c, b, a], [b, c, a]):
        kept, notes = each_once(order)
        assert kept == [a, c]
        assert notes == [f"{tmp_path}/c and {tmp_path}/b hold the same tensors: they count once."]
    assert each_once([a, a]) == ([a], [f"{a.path} is given twice: it counts once."])


def test_some_are_chosen_by_name(opened):
    found = numbered(opened, "a", "b", "c")

    def names(sites=(), exclude=()):
        return [one.name for one in choose(found, sites, exclude)]

    assert names() == ["a", "b", "c"]
    assert names(sites=["c", "a"]) == ["a", "c"]
    assert names(exclude=["b"]) == ["a", "c"]
    with says(UsageError, "no checkpoint is called 'd'; there are a, b, c."):
        names(exclude=["d"])
    with says(
        UsageError, "--site and --exclude leave nothing to merge: name one checkpoint fewer."
    ):
        names(sites=["a"], exclude=["a"])
