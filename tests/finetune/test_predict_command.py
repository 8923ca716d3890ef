"""Models that stay at their sites teach by what they say of images that everybody has."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image

from finetune.answering import noised, secret_seed, thinned
from finetune.cases import content_key, load_unlabelled
from finetune.ensembling import bounded, combined
from merge_kit import predictionsfile
from merge_kit import site as sites
from merge_kit.errors import VectorError
from merge_kit.federation import read_federation
from merge_kit.files import sha256_file
from merge_kit.predictionsfile import Predictions, fault
from merge_kit.runs import latest_run
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.conftest import CLASSES
from tests.finetune.pictures import draw
from tests.merge_kit.helpers import load, says

TRAINING = ("--steps", 2, "--batch-size", 8, "--validations", 1, "--head-steps", 50)
RECIPE = "method: distill\ntraining: {steps: 8, batch_size: 8, validations: 1}\n"
ALONE = """
method: distill
student: {name: test_byobnet, weights: none, preprocessing: {input_size: [3, 32, 32]}}
training: {steps: 5, batch_size: 8, head_steps: 20, validations: 1}
"""


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_most_probable_classes_are_told_and_the_rest_shared():
    known = torch.tensor([True, True, True, True, False])
    told = logits([math.log(8), math.log(4), math.log(3), math.log(1), 0.0])
    found = thinned(told, known, 2)[0, :4].softmax(dim=0)
    assert found.tolist() == pytest.approx([8 / 16, 4 / 16, 2 / 16, 2 / 16])
    assert thinned(told, known, 2)[0, 4] == 0
    assert torch.equal(thinned(told, known, 4), told)


def test_noise_comes_from_its_seed_and_spares_what_is_not_known():
    known, told = torch.tensor([True, False, True]), torch.zeros(2000, 3, dtype=torch.float64)
    found = noised(told, known, 0.5, 3)
    assert torch.equal(found, noised(told, known, 0.5, 3))
    assert not torch.equal(found, noised(told, known, 0.5, 4))
    assert not found[:, 1].any()
    assert float(found[:, [0, 2]].std()) == pytest.approx(0.5, rel=0.05)


@pytest.fixture
def proxy(tmp_path):
    """Images that everybody has."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    for number, pixels in enumerate(draw([0, 1, 2] * 6, seed=7)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def private(hospitals, run_cli, tmp_path):
    """The model of south, which stays there, with other words for its classes."""
    tuned = run_cli("finetune", tmp_path / "south", "--data", hospitals["south"], *TRAINING)
    assert tuned.exit_code == 0, tuned.output
    folder = tmp_path / "private"
    shutil.copytree(latest_run(tmp_path / "south") / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = ["ROUND", "something else", "Granular"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def predict(private, proxy, run_cli, tmp_path):
    """`merge-kit predict-proxy` at south; gives the folder, or the result where it fails."""

    def go(*arguments, code=0, data=proxy):
        done = run_cli(
            "predict-proxy", tmp_path / "south", "--model", private, "--data", data, *arguments
        )
        assert done.exit_code == code, done.output
        folders = (tmp_path / "south" / "predictions").glob("*")
        return done if code else max(folders, key=lambda p: p.stat().st_mtime)

    return go


@pytest.fixture
def distill(hub, proxy, run_cli, tmp_path):
    def go(*arguments, out="distilled", recipe=RECIPE, code=0, data=proxy):
        (tmp_path / "recipe.yaml").write_text(recipe)
        done = run_cli("merge", hub.root, "--recipe", tmp_path / "recipe.yaml", "--data", data,
                       *arguments, "--out", tmp_path / out)  # fmt: skip
        assert done.exit_code == code, done.output
        return done if code else tmp_path / out

    return go


def test_what_leaves_the_site_is_what_the_model_says(predict, proxy, hub, run_cli, tmp_path):
    folder = predict("--publish", "--count", "round=50", "--count", "granular=3")
    with TensorFile(folder / "predictions.safetensors") as file:
        found = predictionsfile.read(file)
    cases = load_unlabelled(proxy)
    assert found.images == tuple(sorted(content_key(case) for case in cases))
    assert found.known.tolist() == [True, False, True]
    assert not found.logits[:, 1].any()
    manifest = json.loads((folder / "predictions.manifest.json").read_bytes())
    assert manifest["class_counts"] == {"round": 50, "lobed": 0, "granular": "<5"}
    assert manifest["about"] == found.about
    assert {"training", "validation"} & set(manifest) == set()
    told = json.loads(run_cli("status", hub.root, "--json").output)
    assert [row["site"] for row in told["predictions"][0]["sites"]] == ["south"]
    assert (
        f"Predictions of the images {found.about[7:19]}: south"
        in run_cli("status", hub.root).output
    )


def test_a_sites_folder_is_its_last_run(hub, private, proxy, run_cli, tmp_path):
    """`private` has trained south."""
    site = tmp_path / "south"

    def said(model):
        done = run_cli("predict-proxy", site, "--model", model, "--data", proxy)
        assert done.exit_code == 0, done.output
        newest = max((site / "predictions").glob("*"), key=lambda path: path.stat().st_mtime)
        return (newest / "predictions.safetensors").read_bytes()

    assert said(site) == said(latest_run(site) / "model")
    shutil.rmtree(site / "runs")
    done = run_cli("predict-proxy", site, "--model", site, "--data", proxy)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"Error: {site} has no finished run: run 'merge-kit finetune {site}'."
    )


def test_what_it_says_does_not_depend_on_names_of_images(predict, proxy, tmp_path):
    first = load(predict() / "predictions.safetensors")
    moved = tmp_path / "moved"
    shutil.copytree(proxy, moved)
    (moved / "0.png").rename(moved / "zz.png")
    shutil.copy(moved / "1.png", moved / "again.png")
    second = load(predict(data=moved) / "predictions.safetensors")
    assert torch.equal(first["images"], second["images"])
    torch.testing.assert_close(first["logits"], second["logits"], rtol=1e-4, atol=1e-5)


def test_a_student_learns_from_a_vector_and_from_predictions(
    predict, distill, hospitals, run_cli, hub, tmp_path
):
    predict("--publish", "--count", "round=9", "--count", "granular=9")
    tuned = run_cli("finetune", tmp_path / "north", "--data", hospitals["north"], *TRAINING)
    assert tuned.exit_code == 0
    assert run_cli("publish", tmp_path / "north").exit_code == 0
    folder = distill()
    record = json.loads((folder / "provenance.json").read_text())
    (vector,), (answers,) = record["contributions"], record["distilled"]["predictions"]
    assert (vector["site"], answers["site"]) == ("north", "south")
    assert vector["weight"] + answers["weight"] == pytest.approx(1)
    result = run_cli("verify", folder, "--hub", hub.root)
    assert result.exit_code == 0, result.output
    assert "south, by its predictions" in (folder / "README.md").read_text()
    shutil.rmtree(hub.root / "contributions" / "south")
    assert run_cli("verify", folder, "--hub", hub.root).exit_code == 1


def test_predictions_alone_teach_another_backbone(predict, distill):
    predict("--publish")
    folder = distill(recipe=ALONE)
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["contributions"], len(record["distilled"]["predictions"])) == ([], 1)
    refused = distill(out="2", code=2)
    assert "there are no vectors to merge the student's first weights from" in refused.stderr


def test_the_images_may_be_fewer_but_not_others(predict, distill, proxy, tmp_path):
    predict("--publish")
    fewer = tmp_path / "fewer"
    shutil.copytree(proxy, fewer)
    (fewer / "0.png").unlink()
    distill(recipe=ALONE, data=fewer)
    Image.new("RGB", (32, 32)).save(fewer / "new.png")
    refused = distill(recipe=ALONE, data=fewer, out="2", code=1)
    assert refused.stderr.splitlines()[-1] == (
        "Error: 1 of the 18 images are not among those that site 'south' has said something of: "
        "the set has changed since; let it label the set again with 'merge-kit predict-proxy', "
        "give the images as they were, or leave it out with --exclude south."
    )
    assert not (tmp_path / "2").exists()


def test_top_classes_and_noise_change_what_is_sent(predict):
    plain = load(predict() / "predictions.safetensors")["logits"]
    noisy = load(predict("--noise", 1.0) / "predictions.safetensors")["logits"]
    top = load(predict("--top-k", 1) / "predictions.safetensors")["logits"]
    assert not torch.equal(plain, noisy)
    again = load(predict("--noise", 1.0) / "predictions.safetensors")["logits"]
    assert torch.equal(noisy, again)  # or the mean of many would be the truth
    known = [0, 2]
    assert torch.equal(plain[:, known].argmax(dim=1), top[:, known].argmax(dim=1))
    torch.testing.assert_close(plain[:, known].softmax(dim=1), top[:, known].softmax(dim=1))


def test_noise_comes_from_the_sites_key(predict, tmp_path):
    site = sites.open_site(tmp_path / "south") if (tmp_path / "south").exists() else None
    predict("--noise", 1.0)
    assert site is not None
    first = secret_seed(site, "sha256:a", "k")
    assert first == secret_seed(site, "sha256:a", "k")
    assert len({first, secret_seed(site, "sha256:b", "k"), secret_seed(site, "sha256:a", "l")}) == 3
    site.key_file.write_bytes(site.key_file.read_bytes()[::-1])
    assert secret_seed(site, "sha256:a", "k") != first


def test_one_site_may_be_left_out_and_have_said_something_of_several_sets(
    predict, distill, hospitals, run_cli, proxy, tmp_path
):
    other = tmp_path / "other-set"
    shutil.copytree(proxy, other)
    Image.new("RGB", (32, 32), "red").save(other / "red.png")
    (other / "0.png").unlink()
    predict("--publish")
    predict("--publish", data=other)
    tuned = run_cli("finetune", tmp_path / "north", "--data", hospitals["north"], *TRAINING)
    assert tuned.exit_code == 0
    assert run_cli("publish", tmp_path / "north").exit_code == 0
    for place, arguments in enumerate((("--exclude", "south"), ("--site", "north"))):
        folder = distill(*arguments, out=f"without{place}")
        assert (
            json.loads((folder / "provenance.json").read_text())["distilled"]["predictions"] == []
        )
    folder = distill("--site", "south", recipe=ALONE, out="south-alone")
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["contributions"], len(record["distilled"]["predictions"])) == ([], 1)
    both = distill(out="both")
    assert len(json.loads((both / "provenance.json").read_text())["distilled"]["predictions"]) == 1


def test_predictions_of_other_images_than_announced_are_refused(predict, hub, distill, run_cli):
    folder = predict()
    forge(folder, lambda tensors: tensors["images"][-1, -1:].bitwise_xor_(torch.tensor(1)))
    assert run_cli("publish", folder.parents[1], "--run", folder).exit_code == 0
    refused = distill(recipe=ALONE, code=1)
    assert "is of other images than it says" in refused.stderr


def test_a_voice_that_shouts_is_one_of_several(predict, distill):
    folder = predict("--publish")
    assert folder.is_dir()
    loud = bounded(torch.tensor([[[1e30, 0.0]], [[0.0, 2.0]]]).double(), torch.ones(2, 2).bool())
    assert float(loud.min()) == -30.0
    mixed = combined(loud, torch.ones(2, 2).bool(), torch.ones(2, 1, 1))
    assert float(mixed.abs().max()) < 10


def test_new_predictions_of_the_same_images_replace_the_old(predict, hub, run_cli):
    predict("--publish")
    predict("--noise", 0.1, "--publish")
    told = json.loads(run_cli("status", hub.root, "--json").output)
    assert len(told["predictions"][0]["sites"]) == 1


def test_features_are_of_models_that_are_here(predict, distill):
    predict("--publish")
    refused = distill(recipe=f"{ALONE}features: 1.0\n", code=2)
    assert "'features' are of models that are here" in refused.stderr


def test_wrong_options_give_their_sentence(predict, proxy, private, tmp_path):
    assert predict("--count", "oval=3", code=2).stderr.splitlines()[-1] == (
        "Error: --count oval: the federation has no such class, it has round, lobed, granular."
    )
    assert "give a whole number of images" in predict("--count", "round=x", code=2).stderr
    assert "take the unreadable ones out" in predict("--skip-unreadable", code=2).stderr
    (proxy / "0.png").write_bytes(b"no image")
    assert "0.png cannot be read as an image" in predict(code=1).stderr
    config = json.loads((private / "config.json").read_text())
    config["label_names"] = ["a", "b", "c"]
    (private / "config.json").write_text(json.dumps(config))
    assert "has no class in common with the federation" in predict(code=1).stderr


def forge(folder, change):
    """Other values under the site's own signature."""
    path = folder / "predictions.safetensors"
    tensors = load(path)
    change(tensors)
    with TensorFile(path) as file:
        metadata = next(iter(file.metadata.items()))
    write_tensors(path, tensors, metadata)
    draft = folder / "predictions.manifest.draft.json"
    told = json.loads(draft.read_text())
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
    told["payload"] = {"sha256": sha256_file(path), "size": path.stat().st_size, "norm": norm}
    draft.write_text(json.dumps(told))


def sound(count=3):
    images = tuple(sorted(f"{n:064x}" for n in range(count)))
    known = torch.tensor([True, False, True])
    return Predictions(images, torch.ones(count, 3) * known, known)


def written(tmp_path, **changes):
    tensors = {**predictionsfile.to_tensors(sound()), **changes}
    write_tensors(tmp_path / "p", tensors)
    return TensorFile(tmp_path / "p")


FAULTS = {
    "nan": ({"logits": torch.full((3, 3), torch.nan)}, "holds NaN or infinite values"),
    "nothing": (
        {"known": torch.zeros(3, dtype=torch.uint8), "logits": torch.zeros(3, 3)},
        "says of no class that it is known, or not clearly",
    ),
    "unclear": (
        {"known": torch.tensor([1, 0, 2], dtype=torch.uint8)},
        "says of no class that it is known, or not clearly",
    ),
    "unknown": ({"logits": torch.ones(3, 3)}, "says something of classes that are not known"),
    "twice": (
        {"images": torch.zeros(3, 32, dtype=torch.uint8)},
        "holds images that are not in ascending order, or one twice",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), FAULTS.values(), ids=list(FAULTS))
def test_what_no_model_can_have_said_is_named(tmp_path, changes, sentence):
    with written(tmp_path) as file:
        assert fault(file) is None
        assert predictionsfile.looks_so(file.specs)
    with written(tmp_path, **changes) as file:
        assert fault(file) == sentence


def test_predictions_of_another_shape_are_refused(tmp_path):
    with written(tmp_path, logits=torch.ones(2, 3)) as file:
        assert not predictionsfile.looks_so(file.specs)
        with says(
            VectorError,
            "here: tensor 'logits' is F32 [2, 3], for this backbone it is F32 [3, 3].",
        ):
            predictionsfile.check_specs(file.specs, 3, "here")


def test_a_forged_file_is_refused_by_name(predict, hub, distill, run_cli):
    """Signed by the site, but with the values of a model that says nothing sound."""
    folder = predict()
    forge(folder, lambda tensors: tensors["logits"][:, 1].fill_(9.0))
    site = folder.parents[1]
    assert run_cli("publish", site, "--run", folder).exit_code == 0
    refused = distill(recipe=ALONE, code=1)
    what = "says something of classes that are not known"
    assert f"{what}: the site must run 'merge-kit predict-proxy' again" in refused.stderr
    assert read_federation(hub.root).classes == CLASSES
