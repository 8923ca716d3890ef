"""A site's whole job: what it writes, and that a broken run ends as an unbroken one."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from finetune import run as runs
from finetune import training
from finetune.cases import Case, load_cases
from finetune.options import TrainingOptions
from finetune.run import Material, Run
from merge_kit import site as sites
from merge_kit.errors import BaseMismatchError, ImageError, TrainingError
from merge_kit.manifest import read_draft
from merge_kit.runs import latest_run
from merge_kit.site import Site
from merge_kit.tensorfile import TensorFile
from tests.finetune.pictures import write_table

CPU = torch.device("cpu")
QUICK = TrainingOptions(steps=6, validations=2, batch_size=8, head_steps=10, select="last")
EVERYTHING = QUICK.model_copy(
    update={
        "ema": 0.5,
        "norm": "update",
        "accumulate": 2,
        "augment": "strong",
        "balance": "weights",
    }
)


@pytest.fixture
def site(hub, tmp_path: Path) -> Site:
    """A site of the federation."""
    return sites.join(hub, "north", tmp_path / "north")


@pytest.fixture
def cases(site, tmp_path: Path) -> list[Case]:
    """11 images of one class, 3 of another (below the policy's minimum), none of the third."""
    table = write_table(tmp_path / "images", {"round": 11, "lobed": 3, "granular": 0})
    return load_cases(table, classes=site.federation.classes)


@pytest.fixture
def material(site, cases) -> Material:
    """The decoded images."""
    return runs.prepare(site, cases)


class Killed(Exception):
    """Stands for a kill at the moment of an event."""


class Reporter:
    """Keeps the events, and dies at the one that `fatal` names by kind, step and occurrence."""

    def __init__(self, fatal: tuple[str, int] | None = None) -> None:
        self.fatal = fatal
        self.events: list[dict[str, Any]] = []
        self.step = -1

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))
        self.step = event.get("step", self.step)
        if self.fatal == (event.get("name", event["event"]), self.step):
            raise Killed


def go(
    site: Site, material: Material, name: str, options: TrainingOptions, *fatal: tuple[str, int]
) -> Run:
    """Run in the folder `name`, killed at each of the moments, to the end."""
    folder = site.root / "runs" / name
    for moment in fatal:
        with pytest.raises(Killed):
            runs.finetune(site, material, options, folder, CPU, Reporter(moment))
        assert latest_run(site.root) is None
        assert not (folder / runs.DRAFT).exists()
    return runs.finetune(site, material, options, folder, CPU, Reporter())


def result(run: Run) -> tuple[bytes, bytes]:
    return tuple((run.folder / name).read_bytes() for name in (runs.VECTOR, runs.METRICS))


# Repeating and resuming


@pytest.mark.parametrize("options", [QUICK, EVERYTHING], ids=["plain", "everything"])
def test_two_runs_give_the_same_bytes_and_another_seed_others(site, material, options):
    first, second = (go(site, material, name, options) for name in ("a", "b"))
    assert result(first) == result(second)
    (site.root / "runs" / "b" / "summary.json").unlink()
    other = go(site, material, "c", options.model_copy(update={"seed": 1}))
    assert result(other)[0] != result(first)[0]


MOMENTS = [
    [("features", -1)],
    [("validation", -1)],
    [("validation", 0)],
    [("checkpoint", 0)],
    [("step", 1)],
    [("step", 3)],
    [("checkpoint", 3)],
    [("step", 4), ("step", 4), ("step", 5)],
    [("step", 6)],
    [("checkpoint", 6)],
    [("features", -1), ("validation", 0), ("step", 2), ("checkpoint", 3), ("step", 6)],
]


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(site, material, moments):
    broken = go(site, material, "broken", EVERYTHING, *moments)
    (broken.folder / "summary.json").rename(site.root / "kept.json")
    assert result(broken) == result(go(site, material, "whole", EVERYTHING))


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_checkpoint_between_validations_is_as_good(site, material, monkeypatch, step):
    whole = result(go(site, material, "whole", EVERYTHING))
    (site.root / "runs" / "whole" / "summary.json").unlink()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    broken = go(site, material, "broken", EVERYTHING, ("checkpoint", step))
    assert result(broken) == whole


def test_a_resumed_run_does_not_begin_again(site, material):
    folder, reporter = site.root / "runs" / "a", Reporter()
    with pytest.raises(Killed):
        runs.finetune(site, material, QUICK, folder, CPU, Reporter(("step", 5)))
    runs.finetune(site, material, QUICK, folder, CPU, reporter)
    kinds = [event["event"] for event in reporter.events]
    assert kinds[:2] == ["head", "resumed"]
    assert [e["step"] for e in reporter.events if e["event"] == "step"] == [4, 5, 6]


def test_a_line_that_a_kill_cut_short_is_written_again(site, material):
    whole = result(go(site, material, "whole", QUICK))
    (site.root / "runs" / "whole" / "summary.json").unlink()
    folder = site.root / "runs" / "broken"
    with pytest.raises(Killed):
        runs.finetune(site, material, QUICK, folder, CPU, Reporter(("step", 5)))
    log = (folder / runs.METRICS).read_bytes()
    (folder / runs.METRICS).write_bytes(log[:-9])
    assert result(go(site, material, "broken", QUICK)) == whole


def test_a_damaged_checkpoint_gives_its_sentence_and_the_way_out_works(site, material):
    folder = site.root / "runs" / "a"
    with pytest.raises(Killed):
        runs.finetune(site, material, QUICK, folder, CPU, Reporter(("step", 5)))
    place = folder / runs.CHECKPOINT
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=f"^{place} cannot be read: remove it to start this"):
        go(site, material, "a", QUICK)
    place.unlink()
    assert result(go(site, material, "a", QUICK)) == result(go(site, material, "b", QUICK))


def test_a_finished_run_is_not_done_again(site, material):
    first = go(site, material, "a", QUICK)
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    second = go(site, material, "a", QUICK)
    assert (first.was_finished, second.was_finished) == (False, True)
    assert second.summary == first.summary
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == before


def test_a_damaged_base_is_refused_before_any_training(site, material):
    weights = site.base_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BaseMismatchError, match="fetch the base again"):
        go(site, material, "a", QUICK)


# What a run leaves


@pytest.fixture
def run(site, material) -> Run:
    """A finished run."""
    return go(site, material, "a", QUICK)


def test_a_finished_run_holds_these_files(run):
    found = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    assert found - {".lock"} == {
        "run.json", "metrics.jsonl", "curves.png", "cases.csv", "summary.json",
        "model/config.json", "model/model.safetensors", "vector.safetensors", "manifest.draft.json",
    }  # fmt: skip


def test_the_sites_model_is_the_base_plus_the_vector(site, run):
    model = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True)
    with TensorFile(run.folder / runs.VECTOR) as vector:
        with TensorFile(site.base_folder / "model.safetensors") as base:
            for name, tensor in model.state_dict().items():
                expected = base.read(name) + vector.read(name)
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_the_row_of_an_unseen_class_is_zero_in_the_vector(run):
    with TensorFile(run.folder / runs.VECTOR) as vector:
        assert (vector.read("fc.weight")[2] == 0).all()
        assert (vector.read("fc.weight")[:2] != 0).any(dim=1).all()
        assert vector.read("fc.bias")[2] == 0


def test_the_draft_tells_what_the_federation_may_know(site, run):
    draft = read_draft(run.folder / runs.DRAFT)
    vector = run.folder / runs.VECTOR
    assert draft.class_counts == {"round": 11, "lobed": "<5", "granular": 0}
    assert (draft.training.steps, draft.training.epochs, draft.training.seed) == (6, 3, 0)
    assert draft.payload.size == vector.stat().st_size == run.summary["vector_bytes"]
    assert draft.payload.norm > 0
    estimate = draft.validation.balanced_accuracy
    assert 0 <= estimate.value <= 1
    if estimate.low is not None:  # else no resample differs from the few images
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert draft.base == site.federation.base_fingerprint


def test_the_metrics_are_a_line_for_each_step_and_validation(run):
    text = (run.folder / runs.METRICS).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    at = [(line["event"], line["step"]) for line in lines]
    steps = [("step", s) for s in range(1, 7)]
    assert at == [
        ("validation", 0), *steps[:3], ("validation", 3), *steps[3:], ("validation", 6)
    ]  # fmt: skip
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses[3:]) / 3)


def test_the_curves_are_a_picture(run):
    with Image.open(run.folder / runs.CURVES) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_the_table_of_cases_says_which_image_was_in_which_split(run, cases):
    text = (run.folder / runs.CASES).read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    names = ("round", "lobed", "granular")
    expected = [(c.file, names[c.label], c.split) for c in sorted(cases, key=lambda c: c.file)]
    assert [(row["file"], row["label"], row["split"]) for row in rows] == expected


def test_intervals_draw_whole_patients(site, cases):
    patients = [replace(case, patient=f"{case.split}-{case.label}") for case in cases]
    options = QUICK.model_copy(update={"steps": 0, "head_steps": 0, "seed": 3})  # a coin's toss
    one = go(site, runs.prepare(site, cases), "images", options).summary["balanced_accuracy"]
    other = go(site, runs.prepare(site, patients), "patients", options).summary["balanced_accuracy"]
    assert one["value"] == other["value"]
    assert one != other


# Where a run lives


def test_the_same_work_has_the_same_folder_in_any_order(site, cases):
    folder = runs.run_folder(site, cases, QUICK, CPU)
    assert runs.run_folder(site, cases[::-1], QUICK, CPU) == folder
    assert folder.parent == site.root / "runs"


def test_other_work_has_another_folder(site, cases):
    folder = runs.run_folder(site, cases, QUICK, CPU)
    relabelled = [replace(cases[0], label=1), *cases[1:]]
    others = [
        runs.run_folder(site, relabelled, QUICK, CPU),
        runs.run_folder(site, cases[1:], QUICK, CPU),
        runs.run_folder(site, [replace(cases[0], split="val"), *cases[1:]], QUICK, CPU),
        runs.run_folder(site, cases, EVERYTHING, CPU),
        runs.run_folder(site, cases, QUICK, torch.device("cuda")),
        runs.run_folder(site, cases, QUICK, CPU, ("cyst", "stone")),
    ]
    os.utime(cases[0].source, (1, 1))
    others.append(runs.run_folder(site, cases, QUICK, CPU))
    assert len({folder, *others}) == 8


# What cannot be read


def test_an_unreadable_image_stops_the_site(site, cases):
    cases[2].source.write_bytes(b"")
    with pytest.raises(ImageError, match=r"round_train_2\.png cannot be read"):
        runs.prepare(site, cases)


def test_unreadable_images_are_left_out_where_the_site_says_so(site, cases):
    broken = [case for case in cases if case.file in ("round_train_2.png", "lobed_val_0.png")]
    for case in broken:
        case.source.write_bytes(b"")
    material = runs.prepare(site, cases, skip_unreadable=True)
    assert (len(material.train), len(material.validation), len(material.skipped)) == (13, 5, 2)
    assert [c.split for c in material.train.cases] == ["train"] * 13
    assert [c.split for c in material.validation.cases] == ["val"] * 5
    run = go(site, material, "a", QUICK)
    assert len(run.summary["skipped"]) == 2
    assert read_draft(run.folder / runs.DRAFT).class_counts["round"] == 10


def test_a_split_without_a_readable_image_is_an_error(site, cases):
    for case in cases:
        if case.split == "val":
            case.source.write_bytes(b"")
    with pytest.raises(TrainingError, match="no readable image is left for training or for"):
        runs.prepare(site, cases, skip_unreadable=True)
