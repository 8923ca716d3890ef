"""What never matters, for every method: order, threads, who came and went before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from merge_kit import engine, running
from merge_kit.methods import METHODS
from merge_kit.notes import Notes
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.running import FOLDER, RunningSum, SumWriter
from merge_kit.tensorfile import TensorWriter, fingerprint_file, read_all
from merge_kit.writing import write_parts
from tests.merge_kit.helpers import assemble

BASE_PRINT = "sha256:" + "0" * 64
RECIPES = [
    {"method": "mean", "weights": "steps"},
    {"method": "mean", "weights": "sqrt-examples", "norm": "average"},
    {"method": "sum", "scale": 0.3, "head": "method"},
    {"method": "ties", "options": {"scope": "tensor", "reduction": "max"}},
    {"method": "krum", "head": "method"},
    {"method": "geometric-median", "options": {"scope": "tensor"}},
    {"method": "slerp", "options": {"space": "vectors"}},
    {"method": "wudi", "options": {"solver": "closed"}},
    {"method": "ties", "lines": {"beta": 0.5}},
    {"method": "mean", "groups": [{"match": "body.*", "method": "median"}]},
    *({"method": name} for name in METHODS),
]
EVERY = pytest.mark.parametrize("data", RECIPES, ids=lambda r: " ".join(map(str, r.values())))


def measured(tensors, kind, generator):
    """Statistics of one site: a Fisher diagonal, or Gram matrices of 300 made-up inputs."""
    weights = {name: tensors[name] for name in ("body.weight", "head.weight")}
    if kind == "fisher":
        return {n: torch.rand(t.shape, generator=generator) for n, t in weights.items()}
    inputs = {n: torch.randn(300, t.shape[1], generator=generator) for n, t in weights.items()}
    return {name: rows.T @ rows / len(rows) for name, rows in inputs.items()}


def many(open_file, count=9, kind=None):
    """Random vectors of many sites, with a tensor that is large enough for several threads."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        tensors = {
            "body.weight": torch.randn(270, 270, generator=generator),
            "bn.running_mean": torch.randn(64, generator=generator),
            "bn.running_var": torch.rand(64, generator=generator),
            "bn.num_batches_tracked": torch.tensor(index),
            "head.weight": torch.randn(3, 64, generator=generator),
        }
        counts = tuple(torch.randint(0, 50, (3,), generator=generator).double().tolist())
        statistics = {kind: open_file(measured(tensors, kind, generator))} if kind else {}
        made.append(
            engine.Source(
                f"{index}", f"s{index}", open_file(tensors), counts, index + 1, statistics
            )
        )
    base = {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in made[0].file.specs.items()}
    return open_file({**base, "table": torch.tensor([5, 6])}), made


def run(base, sources, recipe, **kept):
    """The merged tensors, and the exact sums where they are kept."""
    roles = roles_of(base.specs, ("head",))
    parts = list(engine.merge(base, sources, roles, recipe, **kept))
    return assemble(parts, engine.merged_specs(base.specs, recipe)), parts


def world(open_file, data, count):
    rule = METHODS[data["method"]]
    most = rule.maximum or count
    return *many(open_file, min(count, most), rule.statistics), make_recipe(data, "test")


def same(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@EVERY
def test_the_order_of_the_sources_never_matters(open_file, data):
    """Bit for bit."""
    base, made, recipe = world(open_file, data, 9)
    first, _ = run(base, made, recipe)
    for seed in range(2):
        shuffled = random.Random(seed).sample(made, len(made))
        assert same(first, run(base, shuffled, recipe)[0])


@EVERY
def test_the_number_of_threads_never_matters(open_file, data):
    """Bit for bit."""
    base, made, recipe = world(open_file, data, 5)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(base, made, recipe)[0])
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@EVERY
def test_a_merge_forgets_who_came_and_went(open_file, tmp_path, data):
    """Seven merged, two withdrawn, one come back, with all that is kept on the way."""
    base, made, recipe = world(open_file, data, 7)
    roles = roles_of(base.specs, ("head",))
    groups = engine.groups_of(roles, recipe)
    notes, old = Notes(tmp_path / "notes", BASE_PRINT), None
    few = METHODS[data["method"]].maximum is not None
    walk = [made, made] if few else [made, made[2:], made[1:]]
    for step, inside in enumerate(walk):
        kept = {}
        if running.fits(recipe):
            gone = [source for source in made if source not in inside]
            kept["sums"] = old and running.updates(old, inside, gone, recipe, groups, BASE_PRINT)
            kept["sums"] = kept["sums"] or running.from_scratch(inside, recipe)
        merged, parts = run(base, inside, recipe, notes=notes, **kept)
        assert same(merged, run(base, inside, recipe)[0])
        if kept:
            folder = tmp_path / str(step) / FOLDER
            with SumWriter(folder, BASE_PRINT, base.specs, groups, kept["sums"]) as writer:
                for part in parts:
                    if part.pair is not None:
                        writer.write(part.name, part.begin, part.pair)
            if old:
                old.close()
            old = RunningSum(folder)
    if old:
        assert kept["sums"][0].old is not None
        old.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_whose_tensors_all_have_another_does_nothing(open_file, tmp_path, method):
    data = {"method": method, "groups": [{"match": "*", "method": "mean"}]}
    base, made, recipe = world(open_file, data, 5)
    mean, _ = run(base, made, make_recipe({"method": "mean"}, "test"))
    for notes in (None, Notes(tmp_path / "notes", BASE_PRINT)):
        assert same(mean, run(base, made, recipe, notes=notes)[0])


@pytest.mark.parametrize(
    "data",
    [*({"method": name} for name in METHODS), {"method": "ties", "options": {"scope": "tensor"}}],
    ids=lambda data: " ".join(map(str, data.values())),
)
def test_a_tensor_without_values_changes_nothing_but_the_fingerprint(open_file, tmp_path, data):
    base, made, recipe = world(open_file, data, 5)
    nothing = {"body.empty": torch.empty(0, 3)}
    more = open_file({**dict(read_all(base)), **nothing})
    theirs = [replace(s, file=open_file({**dict(read_all(s.file)), **nothing})) for s in made]
    known, _ = run(base, made, recipe)
    for notes in (None, Notes(tmp_path / "notes", BASE_PRINT)):
        found, parts = run(more, theirs, recipe, notes=notes)
        assert same({**known, **nothing}, {name: found[name] for name in (*known, *nothing)})
        with TensorWriter(tmp_path / "merged", engine.merged_specs(more.specs, recipe)) as writer:
            written = write_parts(writer, parts)
        assert written == fingerprint_file(tmp_path / "merged")


@pytest.mark.parametrize("method", ["mean", "ties", "karcher", "dare"])
def test_many_scales_share_one_pass_and_give_what_each_gives_alone(open_file, method):
    data = {"method": method, "scale": 0.5}
    base, made, recipe = world(open_file, data, 3)
    roles = roles_of(base.specs, ("head",))
    specs = engine.merged_specs(base.specs, recipe)
    found = list(engine.merge_scales(base, made, roles, recipe, (1.0, 0.2)))
    for index, scale in enumerate((0.5, 0.5 * 0.2)):
        alone, _ = run(base, made, make_recipe({**data, "scale": scale}, "test"))
        assert same(assemble((parts[index] for parts in found), specs), alone)
