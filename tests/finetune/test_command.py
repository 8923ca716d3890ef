"""merge-kit finetune as a site types it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from merge_kit import site as sites
from merge_kit.manifest import read_draft
from merge_kit.runs import latest_run
from tests.finetune.pictures import draw, write_csv, write_table

QUICK = ("--steps", 2, "--head-steps", 10, "--validations", 1, "--batch-size", 8, "--device", "cpu")
COUNTS = {"round": 8, "lobed": 6, "granular": 6}


@pytest.fixture
def root(hub, tmp_path: Path) -> Path:
    """A site's folder."""
    return sites.join(hub, "north", tmp_path / "north").root


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A labels.csv beside its images."""
    return write_table(tmp_path / "images", COUNTS)


@pytest.fixture
def finetune(run_cli, root: Path) -> Callable[..., Result]:
    """The command, with few steps."""

    def run(data: Path, *options: object) -> Result:
        return run_cli("finetune", root, "--data", data, *QUICK, *options)

    return run


def draft_of(root: Path):
    return read_draft(latest_run(root) / "manifest.draft.json")


def options_of(root: Path) -> dict[str, object]:
    return json.loads((latest_run(root) / "run.json").read_text())["options"]


def test_finetune_trains_and_says_what_to_do_next(finetune, root, table):
    result = finetune(table)
    assert result.exit_code == 0, result.output
    assert "Site 'north': 29 images, on cpu" in result.stdout
    assert re.search(r"balanced accuracy +\d\.\d{3} \(95 % \d\.\d{3} to \d\.\d{3}\)", result.stdout)
    assert re.search(r"macro AUROC +\d\.\d{3} \(95 %", result.stdout)
    assert re.search(r"vector +1\.4 MiB, norm \d", result.stdout)
    assert str(latest_run(root)) in result.stdout
    assert result.stdout.endswith(
        f"with\n  merge-kit publish {root} --run {latest_run(root)} --dry-run\n"
    )
    assert draft_of(root).class_counts == COUNTS


def test_progress_goes_to_stderr_in_plain_lines(finetune, table):
    result = finetune(table)
    steps = re.findall(r"^step (\d): validation loss \d\.\d{3}, bal", result.stderr, re.MULTILINE)
    assert steps == ["0", "2"]
    assert "step 0" not in result.stdout
    assert "\x1b" not in result.output


def test_the_same_command_again_says_that_it_has_finished(finetune, root, table):
    first, second = finetune(table), finetune(table)
    assert "This run has finished before; nothing was done again." in second.stdout
    assert "finished before" not in first.stdout
    assert len(list((root / "runs").iterdir())) == 1


def test_labels_are_mapped_to_the_federations_classes(finetune, root, tmp_path):
    table = write_table(tmp_path / "images", COUNTS)
    table.write_text(table.read_text().replace(",lobed,", ",segmented,"))
    refused = finetune(table)
    assert refused.exit_code == 1
    assert "label 'segmented' is no class of this federation" in refused.stderr
    assert finetune(table, "--map", "segmented=lobed").exit_code == 0
    assert draft_of(root).class_counts == COUNTS


def test_only_the_rows_that_were_asked_for_are_used(finetune, root, tmp_path):
    here = write_table(tmp_path / "here", COUNTS)
    rows = [line.split(",") for line in here.read_text().splitlines()[1:]]
    marked = [
        {"file": f, "label": c, "split": s, "site": "east" if i % 2 else "north"}
        for i, (f, c, s) in enumerate(rows)
    ]
    result = finetune(write_csv(here, marked), "--where", "site=north")
    assert result.exit_code == 0, result.output
    assert "Site 'north': 15 images" in result.stdout


def test_an_unknown_key_in_the_config_is_refused_with_the_nearest(finetune, table, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("learning_rat: 0.1\n")
    result = finetune(table, "--config", config)
    assert result.exit_code == 2
    assert f"{config}, line 1: unknown key 'learning_rat'; did you mean" in result.stderr


def test_the_command_line_goes_before_the_config_file(finetune, root, table, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("steps: 5\nflip: both\nlearning_rate: 0.001\n")
    assert finetune(table, "--config", config, "--learning-rate", 0.002).exit_code == 0
    options = options_of(root)
    assert (options["steps"], options["flip"], options["learning_rate"]) == (2, "both", 0.002)


def test_the_average_of_the_weights_is_published_when_asked_for(finetune, root, table):
    finetune(table)
    plain = draft_of(root).payload
    assert finetune(table, "--ema", 0.9).exit_code == 0
    averaged = draft_of(root).payload
    assert options_of(root)["ema"] == 0.9
    assert averaged.sha256 != plain.sha256


def test_a_folder_of_class_folders_is_split_and_learnt(finetune, root, tmp_path):
    for index, name in enumerate(COUNTS):
        (tmp_path / "cells" / name).mkdir(parents=True)
        for number, pixels in enumerate(draw([index] * 12, seed=index)):
            Image.fromarray(pixels).save(tmp_path / "cells" / name / f"{number}.jpg")
    result = finetune(tmp_path / "cells", "--val-fraction", 0.25, "--test-fraction", 0.25)
    assert result.exit_code == 0, result.output
    assert draft_of(root).class_counts == {"round": 6, "lobed": 6, "granular": 6}


def test_a_medmnist_file_is_learnt(finetune, root, tmp_path):
    labels = np.array([0, 1, 2] * 6)
    arrays = {f"{s}_images": draw(labels, side=28, seed=i) for i, s in enumerate(("train", "val"))}
    data = tmp_path / "cells.npz"
    np.savez(data, **arrays, train_labels=labels[:, None], val_labels=labels[:, None])
    result = finetune(data)
    assert result.exit_code == 0, result.output
    assert draft_of(root).class_counts == {"round": 6, "lobed": 6, "granular": 6}


def test_images_may_lie_elsewhere(finetune, root, table, tmp_path):
    moved = tmp_path / "tables" / "mine.csv"
    moved.parent.mkdir()
    table.rename(moved)
    assert finetune(moved, "--images", tmp_path / "images").exit_code == 0


def test_an_unreadable_image_is_named_and_left_out_only_when_asked_for(finetune, table):
    (table.parent / "lobed_train_1.png").write_bytes(b"")
    refused = finetune(table)
    assert refused.exit_code == 1
    assert "lobed_train_1.png cannot be read" in refused.stderr
    result = finetune(table, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert re.search(r"^Left out: .*lobed_train_1\.png cannot", result.stderr, re.MULTILINE)
    assert "left out           1 unreadable images" in result.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--learning-rate", -1), "the command line: 'learning_rate': input should be greater"),
        (("--norm", "thaw"), "Invalid value for '--norm'"),
        (("--device", "cuda:99"), "the device 'cuda:99' is not there: use --device auto"),
        (("--map", "a"), "--map a: write it as --map NAME=VALUE."),
        (("--config", "missing.yaml"), "missing.yaml does not exist: check the path."),
    ],
    ids=lambda value: str(value[0]),
)
def test_wrong_use_exits_2_with_one_sentence(finetune, table, options, sentence):
    result = finetune(table, *options)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_a_folder_that_is_no_site_says_how_to_become_one(run_cli, table, tmp_path):
    result = run_cli("finetune", tmp_path, "--data", table)
    assert result.exit_code == 1
    assert "is not a site's folder: it has no site.yaml; run 'merge-kit join'" in result.stderr


def test_every_training_option_is_on_the_command_line(run_cli):
    from finetune.options import TrainingOptions

    text = run_cli("finetune", "--help").output
    missing = [n for n in TrainingOptions.model_fields if f"--{n.replace('_', '-')} " not in text]
    assert missing == []


def test_steps_and_epochs_together_are_refused(finetune, table):
    refused = finetune(table, "--steps", 2, "--epochs", 1)
    assert refused.exit_code == 2
    assert "--steps and --epochs both set the length: give one of them." in refused.stderr


# Statistics


@pytest.fixture
def finished(finetune, root, table) -> Path:
    """The run that `statistics` takes."""
    assert finetune(table).exit_code == 0
    return latest_run(root)


def test_statistics_are_made_and_what_comes_next_is_said(finished, root, run_cli):
    result = run_cli(
        "statistics", root, "--kind", "fisher", "--kind", "gram", "--max-width", 300,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Site 'north': 20 training images, on cpu\n" in result.stdout
    for kind in ("fisher", "gram"):
        size = (finished / f"{kind}.safetensors").stat().st_size
        line = f"  {kind:<8} {finished / kind}.safetensors ({size / 2**20:.1f} MiB)\n"
        assert line in result.stdout
    wide = re.findall(r"^Left out: (\S+) has \d+ input columns, above --max", result.stderr, re.M)
    assert "layer4.0.conv1.weight" in wide
    assert result.stdout.endswith(f"  merge-kit publish {root} --run {finished} --dry-run\n")
    published = run_cli("publish", root)
    assert published.stdout.count("\nPublished: ") == 3


def test_statistics_that_are_there_are_not_made_again(finished, root, run_cli):
    first = run_cli("statistics", root, "--kind", "fisher", "--device", "cpu")
    path = finished / "fisher.safetensors"
    before = path.stat().st_mtime_ns
    second = run_cli("statistics", root, "--kind", "fisher", "--kind", "fisher", "--device", "cpu")
    sentence = f"{path} is there already; remove it to make it again.\n"
    assert sentence not in first.stdout
    assert second.stdout.count(sentence) == 1
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert run_cli("statistics", root, "--kind", "fisher", "--device", "cpu").exit_code == 0
    assert path.is_file()


def test_statistics_of_an_earlier_run_and_of_few_images(finished, finetune, root, table, run_cli):
    assert finetune(table, "--seed", 1).exit_code == 0
    assert latest_run(root) != finished
    options = ("--kind", "fisher", "--run", finished, "--examples", 6, "--device", "cpu")
    result = run_cli("statistics", root, *options)
    assert "Site 'north': 6 training images, on cpu\n" in result.stdout
    assert (finished / "fisher.safetensors").is_file()
    assert not (latest_run(root) / "fisher.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        ((), 2, "Missing option '--kind'"),
        (("--kind", "hessian"), 2, "'hessian' is not one of 'fisher', 'gram'"),
        (("--kind", "gram", "--max-width", 0), 2, "Invalid value for '--max-width'"),
        (("--kind", "gram", "--max-width", 1), 2, "no layer is left with --max-width 1: give a"),
        (("--kind", "gram", "--images", "x"), 2, "--images says where the paths of --data start"),
        (("--kind", "gram", "--device", "cuda:99"), 2, "the device 'cuda:99' is not there"),
        (("--kind", "gram", "--data", "missing.csv"), 1, "missing.csv does not exist: give a "),
        (("--kind", "gram", "--run", "elsewhere"), 1, "elsewhere is no finished run: run "),
        (("--kind", "gram", "--examples", 2), 1, "statistics of 2 images would give them away"),
    ],
    ids=str,
)
def test_wrong_use_of_statistics_is_one_sentence(
    finished, root, run_cli, options, status, sentence
):
    result = run_cli("statistics", root, *options)
    assert result.exit_code == status
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert not (finished / "gram.safetensors").exists()


def test_without_a_run_statistics_say_what_to_do_first(root, run_cli):
    result = run_cli("statistics", root, "--kind", "fisher")
    assert result.exit_code == 2
    assert f"{root} has no finished run: run 'merge-kit finetune {root}' first." in result.stderr
