"""From a merged model back to the model of one of its sites."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import timm
import torch

from merge_kit import publishing, site
from merge_kit.contributions import list_entries
from merge_kit.errors import (
    BaseMismatchError,
    ProvenanceError,
    RecipeError,
    TensorFileError,
    UsageError,
    VectorError,
)
from merge_kit.federation import read_federation
from merge_kit.parameters import Role, roles_of
from merge_kit.sitemasks import read_header
from merge_kit.tensorfile import TensorFile, fingerprint_file, read_all, write_tensors
from merge_kit.unmasking import unmask
from tests.conftest import write_run
from tests.merge_kit.helpers import listing, load, says

SITES = {"north": 1, "south": 2, "west": 3}


@pytest.fixture
def base(hub):
    return hub.fetch("base/model.safetensors")


@pytest.fixture
def vectors(contribute):
    """Three sites have published; their vectors by name."""
    return {name: load(contribute(name, seed=seed).payload) for name, seed in SITES.items()}


@pytest.fixture
def merged(vectors, merge):
    return merge("merged", method="emr").folder


def weights(base, federation):
    with TensorFile(base) as file:
        roles = roles_of(file.specs, federation.classifier)
    return [name for name, role in roles.items() if role is Role.WEIGHT]


def emr(start, vectors, site):
    """theta_0 + lambda M * u of one site in float64, over flattened weights."""
    tau = np.stack([flat(vector, start).numpy() for vector in vectors.values()])
    gamma = np.where(tau.sum(axis=0) > 0, 1.0, -1.0)
    masks = tau * gamma > 0
    unified = gamma * np.abs(tau * masks).max(axis=0)
    own = list(vectors).index(site)
    kept = masks[own] * unified
    return flat(start, start).numpy() + np.abs(tau[own]).sum() / np.abs(kept).sum() * kept


def flat(tensors, names):
    return torch.cat([tensors[name].double().reshape(-1) for name in names])


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "emr"},
        {"method": "emr", "scale": 0.3},
        {"method": "emr", "lines": {"alpha": 0.5, "beta": 1.0}},
        {"method": "dare", "options": {"rule": "emr", "density": 1.0}},
    ],
    ids=["plain", "scaled", "layers scaled", "behind another rule"],
)
def test_a_sites_own_weights_come_back(hub, base, federation, vectors, merge, tmp_path, recipe):
    """At any scale of the merged model, by the formula."""
    folder = merge("scaled", **recipe).folder
    names = weights(base, federation)
    start = {name: tensor for name, tensor in load(base).items() if name in names}
    for name in SITES:
        out = unmask(folder, base, name, tmp_path / f"{name}-model").folder
        found = load(out / "model.safetensors")
        np.testing.assert_allclose(flat(found, start), emr(start, vectors, name), atol=1e-6)


def test_it_is_closer_to_the_sites_model_than_the_merged_one(base, vectors, merged, tmp_path):
    unmask(merged, base, "south", tmp_path / "out")
    start, all_sites = load(base), load(merged / "model.safetensors")
    own, tau = load(tmp_path / "out" / "model.safetensors"), vectors["south"]
    names = [name for name in tau if "conv" in name]
    site = flat(start, names) + flat(tau, names)
    assert (flat(own, names) - site).norm() < 0.7 * (flat(all_sites, names) - site).norm()


def test_heads_and_statistics_are_those_of_the_merged_model(base, federation, merged, tmp_path):
    unmask(merged, base, "north", tmp_path / "out")
    found, model = load(tmp_path / "out" / "model.safetensors"), load(merged / "model.safetensors")
    assert list(found) == list(model)
    same = {name for name in model if torch.equal(found[name], model[name])}
    assert same == set(model) - set(weights(base, federation))


def test_the_folder_loads_in_timm(base, merged, tmp_path):
    made = unmask(merged, base, "north", tmp_path / "out")
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert made.fingerprint == fingerprint_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


def test_the_masks_depend_on_the_set_of_contributions_alone(hub, vectors, merge):
    entries = list_entries(hub, read_federation(hub.root))
    one = merge("one", method="emr", entries=entries).folder / "masks"
    two = merge("two", method="emr", entries=entries[::-1]).folder / "masks"
    assert listing(one) == [f"{site}.safetensors" for site in SITES]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in listing(one))


def test_only_what_emr_has_merged_comes_back(base, vectors, merge, tmp_path):
    """One group of tensors by EMR, the rest by the mean: that stays the merged model's."""
    groups = [{"method": "emr", "match": ["layer2.*"]}]
    folder = merge(method="mean", groups=groups).folder
    unmask(folder, base, "west", tmp_path / "out")
    found, model = load(tmp_path / "out" / "model.safetensors"), load(folder / "model.safetensors")
    changed = {name for name in model if not torch.equal(found[name], model[name])}
    learned = {name for name in model if name.endswith(("weight", "bias"))}
    assert changed == {name for name in learned if name.startswith("layer2.")}


def test_a_merge_without_masks_keeps_none(base, vectors, merge, tmp_path):
    folder = merge(method="mean").folder
    assert not (folder / "masks").exists()
    with says(
        VectorError,
        f"{folder} keeps no masks of its sites: merge with '--method emr', which writes them.",
    ):
        unmask(folder, base, "north", tmp_path / "out")


def test_a_scale_of_zero_is_refused_and_leaves_nothing(vectors, merge, tmp_path):
    with pytest.raises(RecipeError, match=r"^nothing is left of the sites' vectors in the tensor"):
        merge("merged", method="emr", scale=0.0)
    assert [name for name in listing(tmp_path) if "merged" in name] == []


def test_each_contribution_of_a_site_is_unmasked_by_name_and_id(base, hub, contribute, tmp_path,
                                                               merge):  # fmt: skip
    """A site may keep an earlier contribution beside the new one."""
    contribute("south", seed=2)
    first = contribute("north", seed=1)
    joined = site.open_site(tmp_path / "north")
    write_run(joined, run := tmp_path / "north" / "runs" / "more", seed=9)
    parcel = publishing.prepare(joined, run, hub, alongside=True)
    publishing.publish(joined, run, hub, parcel)
    folder = merge(method="emr").folder
    names = sorted(f"north.{p.manifest.id[:12]}" for p in (first, parcel))
    assert listing(folder / "masks") == [f"{name}.safetensors" for name in (*names, "south")]
    found = unmask(folder, base, names[0], tmp_path / "out")
    assert found.header.contribution.startswith(names[0].removeprefix("north."))
    with says(
        VectorError,
        f"{folder} has no masks of the site 'north'; there are {', '.join(names)}, south.",
    ):
        unmask(folder, base, "north", tmp_path / "other")


def test_only_a_merged_model_is_unmasked(base, merged, tmp_path):
    (merged / "provenance.json").unlink()
    with says(
        ProvenanceError,
        f"{merged} is no merged model: it has no provenance.json; give a folder that 'merge-kit "
        "merge' made.",
    ):
        unmask(merged, base, "north", tmp_path / "out")


def test_a_merged_model_without_weights_is_said(base, merged, tmp_path):
    (merged / "model.safetensors").unlink()
    sentence = f"{merged}/model.safetensors does not exist: check the path."
    with says(TensorFileError, sentence):
        unmask(merged, base, "north", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", " is not sound JSON: it was changed or damaged."),
        ("{}", ": the key 'format' is missing."),
        ('{"federation": {}}', ": the key 'format' is missing."),
        ('{"base": "x", "base": "y"}', " names the key 'base' twice: it is refused."),
    ],
    ids=["damaged", "plain", "of a hub", "twice"],
)
def test_a_provenance_is_read_as_strictly_as_by_verify(base, merged, tmp_path, text, sentence):
    (merged / "provenance.json").write_text(text)
    with says(ProvenanceError, f"{merged / 'provenance.json'}{sentence}"):
        unmask(merged, base, "north", tmp_path / "out")


def test_another_base_is_refused(base, federation, merged, tmp_path):
    other = tmp_path / "other.safetensors"
    write_tensors(other, {**load(base), "fc.bias": torch.ones(3)})
    with says(
        BaseMismatchError,
        f"{other} has the fingerprint {fingerprint_file(other)}, {merged} was merged from the "
        f"base {federation.base_fingerprint}: give that base with --base.",
    ):
        unmask(merged, other, "north", tmp_path / "out")
    assert "out" not in listing(tmp_path)


def test_masks_of_another_merge_are_refused(base, merged, merge, tmp_path):
    path, other = merged / "masks" / "north.safetensors", merge("more", method="emr", scale=2.0)
    shutil.copy(other.folder / "masks" / "north.safetensors", path)
    weights = merged / "model.safetensors"
    with says(
        BaseMismatchError,
        f"{weights} has the fingerprint {fingerprint_file(weights)}, {path} belongs to "
        f"{other.fingerprint}: one of them was replaced; merge again.",
    ):
        unmask(merged, base, "north", tmp_path / "out")


def test_masks_that_do_not_fit_the_model_are_refused(base, merged, tmp_path):
    path = merged / "masks" / "north.safetensors"
    with TensorFile(path) as file:
        tensors, metadata = dict(read_all(file)), next(iter(file.metadata.items()))
    write_tensors(path, {**tensors, "bn1.bias": torch.zeros(1, dtype=torch.uint8)}, metadata)
    with says(
        VectorError,
        f"{path}: the mask of 'bn1.bias' is U8 [1], the merged model asks for U8 "
        f"{list(tensors['bn1.bias'].shape)}.",
    ):
        unmask(merged, base, "north", tmp_path / "out")


def test_a_damaged_file_of_masks_is_refused_like_any_other(base, merged, tmp_path):
    path = merged / "masks" / "north.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with says(
        TensorFileError,
        f"{path} is truncated: it should have {len(content)} bytes and has {len(content) - 3}; "
        "copy it again.",
    ):
        unmask(merged, base, "north", tmp_path / "out")


def test_an_existing_folder_is_kept(base, merged, tmp_path):
    (tmp_path / "out").mkdir()
    with says(
        UsageError, f"{tmp_path / 'out'} exists already: choose another --out, or remove it."
    ):
        unmask(merged, base, "north", tmp_path / "out")


@pytest.mark.parametrize("named", ["hub", "folder", "file"])
def test_the_command_takes_the_base_as_hub_folder_or_file(
    hub, base, vectors, run_cli, tmp_path, named
):
    folder, out = tmp_path / "merged", tmp_path / "north-model"
    made = run_cli("merge", hub.root, "--method", "emr", "--out", folder)
    assert made.exit_code == 0, made.stderr
    places = {"hub": hub.root, "folder": base.parent, "file": base}
    result = run_cli("unmask", folder, "--base", places[named], "--site", "north", "--out", out)
    assert result.exit_code == 0, result.stderr
    with TensorFile(folder / "masks" / "north.safetensors") as file:
        contribution = read_header(file).contribution[:12]
    assert result.stdout == (
        f"Model close to that of the site 'north' in {out}, out of {folder}\n"
        f"  contribution {contribution}\n"
        f"  fingerprint  {fingerprint_file(out / 'model.safetensors')}\n"
        f"\nNext: compare it with the merged model\n"
        f"  merge-kit evaluate {folder} {out} --data <labels.csv>\n"
    )


def test_the_command_says_in_one_sentence_what_is_wrong(hub, merged, run_cli, tmp_path):
    out = tmp_path / "out"
    result = run_cli("unmask", merged, "--base", hub.root, "--site", "east", "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {merged} has no masks of the site 'east'; there are north, south, west.\n"
    )
    result = run_cli("unmask", merged, "--base", tmp_path / "no", "--site", "north", "--out", out)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: the hub {tmp_path / 'no'} is not there: check the path, or mount the share.\n"
    )
    assert not out.exists()


def test_plain_checkpoints_come_back_too(run_cli, tmp_path):
    """Without a federation and without a config.json; masks by hand, both values differ in sign."""
    tensors = {"base": [0.0, 0.0], "a": [4.0, -1.0], "b": [1.0, 3.0]}
    for name, values in tensors.items():
        write_tensors(tmp_path / f"{name}.safetensors", {"body.weight": torch.tensor(values)})
    inputs = [tmp_path / f"{name}.safetensors" for name in tensors]
    made = run_cli("merge", *inputs, "--method", "emr", "--out", tmp_path / "merged")
    assert made.exit_code == 0, made.stderr
    assert load(tmp_path / "merged" / "model.safetensors")["body.weight"].tolist() == [4.0, 3.0]
    for name in ("a", "b"):
        out = tmp_path / f"{name}-model"
        result = run_cli(
            "unmask", tmp_path / "merged", "--base", inputs[0], "--site", name, "--out", out
        )
        assert result.exit_code == 0, result.stderr
        assert listing(out) == ["model.safetensors"]
    # a: 5 / 4 of the first value; b: 4 / 7 of both
    found = [load(tmp_path / f"{n}-model" / "model.safetensors")["body.weight"] for n in "ab"]
    assert found[0].tolist() == [5.0, 0.0]
    torch.testing.assert_close(found[1], torch.tensor([16 / 7, 12 / 7]))
