"""Norm statistics measured again: the real commands, from sites and from images."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from merge_kit import site as sites
from merge_kit.hub import open_hub
from merge_kit.tensorfile import write_tensors
from tests.finetune.conftest import HOSPITALS
from tests.finetune.pictures import draw
from tests.merge_kit.helpers import load


@pytest.fixture
def merged(hub, contribute, run_cli, tmp_path):
    contribute("east", seed=1)
    contribute("west", seed=2)
    assert run_cli("merge", hub.root, "--out", tmp_path / "merged").exit_code == 0
    return tmp_path / "merged"


@pytest.fixture
def pictures(tmp_path):
    """A flat folder of images that nobody has labelled."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(draw([0, 1, 2] * 4)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def restore(run_cli, merged, tmp_path):
    """`merge-kit restore`; gives the tensors, or the result where it fails."""

    def go(*arguments, out="restored", code=0, model=merged):
        result = run_cli("restore", model, *arguments, "--out", tmp_path / out)
        assert result.exit_code == code, result.output
        return result if code else load(tmp_path / out / "model.safetensors")

    return go


def differing(first, second):
    return {name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])}


def test_images_without_labels_change_norm_statistics_alone(restore, merged, pictures, tmp_path):
    found, before = restore("--images", pictures), load(merged / "model.safetensors")
    assert differing(found, before) == {"running_mean", "running_var"}
    record = json.loads((tmp_path / "restored" / "provenance.json").read_text())
    assert record["norms"]["images"]["count"] == 12
    assert "on 12 images without labels" in (tmp_path / "restored" / "README.md").read_text()


def test_labels_of_a_table_are_not_read_and_its_split_is(restore, pictures, tmp_path):
    rows = [f"{n}.png,whatever,{'train' if n < 8 else 'test'}" for n in range(12)]
    (pictures / "t.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
    restore("--data", pictures / "t.csv")
    record = json.loads((tmp_path / "restored" / "provenance.json").read_text())
    assert record["norms"]["images"]["count"] == 8


def test_sites_give_theirs_in_any_order_and_are_verified(
    hub, hospitals, calibrate, restore, merged, run_cli, tmp_path
):
    for name in hospitals:
        calibrate(name, "--model", merged, "--norms")
    both = restore("--hub", hub.root)
    assert torch.equal(
        restore("--hub", hub.root, out="2")["bn1.running_var"], both["bn1.running_var"]
    )
    alone = restore("--hub", hub.root, "--exclude", "south", out="3")
    assert not torch.equal(alone["bn1.running_var"], both["bn1.running_var"])
    result = run_cli("verify", tmp_path / "restored", "--hub", hub.root)
    assert result.exit_code == 0, result.output
    assert "are of the merged backbone" in result.output
    assert f"norms of {merged.name}" not in result.output


def test_what_leaves_the_site_is_sums_over_channels(calibrate, merged, hospitals):
    folder = calibrate("north", "--model", merged, "--norms")
    manifest = json.loads((folder / "norms.manifest.json").read_bytes())
    assert (manifest["kind"], manifest["class_counts"]) == ("norms", HOSPITALS["north"])
    tensors = load(folder / "norms.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"count", "sum", "squares"}


def test_the_classifier_comes_after_the_statistics(
    hub, calibrate, hospitals, restore, merged, run_cli, tmp_path
):
    for name in hospitals:
        calibrate(name, "--model", merged, "--norms")
    restore("--hub", hub.root)
    for name in hospitals:
        calibrate(name, "--model", tmp_path / "restored")
    solved = tmp_path / "solved"
    assert run_cli("head", hub.root, tmp_path / "restored", "--out", solved).exit_code == 0
    result = run_cli("verify", solved, "--hub", hub.root)
    assert result.exit_code == 0, result.output
    assert "## Norm statistics" in (solved / "README.md").read_text()
    refused = restore("--hub", hub.root, model=solved, out="4", code=2)
    assert "has a classifier that was solved for its norm statistics" in refused.stderr


def test_statistics_of_the_mergers_images_are_taken_as_they_are(
    hub, restore, pictures, run_cli, tmp_path
):
    restore("--images", pictures)
    result = run_cli("verify", tmp_path / "restored", "--hub", hub.root)
    assert result.exit_code == 0, result.output
    assert "Nothing here vouches for norm statistics" in result.output
    path = tmp_path / "restored" / "model.safetensors"
    tensors = load(path)
    tensors["fc.weight"][0, 0] += 1
    write_tensors(path, tensors, ("format", "pt"))
    assert run_cli("verify", tmp_path / "restored", "--hub", hub.root).exit_code == 1


def test_another_models_statistics_are_found_out(
    hub, calibrate, restore, merged, run_cli, tmp_path
):
    calibrate("north", "--model", merged, "--norms")
    restore("--hub", hub.root)
    path = tmp_path / "restored" / "provenance.json"
    record = json.loads(path.read_text())
    record["norms"]["about"] = record["base"]
    path.write_text(json.dumps(record))
    result = run_cli("verify", tmp_path / "restored", "--hub", hub.root)
    assert result.exit_code == 1
    assert "is no norms of the backbone" in result.output


def test_a_plain_merge_is_restored_and_verified(hub, contribute, run_cli, pictures, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        contribute(name, seed=seed)
    base = hub.root / "base"
    runs = [next((tmp_path / name / "runs").iterdir()) / "vector.safetensors" for name in "ab"]
    plain = tmp_path / "plain"
    assert run_cli("merge", base, *runs, "--out", plain).exit_code == 0
    result = run_cli("restore", plain, "--images", pictures, "--out", tmp_path / "restored")
    assert result.exit_code == 0, result.output
    result = run_cli("verify", tmp_path / "restored", "--base", base, *runs)
    assert result.exit_code == 0, result.output


def test_who_has_measured_is_shown(hub, calibrate, hospitals, merged, run_cli):
    calibrate("south", "--model", merged, "--norms")
    result = run_cli("status", hub.root, "--model", merged)
    assert f"Norm statistics of {merged}: south" in result.stdout
    found = json.loads(run_cli("status", hub.root, "--json").stdout)["norm_statistics"]
    assert [row["site"] for row in found[0]["sites"]] == ["south"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --images (and --data), or --hub."),
        (["--images", "p", "--hub", "h"], "give either --images (and --data), or --hub."),
    ],
)
def test_where_they_come_from_must_be_said(restore, arguments, sentence):
    assert restore(*arguments, code=2).stderr.splitlines()[-1] == f"Error: {sentence}"


def test_nobody_has_measured(hub, restore):
    assert (
        "no site has published norm statistics of this model"
        in restore("--hub", hub.root, code=1).stderr
    )


def test_restored_once_is_enough(restore, pictures, tmp_path):
    restore("--images", pictures)
    again = restore("--images", pictures, model=tmp_path / "restored", out="2", code=2)
    assert "have been measured again" in again.stderr


def test_a_backbone_without_batch_norm_has_nothing_to_measure(run_cli, tmp_path):
    hub = tmp_path / "vit"
    options = ("--weights", "none", "--classes", "a,b", "--input-size", "160")
    assert run_cli("init", hub, "--backbone", "test_vit", *options).exit_code == 0
    sites.join(open_hub(str(hub)), "north", tmp_path / "n")
    folder = tmp_path / "pairs"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(draw([0] * 12)):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    result = run_cli("calibrate", tmp_path / "n", "--data", folder, "--norms")
    assert result.exit_code == 1
    assert "this backbone has no batch norm" in result.stderr
