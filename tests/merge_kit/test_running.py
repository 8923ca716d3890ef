"""Running sums: what has come or gone is read, and nothing else."""

from __future__ import annotations

import json
import random

import pytest
import torch

from merge_kit import engine, running
from merge_kit.errors import MergeKitError, TensorFileError
from merge_kit.exact import InexactSumError
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.running import FOLDER, RECORD, SUMS, RunningSum, SumWriter
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.helpers import assemble, load, says

SHAPES = {"blocks.0.w": (270, 270), "blocks.1.w": (70_000,), "stem.w": (3, 5)}
BASE_PRINT = "sha256:" + "0" * 64


class Counted(TensorFile):
    """Remembers whether any of its values were read."""

    was_read = False

    def read_into(self, name, begin, out):
        self.was_read = True
        super().read_into(name, begin, out)


@pytest.fixture
def vectors(tmp_path):
    """A base and six vectors, opened anew by each call."""
    generator = torch.Generator().manual_seed(0)
    opened = []
    for index in range(7):
        tensors = {
            name: torch.randn(shape, generator=generator) * 0.01 for name, shape in SHAPES.items()
        }
        write_tensors(tmp_path / f"{index}.st", tensors)

    def make():
        files = [Counted(tmp_path / f"{index}.st") for index in range(7)]
        opened.extend(files)
        return files[0], [
            engine.Source(f"id{i}", f"s{i}", file, (float(7 * i + 3),), i + 1)
            for i, file in enumerate(files[1:])
        ]

    yield make
    for file in opened:
        file.close()


RECIPES = [
    {"method": "mean"},
    {"method": "mean", "weights": "uniform", "dtype": "bfloat16"},
    {"method": "mean", "weights": "steps"},
    {"method": "sum", "scale": 0.3},
    {"method": "interpolate", "options": {"alpha": 0.25}, "dtype": "float64"},
    {"method": "mean", "lines": {"beta": 1.0}},
    {
        "method": "sum",
        "lines": {"alpha": 0.5},
        "groups": [{"match": "stem.*", "method": "mean", "scale": 2.0}],
    },
]


def merge_keeping(base, sources, recipe, folder, old=None, gone=()):
    """Merge, keep the sum in `folder`, and say which vectors were read."""
    roles = roles_of(base.specs, ())
    groups = engine.groups_of(roles, recipe)
    sums = running.updates(old, sources, gone, recipe, groups, BASE_PRINT) if old else None
    chosen = sums or running.from_scratch(sources, recipe)
    parts = []
    with SumWriter(folder / FOLDER, BASE_PRINT, base.specs, groups, chosen) as writer:
        for part in engine.merge(base, sources, roles, recipe, chosen):
            writer.write(part.name, part.begin, part.pair)
            parts.append(part)
    specs = engine.merged_specs(base.specs, recipe)
    return assemble(parts, specs), sums is not None


def plain(base, sources, recipe):
    parts = engine.merge(base, sources, roles_of(base.specs, ()), recipe)
    return assemble(parts, engine.merged_specs(base.specs, recipe))


def same(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / FOLDER).iterdir())}


@pytest.mark.parametrize("data", RECIPES, ids=lambda r: f"{r['method']} {len(r)}")
def test_whatever_comes_or_goes_the_bytes_are_those_of_a_merge_from_scratch(
    vectors, tmp_path, data
):
    """Random walks over subsets: the model and the sum itself depend on the subset alone."""
    recipe, chance = make_recipe(data, "test"), random.Random(1)
    base, sources = vectors()
    inside = sources[:4]
    merge_keeping(base, inside, recipe, tmp_path / "0")
    for step in range(1, 5):
        base, sources = vectors()
        before = {source.id for source in inside}
        inside = chance.sample(sources, chance.choice([4, 5, 6]))
        outside = [source for source in sources if source not in inside]
        with RunningSum(tmp_path / f"{step - 1}" / FOLDER) as old:
            merged, updated = merge_keeping(
                base, inside, recipe, tmp_path / f"{step}", old, outside
            )
        changed = before ^ {source.id for source in inside}
        measures = recipe.lines is not None and recipe.lines.alpha is None
        assert updated == (len(changed) < len(inside) and not measures)
        if updated:
            assert {s.id for s in sources if s.file.was_read} == changed
        assert same(merged, plain(base, inside, recipe))
        merge_keeping(base, inside, recipe, tmp_path / f"scratch{step}")
        assert files_in(tmp_path / f"{step}") == files_in(tmp_path / f"scratch{step}")


def test_one_vector_that_comes_is_the_only_one_read(vectors, tmp_path):
    recipe = make_recipe({"method": "mean"}, "test")
    base, sources = vectors()
    merge_keeping(base, sources[:5], recipe, tmp_path / "a")
    base, sources = vectors()
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        merged, updated = merge_keeping(base, sources, recipe, tmp_path / "b", old)
    assert updated
    assert [source.file.was_read for source in sources] == [False] * 5 + [True]
    assert same(merged, plain(base, sources, recipe))


def test_a_weight_that_changes_is_taken_away_and_given_anew(vectors, tmp_path):
    base, sources = vectors()
    weights = {source.site: float(i + 1) for i, source in enumerate(sources)}
    first = make_recipe({"method": "sum", "weights": weights}, "test")
    second = make_recipe({"method": "sum", "weights": {**weights, "s3": 0.1}}, "test")
    merge_keeping(base, sources, first, tmp_path / "a")
    base, sources = vectors()
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        merged, updated = merge_keeping(base, sources, second, tmp_path / "b", old)
    assert updated
    assert [source.file.was_read for source in sources] == [i == 3 for i in range(6)]
    assert same(merged, plain(base, sources, second))


def test_another_base_or_other_groups_begin_from_scratch(vectors, tmp_path):
    recipe = make_recipe({"method": "mean"}, "test")
    base, sources = vectors()
    merge_keeping(base, sources, recipe, tmp_path)
    roles = roles_of(base.specs, ())
    groups = engine.groups_of(roles, recipe)
    grouped = make_recipe(
        {"method": "mean", "groups": [{"match": "stem.*", "method": "sum"}]}, "test"
    )
    with RunningSum(tmp_path / FOLDER) as old:
        assert running.updates(old, sources, (), recipe, groups, BASE_PRINT) is not None
        assert running.updates(old, sources, (), recipe, groups, "sha256:" + "1" * 64) is None
        other = engine.groups_of(roles, grouped)
        assert running.updates(old, sources, (), grouped, other, BASE_PRINT) is None
        # A vector that is gone and cannot be read cannot be taken away.
        assert running.updates(old, sources[:5], (), recipe, groups, BASE_PRINT) is None


def test_many_weights_that_change_begin_from_scratch(vectors, tmp_path):
    """Each is taken away and given anew: two readings, so that 3 of 6 cost what all do."""

    def by(*changed):
        weights = {f"s{i}": 2.0 if i in changed else 1.0 for i in range(6)}
        return make_recipe({"method": "mean", "weights": weights}, "test")

    base, sources = vectors()
    merge_keeping(base, sources, by(), tmp_path)
    groups = engine.groups_of(roles_of(base.specs, ()), by())
    with RunningSum(tmp_path / FOLDER) as old:
        (sums,) = running.updates(old, sources, (), by(0, 1), groups, BASE_PRINT)
        assert [weight for _, weight in sums.changes] == [-1.0, 2.0, -1.0, 2.0]
        assert running.updates(old, sources, (), by(0, 1, 2), groups, BASE_PRINT) is None


def test_only_linear_rules_have_a_running_sum():
    assert running.fits(make_recipe({"method": "interpolate"}, "test"))
    assert not running.fits(make_recipe({"method": "ties"}, "test"))
    assert not running.fits(
        make_recipe({"method": "mean", "groups": [{"match": "*", "method": "median"}]}, "test")
    )


def test_a_sum_with_too_many_digits_is_not_kept(tmp_path):
    for index, value in enumerate([0.0, 1e30, 1.0, 1e-30]):
        write_tensors(tmp_path / f"{index}.st", {"w": torch.tensor([value])})
    files = [TensorFile(tmp_path / f"{index}.st") for index in range(4)]
    sources = [engine.Source(f"{i}", f"s{i}", f, (1.0,), 1) for i, f in enumerate(files[1:])]
    recipe = make_recipe({"method": "sum"}, "test")
    with pytest.raises(InexactSumError):
        merge_keeping(files[0], sources, recipe, tmp_path / "kept")
    assert not list((tmp_path / "kept" / FOLDER).iterdir())
    for file in files:
        file.close()


def test_second_numbers_of_pairs_are_kept(tmp_path):
    """1e10 + 1e-8 needs 60 bits: two numbers, and both come back."""
    for index, value in enumerate([0.0, 1e10, 1e-8, 1e10, 1.0]):
        write_tensors(tmp_path / f"{index}.st", {"w": torch.tensor([1.0, value])})
    files = [TensorFile(tmp_path / f"{index}.st") for index in range(5)]
    sources = [engine.Source(f"{i}", f"s{i}", f, (1.0,), 1) for i, f in enumerate(files[1:])]
    recipe = make_recipe({"method": "sum"}, "test")
    merge_keeping(files[0], [*sources[:2], sources[3]], recipe, tmp_path / "a")
    record = json.loads((tmp_path / "a" / FOLDER / RECORD).read_text())
    assert [index for index, _ in record["rests"]["w"]] == [1]
    changed = {**record, "rests": {"w": [[1, record["rests"]["w"][0][1] * 2]]}}
    (tmp_path / "a" / FOLDER / RECORD).write_text(json.dumps(changed))
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        with pytest.raises(TensorFileError, match="'w' was changed"):
            old.read("w", 0, 2)
    (tmp_path / "a" / FOLDER / RECORD).write_text(json.dumps(record))
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        merged, updated = merge_keeping(
            files[0], sources[1:2] + sources[3:], recipe, tmp_path / "b", old, sources[:1]
        )
    assert updated
    assert same(merged, plain(files[0], sources[1:2] + sources[3:], recipe))
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        merged, updated = merge_keeping(files[0], sources, recipe, tmp_path / "c", old)
    assert updated
    assert same(merged, plain(files[0], sources, recipe))
    for file in files:
        file.close()


def test_a_sum_that_was_changed_is_refused(vectors, tmp_path):
    recipe = make_recipe({"method": "mean"}, "test")
    base, sources = vectors()
    merge_keeping(base, sources[:5], recipe, tmp_path / "a")
    path = tmp_path / "a" / FOLDER / SUMS
    tensors = load(path)
    tensors["blocks.1.w"][69_999] += 1e-9
    write_tensors(path, tensors)
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        with says(TensorFileError, f"{path}: 'blocks.1.w' was changed: merge from scratch."):
            merge_keeping(base, sources, recipe, tmp_path / "b", old)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"base": "x"}'])
def test_a_record_that_is_no_record_is_refused(vectors, tmp_path, text):
    recipe = make_recipe({"method": "mean"}, "test")
    base, sources = vectors()
    merge_keeping(base, sources, recipe, tmp_path)
    (tmp_path / FOLDER / RECORD).write_text(text)
    with pytest.raises(MergeKitError, match=r"record\.json"):
        RunningSum(tmp_path / FOLDER)


@pytest.mark.parametrize("left", [None, 1], ids=["none", "too few"])
def test_a_record_without_a_digest_is_refused(vectors, tmp_path, left):
    recipe = make_recipe({"method": "mean"}, "test")
    base, sources = vectors()
    merge_keeping(base, sources[:5], recipe, tmp_path / "a")
    record = tmp_path / "a" / FOLDER / RECORD
    data = json.loads(record.read_text())
    data["digests"]["blocks.1.w"] = data["digests"]["blocks.1.w"][:left] if left else []
    record.write_text(json.dumps(data))
    with RunningSum(tmp_path / "a" / FOLDER) as old:
        path = record.with_name(SUMS)
        with says(TensorFileError, f"{path}: 'blocks.1.w' was changed: merge from scratch."):
            merge_keeping(base, sources, recipe, tmp_path / "b", old)
