"""Federations whose images have any number of classes, and sites that annotated some of these."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from finetune import network
from finetune.cases import load_cases
from finetune.pixels import decode
from finetune.splits import split_of
from finetune.withholding import withhold
from merge_kit.cli import main
from merge_kit.federation import read_federation
from merge_kit.files import canonical_json
from merge_kit.runs import latest_run
from tests.finetune.pictures import write_csv, write_findings
from tests.merge_kit.helpers import load

CLASSES = ("red", "green", "blue")
ANNOTATED = {"north": ("red", "green"), "south": ("green", "blue"), "west": ("red", "blue")}
TRAINING = ("--steps", 3, "--batch-size", 8, "--head-steps", 60, "--head", "own", "--device", "cpu")
HEAD = ("fc.weight", "fc.bias")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(run_cli):
    """Run a command that must fail; gives its sentence."""

    def run(*arguments, code=2):
        result = run_cli(*arguments)
        assert result.exit_code == code, result.output
        return result.stderr.splitlines()[-1].removeprefix("Error: ")

    return run


def go(*arguments: object) -> None:
    """Run a command that must go through, before any test."""
    main([str(argument) for argument in arguments])


def moved(place: Path, hub: Path, name: str, tmp_path: Path) -> Path:
    """A copy of a site that speaks to another hub."""
    site = Path(shutil.copytree(place / name, tmp_path / name))
    path = site / "site.yaml"
    path.write_text(path.read_text().replace(str(place / "hub"), str(hub)))
    return site


def table_of(place: Path, name: str) -> Path:
    return place / "images" / name / "labels.csv"


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Three sites that annotated two of three classes, one of them not in every image, and have
    published a vector; a merged model that all have calibrated. Made once; tests write elsewhere.
    """
    place = tmp_path_factory.mktemp("findings")
    go(
        "init", place / "hub", "--backbone", "test_resnet", "--weights", "none", "--input-size",
        32, "--crop-pct", 1, "--classes", ",".join(CLASSES), "--multi-label",
    )  # fmt: skip
    for seed, (name, columns) in enumerate(ANNOTATED.items()):
        write_findings(place / "images" / name, CLASSES, 60, columns=columns, seed=seed)
        go("join", place / "hub", "--site", name, "--folder", place / name)
        go("admit", place / "hub", name, place / name / "keys" / "site.pub")
        go("finetune", place / name, "--data", table_of(place, name), *TRAINING)
        go("publish", place / name)
    write_findings(place / "images" / "test", CLASSES, 40, columns=CLASSES, seed=9)
    go("merge", place / "hub", "--out", place / "merged")
    for name in ANNOTATED:
        data = ("--data", table_of(place, name), "--model", place / "merged")
        go("calibrate", place / name, *data, "--publish")
    return place


def manifest_of(site: Path, name: str = "manifest.json") -> dict:
    return json.loads((latest_run(site) / name).read_bytes())


def training(place: Path, name: str, model: Path):
    """Features and targets of a site's training images."""
    federation = read_federation(place / "hub")
    cases = load_cases(table_of(place, name), classes=CLASSES, multi_label=True)
    cases = sorted(split_of(cases, "train"), key=lambda case: case.file)
    images, _ = decode(cases, federation.preprocessing)
    outputs = network.features(network.load(model), images, torch.device("cpu"))
    return outputs.flatten(1), images.targets()


def pooled(place: Path, model: Path, sites=tuple(ANNOTATED), whole=()):
    """What the images of sites in one place tell, but for what each that is not `whole` holds
    back."""
    parts = [(name, *training(place, name, model)) for name in sites]
    targets = [t if name in whole else withhold(t, 5) for name, _, t in parts]
    return torch.cat([f for _, f, _ in parts]), torch.cat(targets)


# The first visit


def test_the_contract_says_so_and_no_other_contract_has_changed(place, federation):
    told = read_federation(place / "hub")
    assert told.multi_label
    config = json.loads((place / "merged" / "config.json").read_bytes())
    assert config["merge_kit"]["multi_label"] is True
    assert "multi_label" not in federation.to_yaml()
    assert "multi_label" not in federation.model_config_json
    assert told.model_copy(update={"multi_label": False}).contract_hash != told.contract_hash


def test_a_manifest_counts_the_images_that_have_and_that_lack_each_class(place):
    for name, columns in ANNOTATED.items():
        rows = rows_of(table_of(place, name))
        rows = [row for row in rows if row["split"] == "train"]
        manifest = manifest_of(place / name)
        for mark, key in (("1", "class_counts"), ("0", "absent_counts")):
            found = {c: sum(row.get(c) == mark for row in rows) for c in CLASSES}
            assert manifest[key] == found
            assert all((found[c] > 0) == (c in columns) for c in CLASSES)
        assert manifest["images"] == 60


def test_small_numbers_of_either_side_are_hidden(place, ok, tmp_path):
    rows = [{"file": f"{n:03}.png", "red": int(n < 3), "green": int(n < 27),
             "split": "train" if n < 30 else "val"} for n in range(50)]  # fmt: skip
    table = write_csv(tmp_path / "few.csv", rows)
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    ok("finetune", site, "--data", table, "--images", place / "images" / "north", *TRAINING)
    draft = manifest_of(site, "manifest.draft.json")
    assert draft["class_counts"] == {"red": "<5", "green": 27, "blue": 0}
    assert draft["absent_counts"] == {"red": 27, "green": "<5", "blue": 0}


def test_head_rows_come_from_those_who_know_the_class(place):
    """Of a class that a site has not annotated the vector's row is zero, and counts nowhere."""
    base, merged = (
        load(place / "hub/base/model.safetensors"),
        load(place / "merged/model.safetensors"),
    )
    vectors = {n: load(latest_run(place / n) / "vector.safetensors") for n in ANNOTATED}
    for row, name in enumerate(CLASSES):
        knowing = [site for site, columns in ANNOTATED.items() if name in columns]
        counts = [manifest_of(place / site)["class_counts"][name] for site in knowing]
        for tensor in HEAD:
            for site in ANNOTATED:
                assert bool(vectors[site][tensor][row].any()) == (site in knowing)
            rows = torch.stack([vectors[site][tensor][row].double() for site in knowing])
            shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
            expected = torch.tensordot(shares, rows, dims=1) + base[tensor][row]
            torch.testing.assert_close(merged[tensor][row].double(), expected, rtol=0, atol=1e-6)


def test_sites_count_by_their_images(place, ok, tmp_path):
    ok("merge", place / "hub", "--weights", "examples", "--out", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "provenance.json").read_bytes())
    assert [part["weight"] for part in record["contributions"]] == [1, 1, 1]


def test_a_class_that_all_annotated_images_have_moves_no_row(place, ok, tmp_path):
    """There was nothing to tell it from: its row was not trained, and its images do not count."""
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    site = moved(place, hub, "north", tmp_path)
    rows = [{**row, "red": "1"} for row in rows_of(table_of(place, "north"))]
    table = write_csv(tmp_path / "all.csv", rows)
    ok("finetune", site, "--data", table, "--images", place / "images" / "north", *TRAINING)
    ok("publish", site)
    assert manifest_of(site)["absent_counts"]["red"] == 0
    assert not load(latest_run(site) / "vector.safetensors")["fc.weight"][0].any()
    ok("merge", hub, "--out", tmp_path / "merged")
    base, merged = (load(d / "model.safetensors") for d in (hub / "base", tmp_path / "merged"))
    west = load(latest_run(place / "west") / "vector.safetensors")
    expected = base["fc.weight"][0] + west["fc.weight"][0]
    torch.testing.assert_close(merged["fc.weight"][0], expected, rtol=0, atol=1e-6)


def test_other_annotations_of_the_same_images_are_another_run(place, ok, tmp_path):
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    rows = rows_of(table_of(place, "north"))
    rows[0]["green"] = str(1 - int(rows[0]["green"]))
    table = write_csv(tmp_path / "other.csv", rows)
    data = ("--data", table, "--images", place / "images" / "north")
    assert "finished before" not in ok("finetune", site, *data, *TRAINING)
    assert "finished before" in ok("finetune", site, *data, *TRAINING)
    model = ("--model", place / "merged", "--device", "cpu")
    assert "measured before" not in ok("calibrate", site, *data, *model)
    assert "measured before" in ok("calibrate", site, *data, *model)


def test_a_site_may_have_a_task_of_its_own(place, ok, tmp_path):
    """Of one class an image, under a classifier that stays there."""
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    site = moved(place, hub, "north", tmp_path)
    rows = [{"file": row["file"], "label": "cyst" if row["green"] == "1" else "stone",
             "split": row["split"]} for row in rows_of(table_of(place, "north"))]  # fmt: skip
    table = write_csv(tmp_path / "own.csv", rows)
    own = ("--own-classes", "cyst,stone", "--images", place / "images" / "north")
    ok("finetune", site, "--data", table, *own, *TRAINING)
    ok("publish", site)
    manifest = manifest_of(site)
    assert manifest["other_images"] == 60
    assert set(manifest["absent_counts"].values()) == {0}
    ok("merge", hub, "--weights", "examples", "--out", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "provenance.json").read_bytes())
    assert [part["weight"] for part in record["contributions"]] == [1, 1, 1]
    ok("evaluate", site, "--data", table, *own[2:], "--split", "val", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_bytes())
    assert report["task"] == "single-label"


def test_a_site_counts_by_how_far_it_is_above_a_coin(place, ok, tmp_path):
    ok("merge", place / "hub", "--weights", "validation", "--out", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "provenance.json").read_bytes())
    scores = {}
    for name in ANNOTATED:
        own = manifest_of(place / name)["validation"]["balanced_accuracy"]
        figure = own["value"] if own["low"] is None else own["low"]
        scores[name] = max(0, 2 * figure - 1)
    mean = sum(scores.values()) / 3
    found = {part["site"]: part["weight"] for part in record["contributions"]}
    assert found == pytest.approx({name: score / mean for name, score in scores.items()})


def test_status_shows_who_has_annotated_what(place, ok):
    counts, absent = (
        {n: manifest_of(place / n)[key] for n in ANNOTATED}
        for key in ("class_counts", "absent_counts")
    )
    lines = [line.split() for line in ok("status", place / "hub").splitlines()]
    (row,) = [" ".join(line) for line in lines if line[:1] == ["red"]]
    cells = [f"{counts[n]['red']} / {absent[n]['red']}" for n in ("north", "west")]
    assert all(cell in row for cell in [*cells, "-"])
    facts = json.loads(ok("status", place / "hub", "--json"))
    assert facts["multi_label"] is True
    assert {r["site"]: r["absent_counts"] for r in facts["contributions"]} == absent


def test_a_site_is_scored_on_what_it_has_annotated(place):
    """North has not annotated blue, and not red and green in every validation image."""
    cases = load_cases(table_of(place, "north"), classes=CLASSES, multi_label=True)
    cases = sorted(split_of(cases, "val"), key=lambda case: case.file)
    images, _ = decode(cases, read_federation(place / "hub").preprocessing)
    model = network.load(latest_run(place / "north") / "model")
    outputs = network.logits(model, images, torch.device("cpu")).numpy()
    truth = images.targets().numpy()
    expected = [
        roc_auc_score(truth[truth[:, c] >= 0, c], outputs[truth[:, c] >= 0, c]) for c in (0, 1)
    ]
    stated = manifest_of(place / "north")["validation"]["macro_auroc"]["value"]
    assert stated == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_run_lists_its_cases_as_a_table_that_can_be_read_again(place):
    run = latest_run(place / "north")
    again = load_cases(
        run / "cases.csv", classes=CLASSES, multi_label=True, images=place / "images" / "north"
    )
    first = load_cases(table_of(place, "north"), classes=CLASSES, multi_label=True)
    assert {c.file: (c.targets, c.split) for c in again} == {
        c.file: (c.targets, c.split) for c in first
    }


def test_a_run_that_was_killed_goes_on_to_the_same_weights(place, ok, tmp_path):
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    run = latest_run(site)
    before = (run / "vector.safetensors").read_bytes()
    shutil.rmtree(run)
    ok("finetune", site, "--data", table_of(place, "north"), *TRAINING)
    assert (latest_run(site) / "vector.safetensors").read_bytes() == before


@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
def test_every_balance_trains(place, ok, tmp_path, balance):
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    options = (*TRAINING, "--balance", balance, "--accumulate", 2)
    ok("finetune", site, "--data", table_of(place, "north"), *options)
    weight = load(latest_run(site) / "vector.safetensors")["fc.weight"]
    assert weight[:2].any(dim=1).all()
    assert not weight[2].any()


# The second visit


@pytest.fixture
def solved(place, ok, tmp_path) -> Path:
    """The merged model with the classifier of all sites, by ridge regression."""
    options = ("--option", "solver=ridge", "--option", "penalty=10")
    ok("head", place / "hub", place / "merged", *options, "--out", tmp_path / "solved")
    return tmp_path / "solved"


def expected_head(place: Path, sites=tuple(ANNOTATED), whole=()):
    """Ridge regression on the pooled images that know each class, by scikit-learn."""
    features, targets = (part.numpy() for part in pooled(place, place / "merged", sites, whole))
    weight, bias = [], []
    for finding in range(3):
        rows = targets[:, finding] >= 0
        told = Ridge(alpha=10.0, solver="cholesky").fit(
            features[rows].astype(np.float64), 2.0 * targets[rows, finding] - 1
        )
        weight.append(told.coef_)
        bias.append(told.intercept_)
    return torch.tensor(np.array(weight)), torch.tensor(bias)


def close(folder: Path, weight: torch.Tensor, bias: torch.Tensor) -> None:
    found = load(folder / "model.safetensors")
    for name, expected in zip(HEAD, (weight, bias), strict=True):
        scale = float(expected.abs().max())
        assert float((found[name].double() - expected).abs().max()) <= 1e-6 * scale


def test_the_classifier_is_that_of_the_pooled_images(place, solved):
    close(solved, *expected_head(place))


def test_who_leaves_has_never_been_in_it(place, ok, tmp_path):
    options = ("--option", "solver=ridge", "--option", "penalty=10", "--exclude", "west")
    ok("head", place / "hub", place / "merged", *options, "--out", tmp_path / "without")
    close(tmp_path / "without", *expected_head(place, ("north", "south")))


def test_the_order_of_arrival_does_not_matter(place, solved, ok, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(place / "hub", again, ignore=shutil.ignore_patterns("contributions"))
    for folder in sorted((place / "hub" / "contributions").iterdir(), reverse=True):
        shutil.copytree(folder, again / "contributions" / folder.name)
    options = ("--option", "solver=ridge", "--option", "penalty=10")
    ok("head", again, place / "merged", *options, "--out", tmp_path / "other")
    first, second = (d / "model.safetensors" for d in (solved, tmp_path / "other"))
    assert first.read_bytes() == second.read_bytes()


def test_a_site_sends_a_gram_matrix_for_each_pattern(place):
    folder = next(
        f for f in (place / "hub/contributions/north").iterdir()
        if json.loads((f / "manifest.json").read_bytes())["kind"] == "moments"
    )  # fmt: skip
    tensors = load(folder / "payload.safetensors")
    assert tensors["annotated"].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert tensors["sizes"].tolist() == [20, 40]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["images"] == 60
    assert manifest["absent_counts"]["blue"] == 0


def test_a_class_that_too_few_have_is_held_back(place, ok, tmp_path):
    rows = rows_of(table_of(place, "north"))
    kept = 0
    for row in rows:
        if row["split"] == "train" and row["red"] == "1":
            kept += 1
            row["red"] = "1" if kept <= 4 else "0"
    table = write_csv(tmp_path / "few.csv", rows)
    images = ("--images", place / "images" / "north", "--device", "cpu")
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    text = ok("calibrate", site, "--data", table, *images)
    assert "Held back: 'red' in 40 image(s): fewer than 5 have it or lack it, or differ in" in text
    assert f"  {'red':<20} {0:>8} images, 0 without" in text
    assert "60 training images measured" in text
    folder = max((site / "calibrations").iterdir(), key=lambda f: f.stat().st_mtime)
    tensors = load(folder / "moments.safetensors")
    assert tensors["annotated"].tolist() == [[0, 1, 0]]


def test_of_too_few_images_nothing_leaves_the_site(place, refused, tmp_path):
    rows = rows_of(table_of(place, "north"))
    seen = 0
    for row in rows:
        kept = row["split"] == "val" or (seen := seen + 1) <= 9
        row |= {} if kept else {"red": "", "green": ""}
    table = write_csv(tmp_path / "few.csv", rows)
    images = ("--images", place / "images" / "north", "--device", "cpu")
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    assert refused("calibrate", site, "--data", table, *images, code=1) == (
        "no class has 5 training images with it and 5 without it, as the federation's policy asks "
        "for: fewer would give their features away; add images."
    )


def test_verify_solves_it_again(place, solved, ok, run_cli, tmp_path):
    assert "Verified" in ok("verify", solved, "--hub", place / "hub")
    changed = Path(shutil.copytree(solved, tmp_path / "changed"))
    path = changed / "provenance.json"
    record = json.loads(path.read_bytes())
    record["head"]["options"]["penalty"] = 11.0
    path.write_text(json.dumps(record))
    result = run_cli("verify", changed, "--hub", place / "hub")
    assert result.exit_code == 1
    assert "Not verified: 2 of 15 differ: rebuilt, README.md." in result.output


def test_images_at_the_merger_count_like_those_of_a_site(place, ok, tmp_path):
    table = table_of(place, "west")
    options = ("--option", "solver=ridge", "--option", "penalty=10", "--exclude", "west")
    args = (place / "hub", place / "merged", *options, "--data", table, "--device", "cpu")
    text = ok("head", *args, "--out", tmp_path / "with")
    assert "of 2 site(s) and 60 images at the merger" in text
    close(tmp_path / "with", *expected_head(place, whole=("west",)))
    report = ok("verify", tmp_path / "with", "--hub", place / "hub")
    assert "was solved with 60 labelled images that lie with the merger" in report


def test_norm_statistics_are_restored_from_sums_of_findings_sites(place, ok, tmp_path):
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    for name in ("north", "south"):
        site = moved(place, hub, name, tmp_path)
        data = ("--data", table_of(place, name), "--model", place / "merged", "--norms")
        text = ok("calibrate", site, *data, "--publish")
        assert "60 training images measured" in text
        assert "Held back" not in text
    restored = tmp_path / "restored"
    ok("restore", place / "merged", "--hub", hub, "--out", restored)
    before, after = (load(d / "model.safetensors") for d in (place / "merged", restored))
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert "Verified" in ok("verify", restored, "--hub", hub)


def test_training_starts_from_the_classifier_of_all_sites(place, ok, tmp_path):
    """And keeps it, so that the vectors' rows are alike: also those of what a site lacks."""
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    site = moved(place, hub, "north", tmp_path)
    ok("calibrate", site, "--data", table_of(place, "north"), "--publish")
    ok("head", hub, "--out", tmp_path / "first")
    options = [*TRAINING[:-4], "--head", "federation", "--device", "cpu"]
    ok("finetune", site, "--data", table_of(place, "north"), *options)
    first, own = (
        load(tmp_path / "first/model.safetensors"),
        load(latest_run(site) / "model/model.safetensors"),
    )
    assert torch.equal(first["fc.weight"], own["fc.weight"])
    assert not first["fc.weight"][2].any()


# Judging


def test_models_are_judged_on_what_was_annotated(place, solved, ok, tmp_path):
    """Without --multi-label: the models say so. Unknown entries of a site's table count nowhere."""
    data = ("--data", table_of(place, "north"), "--split", "val", "--minimum", 1)
    ok("evaluate", place / "merged", solved, *data, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_bytes())
    assert report["task"] == "multi-label"
    cases = load_cases(table_of(place, "north"), classes=CLASSES, multi_label=True)
    images, _ = decode(split_of(cases, "val"), read_federation(place / "hub").preprocessing)
    outputs = network.logits(network.load(solved), images, torch.device("cpu")).numpy()
    truth = images.targets().numpy()
    rows = truth >= 0
    assert 0 < rows[:, 0].sum() < len(rows)
    aurocs = [roc_auc_score(truth[rows[:, c], c], outputs[rows[:, c], c]) for c in (0, 1)]
    (union,) = [s for s in report["models"][1]["scopes"] if s["scope"] == "union"]
    found = union["figures"]["macro_auroc"]["value"]
    assert found == pytest.approx(np.mean(aurocs), abs=1e-6)


def test_a_merge_is_chosen_by_its_figure_on_findings(place, ok, tmp_path):
    data = ("--data", table_of(place, "north"), "--metric", "macro_auroc", "--device", "cpu")
    out = ("--out-recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "chosen")
    ok("select", place / "hub", *data, "--method", "sum", "--scales", "0.5,1", *out)
    told = json.loads((tmp_path / "selection.json").read_bytes())
    ok("evaluate", tmp_path / "chosen", *data[:2], "--split", "val", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_bytes())
    (union,) = [s for s in report["models"][0]["scopes"] if s["scope"] == "union"]
    best = max(candidate["value"] for candidate in told["candidates"])
    assert union["figures"]["macro_auroc"]["value"] == pytest.approx(best, abs=1e-6)


# What cannot be done


def test_what_is_of_one_class_each_names_the_way_out(place, refused, tmp_path):
    init = ("init", tmp_path / "hub", "--backbone", "test_resnet", "--weights", "none")
    assert refused(*init, "--classes", "a,b,c", "--group", "d=a,b", "--multi-label") == (
        "--group is for images of one class each: leave it out with --multi-label, and name what a "
        "coarse label says as a class of its own."
    )
    table = table_of(place, "north")
    assert refused("tune", place / "hub", "--data", table, "--out-recipe", tmp_path / "t") == (
        "tune is for images of one class each, and those of this federation may have several: "
        "choose scale and sites with 'merge-kit select'."
    )
    assert refused("statistics", place / "north", "--kind", "fisher") == (
        "--kind fisher is for images of one class each, and those of this federation may have "
        "several: take gram, or a merge method that needs no statistics."
    )
    assert refused("rounds", place / "north", "--data", table, "--out", tmp_path / "r") == (
        "rounds are of images of one class each, and those of this federation may have several: "
        "merge what the sites have published with 'merge-kit merge'."
    )
    assert refused("select", place / "hub", "--data", table, "--metric", "log_loss") == (
        "--metric log_loss is for images of one class each: take balanced_accuracy or macro_auroc."
    )
    assert refused("calibrate", place / "north", "--data", table, "--assign-groups") == (
        "--assign-groups is for images of one class each: leave it out, what is not annotated "
        "counts nowhere."
    )
    assert refused("evaluate", place / "merged", "--data", table, "--groups") == (
        "--groups: no model's config.json names groups of classes: leave it out."
    )
    assert not (tmp_path / "hub").exists()


def test_gram_matrices_are_made_of_findings_too(place, ok, tmp_path):
    site = Path(shutil.copytree(place / "north", tmp_path / "north"))
    assert "gram" in ok("statistics", site, "--kind", "gram", "--device", "cpu")


def test_annotated_is_refused_where_images_have_one_class_each(hub, contribute, refused, tmp_path):
    contribute("north")
    table = write_csv(tmp_path / "t.csv", [{"file": "a.png", "label": "round"}])
    sentence = refused("finetune", tmp_path / "north", "--data", table, "--annotated", "round")
    assert sentence == (
        "--annotated is for federations in which an image may have several classes ('merge-kit "
        "init --multi-label'): leave it out."
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"red": ""}, {"red": ""}], "{table} annotates no class in any image: write 1 or 0 in its "
         "columns."),
        (
            [{"red": "1"}, {"red": "yes"}],
            "{table} line 3: the column 'red' holds 'yes': write 1 (present), 0 (absent) or "
            "nothing (not annotated).",
        ),
        (
            [{"read": "1"}, {"read": "0"}],
            "{table} has no labels and none named after a class (columns found: file, read, "
            "split): add a column 'label', or sort the images into folders of classes.",
        ),
    ],
)  # fmt: skip
def test_a_table_that_says_nothing_is_refused(place, refused, tmp_path, rows, sentence):
    told = [{"file": f"{n:03}.png", **row, "split": "train"} for n, row in enumerate(rows)]
    table = write_csv(tmp_path / "t.csv", told)
    images = ("--images", place / "images" / "north")
    found = refused("finetune", place / "north", "--data", table, *images, code=1)
    assert found == sentence.format(table=table)


def test_a_manifest_that_does_not_count_what_images_lack_is_refused(place, tmp_path, run_cli):
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    folder = next((hub / "contributions" / "north").iterdir())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["absent_counts"]
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    (folder / "manifest.sig").unlink()
    result = run_cli("merge", hub, "--allow-unsigned", "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert "does not say how many images lack each class: its site must" in result.stderr


def test_a_choice_among_models_takes_a_class_that_two_sites_know(place, refused, ok, tmp_path):
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    ok("merge", hub, "--method", "sum", "--out", tmp_path / "sum")
    for name, only in (("north", "red"), ("south", "blue")):
        site = moved(place, hub, name, tmp_path)
        for model in (place / "merged", tmp_path / "sum"):
            data = ("--data", table_of(place, name), "--annotated", only, "--model", model)
            ok("calibrate", site, *data, "--publish", "--device", "cpu")
    models = (hub, place / "merged", tmp_path / "sum")
    assert refused("head", *models, "--out", tmp_path / "best", code=1) == (
        "no class was annotated at two of the sites that have calibrated all models: choosing "
        "among them takes one that was; name one model."
    )
    assert not (tmp_path / "best").exists()


def test_a_configuration_that_says_neither_yes_nor_no_is_refused(place, refused, tmp_path):
    model = Path(shutil.copytree(place / "merged", tmp_path / "model"))
    config = json.loads((model / "config.json").read_bytes())
    config["merge_kit"]["multi_label"] = "perhaps"
    (model / "config.json").write_text(json.dumps(config))
    data = ("--data", table_of(place, "north"), "--out", tmp_path / "report")
    assert refused("evaluate", model, *data, code=1) == (
        f"{model / 'config.json'} is no timm configuration ('multi_label' is neither true nor "
        "false)."
    )
