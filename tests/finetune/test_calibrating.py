"""What a site measures of a model: real files, the real command, and the pooled classifier."""

from __future__ import annotations

import json

import torch

from finetune import network
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit import moments, momentsfile
from merge_kit import site as sites
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.tensorfile import TensorFile
from tests.finetune.conftest import HOSPITALS
from tests.finetune.pictures import write_table
from tests.merge_kit.helpers import load

CPU = torch.device("cpu")


def pooled(hub, hospitals, model_folder):
    """The classifier of all sites' training images in one place."""
    federation = read_federation(hub.root)
    model = network.load(model_folder)
    features, labels = [], []
    for table in hospitals.values():
        cases = [c for c in load_cases(table, classes=federation.classes) if c.split == "train"]
        images, _ = decode(cases, federation.preprocessing)
        features.append(network.features(model, images, CPU).flatten(1))
        labels.append(images.labels())
    found = moments.measure(torch.cat(features), torch.cat(labels), len(federation.classes))
    return moments.discriminant(found, 0.3)


def test_the_classifier_of_all_sites_is_that_of_the_pooled_images(
    hub, hospitals, calibrate, run_cli, tmp_path
):
    for name in hospitals:
        calibrate(name)
    options = ("--option", "shrinkage=0.3", "--out", tmp_path / "first")
    assert run_cli("head", hub.root, *options).exit_code == 0
    found, expected = (
        load(tmp_path / "first" / "model.safetensors"),
        pooled(hub, hospitals, hub.root / "base"),
    )
    torch.testing.assert_close(found["fc.weight"].double(), expected.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["fc.bias"].double(), expected.bias, rtol=1e-6, atol=1e-6)


def test_a_merged_model_is_calibrated_by_those_who_come(
    hub, hospitals, calibrate, contribute, run_cli, tmp_path
):
    contribute("north", seed=1)
    merged = tmp_path / "merged"
    assert run_cli("merge", hub.root, "--out", merged).exit_code == 0
    for name in hospitals:
        calibrate(name, "--model", merged)
    out = ("--option", "shrinkage=0.3", "--out", tmp_path / "again")
    assert run_cli("head", hub.root, merged, *out).exit_code == 0
    found, expected = load(tmp_path / "again" / "model.safetensors"), pooled(hub, hospitals, merged)
    torch.testing.assert_close(found["fc.weight"].double(), expected.weight, rtol=1e-6, atol=1e-6)
    assert run_cli("verify", tmp_path / "again", "--hub", hub.root).exit_code == 0


def test_what_leaves_the_site_names_no_training(calibrate, tmp_path):
    folder = calibrate("north")
    manifest = json.loads((folder / "moments.manifest.json").read_bytes())
    assert manifest["class_counts"] == HOSPITALS["north"]
    assert {"training", "validation", "supersedes"} & set(manifest) == {"supersedes"}
    with TensorFile(folder / "moments.safetensors") as file:
        assert set(file.specs) == momentsfile.NAMES


def test_a_class_of_too_few_images_is_held_back(hub, hospitals, run_cli, tmp_path):
    policy = Policy(minimum_class_count=7)
    federation = read_federation(hub.root).model_copy(update={"policy": policy})
    hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
    sites.join(hub, "other", tmp_path / "other")
    result = run_cli("calibrate", tmp_path / "other", "--data", hospitals["north"])
    assert (
        "Held back: 'lobed' has 6 image(s), the federation's policy asks for 7: the sum of fewer "
        "would give them away."
    ) in result.stdout
    (folder,) = (tmp_path / "other" / "calibrations").iterdir()
    with TensorFile(folder / "moments.safetensors") as file:
        found = momentsfile.read(file)
    cases = [
        c for c in load_cases(hospitals["north"], classes=federation.classes)
        if c.split == "train" and c.label == 0
    ]  # fmt: skip
    images, _ = decode(cases, federation.preprocessing)
    features = network.features(network.load(hub.root / "base"), images, CPU).flatten(1)
    assert found.counts.tolist() == [7, 0, 0]
    torch.testing.assert_close(found.gram, features.double().T @ features.double())


def test_without_a_class_of_enough_images_nothing_is_written(hub, run_cli, tmp_path):
    sites.join(hub, "north", tmp_path / "north")
    table = write_table(tmp_path / "few", {"round": 4, "lobed": 3, "granular": 0})
    result = run_cli("calibrate", tmp_path / "north", "--data", table)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: no class has 5 training images, as the federation's policy asks for: fewer would "
        "give their features away; add images."
    )
    (folder,) = (tmp_path / "north" / "calibrations").iterdir()
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_was_measured_is_not_measured_again(hospitals, run_cli, tmp_path):
    first = run_cli("calibrate", tmp_path / "north", "--data", hospitals["north"])
    again = run_cli("calibrate", tmp_path / "north", "--data", hospitals["north"])
    assert "nothing was done again" not in first.stdout
    assert "This has been measured before; nothing was done again." in again.stdout
    tail = [line for line in again.stdout.splitlines() if "before" not in line]
    assert tail == first.stdout.splitlines()


def test_publishing_twice_is_one_contribution(calibrate, run_cli, tmp_path):
    folder = calibrate("north")
    assert "Already published" in run_cli("publish", tmp_path / "north", "--run", folder).stdout


def test_a_model_of_another_federation_is_refused(hub, hospitals, contribute, run_cli, tmp_path):
    contribute("north", seed=1)
    run_cli("merge", hub.root, "--out", tmp_path / "merged")
    path = tmp_path / "merged" / "provenance.json"
    record = json.loads(path.read_bytes())
    record["federation"]["hash"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(record))
    data, model = hospitals["south"], tmp_path / "merged"
    result = run_cli("calibrate", tmp_path / "south", "--data", data, "--model", model)
    assert result.exit_code == 1
    assert f"{model} is of the contract sha256:{'0' * 64}, this federation's is" in result.stderr


def test_means_of_groups_travel_in_the_place_of_moments(
    hub, hospitals, calibrate, run_cli, tmp_path
):
    """Beside a site that sends moments; the classifier is that of their sum, and is verified."""
    hospitals["north"] = write_table(tmp_path / "more", {"round": 12, "lobed": 11}, seed=3)
    whole = calibrate("south")
    small = calibrate("north", "--means", 5)
    read = {}
    for name, folder in (("south", whole), ("north", small)):
        with TensorFile(folder / "moments.safetensors") as file:
            read[name] = momentsfile.read(file)
    assert small.joinpath("moments.safetensors").stat().st_size < (
        whole.joinpath("moments.safetensors").stat().st_size / 10
    )
    with TensorFile(small / "moments.safetensors") as file:
        assert int(file.read("sizes").min()) >= 5
    expected = moments.discriminant(moments.add([read["north"], read["south"]]), 0.3)
    out = ("--option", "shrinkage=0.3", "--out", tmp_path / "first")
    assert run_cli("head", hub.root, *out).exit_code == 0
    found = load(tmp_path / "first" / "model.safetensors")
    torch.testing.assert_close(found["fc.weight"].double(), expected.weight, rtol=1e-5, atol=1e-6)
    assert run_cli("verify", tmp_path / "first", "--hub", hub.root).exit_code == 0


def test_means_replace_moments_of_the_same_model(hub, hospitals, calibrate, run_cli, tmp_path):
    hospitals["north"] = write_table(tmp_path / "more", {"round": 12, "lobed": 11}, seed=3)
    calibrate("north")
    calibrate("north", "--means", 5)
    told = json.loads(run_cli("status", hub.root, "--json").output)
    (sites_,) = [row["sites"] for row in told["calibrations"] if row["sites"]]
    assert [row["site"] for row in sites_] == ["north"]


def test_small_groups_and_other_measures_are_refused(hospitals, run_cli, tmp_path):
    def refused(*arguments):
        done = run_cli("calibrate", tmp_path / "north", "--data", hospitals["north"], *arguments)
        assert done.exit_code == 2, done.output
        return done.stderr.splitlines()[-1]

    assert refused("--means", 4) == (
        "Error: --means 4: the federation's policy asks for groups of at least 5 images, since the "
        "mean of few gives their features away: give a larger number."
    )
    assert refused("--means", 5, "--norms") == (
        "Error: --means is for the classifier of images of one class each: leave it out with "
        "--norms."
    )
    assert not (tmp_path / "north" / "calibrations").exists()
    few = run_cli("calibrate", tmp_path / "north", "--data", hospitals["north"], "--means", 5)
    assert few.exit_code == 1
    assert few.stderr.splitlines()[-1] == (
        "Error: no class has two groups of 5 training images, and one group says nothing of how "
        "images differ: give a smaller --means, or leave it out."
    )
