"""merge-kit evaluate on a real federation and generated images."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import network
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit.tensorfile import write_tensors
from tests.merge_kit.helpers import load


@pytest.fixture
def table(tmp_path):
    """Two sites, three classes, twelve images."""
    rng = np.random.default_rng(0)
    rows = ["file,label,site,split"]
    for index in range(12):
        pixels = rng.integers(0, 255, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        label = ("round", "lobed", "granular")[index % 3]
        rows.append(f"{index}.png,{label},{'ab'[index % 2]},{'test' if index < 10 else 'train'}")
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_evaluates_several_models_on_the_test_split(hub, contribute, table, tmp_path, run_cli):
    contribute("north", seed=1)
    run_cli("merge", hub.root, "--out", tmp_path / "merged")
    out = tmp_path / "evaluation"
    result = run_cli("evaluate", hub.root, tmp_path / "merged", "--data", table, "--out", out)
    assert result.exit_code == 0, result.stderr
    summary = json.loads((out / "metrics.json").read_text())
    assert [(m["model"], m["role"]) for m in summary["models"]] == [
        ("base", "base"),
        ("merged", "merged"),
    ]
    assert summary["cases"]["total"] == 10
    assert "merged" in (out / "report.html").read_text()


def test_predictions_are_the_models_own_probabilities(hub, table, tmp_path, run_cli, federation):
    run_cli("evaluate", f"m={hub.root / 'base'}", "--data", table, "--out", tmp_path / "e")
    with (tmp_path / "e" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    images, _ = decode(load_cases(table, classes=federation.classes)[:10], federation.preprocessing)
    model = network.load(hub.root / "base")
    expected = network.logits(model, images, torch.device("cpu")).double().softmax(dim=1)
    found = [[float(row[f"p_{name}"]) for name in federation.classes] for row in rows]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_names_and_splits_are_chosen_by_the_user(hub, table, tmp_path, run_cli):
    out = tmp_path / "e"
    result = run_cli(
        *("evaluate", f"mine={hub.root}", "--data", table, "--out", out),
        *("--split", "train", "--where", "site=a"),
    )
    assert result.exit_code == 0, result.stderr
    summary = json.loads((out / "metrics.json").read_text())
    assert summary["models"][0]["model"] == "mine"
    assert (summary["cases"]["total"], summary["sites"]) == (1, ["a"])


def test_unreadable_images_are_counted_when_skipped(hub, table, tmp_path, run_cli):
    (tmp_path / "0.png").write_bytes(b"broken")
    out = tmp_path / "e"
    result = run_cli("evaluate", hub.root, "--data", table, "--out", out, "--skip-unreadable")
    assert result.exit_code == 0, result.stderr
    assert "Left out:" in result.stderr
    assert json.loads((out / "metrics.json").read_text())["cases"]["total"] == 9


def test_groups_of_near_duplicates_are_drawn_together_and_not_called_patients(
    hub, table, tmp_path, run_cli
):
    lines = table.read_text().splitlines()
    grouped = [lines[0] + ",group", *[f"{line},g{i // 2}" for i, line in enumerate(lines[1:])]]
    table.write_text("\n".join(grouped) + "\n")
    result = run_cli(
        "evaluate", hub.root, "--data", table, "--out", tmp_path / "e", "--split", "all"
    )
    assert result.exit_code == 0, result.stderr
    summary = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert summary["bootstrap"]["unit"] == "group"
    assert summary["cases"]["patients"] is None
    assert "near duplicates are drawn together" in (tmp_path / "e" / "report.html").read_text()


def test_a_class_without_a_case_is_said_in_the_verdict(hub, table, tmp_path, run_cli):
    out = tmp_path / "e"
    result = run_cli("evaluate", hub.root, "--data", table, "--out", out, "--where", "label=round")
    assert result.exit_code == 0, result.stderr
    assert "No case is of the class lobed and granular" in result.stdout


def test_a_report_gives_way_to_one_on_the_same_models_and_images(hub, table, tmp_path, run_cli):
    out = tmp_path / "e"
    command = ("evaluate", hub.root, "--data", table, "--out", out, "--resamples", 10)
    first = run_cli(*command)
    before = (out / "metrics.json").read_bytes()
    assert (first.exit_code, run_cli(*command).exit_code) == (0, 0)
    assert (out / "metrics.json").read_bytes() == before
    refused = f"Error: {out}/metrics.json speaks of other models or images: choose another --out, "
    other = run_cli(*command, "--split", "train")
    assert (other.exit_code, other.stderr) == (2, f"{refused}or pass --replace.\n")
    assert (out / "metrics.json").read_bytes() == before
    assert run_cli(*command, "--split", "train", "--replace").exit_code == 0


def test_a_report_is_not_lost_to_that_of_changed_weights(hub, table, tmp_path, run_cli):
    out, base = tmp_path / "e", tmp_path / "base"
    shutil.copytree(hub.root / "base", base)
    command = ("evaluate", base, "--data", table, "--out", out, "--resamples", 10)
    assert run_cli(*command).exit_code == 0
    weights = load(base / "model.safetensors")
    write_tensors(base / "model.safetensors", {**weights, "fc.bias": weights["fc.bias"] + 1})
    assert run_cli(*command).exit_code == 2


@pytest.mark.parametrize("name", ["report.html", "predictions.csv"])
def test_a_file_of_the_users_is_not_overwritten(hub, table, tmp_path, run_cli, name):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / name).write_text("mine")
    result = run_cli("evaluate", hub.root, "--data", table, "--out", tmp_path / "e")
    assert result.exit_code == 2
    assert (tmp_path / "e" / name).read_text() == "mine"
