"""Whole experiments on small real images: the real commands in real processes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate.experiments.running import DONE
from finetune import network
from merge_kit.cli import main
from merge_kit.contributions import list_entries
from merge_kit.federation import read_federation
from merge_kit.hub import FolderHub
from tests.finetune.pictures import draw, write_csv
from tests.merge_kit.helpers import load

CLASSES = ("round", "lobed", "granular")
TEXT = """
name: cells
data: labels.csv
classes: [round, lobed, granular]
backbone:
  name: test_resnet
  init: --weights none --input-size 32 --crop-pct 1.0
training: {steps: 2, batch_size: 8, head_steps: 5, validations: 1}
merges:
  mean: {}
  sum: {options: --method sum, calibrate: true}
  sum-small: {options: --method sum, calibrate: true, compress: "topk:0.1+int8"}
rounds: 2
strategies: [fedavg, fedavg-common, fedprox, fedsgd, fedbn]
unseen: [sum]
personal: [sum]
arrivals: {merge: sum, orders: 1}
"""


def run(*arguments):
    """The program in this process; gives the exit code."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder with a table of two sites and an experiment on it."""
    folder = tmp_path_factory.mktemp("cells")
    rows = []
    for site, seed in (("north", 0), ("south", 10)):
        for label, name in enumerate(CLASSES):
            for number, pixels in enumerate(draw([label] * 14, seed=seed + label)):
                file = f"{site}-{name}{number}.png"
                Image.fromarray(pixels).save(folder / file)
                split = "train" if number < 7 else "val" if number < 9 else "test"
                rows.append({"file": file, "label": name, "site": site, "split": split})
    write_csv(folder / "labels.csv", rows)
    (folder / "cells.yaml").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def done(cells, tmp_path_factory):
    """The experiment, run."""
    out = tmp_path_factory.mktemp("out")
    assert run("experiment", cells / "cells.yaml", "--out", out, "--jobs", 2) == 0
    return out


def started(said):
    """The commands that an experiment says to have run."""
    return set(re.findall(r"^\d+/\d+ \S+: (\w+)", said, re.M))


def table(out):
    with (out / "table.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def predicted(report, model):
    """Probabilities of a model for each image, by the file."""
    with (report / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return {row["file"]: [float(row[f"p_{name}"]) for name in CLASSES] for row in rows}


def whole(out):
    """The federation that no site is left out of."""
    (folder,) = [path for path in out.glob("seed-*") if "without" not in path.name]
    return folder


def test_what_every_site_has_made_its_own_is_asked_about_its_own_images(cells, done, tmp_path):
    """In every report of it: further experiments in the same folder have one each."""
    (own,) = whole(done).glob("models/sum-personal-*")
    table = next(done.glob("tables/*/all.csv"))
    expected = {}
    for site in ("north", "south"):
        assert run(
            "evaluate", whole(done) / "hub", f"mine={own / site}", "--data", table, "--images",
            cells, "--where", f"site={site}", "--out", tmp_path / site,
        ) == 0  # fmt: skip
        expected |= predicted(tmp_path / site, "mine")
    reports = [found for report in whole(done).glob("report-*") if (found := both(report))]
    assert reports
    for found, merged in reports:
        assert found.keys() == expected.keys()
        for file, row in found.items():
            assert row == pytest.approx(expected[file], abs=1e-6)
        assert found != merged


def both(report):
    """What is said of the images by the sites' own models, and by the merge that they come from."""
    own = predicted(report, "sum-personal")
    return (own, predicted(report, "sum")) if own else None


def test_the_table_has_every_way_with_its_cost(done):
    found = table(done)
    assert set(found) == {
        "north", "south", "best single site", "mean single site", "hub", "base", "first", "mean",
        "sum", "sum-uncalibrated", "sum-small", "sum-small-uncalibrated", "pooled", "fedavg",
        "fedavg-common", "fedprox", "fedsgd", "fedbn", "ensemble-uniform", "ensemble-sqrt",
        "sum-personal",
    } - {"hub"}  # fmt: skip
    assert all(0 <= float(row["union"]) <= 1 for row in found.values())
    assert {name for name, row in found.items() if row["unseen"]} >= {"first", "sum"}
    assert found["fedsgd"]["rounds"] == "2"  # as many as steps
    assert float(found["sum"]["megabytes_per_site"]) > float(found["mean"]["megabytes_per_site"])
    assert found["sum-personal"]["megabytes_per_site"] == found["sum"]["megabytes_per_site"]
    small, all_of_it = (float(found[n]["megabytes_per_site"]) for n in ("sum-small", "sum"))
    assert small < all_of_it
    for name in ("table.md", "table.html", "arrivals.png", "bytes.png"):
        assert (done / name).stat().st_size > 100


def test_compressed_vectors_travel_by_a_hub_of_their_own_and_train_nothing(done):
    whole_one, small = (
        [e.contribution.manifest for e in list_entries(FolderHub(hub), read_federation(hub))]
        for hub in sorted(p.parent for p in whole(done).glob("hub*/federation.yaml"))
    )
    vectors = [m for m in small if m.kind == "vector"]
    assert {m.compression.method for m in vectors} == {"topk:0.1+int8"}
    assert {m.site for m in vectors} == {"north", "south"}
    assert len({m.federation for m in [*whole_one, *small]}) == 1
    assert len(list(whole(done).glob("sites/*/runs/*/summary.json"))) == 2


def test_the_figures_are_those_of_the_reports(done):
    found = table(done)
    for path in whole(done).glob("report-*/report.json"):
        for model in json.loads(path.read_text())["models"]:
            if model["name"] in found:
                union = model["scopes"][0]["figures"]["balanced_accuracy"]["value"]
                assert float(found[model["name"]]["union"]) == pytest.approx(union, abs=1e-6)


def test_again_nothing_is_done_and_one_more_merge_trains_nothing(cells, done, capfd):
    before = {path.name for path in (whole(done) / DONE).iterdir()}
    assert run("experiment", cells / "cells.yaml", "--out", done) == 0
    assert started(capfd.readouterr().out) == set()
    assert {path.name for path in (whole(done) / DONE).iterdir()} == before
    more = cells / "more.yaml"
    more.write_text(TEXT.replace("  mean: {}\n", "  mean: {}\n  ties: {options: --method ties}\n"))
    assert run("experiment", more, "--out", done) == 0
    assert started(capfd.readouterr().out) == {"merge", "evaluate"}
    assert "ties" in table(done)
    assert run("experiment", cells / "cells.yaml", "--out", done) == 0
    assert "ties" not in table(done)


def test_rounds_from_the_common_classifier_keep_it(done):
    folder = next((whole(done) / "models").glob("fedavg-common-*"))
    head = {n: t for n, t in load(folder / "model.safetensors").items() if n.startswith("fc.")}
    first = load(next((whole(done) / "models").glob("first-*")) / "model.safetensors")
    for name, tensor in head.items():
        torch.testing.assert_close(tensor, first[name])


def test_fedbn_keeps_batch_norm_at_the_sites(done):
    folder = next((whole(done) / "models").glob("fedbn-*"))
    north, south = (load(folder / s / "model.safetensors") for s in ("north", "south"))
    differing = {n for n in north if not torch.equal(north[n], south[n])}
    model = network.load(folder / "north")
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert differing
    assert {name.rpartition(".")[0] for name in differing} <= set(norms)


def test_variants_tuned_merges_and_restored_statistics_are_further_rows(cells, tmp_path):
    text = """
name: levers
data: labels.csv
classes: [round, lobed, granular]
backbone: {name: test_resnet, init: --weights none --input-size 32 --crop-pct 1.0}
training: {steps: 2, batch_size: 8, head_steps: 5, validations: 1}
variants: {update: {norm: update}}
merges:
  sum: {options: --method sum, calibrate: true}
  by-sites: {options: --method sum, calibrate: true, restore: sites}
  tuned: {options: --method sum, tune: --by labels --steps 2}
  by-images: {options: --method sum, restore: site=north}
baselines: []
strategies: []
"""
    (cells / "levers.yaml").write_text(text)
    assert run("experiment", cells / "levers.yaml", "--out", tmp_path) == 0
    found = table(tmp_path)
    merges = ("sum", "sum-uncalibrated", "by-sites", "by-sites-uncalibrated", "tuned")
    merges += ("by-images",)
    assert set(found) == {"base", "first", *merges, *[f"{name}, update" for name in merges]}
    visits = {name: row["rounds"] for name, row in found.items()}
    assert (visits["sum"], visits["by-sites"], visits["by-images"]) == ("2", "3", "1")
    assert visits["by-sites-uncalibrated, update"] == "2"
    assert float(found["by-sites"]["megabytes_per_site"]) > float(
        found["sum"]["megabytes_per_site"]
    )
    page = (tmp_path / "table.html").read_text()
    assert '<tr class="ours"><td>sum, update</td>' in page


def test_private_teachers_are_a_way_to_train_and_have_rows_of_their_own(cells, tmp_path):
    text = """
name: taught
data: labels.csv
classes: [round, lobed, granular]
backbone: {name: test_resnet, init: --weights none --input-size 32 --crop-pct 1.0}
training: {steps: 2, batch_size: 8, head_steps: 5, validations: 1}
others:
  vit: {name: test_vit, init: --weights none --input-size 32 --model-arg img_size=32 --crop-pct 1}
variants: {taught: {mutual: vit, mutual_rate: 0.001}}
merges:
  mean: {}
  small: {options: --recipe distill, transfer: site=north, student: vit}
  spoken: {options: --recipe distill, transfer: site=north, private: {south: vit}}
baselines: [single]
strategies: []
"""
    (cells / "taught.yaml").write_text(text)
    assert run("experiment", cells / "taught.yaml", "--out", tmp_path) == 0
    found = table(tmp_path)
    ours = ("own-published", "own-teacher")
    expected = {"mean, taught", *[f"{name}, taught" for name in ours], "own-published"}
    assert expected <= set(found)
    assert "own-teacher" not in found
    theirs = {name for name in found if name.startswith(("north-", "south-"))}
    assert theirs == {"south-vit", "south-vit, taught"}
    assert found["own-teacher, taught"]["megabytes_per_site"] == "0.000"
    assert found["south-vit"]["megabytes_per_site"] == "0.000"
    assert float(found["spoken"]["megabytes_per_site"]) < float(found["mean"]["megabytes_per_site"])
    for folder in tmp_path.glob("seed-*"):
        (spoken,) = folder.glob("models/spoken-*/provenance.json")
        record = json.loads(spoken.read_text())
        assert [one["site"] for one in record["contributions"]] == ["north"]
        assert [one["site"] for one in record["distilled"]["predictions"]] == ["south"]
        (small,) = folder.glob("models/small-*/config.json")
        assert json.loads(small.read_text())["architecture"] == "test_vit"
        assert len(list(folder.glob("other-*/federation.yaml"))) == 1
    (report,) = tmp_path.glob("seed-0-taught-*/report-*/report.json")
    models = {m["name"]: m for m in json.loads(report.read_text())["models"]}
    assert {"north-teacher", "south-teacher", "north-shared"} <= set(models)
    # On its own images every site's own teacher is what it is alone.
    for site in ("north", "south"):
        values = [
            scope["figures"]["balanced_accuracy"]["value"]
            for name in (f"{site}-teacher", "own-teacher")
            for scope in models[name]["scopes"]
            if scope["scope"] == f"site:{site}"
        ]
        assert len(values) == 2
        assert values[0] == values[1]


def test_a_student_that_learns_without_images_is_a_row(cells, tmp_path):
    """By its recipe, and by a number beside a recipe that gives none."""
    (cells / "free.yaml").write_text(
        "method: distill\nsynthesis: {images: 6, steps: 2, stages: 1}\n"
        "training: {steps: 2, validations: 1}\n"
    )
    (cells / "bare.yaml").write_text(
        "method: distill\nsynthesis: {steps: 1, stages: 1}\ntraining: {steps: 1, validations: 1}\n"
    )
    rows = (
        f"  free: {{options: --recipe {cells / 'free.yaml'}, transfer: synthetic}}\n"
        f"  more: {{options: --recipe={cells / 'bare.yaml'} --synthesise 4, transfer: synthetic}}\n"
    )
    head = TEXT[: TEXT.index("  mean: {")]
    path = cells / "free-cells.yaml"
    path.write_text(f"{head}{rows}strategies: []\nbaselines: []\n")
    assert run("experiment", path, "--out", tmp_path, "--jobs", 1) == 0
    found = table(tmp_path)
    assert {"free", "more"} <= set(found)
    (folder,) = (whole(tmp_path) / "models").glob("more-*")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["distilled"]["images"]["count"] == 4
    assert record["distilled"]["synthesised"]


def test_images_that_were_copied_elsewhere_are_known_again(cells, done, tmp_path, capfd):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in cells.iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    assert run("experiment", moved / "cells.yaml", "--out", done) == 0
    assert started(capfd.readouterr().out) <= {"evaluate"}


def test_machines_share_the_work_and_the_table_is_the_same_again(cells, done, tmp_path):
    """Of its own rows, what another run of the same jobs gave."""
    text = TEXT.replace("unseen: [sum]\n", "").replace("arrivals: {merge: sum, orders: 1}\n", "")
    text = text.replace("[fedavg, fedavg-common, fedprox, fedsgd, fedbn]", "[fedavg]")
    text = "\n".join(line for line in text.splitlines() if "sum-small" not in line)
    (cells / "shared.yaml").write_text(text)
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "merge_kit", "experiment", str(cells / "shared.yaml"), "--out", str(out),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^(\d+)/(\d+) \S+: \w+", result.stdout, re.M)
    assert len(lines) == len(list((whole(out) / DONE).iterdir()))
    found, expected = table(out), table(done)
    assert {"sum", "mean", "pooled", "fedavg", "ensemble-sqrt", "north"} <= set(found)
    for name, row in found.items():
        assert row == {**expected[name], "unseen": ""}, name


def test_the_list_of_jobs_is_empty_when_all_is_done(cells, done, capfd):
    assert run("experiment", cells / "cells.yaml", "--out", done, "--list-jobs") == 0
    assert capfd.readouterr().out.strip() == ""


def test_the_list_of_jobs_can_be_run_by_hand(cells, tmp_path, capfd):
    assert run("experiment", cells / "cells.yaml", "--out", tmp_path / "x", "--list-jobs") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "# phase 1"
    assert lines[1].startswith("merge-kit init ")
    assert sum(line.startswith("merge-kit finetune ") for line in lines) == 2 + 3 + 2


def test_a_command_that_fails_is_named_and_the_rest_can_go_on(cells, tmp_path, capfd):
    broken = cells / "broken.yaml"
    broken.write_text(TEXT.replace("  mean: {}\n", "  mean: {options: --method nonsense}\n"))
    out = tmp_path / "out"
    assert run("experiment", broken, "--out", out) == 1
    said = capfd.readouterr().err
    assert "--method nonsense" in said
    assert "unknown method 'nonsense'" in said
    assert not (out / "table.csv").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("unseen: [sum]", "unseen: [summ]", "'the document': 'summ' is none of the merges"),
        ("+int8", "+int9", "line 12: 'topk:0.1+int9' is no way to compress a vector"),
        ("data: labels.csv", "data: absent.csv", "absent.csv does not exist: paths start from"),
        ("rounds: 2", "round: 2", "unknown key 'round'; did you mean 'rounds'?"),
        ("{steps: 2,", "{stepps: 2,", "unknown key 'stepps'; did you mean 'steps'?"),
        ("--method sum", "--method 'sum", "has a quotation mark without its pair: close it."),
        ("--crop-pct 1.0", "--multi-label", "experiments are on images of one class each: leave"),
        ("mean: {}", "mean: {student: vit}", "'student: vit' is none of the 'others'"),
        (
            "mean: {}",
            "mean: {private: {north: vit}, transfer: site=south}",
            "'private: north: vit'",
        ),
        ("mean: {}", "mean: {private: {north: vit}}", "say of which with 'transfer'"),
        ("steps: 2,", "steps: 2, mutual: vit,", "'mutual: vit' is none of the 'others'"),
        ("fedbn]", "fedbn, fedbn]", "'strategies': an entry is named twice"),
        *[
            (
                "mean: {}",
                f"mean: {{{options}transfer: synthetic}}",
                "'transfer: synthetic' goes with a recipe that says how many images are",
            )
            for options in ("", "options: --recipe distill, ", "options: --synthesise 9, ")
        ],
        ("sum: {", "sum: {tune: --by labels, ", "'sum' uses images of the table, which may be"),
        ("mean: {}", "mean: {tune: --by 'labels}", "has a quotation mark without its pair"),
        ("mean: {}", "mean: {transfer: absent}", "rows such as site=north, or 'synthetic'."),
    ],
)
def test_what_is_wrong_in_the_file_is_named(cells, tmp_path, capfd, old, new, sentence):
    path = cells / "wrong.yaml"
    path.write_text(TEXT.replace(old, new))
    assert run("experiment", path, "--out", tmp_path / "out") == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_rounds_for_the_steps_are_refused(cells, done, run_cli):
    site = whole(done) / "sites" / "north"
    data = whole(done).parent / "tables"
    (union,) = data.glob("*/all.csv")
    result = run_cli(
        "rounds", site, "--data", union, "--images", cells, "--steps", 3, "--rounds", 4,
        "--out", done / "r",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: 3 steps cannot be shared out over 4 rounds: give --steps, and at least as many as "
        "rounds."
    )


def test_probabilities_of_an_ensemble_are_probabilities(done):
    with (whole(done) / "combined" / "ensemble-sqrt.csv").open(newline="") as file:
        rows = [[float(v) for k, v in row.items() if k.startswith("p_")]
                for row in csv.DictReader(file)]  # fmt: skip
    np.testing.assert_allclose(np.sum(rows, axis=1), 1, atol=1e-6)
