"""The whole job on real images from four laboratories with a real pretrained backbone, in small."""

from __future__ import annotations

import csv
import json

import pytest

from evaluate.document import Report


@pytest.fixture
def few_images(tmp_path, shared_data):
    """At most four images of each site, class and split, in place."""
    source = shared_data / "wbc_multisite"
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "images").symlink_to(source / "images")
    taken: dict[tuple[str, str, str], int] = {}
    with (source / "labels.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            key = (row["site"], row["label"], row["split"])
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= 4:
                rows.append(row)
    with (tmp_path / "few" / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "few"


def test_demo_on_real_images_ends_with_an_evaluated_merge(
    few_images, shared_weights, tmp_path, run_cli
):
    weights = shared_weights / "mobilenetv2_100.safetensors"
    init = "--model-arg pad_type=same --input-size 96 --mean .5 .5 .5 --std .5 .5 .5"
    result = run_cli(
        *("demo", "--data", few_images, "--out", tmp_path / "out", "--init", init),
        *("--backbone", "mobilenetv2_100", "--weights", weights),
        *("--set", "steps=0", "--set", "head=own"),
    )
    assert result.exit_code == 0, result.stderr
    found = Report.model_validate_json((tmp_path / "out" / "report" / "report.json").read_text())
    figures = {
        model.name: model.on("union").figures["balanced_accuracy"].value for model in found.models
    }
    sites = [figures[name] for name in ("barcelona", "bccd", "cellavision", "jtsc")]
    assert figures["merged-mean"] > sum(sites) / 4
    config = json.loads((tmp_path / "out" / "merged-mean" / "config.json").read_text())
    assert config["model_args"] == {"pad_type": "same"}


ANNOTATED = {
    "barcelona": ("monocyte", "eosinophil", "basophil"),
    "jtsc": ("neutrophil", "lymphocyte", "granulocyte"),
    "cellavision": ("lymphocyte", "monocyte", "granulocyte"),
    "bccd": ("neutrophil", "eosinophil", "granulocyte"),
}
FINDINGS = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil", "granulocyte")
GRANULOCYTES = ("neutrophil", "eosinophil", "basophil")


def findings_table(folder, name, columns, site=None):
    """A column for each finding: the cells' names, and what three of them are."""
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if site in (None, row["site"])]
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *columns, "site", "group", "split"])
        for row in rows:
            label = row["label"]
            has = {"granulocyte": label in GRANULOCYTES, label: True}
            marks = [int(has.get(column, False)) for column in columns]
            writer.writerow([row["file"], *marks, row["site"], row["group"], row["split"]])
    return folder / name


def test_four_laboratories_that_annotated_three_of_six_findings_each(
    few_images, shared_weights, tmp_path, run_cli
):
    def ok(*arguments):
        result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    hub = tmp_path / "hub"
    ok(
        *("init", hub, "--backbone", "mobilenetv2_100", "--classes", ",".join(FINDINGS)),
        *("--weights", shared_weights / "mobilenetv2_100.safetensors", "--multi-label"),
        *("--model-arg", "pad_type=same", "--input-size", 96, "--minimum-count", 2),
        *("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5),
    )
    for name, columns in ANNOTATED.items():
        table = findings_table(few_images, f"{name}.csv", columns, name)
        site = tmp_path / name
        ok("join", hub, "--site", name, "--folder", site)
        ok("admit", hub, name, site / "keys" / "site.pub")
        training = ("--steps", 1, "--head", "own", "--head-steps", 100, "--device", "cpu")
        ok("finetune", site, "--data", table, *training)
        ok("publish", site)
    ok("merge", hub, "--out", tmp_path / "merged")
    for name in ANNOTATED:
        data = ("--data", few_images / f"{name}.csv", "--model", tmp_path / "merged")
        ok("calibrate", tmp_path / name, *data, "--device", "cpu", "--publish")
    ok("head", hub, tmp_path / "merged", "--out", tmp_path / "solved")
    assert "Verified" in ok("verify", tmp_path / "solved", "--hub", hub)
    table = findings_table(few_images, "all.csv", FINDINGS)
    models = [tmp_path / name for name in (*ANNOTATED, "merged", "solved")]
    ok("evaluate", *models, "--data", table, "--device", "cpu", "--out", tmp_path / "report")
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert report.task == "multi-label"
    figures = {m.name: m.on("union").figures["macro_auroc"].value for m in report.models}
    assert figures["solved"] > max(figures[name] for name in ANNOTATED)
    assert figures["merged"] > max(figures[name] for name in ANNOTATED)
