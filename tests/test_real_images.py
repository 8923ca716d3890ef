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
