"""Distillation without any image, by the commands: real vectors, a student that learns."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from finetune import synthesising
from merge_kit import publishing
from merge_kit import site as sites
from merge_kit.checkpoints import WEIGHTS
from merge_kit.creation import create
from merge_kit.federation import Policy
from merge_kit.hub import FolderHub
from merge_kit.predictionsfile import digest_of
from merge_kit.remembered import VARIABLE
from merge_kit.runs import latest_run
from tests.conftest import CLASSES, write_run
from tests.finetune.pictures import draw

RECIPE = """
method: distill
synthesis: {images: 24, batch_size: 10, steps: 12, learning_rate: 0.2, statistics: 0.01,
  stages: 1, invert: each}
training: {steps: 12, batch_size: 8, learning_rate: 1.0e-3, validations: 2}
"""
NEW = """
method: distill
student: {name: test_resnet, weights: none, preprocessing: {input_size: [3, 32, 32]}}
synthesis: {images: 90, steps: 60, learning_rate: 0.1, statistics: 0.1}
training: {steps: 60, batch_size: 16, learning_rate: 1.0e-2, augment: none}
"""
TRAINED = ("--steps", 40, "--learning-rate", "1e-3", "--batch-size", 8, "--validations", 1)
GIVEN = "method: distill\ntraining: {steps: 12, batch_size: 8, validations: 2}\n"


@pytest.fixture
def distill(trained, run_cli, tmp_path):
    """`merge-kit merge --recipe`; gives the folder and what was said, or the failure."""

    def go(*arguments, out="distilled", recipe=RECIPE, code=0, cli="merge"):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        result = run_cli(cli, trained.root, "--recipe", path, *arguments, "--out", tmp_path / out)
        assert result.exit_code == code, result.output
        return result if code else tmp_path / out

    return go


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


def last(result):
    return result.stderr.splitlines()[-1]


def test_a_student_learns_without_any_image(distill, trained, run_cli, tmp_path):
    longer = RECIPE.replace("images: 24", "images: 60").replace(
        "steps: 12, learn", "steps: 40, learn"
    )
    folder = distill(recipe=longer.replace("{steps: 12,", "{steps: 60,"))
    record = provenance(folder)
    made, settings = record["distilled"], record["recipe"]["synthesis"]
    assert made["images"]["count"] == settings["images"] == 60
    assert (settings["steps"], settings["learning_rate"], settings["invert"]) == (40, 0.2, "each")
    assert made["synthesised"]["probability"] > 0.8
    result = run_cli("verify", folder, "--hub", trained.root)
    assert result.exit_code == 0, result.output
    assert "was distilled on 60 images that were synthesised from its teachers" in result.output
    card = (folder / "README.md").read_text()
    assert "60 images that were synthesised from these models" in card
    assert "The images were made from noise" in card


def test_a_student_that_knew_nothing_has_learnt_the_classes(hub, hospitals, ok, tmp_path):
    """Another backbone with random weights, and nothing but synthesised images, tells real ones
    apart."""
    for name, table in hospitals.items():
        ok("finetune", tmp_path / name, "--data", table, *TRAINED)
        ok("publish", tmp_path / name)
    (tmp_path / "r.yaml").write_text(NEW)
    folder = tmp_path / "new"
    ok("merge", hub.root, "--recipe", tmp_path / "r.yaml", "--out", folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    labels = torch.arange(60) % 3
    pixels = torch.from_numpy(draw(labels.tolist(), seed=99)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        found = model((pixels - mean) / std).argmax(dim=1)
    recalls = [float((found[labels == c] == c).float().mean()) for c in range(3)]
    assert min(recalls) > 0.5, recalls


def test_teachers_find_the_classes_in_the_images_more_probable_than_in_noise(
    trained, run_cli, tmp_path
):
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = run_cli("distill", trained.root, "--recipe", tmp_path / "r.yaml", "--synthesise", "30",
                     "--out", tmp_path / "d")  # fmt: skip
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if "in the noise" in line)
    before, after = (float(part.split()[0]) for part in line.split("probability ")[1].split(", "))
    assert after > max(before, 1 / 2) + 0.1
    assert after == pytest.approx(
        provenance(tmp_path / "d")["distilled"]["synthesised"]["probability"], abs=1e-3
    )
    assert provenance(tmp_path / "d")["recipe"]["synthesis"]["images"] == 30
    assert "on 30 synthesised images" in result.output


def test_the_same_command_gives_the_same_bytes_and_makes_nothing_again(
    distill, monkeypatch, tmp_path
):
    first = distill()
    made, real = [], synthesising.synthesise
    monkeypatch.setattr(synthesising, "synthesise", lambda *a: made.append(1) or real(*a))
    again = distill(out="again", cli="distill")
    assert not made
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    afresh = distill(out="afresh")
    assert len(made) == 4
    for folder in (again, afresh):
        for file in (WEIGHTS, "provenance.json", "README.md"):
            assert (folder / file).read_bytes() == (first / file).read_bytes()


def test_without_a_cache_it_gives_the_same_and_leaves_nothing(distill, monkeypatch):
    first = distill()
    monkeypatch.setenv(VARIABLE, "off")
    before = set(Path(tempfile.gettempdir()).iterdir())
    assert (distill(out="again") / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    left = [path for path in set(Path(tempfile.gettempdir()).iterdir()) - before if path.is_dir()]
    assert not [path for path in left if (path / "synthesis").exists()]


def test_a_run_that_was_killed_goes_on_with_the_next_batch(distill, monkeypatch, tmp_path):
    from finetune import synthesis

    real, steps = synthesis._loss, []

    def stop(*arguments):
        if len(steps) == 30:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*arguments)

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cut-cache"))
    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "_loss", stop)
        distill(out="cut", code=130)
    assert not (tmp_path / "cut").exists()
    kept = list((tmp_path / "cut-cache" / "synthesis").glob("*/*"))
    assert [path.name for path in sorted(kept)] == ["00000.safetensors", "00001.safetensors"]
    steps.clear()
    monkeypatch.setattr(synthesis, "_loss", lambda *a: steps.append(1) or real(*a))
    gone_on = distill(out="cut")
    assert len(steps) == 12 * 2
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    one_go = distill(out="one")
    assert (gone_on / WEIGHTS).read_bytes() == (one_go / WEIGHTS).read_bytes()


def test_images_can_be_looked_at_and_nobody_is_asked_for_what_it_has_not_seen(distill, tmp_path):
    """north has no 'granular', south no 'lobed'."""
    folder = distill("--save-images", tmp_path / "seen")
    with (tmp_path / "seen" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    asked = {(row["teacher"], row["label"]) for row in rows}
    assert asked == {
        ("north", "round"), ("north", "lobed"), ("south", "round"), ("south", "granular")
    }  # fmt: skip
    assert sorted(row["label"] for row in rows) == sorted(CLASSES * 8)
    for row in rows:
        with Image.open(tmp_path / "seen" / row["file"]) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
    told = provenance(folder)["distilled"]["images"]
    keys = []
    for path in (tmp_path / "seen").glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        text = f"{pixels.dtype.str} {pixels.shape}\n".encode() + pixels.tobytes()
        keys.append(hashlib.sha256(text).hexdigest())
    assert told == {"count": 24, "sha256": digest_of(keys)}
    refused = distill("--save-images", tmp_path / "seen", out="2", code=2)
    assert last(refused).startswith(f"Error: {tmp_path / 'seen'} exists already")
    assert not (tmp_path / "2").exists()


def test_images_of_all_stages_are_learnt_from(distill):
    """Noise-adapted teachers speak of those on their way, of features too."""
    recipe = RECIPE.replace("images: 24", "images: 9").replace("stages: 1", "stages: 3")
    staged = distill(recipe=recipe)
    assert provenance(staged)["distilled"]["images"]["count"] == 27
    matched = distill(recipe=f"{recipe}features: 1.0\n", out="2")
    assert (staged / WEIGHTS).read_bytes() != (matched / WEIGHTS).read_bytes()


@pytest.mark.parametrize("changes", ["invert: together", "invert: each, competition: 1.0"])
def test_other_ways_to_make_them(distill, changes):
    folder = distill(recipe=RECIPE.replace("invert: each", changes))
    plain = distill(out="plain")
    made, others = (provenance(one)["distilled"]["images"] for one in (folder, plain))
    assert made["count"] == others["count"]
    assert made["sha256"] != others["sha256"]


OTHER = """
method: distill
student: {name: test_byobnet, weights: none, preprocessing: {input_size: [3, 24, 24]}}
synthesis: {images: 12, steps: 5, stages: 2}
training: {steps: 5, batch_size: 8, head_steps: 20}
"""


def test_a_student_of_another_backbone(distill, trained, run_cli):
    folder = distill(recipe=OTHER)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 3
    result = run_cli("verify", folder, "--hub", trained.root)
    assert result.exit_code == 0, result.output
    refused = distill(recipe=OTHER.replace("stages: 2", "competition: 1"), out="2", code=2)
    assert last(refused) == (
        "Error: 'competition' is with a student that knows the classes already, and the classifier "
        "of this one is of zeros: leave it at 0."
    )


def test_a_teacher_without_batch_norm_teaches_all_the_same(distill, tmp_path, run_cli):
    """A timm folder of a vision transformer: no image is made from it."""
    made = tmp_path / "vit"
    _vision_transformer(made)
    config = json.loads((made / "base" / "config.json").read_text())
    (made / "base" / "config.json").write_text(json.dumps(config))
    result = distill("--teacher", f"clinic={made / 'base'}", "--save-images", tmp_path / "seen")
    assert provenance(result)["distilled"]["others"][0]["name"] == "clinic"
    assert "clinic" not in (tmp_path / "seen" / "labels.csv").read_text()


def test_another_backbone_with_batch_norm_is_inverted_too(distill, tmp_path):
    other = distill(recipe=OTHER, out="other")
    distill("--teacher", f"clinic={other}", "--save-images", tmp_path / "seen", out="2")
    with (tmp_path / "seen" / "labels.csv").open() as file:
        shown = {row["label"] for row in csv.DictReader(file) if row["teacher"] == "clinic"}
    assert shown == set(CLASSES)


def _vision_transformer(folder):
    create(
        folder,
        name="cells",
        architecture="test_vit",
        classes=CLASSES,
        weights="none",
        model_args={"img_size": 32},
        preprocessing={"input_size": (3, 32, 32), "crop_pct": 1.0},
        policy=Policy(),
        seed=1,
    )
    return FolderHub(folder)


def test_a_backbone_without_batch_norm_is_refused_with_the_other_ways(run_cli, tmp_path):
    hub = _vision_transformer(tmp_path / "vit")
    joined = sites.join(hub, "north", tmp_path / "n")
    run = tmp_path / "n" / "runs" / "1"
    write_run(joined, run)
    (parcel,) = publishing.prepare_all(joined, run, hub)
    publishing.publish(joined, run, hub, parcel)
    refused = run_cli("merge", hub.root, "--recipe", "distill-synthetic", "--allow-unsigned",
                      "--out", tmp_path / "d")  # fmt: skip
    assert refused.exit_code == 2
    assert last(refused) == (
        "Error: images are synthesised from the statistics that batch norm keeps, and none of "
        "these teachers has it: learn from unlabelled images (--data), let sites say what they "
        "make of images that all have ('merge-kit predict-proxy'), add the weights ('merge-kit "
        "merge --method sum'), or solve the classifier in closed form ('merge-kit head')."
    )
    assert not (tmp_path / "d").exists()


def test_a_few_labelled_images_may_weigh_the_teachers_all_the_same(distill, hospitals):
    recipe = f"{RECIPE}teachers: stacking\n"
    folder = distill("--labelled", hospitals["south"], recipe=recipe)
    assert provenance(folder)["distilled"]["labelled"]["count"] == 20
    assert provenance(folder)["distilled"]["synthesised"]


def test_predictions_say_nothing_of_synthesised_images(
    distill, trained, hospitals, run_cli, tmp_path
):
    shutil.copytree(latest_run(tmp_path / "south") / "model", tmp_path / "private")
    done = run_cli("predict-proxy", tmp_path / "south", "--model", tmp_path / "private", "--data",
                   hospitals["north"], "--publish")  # fmt: skip
    assert done.exit_code == 0, done.output
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = run_cli("merge", trained.root, "--recipe", tmp_path / "r.yaml", "--out",
                     tmp_path / "d")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        "Left out: the predictions of site 'south' are of images that there are, and not of "
        "synthesised ones." in result.stderr
    )
    assert provenance(tmp_path / "d")["distilled"]["predictions"] == []


NO_IMAGES = (
    "there are no images to learn from: give unlabelled ones with --data, or let N be made from "
    "the teachers themselves with --synthesise N."
)
WRONG = {
    "nothing": ([], GIVEN, NO_IMAGES),
    "no number": ([], RECIPE.replace("images: 24, ", ""), NO_IMAGES),
    "both": (
        ["--data", "x", "--synthesise", "30"], GIVEN,
        "--data and --synthesise are two sets of images to learn from: leave one of them out.",
    ),
    "data and a recipe": (
        ["--data", "x"], RECIPE,
        "the recipe has 24 images synthesised ('images' under 'synthesis'), and --data gives "
        "others: leave --data out, or take a recipe without them.",
    ),
    "rows": (
        ["--where", "site=a"], RECIPE,
        "--where and --skip-unreadable choose among the images of --data: leave them out where "
        "images are synthesised.",
    ),
    "unreadable": (
        ["--skip-unreadable"], RECIPE,
        "--where and --skip-unreadable choose among the images of --data: leave them out where "
        "images are synthesised.",
    ),
    "pictures of given ones": (
        ["--data", "x", "--save-images", "seen"], GIVEN,
        "--save-images is for images that are synthesised: leave it out.",
    ),
    "stacking": (
        ["--synthesise", "30", "--labelled", "few.csv"],
        f"{GIVEN}teachers: stacking\n",
        "'teachers: stacking' is learnt on labelled images, of which noise-adapted teachers know "
        "nothing: set 'stages: 1' under 'synthesis', or choose other 'teachers'.",
    ),
    "too few": (
        ["--synthesise", "2"], RECIPE,
        "2 images cannot show 3 classes: have 3 synthesised at least, better ten of each.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "recipe", "sentence"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_go_together_gives_its_sentence(
    contribute, run_cli, hub, tmp_path, arguments, recipe, sentence
):
    contribute("north")
    (tmp_path / "r.yaml").write_text(recipe)
    refused = run_cli("merge", hub.root, "--recipe", tmp_path / "r.yaml", *arguments, "--out",
                      tmp_path / "d")  # fmt: skip
    assert refused.exit_code == 2
    assert last(refused) == f"Error: {sentence}"
    assert not (tmp_path / "d").exists()


def test_one_image_is_no_number(run_cli, hub, tmp_path):
    refused = run_cli("distill", hub.root, "--synthesise", "1", "--out", tmp_path / "d")
    assert refused.exit_code == 2
    assert "'--synthesise'" in refused.stderr


def test_images_that_are_given_win_over_settings_without_a_number(distill, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(draw([0, 1, 2] * 3, seed=7)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    made = distill("--data", folder, recipe=RECIPE.replace("images: 24, ", ""))
    record = provenance(made)
    assert record["recipe"]["synthesis"] is None
    assert record["distilled"]["synthesised"] is None
    assert record["distilled"]["images"]["count"] == 9
