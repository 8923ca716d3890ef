"""A merged model made a site's own, by the commands and on its own images."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from finetune.personalising import SHARES, _between
from merge_kit.checkpoints import WEIGHTS
from merge_kit.runs import latest_run
from tests.finetune.pictures import write_csv
from tests.merge_kit.helpers import load

TRAINING = ("--steps", 4, "--batch-size", 8, "--validations", 1, "--head-steps", 60)


@pytest.fixture
def merged(hub, hospitals, run_cli, tmp_path):
    """Two trained sites and their merge."""
    for name, table in hospitals.items():
        tuned = run_cli("finetune", tmp_path / name, "--data", table, *TRAINING)
        assert tuned.exit_code == 0, tuned.output
        assert run_cli("publish", tmp_path / name).exit_code == 0
    assert run_cli("merge", hub.root, "--out", tmp_path / "merged").exit_code == 0
    return tmp_path / "merged"


@pytest.fixture
def personalise(merged, hospitals, run_cli, tmp_path):
    def go(*arguments, name="north", out="mine", code=0, data=None):
        done = run_cli(
            "personalise", tmp_path / name, "--data", data or hospitals[name],
            "--model", merged, *arguments, "--out", tmp_path / out,
        )  # fmt: skip
        assert done.exit_code == code, done.output
        return done if code else (tmp_path / out, done.output)

    return go


def figures(output):
    """Share, classifier, norm statistics, balanced accuracy and loss of each candidate."""
    lines = [line.split() for line in output.splitlines() if line.startswith("  share")]
    return [(float(w[1]), w[3], w[6], float(w[9]), float(w[11])) for w in lines]


def test_the_best_on_the_validation_images_is_written(personalise, merged, tmp_path):
    folder, said = personalise()
    tried = figures(said)
    assert len(tried) == len(SHARES) * 4
    assert {row[0] for row in tried} == set(SHARES)
    best = max(tried, key=lambda row: (row[3], -row[4]))
    (written,) = [line for line in said.splitlines() if line.startswith("Model in")]
    assert f"share {best[0]:.2f}  classifier {best[1]}" in written
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 3
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (merged / "config.json").read_text()
    )


def test_candidates_begin_with_the_merged_model_itself(personalise, merged, run_cli, hospitals,
                                                       tmp_path):  # fmt: skip
    _, said = personalise()
    first = figures(said)[0]
    assert first[:3] == (0.0, "between", "between")
    out = tmp_path / "report"
    done = run_cli("evaluate", merged, "--data", hospitals["north"], "--split", "val", "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    value = report["models"][0]["scopes"][0]["figures"]["balanced_accuracy"]["value"]
    assert first[3] == pytest.approx(value, abs=1e-3)


def test_with_the_share_of_one_it_is_the_sites_own_model(personalise, merged, tmp_path):
    own = load(latest_run(tmp_path / "north") / "model" / WEIGHTS)
    start = load(merged / WEIGHTS)
    half = _between(start, own, 0.5)
    for name, tensor in start.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(half[name], (tensor + own[name]) / 2)
            torch.testing.assert_close(_between(start, own, 1.0)[name], own[name])
        else:
            assert torch.equal(half[name], tensor)
    assert _between(start, own, 0.0).keys() == start.keys()


def test_rows_of_classes_that_the_site_does_not_have_stay(personalise, merged):
    """north has no 'granular'."""
    folder, said = personalise("--share", 0)
    found, start = load(folder / WEIGHTS), load(merged / WEIGHTS)
    assert torch.equal(found["fc.weight"][2], start["fc.weight"][2])
    assert {row[0] for row in figures(said)} == {0.0}


def test_a_site_without_a_run_has_nothing_to_come_nearer_to(
    merged, hub, run_cli, tmp_path, hospitals
):
    assert run_cli("join", hub.root, "--site", "new", "--folder", tmp_path / "new").exit_code == 0
    done = run_cli("personalise", tmp_path / "new", "--data", hospitals["north"],
                   "--model", merged, "--out", tmp_path / "mine")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {row[0] for row in figures(done.output)} == {0.0}
    assert "The site has no finished run" in done.output


def test_what_cannot_be_is_refused(personalise, hub, hospitals, run_cli, tmp_path):
    folder, _ = personalise("--share", 0)
    assert f"{folder} exists already" in personalise(code=2).stderr
    inside = personalise(out="hub/mine", code=2)
    assert "lies in the federation" in inside.stderr
    rows = [{"file": f"round_train_{n}.png", "label": ("big", "small")[n % 2], "split": "train"}
            for n in range(5)]  # fmt: skip
    rows += [{"file": "round_val_0.png", "label": "big", "split": "val"},
             {"file": "round_val_1.png", "label": "small", "split": "val"}]  # fmt: skip
    table = write_csv(hospitals["south"].parent / "own.csv", rows)
    tuned = run_cli("finetune", tmp_path / "south", "--data", table, "--own-classes", "big,small",
                    *TRAINING)  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    refused = personalise(name="south", out="other", code=2)
    assert "site 'south' has a task of its own" in refused.stderr
