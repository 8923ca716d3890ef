"""Classifiers solved on a hub: the real command, real folders."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from merge_kit import moments
from merge_kit.contributions import PAYLOAD, folder_of
from merge_kit.federation import read_federation
from merge_kit.reheading import find_model
from tests.conftest import drawn
from tests.merge_kit.helpers import listing, load

HEAD = ("fc.bias", "fc.weight")


@pytest.fixture
def solve(hub, run_cli, tmp_path):
    """`merge-kit head`; gives the classifier."""

    def go(*arguments, out="solved", code=0):
        result = run_cli("head", hub.root, *arguments, "--out", tmp_path / out)
        assert result.exit_code == code, result.output
        return result if code else load(tmp_path / out / "model.safetensors")

    return go


@pytest.fixture
def merged(hub, contribute, run_cli, tmp_path):
    """A merged model, and the fingerprint of its backbone."""
    contribute("north", seed=1)
    contribute("south", seed=2)
    folder = tmp_path / "merged"
    assert run_cli("merge", hub.root, "--out", folder).exit_code == 0
    return folder, find_model(hub, read_federation(hub.root), folder).backbone


def pooled(*sites):
    """The classifier of all sites' images, from the images."""
    found = [drawn(counts, seed=seed) for seed, counts in sites]
    features = torch.cat([features for features, _ in found])
    labels = torch.cat([labels for _, labels in found])
    return moments.discriminant(moments.measure(features, labels, 3), 0.2)


def test_sites_on_the_base_give_the_pooled_classifier(measured, solve):
    measured("north", seed=1, counts=(9, 30, 7))
    measured("south", seed=2, counts=(20, 0, 8))
    found = solve("--option", "shrinkage=0.2")
    expected = pooled((1, (9, 30, 7)), (2, (20, 0, 8)))
    torch.testing.assert_close(found["fc.weight"].double(), expected.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["fc.bias"].double(), expected.bias, rtol=1e-6, atol=1e-6)


def test_all_but_the_classifier_is_the_model_s(hub, measured, merged, solve):
    folder, backbone = merged
    measured("north", about=backbone)
    found, before = solve(folder), load(folder / "model.safetensors")
    assert {n for n in before if not torch.equal(found[n], before[n])} == set(HEAD)


def test_who_is_left_out_has_never_been_there(measured, solve):
    measured("north", seed=1)
    alone = solve(out="a")
    measured("south", seed=2)
    both, without = solve(out="b"), solve("--exclude", "south", out="c")
    assert not torch.equal(both["fc.weight"], alone["fc.weight"])
    assert all(torch.equal(without[name], alone[name]) for name in alone)


def test_the_order_of_arrival_does_not_matter(measured, solve, tmp_path):
    for name in ("b", "a", "c"):
        measured(name, seed=ord(name))
    first = solve(out="1")
    again = solve(out="2")
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (
        tmp_path / "2" / "model.safetensors"
    ).read_bytes()
    assert torch.equal(first["fc.weight"], again["fc.weight"])


def test_moments_of_another_backbone_are_not_used(measured, merged, solve):
    folder, _ = merged
    measured("north")  # of the base
    result = solve(folder, code=1)
    assert result.stderr == (
        "Error: no site has published moments of this model: sites make them with "
        "'merge-kit calibrate' and 'merge-kit publish'; labelled images of your own may stand in, "
        "with --data.\n"
    )


def test_a_solved_model_keeps_its_backbone_and_can_be_solved_again(
    hub, measured, merged, solve, tmp_path
):
    folder, backbone = merged
    measured("north", about=backbone, seed=1)
    first = solve(folder, out="once")
    measured("south", about=backbone, seed=2)
    second = solve(tmp_path / "once", out="twice")
    assert find_model(hub, read_federation(hub.root), tmp_path / "once").backbone == backbone
    assert not torch.equal(first["fc.weight"], second["fc.weight"])


def test_timm_loads_what_was_solved(measured, solve, tmp_path):
    measured("north", seed=1)
    solve()
    model = timm.create_model(f"local-dir:{tmp_path / 'solved'}", pretrained=True).eval()
    features, labels = drawn((20, 20, 20), seed=7)
    assert float((model.fc(features).argmax(dim=1) == labels).float().mean()) > 0.9


@pytest.mark.parametrize("on_base", [True, False])
def test_a_solved_model_is_verified(hub, measured, merged, solve, run_cli, tmp_path, on_base):
    folder, backbone = merged
    measured("north", about=None if on_base else backbone)
    solve(*([] if on_base else [folder]))
    before = listing(tmp_path / "solved")
    result = run_cli("verify", tmp_path / "solved", "--hub", hub.root)
    assert result.exit_code == 0, result.stdout
    assert listing(tmp_path / "solved") == before == [
        "README.md", "config.json", "model.safetensors", "provenance.json",
    ]  # fmt: skip


def test_a_solved_model_in_half_precision_is_verified(
    hub, contribute, measured, solve, run_cli, tmp_path
):
    contribute("north", seed=1)
    recipe = tmp_path / "half.yaml"
    recipe.write_text("method: ties\ndtype: bfloat16\n")
    run_cli("merge", hub.root, "--recipe", recipe, "--out", tmp_path / "half")
    measured("north", about=find_model(hub, read_federation(hub.root), tmp_path / "half").backbone)
    assert solve(tmp_path / "half")["fc.weight"].dtype == torch.bfloat16
    assert run_cli("verify", tmp_path / "solved", "--hub", hub.root).exit_code == 0


def state(folder, change):
    path = folder / "provenance.json"
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        (lambda r: r["head"].update(about="sha256:" + "0" * 64), "backbone"),
        (lambda r: r["head"]["options"].update(shrinkage=0.5), "rebuilt"),
        (lambda r: r["head"]["moments"].pop(), "rebuilt"),
        (lambda r: r["head"]["moments"][0].update(payload="sha256:" + "0" * 64), "moments"),
        (lambda r: r["contributions"].pop(), "rebuilt"),
        (lambda r: r.pop("head"), "rebuilt"),
    ],
)
def test_what_is_stated_wrongly_of_a_classifier_is_named(
    hub, measured, merged, solve, run_cli, tmp_path, change, subject
):
    folder, backbone = merged
    parcels = [measured(name, about=backbone, seed=ord(name[0])) for name in ("north", "south")]
    solve(folder)
    state(tmp_path / "solved", change)
    result = run_cli("verify", tmp_path / "solved", "--hub", hub.root, "--json")
    report = json.loads(result.stdout)
    differing = {c["subject"] for c in report["checks"] if c["state"] == "differs"}
    names = {f"{p.manifest.site}/{p.manifest.id[:12]}" for p in parcels}
    assert result.exit_code == 1
    assert differing & (names if subject in ("moments", "backbone") else {subject}) or (
        subject in differing
    )


def test_a_changed_payload_is_refused_by_name(hub, measured, solve):
    parcel = measured("north")
    path = hub.root / folder_of(parcel.manifest) / PAYLOAD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = solve(code=1)
    assert "the payload is not what the site signed" in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alter": lambda t: t["sums"].mul_(5)}, "holds sums of squares that are too small"),
        ({"alter": lambda t: t["gram"].fill_(torch.nan)}, "NaN or infinite"),
        ({"header": {"kind": "gram"}}, "is announced as moments and holds gram"),
        ({"header": {"about": "sha256:" + "0" * 64}}, "is announced for the backbone"),
    ],
)
def test_moments_that_are_not_sound_are_refused_and_can_be_left_out(
    measured, solve, changes, words
):
    measured("south", seed=2)
    measured("north", seed=1, **changes)
    result = solve(code=1)
    assert words in result.stderr
    assert "Leave it out with --exclude north or --skip-refused." in result.stderr
    left = solve("--skip-refused", out="left")
    assert all(torch.equal(left[n], t) for n, t in solve("--exclude", "north", out="other").items())


def test_a_stranger_s_moments_are_taken_only_when_asked(measured, solve):
    measured("north", seed=1)
    measured("stranger", seed=2, admit=False)
    assert "is signed by a key that is not admitted" in solve(code=1).stderr
    solve("--allow-unsigned")


def test_status_says_who_has_calibrated_what(hub, measured, merged, run_cli):
    folder, backbone = merged
    measured("north")
    measured("south", about=backbone)
    result = run_cli("status", hub.root, "--model", folder)
    assert "Calibrated the base: north; not yet: south" in result.stdout
    assert f"Calibrated {folder}: south; not yet: north" in result.stdout
    facts = json.loads(run_cli("status", hub.root, "--json").stdout)
    found = {c["backbone"]: [s["site"] for s in c["sites"]] for c in facts["calibrations"]}
    assert found[backbone] == ["south"]


def test_a_plain_merge_passes_moments_over(hub, merged, measured, run_cli, tmp_path):
    measured("north")
    assert run_cli("merge", hub.root, "--out", tmp_path / "again").exit_code == 0
    first, again = (load(f / "model.safetensors") for f in (merged[0], tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_new_moments_of_a_backbone_replace_the_site_s_old_ones(measured, solve):
    measured("north", seed=1)
    measured("north", seed=2)
    found = solve("--option", "shrinkage=0.2")
    torch.testing.assert_close(
        found["fc.weight"].double(), pooled((2, (20, 20, 20))).weight, rtol=1e-6, atol=1e-6
    )


@pytest.fixture
def three(hub, contribute, run_cli, tmp_path):
    """Three merged models and the fingerprints of their backbones."""
    for seed, name in enumerate(("north", "south", "west")):
        contribute(name, seed=seed + 1)
    found = {}
    for method in ("mean", "sum", "ties"):
        folder = tmp_path / method
        assert run_cli("merge", hub.root, "--method", method, "--out", folder).exit_code == 0
        found[folder] = find_model(hub, read_federation(hub.root), folder).backbone
    return found


def test_of_several_models_the_one_that_loses_least_elsewhere_is_taken(
    hub, three, measured, run_cli, tmp_path
):
    # The classes are ever further apart in the features of the three.
    for spread, (folder, about) in zip((0.2, 3.0, 1.0), three.items(), strict=True):
        for seed, name in enumerate(("north", "south", "west")):
            measured(name, about=about, seed=seed + 10 * len(folder.name), spread=spread)
    out = tmp_path / "chosen"
    result = run_cli("head", hub.root, *three, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"classifier of 3 site(s) on {tmp_path / 'sum'}" in result.stdout
    lines = [line for line in result.stdout.splitlines() if "unseen site" in line]
    names = [str(tmp_path / name) for name in ("sum", "ties", "mean")]
    assert [line.split()[-1] for line in lines] == names
    assert find_model(hub, read_federation(hub.root), out).backbone == three[tmp_path / "sum"]
    assert run_cli("verify", out, "--hub", hub.root).exit_code == 0


def test_models_are_compared_on_the_sites_that_measured_them_all(
    hub, three, measured, run_cli, tmp_path
):
    first, second, _ = three.items()
    for folder, about in (first, second):
        measured("north", about=about, seed=len(folder.name))
    result = run_cli("head", hub.root, first[0], second[0], "--out", tmp_path / "x")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, (
        "Error: 1 site(s) have calibrated all 2 models: to choose among them two sites or more "
        "must have measured each."
    ))  # fmt: skip
    assert not (tmp_path / "x").exists()
