"""What a site's training starts from: the federation's classifier, or its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from merge_kit.contributions import PAYLOAD, ROOT
from merge_kit.tensorfile import fingerprint
from tests.merge_kit.helpers import load

QUICK = ("--steps", 2, "--validations", 1, "--batch-size", 8, "--head-steps", 5)


@pytest.fixture
def finetune(hospitals, run_cli, tmp_path):
    """`merge-kit finetune`; gives the result and the run's folder."""

    def go(name, *arguments):
        result = run_cli("finetune", tmp_path / name, "--data", hospitals[name], *QUICK, *arguments)
        if result.exit_code:
            return result, None
        return result, max((tmp_path / name / "runs").iterdir(), key=lambda p: p.stat().st_mtime)

    return go


def head_in(path):
    return {n: t for n, t in load(path).items() if n.startswith("fc.")}


def test_two_sites_keep_the_classifier_of_the_federation(
    hub, hospitals, calibrate, finetune, run_cli, tmp_path
):
    for name in hospitals:
        calibrate(name)
    out = tmp_path / "first"
    assert run_cli("head", hub.root, "--out", out).exit_code == 0
    common = head_in(out / "model.safetensors")
    for name in hospitals:
        result, run = finetune(name)
        assert "starts from the federation's classifier, of 2 sites." in result.stderr
        found = head_in(run / "model" / "model.safetensors")
        assert all(torch.equal(found[n], common[n]) for n in common)
        told = json.loads((run / "manifest.draft.json").read_bytes())["training"]["head"]
        assert told == fingerprint(sorted(common.items()))


def test_merging_such_vectors_keeps_it_too(hub, hospitals, calibrate, finetune, run_cli, tmp_path):
    for name in hospitals:
        calibrate(name)
    for name in hospitals:
        _, run = finetune(name)
        assert run_cli("publish", tmp_path / name, "--run", run).exit_code == 0
    run_cli("merge", hub.root, "--method", "sum", "--out", tmp_path / "merged")
    run_cli("head", hub.root, "--out", tmp_path / "first")
    merged, common = (head_in(tmp_path / f / "model.safetensors") for f in ("merged", "first"))
    for name in common:
        torch.testing.assert_close(merged[name], common[name])


def test_without_moments_the_site_trains_its_own(finetune):
    result, run = finetune("north")
    assert (
        "starts from the site's own classifier: no site has calibrated the base yet "
        "('merge-kit calibrate' before 'finetune' makes vectors that merge better)."
    ) in result.stderr
    told = json.loads((run / "manifest.draft.json").read_bytes())["training"]
    assert told.get("head") is None
    assert float(head_in(run / "model" / "model.safetensors")["fc.weight"].abs().max()) > 0


def test_the_site_s_own_can_be_asked_for(calibrate, finetune):
    calibrate("south")
    result, _ = finetune("north", "--head", "own")
    assert "starts from the site's own classifier, as asked for." in result.stderr


def test_the_federation_s_can_be_required(hub, finetune, tmp_path):
    result, _ = finetune("north", "--head", "federation")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: there is no classifier of the federation to start from: no site has calibrated the "
        "base yet ('merge-kit calibrate' before 'finetune' makes vectors that merge better)."
    )


def test_a_hub_that_is_away_is_no_obstacle(hub, finetune, tmp_path):
    shutil.move(hub.root, tmp_path / "elsewhere")
    result, _ = finetune("north")
    assert result.exit_code == 0
    assert "starts from the site's own classifier: " in result.stderr


def test_moments_that_are_damaged_are_not_used(hub, calibrate, finetune):
    calibrate("south")
    (path,) = (hub.root / ROOT / "south").glob(f"*/{PAYLOAD}")
    path.write_bytes(path.read_bytes()[:-1])
    result, _ = finetune("north")
    assert "starts from the site's own classifier: " in result.stderr


def test_a_run_goes_on_with_the_classifier_that_it_began_with(calibrate, finetune, tmp_path):
    calibrate("north")
    _, run = finetune("north")
    first = load(run / "vector.safetensors")
    for name in ("summary.json", "vector.safetensors"):
        (run / name).unlink()
    calibrate("south")  # the federation's classifier is another one now
    result, again = finetune("north")
    assert again == run
    assert "starts from the federation's classifier, as it was." in result.stderr
    assert all(torch.equal(first[n], t) for n, t in load(run / "vector.safetensors").items())


def test_a_run_that_began_with_its_own_goes_on_with_it(calibrate, finetune):
    _, run = finetune("north")
    for name in ("summary.json",):
        (run / name).unlink()
    (run / "checkpoint.pt").write_bytes(b"")  # as a killed run leaves one; its content comes later
    calibrate("south")
    result, _ = finetune("north")
    assert "checkpoint.pt cannot be read" in result.stderr
    assert "federation's" not in result.stderr
