"""Models made again without what was withdrawn, by the commands."""

from __future__ import annotations

import json
import shutil

import pytest

from merge_kit.checkpoints import WEIGHTS
from tests.merge_kit.helpers import load


@pytest.fixture
def three(contribute):
    """Three sites with vectors and statistics."""
    return {
        name: contribute(name, seed=seed, beside=("fisher",))
        for seed, name in enumerate(("north", "south", "west"), 1)
    }


def same(one, other):
    left, right = load(one / WEIGHTS), load(other / WEIGHTS)
    return set(left) == set(right) and all((left[n] == t).all() for n, t in right.items())


def ids(folder):
    told = json.loads((folder / "provenance.json").read_text())
    return [part["site"] for part in told["contributions"]]


@pytest.mark.parametrize("method", ["mean", "ties", "fisher"])
def test_a_model_is_what_a_merge_of_the_rest_gives(three, hub, ok, tmp_path, method):
    for out in ("merged", "other"):
        ok("merge", hub.root, "--method", method, "--out", tmp_path / out)
    ok("withdraw", tmp_path / "south", "--all")
    ok("merge", hub.root, "--method", method, "--out", tmp_path / "rest")
    said = ok("remerge", hub.root, tmp_path / "merged", tmp_path / "other")
    assert (
        said.count(f"without south/{three['south'].manifest.id[:12]}: site 'south' has with") == 2
    )
    assert "  of north, west" in said or "  of west, north" in said
    for out in ("merged", "other"):
        assert same(tmp_path / out, tmp_path / "rest")
        assert sorted(ids(tmp_path / out)) == ["north", "west"]
        ok("verify", tmp_path / out, "--hub", hub.root)
    assert "holds nothing that was withdrawn" in ok("remerge", hub.root, tmp_path / "merged")


def test_a_model_that_holds_nothing_of_it_stays_as_it_is(three, hub, ok, tmp_path):
    ok("merge", hub.root, "--exclude", "south", "--out", tmp_path / "merged")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "merged").iterdir()}
    ok("withdraw", tmp_path / "south", "--all")
    ok("remerge", hub.root, tmp_path / "merged")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


def test_what_a_revoked_key_has_signed_goes_too(three, hub, ok, tmp_path):
    ok("merge", hub.root, "--out", tmp_path / "merged")
    ok("revoke", hub.root, "west")
    said = ok("remerge", hub.root, tmp_path / "merged")
    assert "which was revoked on" in said
    assert sorted(ids(tmp_path / "merged")) == ["north", "south"]


def test_what_is_no_more_to_be_made_is_said_and_left(three, hub, ok, run_cli, tmp_path):
    ok("merge", hub.root, "--site", "north", "--out", tmp_path / "alone")
    ok("merge", hub.root, "--out", tmp_path / "all")
    ok("withdraw", tmp_path / "north", "--all")
    before = load(tmp_path / "alone" / WEIGHTS)
    found = run_cli("remerge", hub.root, tmp_path / "alone", tmp_path / "all")
    assert found.exit_code == 1
    assert f"nothing is left of {tmp_path / 'alone'}" in found.stderr
    assert sorted(ids(tmp_path / "all")) == ["south", "west"]  # the other one is made all the same
    after = load(tmp_path / "alone" / WEIGHTS)
    assert all((before[n] == t).all() for n, t in after.items())


def test_what_has_vanished_is_not_taken_for_withdrawn(three, hub, ok, run_cli, tmp_path):
    ok("merge", hub.root, "--out", tmp_path / "merged")
    shutil.rmtree(hub.root / "contributions" / "west")
    found = run_cli("remerge", hub.root, tmp_path / "merged")
    assert found.exit_code == 1
    assert "is not on the hub, and nobody has withdrawn it" in found.stderr


def test_a_model_of_elsewhere_is_refused(three, hub, ok, run_cli, tmp_path):
    ok("merge", hub.root, "--out", tmp_path / "merged")
    path = tmp_path / "merged" / "provenance.json"
    told = json.loads(path.read_text())
    told["federation"]["hash"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(told))
    found = run_cli("remerge", hub.root, tmp_path / "merged")
    assert f"{tmp_path / 'merged'} was not merged from {hub.uri}: give its own hub." in found.stderr


# With classifiers


@pytest.fixture
def calibrated(hub, hospitals, calibrate, ok, tmp_path):
    """A merge of two sites that both have calibrated, with its classifier solved."""
    quick = ("--steps", 2, "--head-steps", 20, "--batch-size", 8, "--validations", 1)
    for name, table in hospitals.items():
        ok("finetune", tmp_path / name, "--data", table, *quick)
        ok("publish", tmp_path / name)
    ok("merge", hub.root, "--out", tmp_path / "merged")
    for name in hospitals:
        calibrate(name, "--model", tmp_path / "merged")
    ok("head", hub.root, tmp_path / "merged", "--out", tmp_path / "calibrated")
    return tmp_path / "calibrated"


def moments_of(hub, ok, site):
    facts = json.loads(ok("status", hub.root, "--json"))
    (found,) = [s["id"] for m in facts["calibrations"] for s in m["sites"] if s["site"] == site]
    return found


def test_without_its_moments_a_classifier_is_solved_from_the_rest(calibrated, hub, ok, tmp_path):
    ok("withdraw", tmp_path / "south", moments_of(hub, ok, "south"))
    stated = json.loads((calibrated / "provenance.json").read_text())["head"]["options"]
    shrinkage = ("--option", f"shrinkage={stated['shrinkage']}")
    ok("head", hub.root, tmp_path / "merged", *shrinkage, "--out", tmp_path / "rest")
    said = ok("remerge", hub.root, calibrated)
    assert "made again" in said
    assert "calibrate what is new" not in said
    assert same(calibrated, tmp_path / "rest")
    ok("verify", calibrated, "--hub", hub.root)


def test_without_a_vector_its_classifier_has_to_be_measured_again(calibrated, hub, ok, tmp_path):
    facts = json.loads(ok("status", hub.root, "--json"))
    (vector,) = [row["id"] for row in facts["contributions"] if row["site"] == "south"]
    ok("withdraw", tmp_path / "south", vector)
    ok("merge", hub.root, "--out", tmp_path / "rest")
    said = ok("remerge", hub.root, calibrated)
    assert f"merge-kit calibrate <site> --data <labels.csv> --model {calibrated} --publish" in said
    assert same(calibrated, tmp_path / "rest")
    assert json.loads((calibrated / "provenance.json").read_text()).get("head") is None


def test_a_student_takes_images_to_be_made_again(calibrated, hub, hospitals, ok, run_cli, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: distill\ntraining: {steps: 1, batch_size: 8, validations: 1}\n")
    ok("distill", hub.root, "--recipe", recipe, "--data", hospitals["north"],
       "--out", tmp_path / "student")  # fmt: skip
    before = (tmp_path / "student" / WEIGHTS).read_bytes()
    ok("withdraw", tmp_path / "south", "--all")
    found = run_cli("remerge", hub.root, tmp_path / "student")
    assert found.exit_code == 1
    assert "takes images to be made again: run 'merge-kit distill'" in found.stderr
    assert (tmp_path / "student" / WEIGHTS).read_bytes() == before


def test_statistics_alone_that_were_withdrawn_are_not_overlooked(three, hub, ok, run_cli, tmp_path):
    ok("merge", hub.root, "--method", "fisher", "--out", tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    (fisher,) = [c["statistics"]["fisher"] for c in told["contributions"] if c["site"] == "south"]
    before = (tmp_path / "merged" / WEIGHTS).read_bytes()
    ok("withdraw", tmp_path / "south", fisher)
    found = run_cli("remerge", hub.root, tmp_path / "merged")
    assert found.exit_code == 1
    assert (
        f"{tmp_path / 'merged'} was made with the fisher {fisher[:12]} of site 'south', which is "
        "withdrawn or refused while its vector is not: merge again with --exclude south"
    ) in found.stderr
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == before
    shutil.rmtree(hub.root / "contributions" / "south" / fisher)
    assert "which is not on the hub" in run_cli("remerge", hub.root, tmp_path / "merged").stderr
    # With the vector gone too there is nothing to decide.
    ok("withdraw", tmp_path / "south", "--all")
    ok("remerge", hub.root, tmp_path / "merged")
    assert sorted(ids(tmp_path / "merged")) == ["north", "west"]


@pytest.mark.parametrize("where", ["the recipe", "a group"])
def test_weights_of_sites_are_not_guessed(three, hub, ok, run_cli, tmp_path, where):
    weights = "weights: {north: 0.5, south: 0.2, west: 0.3}"
    text = f"method: sum\n{weights}\n"
    if where == "a group":
        text = f"method: sum\ngroups:\n- match: ['*conv1*']\n  method: sum\n  {weights}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    ok("merge", hub.root, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "merged")
    before = (tmp_path / "merged" / WEIGHTS).read_bytes()
    assert "holds nothing that was withdrawn" in ok("remerge", hub.root, tmp_path / "merged")
    ok("withdraw", tmp_path / "south", "--all")
    found = run_cli("remerge", hub.root, tmp_path / "merged")
    assert found.exit_code == 1
    assert (
        f"the recipe of {tmp_path / 'merged'} has a weight for site 'south', which is gone"
        in found.stderr
    )
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == before


def test_whoever_removes_a_signature_does_not_undo_a_revocation(three, hub, ok, tmp_path):
    ok("merge", hub.root, "--out", tmp_path / "merged")
    ok("revoke", hub.root, "west")
    for signature in (hub.root / "contributions" / "west").rglob("manifest.sig"):
        signature.unlink()
    said = ok("remerge", hub.root, tmp_path / "merged")
    assert "it does not carry the signature of an admitted site any more: ask 'west'" in said
    assert sorted(ids(tmp_path / "merged")) == ["north", "south"]


def test_what_was_merged_unsigned_stays(three, hub, ok, tmp_path):
    """Whoever merged it had said that it was to be taken all the same."""
    (signature,) = (
        hub.root / "contributions" / "west" / three["west"].manifest.id
    ).glob("*.sig")  # fmt: skip
    signature.unlink()
    ok("merge", hub.root, "--allow-unsigned", "--out", tmp_path / "merged")
    assert "holds nothing that was withdrawn" in ok("remerge", hub.root, tmp_path / "merged")


def test_a_running_sum_is_without_it_too(three, hub, ok, tmp_path):
    ok("merge", hub.root, "--method", "sum", "--keep-sum", "--out", tmp_path / "merged")
    ok("withdraw", tmp_path / "south", "--all")
    ok("merge", hub.root, "--method", "sum", "--keep-sum", "--out", tmp_path / "rest")
    ok("remerge", hub.root, tmp_path / "merged")
    sums = "running-sum/sums.safetensors"
    assert (tmp_path / "merged" / sums).read_bytes() == (tmp_path / "rest" / sums).read_bytes()
