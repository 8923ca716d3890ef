"""Distillation by the commands: real vectors, real images, a student that learns."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from finetune import network
from merge_kit.checkpoints import WEIGHTS
from merge_kit.hub import FolderHub
from merge_kit.remembered import VARIABLE
from merge_kit.site import open_site
from merge_kit.tensorfile import write_tensors
from tests.conftest import CLASSES
from tests.finetune.conftest import TRAINING
from tests.finetune.pictures import draw, write_csv
from tests.merge_kit.helpers import load

RECIPE = """
method: distill
training: {steps: 12, batch_size: 8, learning_rate: 1.0e-3, validations: 2}
"""


@pytest.fixture
def pictures(tmp_path):
    """A folder of images that nobody has labelled."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(draw([0, 1, 2] * 10, seed=7)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def distill(trained, pictures, run_cli, tmp_path):
    """`merge-kit merge --recipe`; gives the folder, or the result where it fails."""

    def go(*arguments, out="distilled", recipe=RECIPE, code=0, data=pictures, cli="merge"):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        result = run_cli(
            cli, trained.root, "--recipe", path, "--data", data, *arguments, "--out", tmp_path / out
        )
        assert result.exit_code == code, result.output
        return result if code else tmp_path / out

    return go


def test_a_student_loses_no_class_that_a_teacher_knows(distill, run_cli, tmp_path):
    """north has no 'granular', south no 'lobed'; the transfer images have all three."""
    longer = RECIPE.replace("steps: 12", "steps: 150").replace("1.0e-3", "1.0e-2")
    folder = distill(recipe=longer)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    labels = torch.arange(30) % 3
    pixels = torch.from_numpy(draw(labels.tolist(), seed=99)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in _seen(folder))
    with torch.no_grad():
        found = model((pixels - mean) / std).argmax(dim=1)
    recalls = [float((found[labels == c] == c).float().mean()) for c in range(3)]
    assert min(recalls) > 0.5, recalls


def _seen(folder):
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return config["mean"], config["std"]


def test_provenance_names_teachers_and_images_and_verify_takes_the_weights(
    distill, trained, run_cli, hospitals
):
    folder = distill()
    record = json.loads((folder / "provenance.json").read_text())
    assert {c["site"] for c in record["contributions"]} == set(hospitals)
    assert sum(c["weight"] for c in record["contributions"]) == pytest.approx(1)
    assert record["distilled"]["images"]["count"] == 30
    assert record["recipe"]["training"]["steps"] == 12
    result = run_cli("verify", folder, "--hub", trained.root)
    assert result.exit_code == 0, result.output
    assert "was distilled on 30 images that lie with the merger" in result.output
    card = (folder / "README.md").read_text()
    assert "distilled from 2 teachers" in card
    weights = load(folder / WEIGHTS)
    weights["fc.bias"] += 1
    write_tensors(folder / WEIGHTS, weights, ("format", "pt"))
    assert run_cli("verify", folder, "--hub", trained.root).exit_code == 1


def test_the_same_command_gives_the_same_bytes_and_asks_nobody_again(
    distill, run_cli, tmp_path, monkeypatch
):
    first = distill()
    asked = []
    real = network.logits
    monkeypatch.setattr(network, "logits", lambda *a, **k: asked.append(1) or real(*a, **k))
    again = distill(out="again", cli="distill")
    assert (first / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()
    assert (first / "provenance.json").read_bytes() == (again / "provenance.json").read_bytes()
    validations = 3
    assert len(asked) == validations


def test_without_a_cache_it_gives_the_same(distill, monkeypatch):
    first = distill()
    monkeypatch.setenv(VARIABLE, "off")
    before = set(Path(tempfile.gettempdir()).iterdir())
    assert (distill(out="again") / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    left = {path.name for path in set(Path(tempfile.gettempdir()).iterdir()) - before}
    assert "distilling" not in left


def test_names_of_images_do_not_matter_but_their_content_does(distill, pictures, tmp_path):
    first = json.loads((distill() / "provenance.json").read_text())["distilled"]["images"]
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    (moved / "0.png").rename(moved / "zz.png")
    second = distill(out="2", data=moved)
    assert json.loads((second / "provenance.json").read_text())["distilled"]["images"] == first


@pytest.mark.parametrize("rule", ["uniform", "examples", "sqrt-examples", "confidence"])
def test_each_rule_gives_shares(distill, rule):
    folder = distill(recipe=f"{RECIPE}teachers: {rule}\n")
    record = json.loads((folder / "provenance.json").read_text())
    shares = {c["site"]: c["weight"] for c in record["contributions"]}
    assert sum(shares.values()) == pytest.approx(1)
    if rule == "uniform":
        assert shares == pytest.approx({"north": 0.5, "south": 0.5})
    if rule == "examples":
        assert shares == pytest.approx({"north": 13 / 27, "south": 14 / 27})


def test_stacking_learns_from_a_few_labelled_images(distill, tmp_path):
    rows = []
    folder = tmp_path / "few"
    folder.mkdir()
    for number, pixels in enumerate(draw([0, 2] * 5, seed=3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"file": f"{number}.png", "label": CLASSES[[0, 2][number % 2]]})
    table = write_csv(folder / "few.csv", rows)
    recipe = f"{RECIPE}teachers: stacking\n"
    made = distill("--labelled", table, recipe=recipe)
    record = json.loads((made / "provenance.json").read_text())
    assert record["distilled"]["labelled"]["count"] == 10
    refused = distill(recipe=recipe, out="2", code=2)
    assert "'teachers: stacking' learns from a few labelled images" in refused.stderr
    refused = distill("--labelled", table, out="3", code=2)
    assert "'teachers: stacking' learns from a few labelled images" in refused.stderr


def test_features_are_matched(distill):
    plain, matched = distill(), distill(recipe=f"{RECIPE}features: 1.0\n", out="2")
    assert (plain / WEIGHTS).read_bytes() != (matched / WEIGHTS).read_bytes()


SMALL = """
method: distill
student: {name: test_byobnet, weights: none, preprocessing: {input_size: [3, 32, 32]}}
training: {steps: 10, batch_size: 8, head_steps: 50}
"""


def test_a_student_of_another_backbone(distill, trained, run_cli, hospitals, tmp_path):
    folder = distill(recipe=SMALL)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["label_names"]) == ("test_byobnet", list(CLASSES))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 3
    result = run_cli("verify", folder, "--hub", trained.root)
    assert result.exit_code == 0, result.output
    refused = run_cli("head", trained.root, folder, "--out", folder.parent / "h")
    assert refused.exit_code == 1
    assert "is a 'test_byobnet' and not of the federation's backbone" in refused.stderr
    refused = run_cli(
        "calibrate", tmp_path / "north", "--data", hospitals["north"], "--model", folder
    )
    assert "is a 'test_byobnet' and not of the federation's backbone" in refused.stderr


def test_a_student_with_a_classifier_of_zeros_learns_one_first(distill, ok, tmp_path):
    ok("init", tmp_path / "other", "--backbone", "test_byobnet", "--weights", "none",
       "--input-size", 32, "--crop-pct", 1, "--classes", ",".join(CLASSES))  # fmt: skip
    folder = distill("--student", tmp_path / "other" / "base")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["recipe"]["training"]["head_steps"] == 300
    assert record["recipe"]["training"]["learning_rate"] == 1e-3  # as the recipe says
    assert record["distilled"]["other_backbone"] == "test_byobnet"
    again = distill("--student", folder, out="again")
    told = json.loads((again / "provenance.json").read_text())
    assert told["recipe"]["training"]["head_steps"] == 0


def test_a_student_that_was_given_is_told_as_such(distill, trained, run_cli, tmp_path):
    """Nothing was merged to start from; one of another backbone is verified all the same."""
    small = distill(recipe=SMALL, out="small")
    folder = distill("--student", small, out="2")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["recipe"]["start"] is None
    assert record["distilled"]["other_backbone"] == "test_byobnet"
    result = run_cli("verify", folder, "--hub", trained.root)
    assert result.exit_code == 0, result.output
    assert run_cli("merge", trained.root, "--out", tmp_path / "merged").exit_code == 0
    own = distill("--student", tmp_path / "merged", out="3")
    told = json.loads((own / "provenance.json").read_text())
    assert (told["recipe"]["start"], told["distilled"]["other_backbone"]) == (None, None)
    assert run_cli("verify", own, "--hub", trained.root).exit_code == 0


@pytest.fixture
def other(distill, tmp_path):
    """A model of another backbone with classes that overlap in part."""
    folder = distill(recipe=SMALL, out="other")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["label_names"] = ["Granular", "ROUND", "unheard of"]
    path.write_text(json.dumps(config))
    return folder


def test_a_teacher_of_another_backbone_with_part_of_the_classes(distill, other):
    folder = distill("--teacher", f"clinic={other}", out="2")
    record = json.loads((folder / "provenance.json").read_text())
    (told,) = record["distilled"]["others"]
    assert told["name"] == "clinic"
    assert 0 < told["weight"] < 0.6
    assert "| clinic |" in (folder / "README.md").read_text()


def test_only_other_teachers(distill, other, trained, run_cli):
    folder = distill("--teacher", other, "--alone", recipe=SMALL, out="2")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["contributions"] == []
    assert record["distilled"]["others"][0]["weight"] == 1
    assert run_cli("verify", folder, "--hub", trained.root).exit_code == 0


def test_a_merged_model_as_the_start_can_be_calibrated_again(
    distill, trained, calibrate, hospitals, run_cli, tmp_path
):
    assert run_cli("merge", trained.root, "--out", tmp_path / "merged").exit_code == 0
    folder = distill("--student", tmp_path / "merged")
    for name in hospitals:
        calibrate(name, "--model", folder)
    solved = run_cli("head", trained.root, folder, "--out", tmp_path / "solved")
    assert solved.exit_code == 0, solved.output
    result = run_cli("verify", tmp_path / "solved", "--hub", trained.root)
    assert result.exit_code == 0, result.output


def test_a_run_that_was_killed_goes_on(distill, trained, pictures, run_cli, tmp_path, monkeypatch):
    """The checkpoint of the first validation is there; the result is that of one go."""
    from finetune import training

    whole = distill()
    real, calls = training._Loop._update, []

    def stop(self):
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(1)
        real(self)

    recipe = RECIPE.replace("validations: 2", "validations: 2, seed: 1")
    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "_update", stop)
        distill(recipe=recipe, out="cut", code=130)
    assert not (tmp_path / "cut").exists()
    calls.clear()
    monkeypatch.setattr(training._Loop, "_update", lambda self: (calls.append(1), real(self)))
    gone_on = distill(recipe=recipe, out="cut")
    assert len(calls) == 12 - 6
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    one_go = distill(recipe=recipe, out="one")
    assert (gone_on / WEIGHTS).read_bytes() == (one_go / WEIGHTS).read_bytes()
    assert (gone_on / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()


def test_a_checkpoint_is_of_one_set_of_teachers(distill, hospitals, run_cli, tmp_path, monkeypatch):
    """A new vector with the same counts arrives between the kill and the next try."""
    from finetune import training

    assert run_cli("merge", tmp_path / "hub", "--out", tmp_path / "merged").exit_code == 0
    real, calls = training._Loop._update, []

    def stop(self):
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(1)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "_update", stop)
        distill("--student", tmp_path / "merged", code=130)
    again = run_cli("finetune", tmp_path / "north", "--data", hospitals["north"], *TRAINING,
                    "--seed", 5)  # fmt: skip
    assert again.exit_code == 0, again.output
    assert run_cli("publish", tmp_path / "north").exit_code == 0
    calls.clear()
    monkeypatch.setattr(training._Loop, "_update", lambda self: (calls.append(1), real(self)))
    distill("--student", tmp_path / "merged")
    assert len(calls) == 12


def test_no_image_that_can_be_read(distill, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    refused = distill(data=folder, code=1)
    assert "a.png cannot be read as an image" in refused.stderr
    refused = distill("--skip-unreadable", data=folder, code=1)
    assert refused.stderr.splitlines()[-1] == (
        "Error: no image can be read: check the image folder and the file formats."
    )
    assert not (tmp_path / "distilled").exists()


def test_a_teacher_without_a_class_in_common(distill, other):
    path = other / "config.json"
    config = json.loads(path.read_text())
    config["label_names"] = ["a", "b", "c"]
    path.write_text(json.dumps(config))
    refused = distill("--teacher", other, out="2", code=1)
    assert refused.stderr.splitlines()[-1] == (
        f"Error: the teacher {other} has no class in common with the federation (a, b, c): leave "
        "it out, or rename its 'label_names'."
    )


def test_a_student_with_another_order_of_classes(distill, trained, run_cli, tmp_path):
    assert run_cli("merge", trained.root, "--out", tmp_path / "merged").exit_code == 0
    path = tmp_path / "merged" / "config.json"
    config = json.loads(path.read_text())
    config["label_names"] = list(reversed(CLASSES))
    path.write_text(json.dumps(config))
    refused = distill("--student", tmp_path / "merged", code=1)
    assert refused.stderr.splitlines()[-1] == (
        f"Error: the student {tmp_path / 'merged'} has the classes granular, lobed, round, the "
        "federation round, lobed, granular: they must be the same, in this order."
    )


def test_two_students_and_nobody_to_start_from(distill, tmp_path):
    refused = distill("--student", tmp_path, recipe=SMALL, code=2)
    assert "--student and the recipe's 'student' are two students" in refused.stderr
    refused = distill("--alone", code=2)
    assert "nobody teaches: give --teacher" in refused.stderr


def test_a_site_with_a_task_of_its_own_does_not_teach(
    trained, distill, hospitals, run_cli, tmp_path
):
    rows = [
        {"file": f"round_train_{n}.png", "label": "big" if n < 4 else "small", "split": split}
        for n, split in enumerate(["train"] * 3 + ["val"] + ["train"] * 2 + ["val"])
    ]
    table = write_csv(hospitals["south"].parent / "own.csv", [
        {**row, "file": f"round_train_{n % 5}.png"} for n, row in enumerate(rows[:5])
    ] + [{"file": "round_val_0.png", "label": "big", "split": "val"},
         {"file": "round_val_1.png", "label": "small", "split": "val"}])  # fmt: skip
    site = open_site(tmp_path / "south")
    tuned = run_cli("finetune", site.root, "--data", table, "--own-classes", "big,small", *TRAINING)
    assert tuned.exit_code == 0, tuned.output
    assert run_cli("publish", site.root).exit_code == 0
    folder = distill()
    record = json.loads((folder / "provenance.json").read_text())
    assert [c["site"] for c in record["contributions"]] == ["north"]
    assert isinstance(trained, FolderHub)
