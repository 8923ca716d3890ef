"""merge-kit evaluate on a real federation and generated images."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from evaluate.document import Report
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


@pytest.fixture
def evaluated(run_cli, tmp_path):
    """Run a command that must succeed; its report, and what it printed."""

    def run(command, *arguments):
        out = tmp_path / "e"
        result = run_cli(command, *arguments, "--out", out, "--resamples", "50")
        assert result.exit_code == 0, result.stderr
        return Report.model_validate_json((out / "report.json").read_text()), result

    return run


@pytest.fixture
def merged(hub, contribute, tmp_path, run_cli):
    contribute("north", seed=1)
    run_cli("merge", hub.root, "--out", tmp_path / "merged")
    return tmp_path / "merged"


def test_evaluates_several_models_on_the_test_split(hub, merged, table, tmp_path, evaluated):
    report, _ = evaluated("evaluate", hub.root, merged, "--data", table)
    assert [(m.name, m.role) for m in report.models] == [("base", "base"), ("merged", "merged")]
    assert report.scopes[0].cases == 10
    assert report.models[0].fingerprint != report.models[1].fingerprint
    assert "merged" in (tmp_path / "e" / "report.html").read_text()


def test_predictions_are_the_models_own_probabilities(hub, table, tmp_path, evaluated, federation):
    evaluated("evaluate", f"m={hub.root / 'base'}", "--data", table)
    with (tmp_path / "e" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    images, _ = decode(load_cases(table, classes=federation.classes)[:10], federation.preprocessing)
    model = network.load(hub.root / "base")
    expected = network.logits(model, images, torch.device("cpu")).double().softmax(dim=1)
    found = [[float(row[f"p_{name}"]) for name in federation.classes] for row in rows]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_names_and_splits_are_chosen_by_the_user(hub, table, evaluated):
    report, _ = evaluated(
        *("evaluate", f"mine={hub.root}", "--data", table, "--minimum", "1"),
        *("--split", "train", "--where", "site=a"),
    )
    assert report.models[0].name == "mine"
    assert (report.scopes[0].cases, [s.name for s in report.sites()]) == (1, ["a"])


def test_several_sets_are_sites_of_their_own(hub, table, tmp_path, evaluated):
    lines = [line.rsplit(",", 2) for line in table.read_text().splitlines()]
    for name, rows in (("one", lines[1:7]), ("two", lines[7:])):
        text = ["file,label", *(row[0] for row in rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(text) + "\n")
    report, _ = evaluated(
        *("evaluate", hub.root, "--data", f"first={tmp_path / 'one.csv'}"),
        *("--data", f"second={tmp_path / 'two.csv'}", "--external", "second"),
    )
    assert [(s.name, s.external) for s in report.sites()] == [("first", False), ("second", True)]


def test_unreadable_images_are_counted_when_skipped(hub, table, tmp_path, evaluated):
    (tmp_path / "0.png").write_bytes(b"broken")
    report, result = evaluated("evaluate", hub.root, "--data", table, "--skip-unreadable")
    assert "Left out:" in result.stderr
    assert report.scopes[0].cases == 9
    assert report.notes[0] == "1 unreadable images were left out."
    assert "0.png" not in (tmp_path / "e" / "report.html").read_text()


def test_groups_of_near_duplicates_are_drawn_together_and_not_called_patients(
    hub, table, tmp_path, evaluated
):
    lines = table.read_text().splitlines()
    grouped = [lines[0] + ",group", *[f"{line},g{i // 2}" for i, line in enumerate(lines[1:])]]
    table.write_text("\n".join(grouped) + "\n")
    report, _ = evaluated("evaluate", hub.root, "--data", table, "--split", "all")
    assert report.resampling.unit == "group"
    assert report.scopes[0].patients is None


def test_a_class_without_a_case_is_said_in_the_verdict(hub, table, evaluated):
    _, result = evaluated("evaluate", hub.root, "--data", table, "--where", "label=round")
    assert "No case is of the class lobed and granular" in result.stdout


def test_validation_images_give_thresholds_and_a_temperature(hub, table, evaluated):
    table.write_text(table.read_text().replace(",train", ",val"))
    report, _ = evaluated("evaluate", hub.root, "--data", table, "--calibrate", "--minimum", "1")
    assert report.validation_cases == 2
    assert report.models[0].temperature is not None
    assert {point.specificity for point in report.models[0].thresholds} == {0.9, 0.95}


def test_nothing_is_fitted_on_external_sites(hub, table, evaluated):
    table.write_text(table.read_text().replace(",train", ",val"))
    options = ("evaluate", hub.root, "--data", table, "--minimum", "1")
    assert evaluated(*options)[0].validation_cases == 2  # one of each site
    assert evaluated(*options, "--external", "b")[0].validation_cases == 1


def test_the_worst_mistakes_are_shown_only_if_asked_for(hub, table, tmp_path, evaluated):
    page = tmp_path / "e" / "report.html"
    evaluated("evaluate", hub.root, "--data", table)
    assert "data:image/jpeg" not in page.read_text()
    evaluated("evaluate", hub.root, "--data", table, "--with-images")
    assert "data:image/jpeg" in page.read_text()
    assert "data:image/jpeg" not in (tmp_path / "e" / "report.json").read_text()


def test_figures_go_into_the_card_of_a_merged_model_if_asked_for(hub, merged, table, evaluated):
    before = (merged / "README.md").read_text()
    evaluated("evaluate", hub.root, merged, "--data", table)
    assert (merged / "README.md").read_text() == before
    report, _ = evaluated("evaluate", hub.root, merged, "--data", table, "--cards")
    first = ModelCard.load(merged / "README.md").data.eval_results[0]
    value = report.models[1].on("union").figures["balanced_accuracy"].value
    assert first.metric_value == pytest.approx(value, abs=1e-6)


def test_how_vectors_lie_to_each_other_is_shown_beside_the_base(
    hub, merged, table, tmp_path, evaluated
):
    shutil.copytree(merged, tmp_path / "twin")
    report, _ = evaluated(
        "evaluate", hub.root, merged, f"twin={tmp_path / 'twin'}", "--data", table
    )
    assert report.similarity is not None
    assert report.similarity.models == ("merged", "twin")
    assert report.similarity.cosine[0][1] == pytest.approx(1)


def test_a_second_call_with_other_figures_runs_no_model(hub, table, tmp_path, evaluated):
    def times():
        files = (tmp_path / "e" / "predictions").rglob("*.safetensors")
        return {file: file.stat().st_mtime_ns for file in files}

    evaluated("evaluate", hub.root, "--data", table)
    kept = times()
    evaluated("evaluate", hub.root, "--data", table, "--by", "split", "--seed", "3")
    again = times()
    assert kept
    assert again == kept


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--prevalence", "round=2"), "--prevalence round=2: give a share between 0 and 1."),
        (("--prevalence", "flat=.1"), "--prevalence flat: there is no such class"),
        (("--external", "c"), "--external c: no case is of this site (known: a, b)."),
        (("--by", "scanner"), "--by scanner:"),
        (("--pooled", "x"), "--pooled x: no model has this name."),
        (("--federated", "x"), "--federated x: no model has this name."),
        (("--reference", "x"), "There is no model 'x' to compare with (known: base)."),
    ],
)
def test_options_that_name_nothing_are_refused(hub, table, tmp_path, run_cli, option, sentence):
    result = run_cli("evaluate", hub.root, "--data", table, "--out", tmp_path / "e", *option)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr
    assert not (tmp_path / "e" / "report.json").exists()


def test_a_report_on_others_is_not_overwritten_unless_asked_for(
    hub, merged, table, tmp_path, evaluated, run_cli
):
    evaluated("evaluate", hub.root, "--data", table)
    evaluated("evaluate", hub.root, "--data", table, "--by", "split")
    again = "evaluate", merged, "--data", table, "--out", tmp_path / "e"
    refused = run_cli(*again)
    assert refused.exit_code == 2
    assert "report.json speaks of other models or images: choose another --out" in refused.stderr
    report, _ = evaluated(*again[:-2], "--replace")
    assert report.models[0].name == "merged"


def test_compare_takes_the_first_model_as_the_reference(hub, merged, table, evaluated):
    report, _ = evaluated("compare", merged, hub.root, "--data", table)
    assert report.reference == "merged"
    found = {(e.model, e.against) for e in report.comparisons if e.family == "reference"}
    assert found == {("base", "merged")}


def test_compare_needs_two_models(hub, table, run_cli):
    result = run_cli("compare", hub.root, "--data", table)
    assert result.exit_code == 2
    assert "there is nothing to compare: name two models or more." in result.stderr


def test_models_of_other_classes_are_compared_on_those_in_common(hub, table, tmp_path, evaluated):
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    lines = ["file,p_lobed,p_round,p_flat"]
    said = {"round": "0.1,0.3,0.6", "lobed": "0.5,0.1,0.4", "granular": "0,0,1"}
    lines += [f"{row[0]},{said[row[1]]}" for row in rows]
    (tmp_path / "other.csv").write_text("\n".join(lines) + "\n")
    report, result = evaluated("compare", hub.root, tmp_path / "other.csv", "--data", table)
    assert report.classes == ("round", "lobed")
    assert report.scopes[0].cases == 7
    assert "All figures are on those in common (round, lobed)" in result.stderr
    assert report.notes[0].startswith("The models do not know the same classes.")
    other = report.models[1].on("union")
    assert other.figures["accuracy"].value == pytest.approx(1)


def test_a_report_is_not_lost_to_that_of_changed_weights(hub, table, tmp_path, evaluated, run_cli):
    base = tmp_path / "base"
    shutil.copytree(hub.root / "base", base)
    evaluated("evaluate", base, "--data", table)
    weights = load(base / "model.safetensors")
    write_tensors(base / "model.safetensors", {**weights, "fc.bias": weights["fc.bias"] + 1})
    again = run_cli("evaluate", base, "--data", table, "--out", tmp_path / "e")
    assert again.exit_code == 2


@pytest.mark.parametrize("name", ["report.html", "predictions.csv"])
def test_a_file_of_the_users_is_not_overwritten(hub, table, tmp_path, run_cli, name):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / name).write_text("mine")
    result = run_cli("evaluate", hub.root, "--data", table, "--out", tmp_path / "e")
    assert result.exit_code == 2
    assert (tmp_path / "e" / name).read_text() == "mine"


def with_validation(tmp_path):
    """The table of twelve images, two of them for validation."""
    path = tmp_path / "labels.csv"
    text = path.read_text().replace("8.png,granular,a,test", "8.png,granular,a,val")
    path.write_text(text.replace("9.png,round,b,test", "9.png,round,b,val"))
    return path


def test_predictions_without_validation_images_are_judged_without_thresholds(
    hub, table, tmp_path, evaluated
):
    with_validation(tmp_path)
    lines = ["file,p_round,p_lobed,p_granular"] + [f"{i}.png,.5,.3,.2" for i in range(8)]
    (tmp_path / "away.csv").write_text("\n".join(lines) + "\n")
    options = ("--minimum", "1", "--calibrate")
    report, result = evaluated(
        "evaluate", hub.root, tmp_path / "away.csv", "--data", table, *options
    )
    base, away = report.models
    assert base.thresholds
    assert base.temperature is not None
    assert not away.thresholds
    assert away.temperature is None
    assert report.validation_cases == 2
    note = (
        "The predictions of 'away' hold none of the validation images: it has no thresholds and no "
        "temperature."
    )
    assert note in report.notes
    assert note in result.stderr


def test_predictions_of_some_validation_images_are_refused(hub, table, tmp_path, run_cli):
    with_validation(tmp_path)
    lines = ["file,p_round,p_lobed,p_granular"] + [f"{i}.png,.5,.3,.2" for i in range(9)]
    (tmp_path / "away.csv").write_text("\n".join(lines) + "\n")
    result = run_cli(
        *("evaluate", hub.root, tmp_path / "away.csv", "--data", table, "--out", tmp_path / "e")
    )
    assert result.exit_code == 1
    assert "has no prediction for 9.png (1 missing in all)" in result.stderr


def test_test_images_that_are_also_in_training_are_counted_and_named_to_the_user_alone(
    hub, table, tmp_path, evaluated
):
    shutil.copy(tmp_path / "3.png", tmp_path / "copy.png")
    table.write_text(table.read_text() + "copy.png,round,b,train\n")
    report, result = evaluated("evaluate", hub.root, "--data", table)
    note = "1 image is in the train split, too: figures are too good where a model was trained on"
    assert any(n.startswith(note) for n in report.notes)
    assert "One image: 3.png, copy.png" in result.stderr
    assert "copy.png" not in (tmp_path / "e" / "report.json").read_text()


def test_external_sites_may_stand_between_commas(hub, table, evaluated):
    report, _ = evaluated("evaluate", hub.root, "--data", table, "--external", "a, b")
    assert [scope.external for scope in report.sites()] == [True, True]


def test_a_site_with_a_comma_in_its_name_stays_whole(hub, table, evaluated):
    table.write_text(table.read_text().replace(",a,", ',"a,b",'))
    report, _ = evaluated("evaluate", hub.root, "--data", table, "--external", "a,b")
    assert {scope.name: scope.external for scope in report.sites()} == {"a,b": True, "b": False}


@pytest.mark.parametrize(("external", "warned"), [("a,b", False), ("a", True)])
def test_external_sets_without_splits_are_not_said_to_be_trained_on(
    hub, table, evaluated, external, warned
):
    table.write_text(table.read_text().replace(",split", ",note"))
    report, _ = evaluated("evaluate", hub.root, "--data", table, "--external", external)
    assert any("names no splits" in note for note in report.notes) is warned


def test_nothing_in_the_terminal_is_cut_off(hub, table, evaluated):
    models = [f"{'a-name-of-many-letters' * 3}{index}={hub.root}" for index in range(3)]
    _, result = evaluated("evaluate", *models, "--data", table)
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    table = result.stdout.split("- On all")[0]
    assert sum(line.count("many") for line in table.splitlines()) >= 9


def test_verify_knows_a_card_with_figures_of_an_evaluation(hub, merged, table, evaluated, run_cli):
    evaluated("evaluate", merged, "--data", table, "--cards", "--minimum", "1")
    said = run_cli("verify", merged, "--hub", hub.root)
    assert "README.md" in said.stdout
    assert "with figures that an evaluation added" in said.stdout
    card = merged / "README.md"
    card.write_text(card.read_text() + "It cures everything.\n")
    assert "with figures" not in run_cli("verify", merged, "--hub", hub.root).stdout


def test_the_page_says_whose_mistakes_are_shown(hub, table, tmp_path, evaluated):
    evaluated("evaluate", f"mine={hub.root}", "--data", table, "--with-images")
    page = (tmp_path / "e" / "report.html").read_text()
    assert "The cases that <bdi>mine</bdi> is most wrong about" in page
