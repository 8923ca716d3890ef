"""Labelled images at the merger in the place of sites that have not come."""

from __future__ import annotations

import json

import torch

from finetune.cases import load_cases
from merge_kit.federation import read_federation
from merge_kit.tensorfile import write_tensors
from tests.finetune.pictures import write_table
from tests.merge_kit.helpers import load

OPTIONS = ("--option", "shrinkage=0.3")


def solved(run_cli, hub, out, *arguments):
    result = run_cli("head", hub.root, *arguments, *OPTIONS, "--out", out)
    assert result.exit_code == 0, result.output
    return load(out / "model.safetensors")


def test_they_count_like_those_of_a_site(hub, hospitals, calibrate, run_cli, tmp_path):
    calibrate("north")
    with_own = solved(run_cli, hub, tmp_path / "own", "--data", hospitals["south"])
    calibrate("south")
    both = solved(run_cli, hub, tmp_path / "both")
    torch.testing.assert_close(with_own["fc.weight"], both["fc.weight"], rtol=1e-5, atol=1e-6)


def test_they_stand_in_for_all_sites_on_a_merged_model(hub, contribute, run_cli, tmp_path):
    contribute("north", seed=1)
    assert run_cli("merge", hub.root, "--out", tmp_path / "merged").exit_code == 0
    few = write_table(tmp_path / "few", {"round": 5, "lobed": 5, "granular": 5}, seed=9)
    found = solved(run_cli, hub, tmp_path / "head", tmp_path / "merged", "--data", few)
    assert float(found["fc.weight"].abs().sum()) > 0
    record = json.loads((tmp_path / "head" / "provenance.json").read_text())["head"]
    trained = [c for c in load_cases(few, classes=read_federation(hub.root).classes)
               if c.split == "train"]  # fmt: skip
    assert (record["moments"], record["images"]["count"]) == ([], len(trained))
    assert "labelled images that lay at the merger" in (tmp_path / "head" / "README.md").read_text()


def test_what_the_merger_alone_knows_is_taken_as_it_is(
    hub, hospitals, calibrate, run_cli, tmp_path
):
    calibrate("north")
    tensors = solved(run_cli, hub, tmp_path / "own", "--data", hospitals["south"])
    result = run_cli("verify", tmp_path / "own", "--hub", hub.root)
    assert result.exit_code == 0, result.output
    assert "Nothing here vouches for classifier" in result.output
    name = next(n for n in tensors if n.endswith("conv1.weight"))
    tensors[name].view(-1)[0] += 1
    write_tensors(tmp_path / "own" / "model.safetensors", tensors, ("format", "pt"))
    assert run_cli("verify", tmp_path / "own", "--hub", hub.root).exit_code == 1


def test_among_models_the_merger_is_one_more_site(hub, hospitals, calibrate, run_cli, tmp_path,
                                                  contribute):  # fmt: skip
    contribute("east", seed=1)
    for method in ("mean", "sum"):
        assert (
            run_cli("merge", hub.root, "--method", method, "--out", tmp_path / method).exit_code
            == 0
        )
        calibrate("north", "--model", tmp_path / method)
    models = (tmp_path / "mean", tmp_path / "sum")
    alone = run_cli("head", hub.root, *models, "--out", tmp_path / "a")
    assert "1 site(s) have calibrated all 2 models" in alone.stderr
    result = run_cli(
        "head", hub.root, *models, "--data", hospitals["south"], "--out", tmp_path / "b"
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("error at an unseen site") == 2
