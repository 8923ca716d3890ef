"""A model that was merged from plain checkpoints is made again and compared."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from merge_kit.tensorfile import fingerprint_file, write_tensors
from tests.bench import open_bench
from tests.merge_kit.helpers import load, settle
from tests.merge_kit.test_comparing import rewrite


class Plain:
    """A model that was merged from three checkpoints, which somebody has renamed since."""

    def __init__(self, bench, run_cli):
        self._bench, self._run, self.tmp = bench, run_cli, bench.tmp
        self.folder, self.base = bench.tmp / "out", bench.base
        for name in ("a", "bc", "def"):
            bench.checkpoint(name)
        self.inputs = [self.tmp / name for name in ("def", "a", "bc")]

    def merge(self, *options):
        result = self._run(*self._bench.plain(*self.inputs, *options))
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def verify(self, *inputs, base=None):
        return self._run("verify", self.folder, "--base", base or self.base, *inputs, "--json")

    def checks(self, *inputs, base=None):
        """State and text by subject; the exit status must agree."""
        result = self.verify(*(inputs or self.inputs), base=base)
        assert result.stdout, result.stderr
        checks = json.loads(result.stdout)["checks"]
        assert (result.exit_code == 1) is any(c["state"] == "differs" for c in checks)
        return {c["subject"]: (c["state"], c["text"]) for c in checks}

    def differing(self, *inputs, base=None):
        found = self.checks(*inputs, base=base).items()
        return {subject: text for subject, (state, text) in found if state == "differs"}

    def label(self, name):
        found = fingerprint_file(self.tmp / name / "model.safetensors")
        return f"{name}/{found.removeprefix('sha256:')[:12]}"


@pytest.fixture
def merged(tmp_path, hub, contribute, run_cli):
    return Plain(open_bench(tmp_path, hub, contribute), run_cli)


def test_a_plain_merge_is_verified_with_its_inputs_in_any_order(merged):
    said = merged.merge("--weights", "a=1,bc=2,def=3")
    again = f"merge-kit verify {merged.folder} --base {merged.base} <checkpoints>"
    assert f"({again} checks all again)" in said
    found = merged.checks(*reversed(merged.inputs))
    assert {state for state, _ in found.values()} == {"ok"}
    assert {merged.label(name) for name in ("a", "bc", "def")} < set(found)
    assert found["weights"] == ("ok", "follow from the recipe")
    assert found["config.json"] == ("ok", "as what it was merged from gives it")


@pytest.mark.parametrize("method", ["ties", "emr", "dare", "karcher", "interpolate"])
def test_a_plain_merge_of_other_methods_is_verified(merged, method):
    merged.merge("--method", method)
    assert merged.differing() == {}


def test_names_and_files_of_the_inputs_may_have_changed(merged):
    """Weights and masks go by the names of the merge."""
    merged.merge("--method", "emr", "--weights", "a=1,bc=2,def=3")
    moved = [merged.tmp / f"moved-{path.name}" for path in merged.inputs]
    for old, new in zip(merged.inputs, moved, strict=True):
        old.rename(new)
    found = merged.checks(f"x={moved[0]}", moved[2], moved[1] / "model.safetensors")
    assert {state for state, _ in found.values()} == {"ok"}
    assert "masks/bc.safetensors" in found


def test_a_running_sum_and_masks_of_a_plain_merge_are_compared(merged):
    merged.merge("--keep-sum")
    path = merged.folder / "running-sum" / "sums.safetensors"
    rewrite(path, lambda tensors: tensors["fc.bias"].add_(1))
    assert list(merged.differing()) == ["running-sum/sums.safetensors"]


def test_a_new_head_is_made_again(merged, run_cli):
    path = merged.base / "model.safetensors"
    tensors = {name: t for name, t in load(path).items() if not name.startswith("fc.")}
    write_tensors(path, tensors)
    merged.merge("--method", "ties")
    assert merged.differing() == {}


def test_files_without_a_configuration_are_verified(run_cli, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for number, path in enumerate(paths):
        write_tensors(path, {"w": torch.arange(6.0) * number})
    out = tmp_path / "out"
    assert run_cli("merge", *paths, "--out", out).exit_code == 0
    assert run_cli("verify", out, "--base", *paths).exit_code == 0
    (out / "config.json").write_text("{}")
    said = run_cli("verify", out, "--base", *paths).stdout
    assert "unknown  config.json        no merge by this recipe writes it" in said


def changed_input(merged):
    path = merged.inputs[0] / "model.safetensors"
    write_tensors(path, {**load(path), "fc.bias": torch.ones(3)})
    return ["def", str(merged.inputs[0]), "rebuilt"]


def changed_base(merged):
    path = merged.base / "model.safetensors"
    write_tensors(path, {**load(path), "fc.bias": torch.ones(3)})
    return ["base", "rebuilt"]


def missing_input(merged):
    merged.inputs.pop(0)
    return ["def", "rebuilt"]


def another_input(merged):
    merged.inputs.append(shutil.copytree(merged.base, merged.tmp / "more"))
    return [str(merged.tmp / "more"), "rebuilt"]


def config(merged):
    path = merged.folder / "config.json"
    path.write_text(path.read_text().replace("lobed", "round"))
    return ["config.json"]


def card(merged):
    path = merged.folder / "README.md"
    path.write_text(path.read_text().replace("checkpoint |", "vector |"))
    return ["README.md"]


def weights(merged):
    """The careful forger: the provenance agrees with the file."""
    path = merged.folder / "model.safetensors"
    write_tensors(path, {**load(path), "fc.bias": torch.ones(3)}, ("format", "pt"))
    state(merged, merged=fingerprint_file(path))
    return ["rebuilt", "README.md"]


def state(bench, **changes):
    path = bench.folder / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def scale(merged):
    recipe = json.loads((merged.folder / "provenance.json").read_bytes())["recipe"]
    state(merged, recipe={**recipe, "scale": 2.0})
    return ["rebuilt", "README.md"]


def weight_of_nobody(merged):
    recipe = json.loads((merged.folder / "provenance.json").read_bytes())["recipe"]
    state(merged, recipe={**recipe, "weights": {"a": 1, "bc": 1, "x": 2}})
    return ["rebuilt"]


@pytest.mark.parametrize(
    "change",
    [changed_input, changed_base, missing_input, another_input, config, card, weights, scale,
     weight_of_nobody],
)  # fmt: skip
def test_what_was_changed_of_a_plain_merge_is_named(merged, change):
    merged.merge()
    labels = {merged.label("def"): "def"}
    expected = change(merged)
    assert sorted(labels.get(s, s) for s in merged.differing()) == sorted(expected)


def test_what_is_remembered_of_a_checkpoint_is_not_believed(merged, monkeypatch, tmp_path):
    monkeypatch.setenv("MERGE_KIT_CACHE", str(tmp_path / "cache"))
    settle(merged.inputs[0])
    merged.merge()
    for path in (tmp_path / "cache" / "checked").iterdir():
        record = json.loads(path.read_bytes())
        record["found"]["fingerprint"] = "sha256:" + "0" * 64
        path.write_text(json.dumps(record))
    assert merged.differing() == {}


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--hub", "HUB"], 2, "OUT was merged without a federation: give --base, and after the "
         "folder the 3 checkpoints or vectors that it was merged from."),
        (["--base", "BASE"], 2, "OUT was merged without a federation: give --base, and after the "
         "folder the 3 checkpoints or vectors that it was merged from."),
        (["--base", "BASE", "nowhere"], 1, "nowhere does not exist: check the path."),
    ],
    ids=["hub", "no inputs", "nowhere"],
)  # fmt: skip
def test_what_a_plain_merge_is_compared_with_must_be_given(
    merged, run_cli, arguments, status, sentence
):
    merged.merge()
    places = {"HUB": merged.base.parent, "BASE": merged.base}
    result = run_cli("verify", merged.folder, *[places.get(a, a) for a in arguments])
    assert result.stderr == f"Error: {sentence.replace('OUT', str(merged.folder))}\n"
    assert (result.exit_code, result.stdout) == (status, "")
