"""What was measured on a vector is not measured again, and changes no byte."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit import engine
from merge_kit.notes import LIMIT, Notes
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.helpers import assemble

BASE_PRINT = "sha256:" + "0" * 64
SHAPES = {"a.w": (270, 270), "b.w": (70_001,), "c.w": (3,)}
VALUES = sum(torch.Size(shape).numel() for shape in SHAPES.values())


class Counted(TensorFile):
    """Counts the values that are read."""

    values = 0

    def read_into(self, name, begin, out):
        self.values += out.numel()
        super().read_into(name, begin, out)


@pytest.fixture
def vectors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    opened = []
    for index in range(7):
        write_tensors(
            tmp_path / f"{index}.st",
            {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()},
        )

    def make():
        files = [Counted(tmp_path / f"{index}.st") for index in range(7)]
        opened.extend(files)
        return files[0], [
            engine.Source(f"id{i}", f"s{i}", file, (float(i + 3),), i + 1)
            for i, file in enumerate(files[1:])
        ]

    yield make
    for file in opened:
        file.close()


def merge(base, sources, recipe, notes=None):
    parts = engine.merge(base, sources, roles_of(base.specs, ()), recipe, notes=notes)
    return assemble(parts, engine.merged_specs(base.specs, recipe))


def passes(sources):
    """How often each vector was read."""
    return [source.file.values / VALUES for source in sources]


RECIPES = [
    {"method": "ties"},
    {"method": "ties", "options": {"scope": "tensor", "density": 0.4}},
    {"method": "karcher"},
    {"method": "model-stock"},
    {"method": "geometric-median"},
    {"method": "krum"},
    {"method": "breadcrumbs", "options": {"rule": "norm-clipping"}},
    {"method": "dare", "options": {"rule": "ties", "rule_options": {"density": 0.5}}},
]


@pytest.mark.parametrize("data", RECIPES, ids=lambda r: f"{r['method']} {len(r)}")
def test_a_vector_that_comes_or_goes_leaves_the_figures_of_the_others(vectors, tmp_path, data):
    recipe, notes = make_recipe(data, "test"), Notes(tmp_path / "notes", BASE_PRINT)
    for inside in (range(5), range(6), [0, 2, 3, 4, 5], [1, 2, 3, 4, 5], range(6)):
        base, sources = vectors()
        noted = merge(base, [sources[i] for i in inside], recipe, notes)
        base, sources = vectors()
        plain = merge(base, [sources[i] for i in inside], recipe)
        assert all(torch.equal(noted[name], plain[name]) for name in SHAPES)


def test_thresholds_are_found_once(vectors, tmp_path):
    """Two readings at first; then one of the known, two of the new one."""
    recipe, notes = make_recipe({"method": "ties"}, "test"), Notes(tmp_path, BASE_PRINT)
    base, sources = vectors()
    merge(base, sources[:5], recipe, notes)
    assert passes(sources[:5]) == [2.0] * 5
    base, sources = vectors()
    merge(base, sources, recipe, notes)
    assert passes(sources) == [1.0] * 5 + [2.0]
    base, sources = vectors()
    merge(base, sources[1:], recipe, notes)
    assert passes(sources) == [0.0] + [1.0] * 5


def test_inner_products_are_computed_once(vectors, tmp_path):
    """A new vector is multiplied with all others; one that is gone costs nothing."""
    recipe, notes = make_recipe({"method": "karcher"}, "test"), Notes(tmp_path, BASE_PRINT)
    base, sources = vectors()
    merge(base, sources, recipe, notes)
    assert passes(sources) == [2.0] * 6
    base, sources = vectors()
    merge(base, sources[:4], recipe, notes)
    assert passes(sources) == [1.0] * 4 + [0.0] * 2


def test_other_options_bases_and_rules_have_notes_of_their_own(vectors, tmp_path):
    notes = Notes(tmp_path, BASE_PRINT)
    base, sources = vectors()
    merge(base, sources, make_recipe({"method": "ties"}, "test"), notes)
    for data, about in (
        ({"method": "ties", "options": {"density": 0.3}}, BASE_PRINT),
        ({"method": "ties"}, "sha256:" + "1" * 64),
        ({"method": "breadcrumbs", "options": {"rule": "ties", "rule_options": {"density": 0.2}}},
         BASE_PRINT),
    ):  # fmt: skip
        base, sources = vectors()
        merge(base, sources, make_recipe(data, "test"), Notes(tmp_path, about))
        assert all(times >= 2 for times in passes(sources)), data


@pytest.mark.parametrize("text", ["", "{", "[]", '{"figures": {}}', '{"figures": 3, "digest": 4}'])
def test_a_damaged_note_is_no_note(tmp_path, text):
    notes = Notes(tmp_path, BASE_PRINT)
    notes.add(["x"], {"a": [1.5, 0.1]})
    assert notes.read(["x"]) == {"a": [1.5, 0.1]}
    (path,) = tmp_path.iterdir()
    changed = json.loads(path.read_text())
    changed["figures"]["a"][0] = 2.5
    for content in (text, json.dumps(changed)):
        path.write_text(content)
        assert notes.read(["x"]) == {}


def test_notes_are_added_to_and_pruned(tmp_path):
    notes = Notes(tmp_path, BASE_PRINT)
    notes.add(["x"], {"a": [1.0]})
    notes.add(["x"], {"b": [2.0]})
    assert notes.read(["x"]) == {"a": [1.0], "b": [2.0]}
    for number in range(LIMIT + 5):
        notes.add([number], {"a": [1.0]})
    assert len(list(tmp_path.iterdir())) == LIMIT
    assert notes.read(["x"]) == {}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    notes = Notes(tmp_path / "file" / "notes", BASE_PRINT)
    notes.add(["x"], {"a": [1.0]})
    assert notes.read(["x"]) == {}


def test_notes_that_others_may_write_are_not_used(tmp_path):
    notes = Notes(tmp_path / "notes", BASE_PRINT)
    notes.add(["x"], {"a": [1.0]})
    notes.folder.chmod(0o777)
    assert notes.read(["x"]) == {}
    notes.add(["y"], {"a": [1.0]})
    notes.folder.chmod(0o700)
    assert (notes.read(["x"]), notes.read(["y"])) == ({"a": [1.0]}, {})


def test_other_files_are_not_pruned(tmp_path):
    (tmp_path / "mine.json").touch()
    for number in range(LIMIT + 1):
        Notes(tmp_path, BASE_PRINT).add([number], {"a": [1.0]})
    assert (tmp_path / "mine.json").exists()


def test_what_is_not_finite_is_not_noted(tmp_path):
    notes = Notes(tmp_path, BASE_PRINT)
    notes.add(["x"], {"a": [1.0]})
    notes.add(["x"], {"b": [float("inf")]})
    assert notes.read(["x"]) == {"a": [1.0]}
