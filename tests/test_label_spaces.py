"""Sites that label in other ways, by the commands: fine, coarse, and with a task of their own."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import network
from finetune.calibrating import calibrate
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit.cli import main
from merge_kit.errors import DataError
from merge_kit.hub import FolderHub
from merge_kit.publishing import prepare, publish
from merge_kit.runs import latest_run
from merge_kit.site import open_site
from tests.finetune.pictures import write_csv, write_table
from tests.merge_kit.helpers import load

TRAINING = ("--steps", 3, "--batch-size", 8, "--head-steps", 25, "--device", "cpu")
GROUP = ("--group", "dark=lobed,granular")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def go(*arguments: object) -> None:
    """Run a command that must go through, before any test."""
    main([str(argument) for argument in arguments])


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def relabelled(table: Path, names: dict[str, str], out: Path | None = None) -> Path:
    """The table with other names for labels, in its place or elsewhere."""
    rows = [{**row, "label": names.get(row["label"], row["label"])} for row in rows_of(table)]
    return write_csv(out or table, rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A federation of three classes and a group, and three sites that have published.

    `fine` knows two of the classes; `coarse` alone has images of the third, in its group; `other`
    has a task of its own. Made once, for it takes five seconds; tests write elsewhere.
    """
    place = tmp_path_factory.mktemp("label-spaces")
    go(
        "init", place / "hub", "--backbone", "test_resnet", "--weights", "none", "--input-size",
        32, "--crop-pct", 1, "--classes", "round,lobed,granular", *GROUP,
    )  # fmt: skip
    counts = {"fine": (9, 8, 0), "coarse": (8, 6, 7), "other": (7, 9, 0)}
    for seed, (name, found) in enumerate(counts.items(), 1):
        sizes = dict(zip(("round", "lobed", "granular"), found, strict=True))
        write_table(place / "images" / name, sizes, seed=seed)
        go("join", place / "hub", "--site", name, "--folder", place / name)
        go("admit", place / "hub", name, place / name / "keys" / "site.pub")
    relabelled(table_of(place, "coarse"), dict.fromkeys(("lobed", "granular"), "dark"))
    relabelled(table_of(place, "other"), {"round": "cyst", "lobed": "stone"})
    for name in counts:
        own = ("--own-classes", "cyst,stone") if name == "other" else ()
        go("finetune", place / name, "--data", table_of(place, name), *own, *TRAINING)
        go("publish", place / name)
    return place


def table_of(place: Path, name: str) -> Path:
    return place / "images" / name / "labels.csv"


@pytest.fixture
def merged(place, ok, tmp_path) -> Path:
    """The merge by the defaults."""
    ok("merge", place / "hub", "--out", tmp_path / "merged")
    return tmp_path / "merged"


def manifest_of(site: Path) -> dict:
    return json.loads((latest_run(site) / "manifest.json").read_bytes())


def head_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load(folder)
    return tensors["fc.weight"], tensors["fc.bias"]


def test_what_each_kind_of_site_tells(place):
    fine, coarse, other = (manifest_of(place / name) for name in ("fine", "coarse", "other"))
    none = {"round": 0, "lobed": 0, "granular": 0}
    assert fine["class_counts"] == {"round": 9, "lobed": 8, "granular": 0}
    assert not {"group_counts", "other_images"} & set(fine)
    assert coarse["class_counts"] == {**none, "round": 8}
    assert coarse["group_counts"] == {"dark": 13}
    assert other["class_counts"] == none
    assert other["other_images"] == 16
    assert "cyst" not in json.dumps(other)
    weight, bias = head_of(latest_run(place / "other") / "vector.safetensors")
    assert not weight.any()
    assert not bias.any()


def test_the_model_of_an_own_task_is_a_plain_one_of_its_classes(place, ok, tmp_path):
    model = latest_run(place / "other") / "model"
    assert json.loads((model / "config.json").read_bytes())["label_names"] == ["cyst", "stone"]
    data = ("--data", table_of(place, "other"), "--split", "val")
    ok("evaluate", place / "other", *data, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_bytes())
    assert report["classes"] == ["cyst", "stone"]


def test_rows_come_from_who_knows_the_class_and_no_class_is_lost(place, merged):
    base_weight, _ = head_of(place / "hub" / "base" / "model.safetensors")
    weight, _ = head_of(merged / "model.safetensors")
    fine, coarse = (
        head_of(latest_run(place / name) / "vector.safetensors")[0].double()
        for name in ("fine", "coarse")
    )
    found = (weight - base_weight).double()
    # It alone tells lobed from granular; of granular nobody has more than images of the group.
    expected = torch.stack([(9 * fine[0] + 8 * coarse[0]) / 17, fine[1], coarse[2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert all(row.any() for row in found)


def test_the_weights_count_every_sites_images(place, merged, ok):
    record = json.loads((merged / "provenance.json").read_bytes())
    found = {part["site"]: part["weight"] for part in record["contributions"]}
    total = 17 + 21 + 16
    expected = {"fine": 3 * 17 / total, "coarse": 3 * 21 / total, "other": 3 * 16 / total}
    assert found == pytest.approx(expected)
    lines = [line.split() for line in ok("status", place / "hub").splitlines()]
    assert ["dark", "(group)", "13", "0", "0"] in lines
    assert ["of", "other", "classes", "0", "0", "16"] in lines


def test_the_order_of_arrival_does_not_matter(place, merged, ok, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(place / "hub", again, ignore=shutil.ignore_patterns("contributions"))
    for folder in sorted((place / "hub" / "contributions").iterdir(), reverse=True):
        shutil.copytree(folder, again / "contributions" / folder.name)
    ok("merge", again, "--out", tmp_path / "again-merged")
    first, second = (d / "model.safetensors" for d in (merged, tmp_path / "again-merged"))
    assert first.read_bytes() == second.read_bytes()
    ok("verify", merged, "--hub", place / "hub")


def test_a_coarse_site_is_scored_on_the_labels_that_it_has(place):
    """3 validation images of round and 6 of the group: the mean of two recalls is in twelfths."""
    lines = (latest_run(place / "coarse") / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["balanced_accuracy"] for line in lines if '"validation"' in line]
    assert found
    assert all(value * 12 == pytest.approx(round(value * 12)) for value in found)
    cases = rows_of(latest_run(place / "coarse") / "cases.csv")
    assert {row["label"] for row in cases} == {"round", "dark"}


def test_the_report_sums_the_probabilities_of_a_group(place, merged, ok, run_cli, tmp_path):
    images = ("--images", place / "images" / "coarse", "--split", "all")
    data, out = ("--data", table_of(place, "coarse"), *images), tmp_path / "report"
    refused = run_cli("evaluate", merged, *data, "--out", out)
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        "Error: lobed_train_0.png has the label 'dark', a group of classes: 'merge-kit evaluate "
        "--groups' judges models at the level of groups."
    )
    ok("evaluate", merged, *data, "--groups", "--out", out)
    fine = relabelled(table_of(place, "coarse"), {"dark": "lobed"}, tmp_path / "fine.csv")
    ok("evaluate", merged, "--data", fine, *images, "--out", tmp_path / "told")
    coarse_rows, fine_rows = (rows_of(d / "predictions.csv") for d in (out, tmp_path / "told"))
    assert {row["label"] for row in coarse_rows} == {"round", "dark"}
    sums = [float(row["p_lobed"]) + float(row["p_granular"]) for row in fine_rows]
    np.testing.assert_allclose([float(row["p_dark"]) for row in coarse_rows], sums, atol=1e-8)
    right: dict[str, list[bool]] = {"round": [], "dark": []}
    for row in coarse_rows:
        right[row["label"]].append((float(row["p_dark"]) > 0.5) == (row["label"] == "dark"))
    report = json.loads((out / "report.json").read_bytes())
    (union,) = [s for s in report["models"][0]["scopes"] if s["scope"] == "union"]
    found = union["figures"]["balanced_accuracy"]["value"]
    assert found == pytest.approx(np.mean([np.mean(marks) for marks in right.values()]))
    assert report["notes"][0].startswith("All cases are judged at the level of groups (dark: lobed")


def test_predictions_from_elsewhere_are_summed_too(place, merged, ok, tmp_path):
    images = ("--images", place / "images" / "coarse", "--split", "all")
    fine = relabelled(table_of(place, "coarse"), {"dark": "lobed"}, tmp_path / "fine.csv")
    ok("evaluate", merged, "--data", fine, *images, "--out", tmp_path / "told")
    theirs = f"theirs={tmp_path / 'told' / 'predictions.csv'}"
    data = ("--data", table_of(place, "coarse"), *images, "--groups")
    ok("evaluate", theirs, merged, *data, "--out", tmp_path / "both")
    chances: dict[str, list[float]] = {"merged": [], "theirs": []}
    for row in rows_of(tmp_path / "both" / "predictions.csv"):
        chances[row["model"]].append(float(row["p_dark"]))
    np.testing.assert_allclose(chances["theirs"], chances["merged"], atol=1e-8)


def test_groups_are_refused_where_there_are_none_or_with_several_labels(
    place, merged, run_cli, hub, tmp_path
):
    data = ("--data", table_of(place, "fine"), "--groups", "--out", tmp_path / "report")
    several = run_cli("evaluate", merged, *data, "--multi-label")
    assert several.exit_code == 2
    assert "--groups is for cases of one class: leave it or --multi-label out." in several.stderr
    without = run_cli("evaluate", hub.root, *data)
    assert without.exit_code == 2
    assert "--groups: no model's config.json names groups of classes: leave it" in without.stderr


# The second visit


def test_a_coarse_site_gives_what_is_of_single_classes(place, ok):
    text = ok("calibrate", place / "coarse", "--data", table_of(place, "coarse"))
    assert "Site 'coarse': 8 training images measured" in text
    assert "Held back: 13 image(s) whose label names a group of classes: the classifier is" in text


def test_a_site_of_groups_alone_has_no_part_in_the_classifier(place):
    site = open_site(place / "coarse")
    labels = site.federation.labels
    cases = load_cases(
        table_of(place, "coarse"), classes=labels.classes, groups=tuple(labels.groups)
    )
    dark = [case for case in cases if labels.names[case.label] == "dark"]
    with pytest.raises(DataError) as caught:
        calibrate(site, dark, None, torch.device("cpu"))
    assert str(caught.value) == (
        "all 13 training images have labels of groups, and the classifier is made of sums over "
        "single classes: this site has no part in it, its vector in the merge stays; "
        "--assign-groups takes its images for the most probable class of their group."
    )


def test_images_of_groups_may_count_for_the_class_that_a_solved_model_finds(
    place, merged, ok, run_cli, tmp_path
):
    """Of the group's classes alone: these images look like another class, which is not asked."""
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    swapped = {"round": "dark", "dark": "round"}
    table = relabelled(table_of(place, "coarse"), swapped, place / "images/coarse/swapped.csv")
    refused = run_cli("calibrate", place / "coarse", "--data", table, "--model", merged,
                      "--assign-groups")  # fmt: skip
    assert refused.exit_code == 2
    assert "give a model of 'merge-kit head' with --model." in refused.stderr
    fine = ("calibrate", place / "fine", "--data", table_of(place, "fine"), "--model", merged)
    ok(*fine)
    folder = max((place / "fine" / "calibrations").iterdir(), key=lambda p: p.stat().st_mtime)
    parcel = prepare(open_site(place / "fine"), folder, FolderHub(hub), "moments")
    publish(open_site(place / "fine"), folder, FolderHub(hub), parcel)
    solved = tmp_path / "solved"
    ok("head", hub, merged, "--out", solved)
    text = ok("calibrate", place / "coarse", "--data", table, "--model", solved, "--assign-groups")
    assert "Guessed: 8 image(s) of a group count for the class of it that the model" in text
    site = open_site(place / "coarse")
    groups = tuple(site.federation.groups)
    cases = load_cases(table, classes=site.federation.classes, groups=groups)
    images, _ = decode([c for c in cases if c.split == "train"], site.federation.preprocessing)
    outputs = network.logits(network.load(solved), images, torch.device("cpu"))
    dark = images.labels() == 3
    assert (outputs[dark].argmax(dim=1) == 0).any()
    lobed = int((outputs[dark, 1] >= outputs[dark, 2]).sum())
    counts = {"round": 13, "lobed": lobed, "granular": 8 - lobed}
    shown = {name: n if n >= 5 else 0 for name, n in counts.items()}
    assert all(f"  {name:<20} {n:>8} images" in text for name, n in shown.items())


def test_a_site_of_another_task_has_no_moments_and_is_told_so(place, run_cli):
    result = run_cli("calibrate", place / "other", "--data", table_of(place, "other"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: site 'other' has trained classes of its own, and moments are sums over the images "
        "of the federation's (round, lobed, granular): it has none to give; 'merge-kit calibrate "
        "--own-classes' puts its own classifier on a merged backbone."
    )


def test_the_merged_backbone_comes_back_under_the_own_classifier(place, merged, ok, tmp_path):
    table, out = table_of(place, "other"), tmp_path / "mine"
    own = ("--model", merged, "--own-classes", "cyst,stone", "--out", out, "--device", "cpu")
    text = ok("calibrate", place / "other", "--data", table, *own)
    assert "a classifier of 2 own classes on" in text
    found, shared = load(out / "model.safetensors"), load(merged / "model.safetensors")
    heads = {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[name], shared[name]) for name in set(shared) - heads)
    ok("evaluate", out, "--data", table, "--split", "val", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_bytes())
    (union,) = [s for s in report["models"][0]["scopes"] if s["scope"] == "union"]
    figure = union["figures"]["balanced_accuracy"]["value"]
    assert f"balanced accuracy    {figure:.3f} on 6 own validation images" in text
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--own-classes", "cyst,stone"), "--own-classes writes a model for this site alone: give"),
        (("--own-classes", "cyst,stone", "--out", "x", "--publish"), "give its folder with --out"),
        (("--own-classes", "cyst,stone", "--out", "HUB"), "HUB lies in the federation in"),
        (("--own-classes", "cyst,stone", "--out", "THERE"), "THERE exists already: choose another"),
        (("--out", "x"), "--out is for --own-classes: moments lie in the site's folder."),
    ],
    ids=["no out", "publish", "in a hub", "there", "out alone"],
)
def test_wrong_use_of_an_own_classifier_is_one_sentence(
    place, run_cli, tmp_path, options, sentence
):
    places = {"HUB": str(place / "hub" / "mine"), "THERE": str(tmp_path)}
    options = [places.get(option, option) for option in options]
    for name, path in places.items():
        sentence = sentence.replace(name, path)
    result = run_cli("calibrate", place / "other", "--data", table_of(place, "other"), *options)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_the_federations_classifier_is_no_start_for_own_classes(place, run_cli):
    own = ("--own-classes", "cyst,stone", "--head", "federation")
    result = run_cli("finetune", place / "other", "--data", table_of(place, "other"), *own)
    assert result.exit_code == 2
    assert "--head federation is of the federation's classes: leave it out" in result.stderr


def test_statistics_of_other_labels_fit_the_federation(place, ok, tmp_path):
    """Fisher information of a coarse site and of an own task, in copies of their folders."""
    for name in ("coarse", "other"):
        site = Path(shutil.copytree(place / name, tmp_path / name))
        ok("statistics", site, "--kind", "fisher", "--kind", "gram", "--max-width", 200)
        fisher = load(latest_run(site) / "fisher.safetensors")
        assert fisher["fc.weight"].shape == (3, 96)
        assert fisher["fc.weight"].any() == (name == "coarse")
        assert all(t.any() for n, t in fisher.items() if n.endswith("conv1.weight"))
