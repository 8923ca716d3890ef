"""The whole merge job on real folders."""

from __future__ import annotations

import json
import random

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from merge_kit import merging, publishing, signing, site, vector
from merge_kit.contributions import (
    PAYLOAD,
    SIGNATURE,
    Trust,
    bundle,
    current,
    folder_of,
    list_entries,
)
from merge_kit.errors import BaseMismatchError, ContributionError, RecipeError, UsageError
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.manifest import Manifest
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import fingerprint_file, write_tensors
from tests.conftest import write_statistics
from tests.merge_kit.helpers import listing, load, says

FILES = ["README.md", "config.json", "model.safetensors", "provenance.json"]


def content(folder):
    return {name: (folder / name).read_bytes() for name in listing(folder)}


def provenance(folder):
    return json.loads((folder / "provenance.json").read_bytes())


def unsign(hub, published):
    (hub.root / folder_of(published.manifest) / SIGNATURE).unlink()


def test_merged_folder_loads_in_timm_without_our_code(contribute, merge):
    contribute("north", seed=1)
    contribute("south", seed=2)
    folder = merge().folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert tuple(timm.data.resolve_model_data_config(model)["input_size"]) == (3, 32, 32)
    merged = load(folder / "model.safetensors")
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())


def test_the_folder_has_four_files_and_nothing_else_is_left(contribute, merge, tmp_path):
    contribute("north")
    before = set(listing(tmp_path))
    assert listing(merge().folder) == FILES
    assert set(listing(tmp_path)) - before == {"merged"}


def test_merging_one_contribution_gives_back_its_model(hub, contribute, merge):
    parcel = contribute("north", seed=1)
    merged, tau = load(merge().folder / "model.safetensors"), load(parcel.payload)
    for name, start in load(hub.fetch("base/model.safetensors")).items():
        expected = vector.apply(start, tau[name]) if name in tau else start
        torch.testing.assert_close(merged[name], expected.to(start.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_the_bytes_of_every_file_depend_on_the_set_alone(hub, contribute, merge, method):
    """Whatever the order in which they arrived or were listed, and however often named."""
    for number in range(4):
        contribute(f"s{number}", seed=number, counts=dict.fromkeys(
            ("round", "lobed", "granular"), 10 + number))  # fmt: skip
    entries = list_entries(hub, read_federation(hub.root))
    first = content(merge("one", method=method).folder)
    shuffled = random.Random(0).sample(entries, 4) + entries[:2]
    assert content(merge("two", method=method, entries=shuffled).folder) == first


def test_the_fingerprint_is_of_the_merged_weights(contribute, merge):
    contribute("north")
    merged = merge()
    assert merged.fingerprint == fingerprint_file(merged.folder / "model.safetensors")
    assert merged.fingerprint == provenance(merged.folder)["merged"]


def test_provenance_is_enough_to_merge_again(contribute, hub, merge, federation, tmp_path):
    one = contribute("north", seed=1, counts={"round": 30, "lobed": 0, "granular": 0})
    two = contribute("south", seed=2, counts={"round": 5, "lobed": 3, "granular": 2})
    record = provenance(merge(scale=0.5).folder)
    assert record["federation"] == {"name": "cells", "hash": federation.contract_hash}
    assert record["base"] == federation.base_fingerprint
    assert record["recipe"] == make_recipe({"method": "mean", "scale": 0.5}, "x").model_dump(
        mode="json"
    )
    assert record["refused"] == []
    # 30 examples of 40 and 5 + 2.5 + 2.5 of 40, averaging 1
    weights = {one.manifest.id: 1.5, two.manifest.id: 0.5}
    assert [c["id"] for c in record["contributions"]] == sorted(weights)
    for entry, parcel in (
        (c, {"north": one, "south": two}[c["site"]]) for c in record["contributions"]
    ):
        assert entry["weight"] == weights[entry["id"]]
        assert entry["payload"] == parcel.manifest.payload.sha256
        assert entry["trust"] == "admitted"
        signed = json.loads(hub.read(f"{folder_of(parcel.manifest)}/{SIGNATURE}"))
        assert entry["signature"] == signed["signature"]
        key = tmp_path / entry["site"] / site.KEY_FILE
        assert entry["public_key"] == signed["key"] == signing.public_key(key)


def test_the_model_card_is_one_that_hugging_face_reads(contribute, merge):
    contribute("north", seed=1)
    contribute("south", seed=2)
    text = (merge(method="ties").folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert {"merge", "task-vector", "medical"} <= set(card.data.tags)
    assert "# cells: ties of 2 sites" in text
    assert "| north | `" in text
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert make_recipe(recipe, "card").method == "ties"


def test_the_model_card_names_the_base_when_it_is_on_the_hub(contribute, hub, federation, merge):
    text = federation.model_copy(update={"weights_source": "timm/test_resnet.r160_in1k"}).to_yaml()
    hub.replace(FEDERATION_FILE, text.encode(), hub.read(FEDERATION_FILE))
    contribute("north")
    card = ModelCard((merge().folder / "README.md").read_text())
    assert card.data.base_model == "timm/test_resnet.r160_in1k"
    assert card.data.to_dict()["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        ({"value": None, "low": None, "high": None}, "| not known |"),
        ({"value": 0.5, "low": None, "high": None}, "| 0.500 |"),
        ({"value": 0.5, "low": 0.25, "high": 0.75}, "| 0.500 (0.250 to 0.750) |"),
    ],
    ids=["nothing", "no interval", "interval"],
)
def test_the_model_card_shows_what_a_site_reports(
    contribute, hub, merge, tmp_path, estimate, shown
):
    parcel = contribute("north")
    validation = {"balanced_accuracy": estimate, "macro_auroc": estimate}
    changes = {"validation": validation, "supersedes": f"sha256:{parcel.manifest.id}"}
    manifest = Manifest.model_validate({**parcel.manifest.model_dump(), **changes})
    key = tmp_path / "north" / site.KEY_FILE
    signature = signing.sign(key, signing.MANIFEST_CONTEXT, manifest.to_bytes())
    hub.publish(folder_of(manifest), bundle(manifest, parcel.payload, signature))
    assert shown in (merge().folder / "README.md").read_text()


def test_what_was_replaced_is_not_merged(contribute, merge):
    contribute("north", seed=1)
    second = contribute("north", seed=2)
    assert [c.id for c in merge().contributions] == [second.manifest.id]


def test_a_stranger_is_refused_with_the_command_that_admits_it(contribute, merge, tmp_path):
    parcel = contribute("north", admit=False)
    key = signing.public_key(tmp_path / "north" / site.KEY_FILE)
    with says(
        ContributionError,
        f"contribution north/{parcel.manifest.id[:12]} is signed by a key that is not admitted: "
        f"check it with the site and run 'merge-kit admit <hub> north {key}'. "
        "Leave it out with --exclude north or --skip-refused.",
    ):
        merge()


def test_an_unsigned_contribution_is_refused(contribute, hub, merge):
    parcel = contribute("north")
    unsign(hub, parcel)
    with says(
        ContributionError,
        f"contribution north/{parcel.manifest.id[:12]} is not signed "
        "(--allow-unsigned takes it all the same). "
        "Leave it out with --exclude north or --skip-refused.",
    ):
        merge()


def test_strangers_and_unsigned_ones_are_taken_when_allowed(contribute, hub, merge):
    contribute("north", admit=False)
    unsign(hub, contribute("south"))
    merged = merge(allow_unsigned=True)
    assert {c.site: c.trust for c in merged.contributions} == {
        "north": Trust.STRANGER,
        "south": Trust.UNSIGNED,
    }
    signatures = {c["site"]: c["trust"] for c in provenance(merged.folder)["contributions"]}
    assert signatures == {"north": "not admitted", "south": "unsigned"}


def test_what_is_refused_can_be_skipped_and_is_recorded(contribute, hub, merge):
    contribute("north")
    parcel = contribute("south", admit=False)
    unsign(hub, parcel)
    merged = merge(skip_refused=True)
    assert [c.site for c in merged.contributions] == ["north"]
    left_out = [{"site": "south", "id": parcel.manifest.id}]
    assert provenance(merged.folder)["refused"] == left_out


def test_a_damaged_payload_can_be_skipped(contribute, hub, merge):
    contribute("north")
    damaged = contribute("south").manifest
    (hub.root / folder_of(damaged) / PAYLOAD).write_bytes(b"")
    merged = merge(skip_refused=True)
    assert [c.site for c in merged.contributions] == ["north"]
    assert provenance(merged.folder)["refused"] == [{"site": "south", "id": damaged.id}]


def test_nothing_to_merge_is_said(merge):
    with says(
        ContributionError,
        "no contribution can be merged: sites publish with 'merge-kit publish', "
        "'merge-kit status' shows what is there.",
    ):
        merge()


def choose(hub, **options):
    entries = list_entries(hub, read_federation(hub.root))
    chosen, _ = merging.choose(entries, allow_unsigned=False, skip_refused=False, **options)
    return [c.site for c in chosen]


def test_sites_are_chosen_and_excluded_by_name(contribute, hub):
    for name in ("north", "south", "west"):
        contribute(name)
    assert choose(hub, sites=["north"]) == ["north"]
    assert sorted(choose(hub, exclude=["north"])) == ["south", "west"]
    with says(
        ContributionError,
        "no contribution of site 'east' is there; there are north, south, west.",
    ):
        choose(hub, exclude=["east"])


def test_a_damaged_payload_stops_the_merge_before_it_starts(contribute, hub, merge, tmp_path):
    contribute("north")
    damaged = hub.root / folder_of(contribute("south").manifest) / PAYLOAD
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(ContributionError, match=r"^contribution south/.* damaged or replaced"):
        merge()
    assert "merged" not in listing(tmp_path)


def test_a_norm_above_the_policy_stops_the_merge(contribute, hub, merge):
    contribute("north")
    strict = read_federation(hub.root).model_copy(update={"policy": Policy(maximum_norm=0.01)})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), hub.read(FEDERATION_FILE))
    with pytest.raises(ContributionError, match=r"above the 0\.01 of the federation's policy"):
        merge()


def test_another_base_is_refused(contribute, hub, federation, merge):
    contribute("north")
    weights = hub.root / "base" / "model.safetensors"
    write_tensors(weights, {**load(weights), "fc.bias": torch.ones(3)})
    with says(
        BaseMismatchError,
        f"{weights} has the fingerprint {fingerprint_file(weights)}, the federation 'cells' "
        f"expects {federation.base_fingerprint}: fetch the base again.",
    ):
        merge()


def test_an_existing_folder_is_kept_unless_replaced(contribute, merge, tmp_path):
    contribute("north")
    before = content(merge().folder)
    sentence = f"{tmp_path}/merged exists already: choose another --out, or pass --replace."
    with says(UsageError, sentence):
        merge(scale=2.0)
    assert content(tmp_path / "merged") == before
    assert content(merge(scale=2.0, replace=True).folder) != before


def test_a_merge_that_fails_midway_leaves_the_old_model(contribute, merge, tmp_path):
    contribute("north")
    before = content(merge().folder)
    with pytest.raises(RecipeError):
        merge(replace=True, weights={"south": 1.0})
    with pytest.raises(Exception, match="NaN or infinite"):
        merge(replace=True, scale=1e30, dtype="float16")
    assert content(tmp_path / "merged") == before
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


def test_only_a_merged_model_is_replaced(contribute, merge, tmp_path):
    """A slip of the hand must not remove a folder of images."""
    contribute("north")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "scan.png").touch()
    sentence = f"{tmp_path}/merged is no merged model: --replace does not remove it."
    with says(UsageError, sentence):
        merge(replace=True)
    assert listing(tmp_path / "merged") == ["scan.png"]


def test_no_path_of_this_machine_is_in_a_merged_model(contribute, hub, merge, tmp_path):
    contribute("north")
    (hub.root / folder_of(contribute("south").manifest) / PAYLOAD).unlink()
    for name, data in content(merge(skip_refused=True).folder).items():
        assert str(tmp_path).encode() not in data, name


# Methods that need statistics


@pytest.fixture
def there(hub):
    """All current contributions on the hub."""

    def find():
        entries = current(list_entries(hub, read_federation(hub.root)))
        return [entry.contribution for entry in entries if entry.contribution]

    return find


def missing(name):
    return (
        f"site '{name}' has published no fisher statistics for its vector: "
        "ask it to run 'merge-kit statistics <folder> --kind fisher' and to publish again, or take "
        "another method (plain checkpoints have none)."
    )


def vectors(contributions):
    return [c for c in contributions if c.kind == "vector"]


def republish(hub, root, run, **options):
    """Publish other statistics of a run."""
    joined = site.open_site(root)
    write_statistics(joined, run, "fisher", **options)
    parcel = publishing.prepare(joined, run, hub, "fisher")
    publishing.publish(joined, run, hub, parcel)
    return parcel.manifest


def test_statistics_change_nothing_for_a_method_that_does_not_ask(contribute, merge):
    contribute("north", seed=1)
    contribute("south", seed=2)
    before = content(merge("a").folder)
    contribute("south", seed=2, beside=["fisher", "gram"])
    assert content(merge("b").folder) == before


def test_a_method_gets_the_statistics_of_each_vector(contribute, there, hub, merge):
    """Provenance says which."""
    contribute("south", seed=2, beside=["gram", "fisher"])
    contribute("north", seed=1, beside=["fisher"])
    found = merging.find_statistics(vectors(there()), "fisher", there())
    assert [s.site for s in found] == [c.site for c in vectors(there())]
    assert [s.manifest.about for s in found] == [
        c.manifest.payload.sha256 for c in vectors(there())
    ]
    record = provenance(merge(method="fisher").folder)["contributions"]
    assert [c["statistics"] for c in record] == [{"fisher": s.id} for s in found]
    assert [c["id"] for c in record] == [c.id for c in vectors(there())]
    assert all("statistics" not in c for c in provenance(merge("b").folder)["contributions"])


def test_the_merge_weighs_values_by_the_statistics(contribute, there, hub, merge):
    """sum c_i F_i tau_i / sum c_i F_i with c_i = 1 / |F_i|, from the very files on the hub."""
    contribute("north", seed=1, beside=["fisher"])
    contribute("south", seed=2, beside=["fisher"])
    merged = load(merge(method="fisher").folder / "model.safetensors")
    base, name = load(hub.root / "base" / "model.safetensors"), "conv1.0.weight"
    tau = {c.site: load(c.payload)[name].double() for c in there() if c.kind == "vector"}
    files = {c.site: load(c.payload) for c in there() if c.kind == "fisher"}
    weights = {
        site: value
        for site, file in files.items()
        for value in [file[name].double().clamp(min=1e-6) / norm_of_weights(file)]
    }
    total = sum(weights[site] * tau[site] for site in tau)
    wanted = base[name].double() + total / sum(weights.values())
    torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-6, atol=1e-8)


def norm_of_weights(file):
    """Of the tensors that the method merges: all but the head."""
    body = [t.double().flatten() for n, t in file.items() if not n.startswith("fc.")]
    return torch.cat(body).norm()


def test_a_site_without_statistics_is_named_before_any_work(contribute, merge, tmp_path):
    contribute("north", seed=1, beside=["fisher"])
    contribute("south", seed=2, beside=["gram"])
    with says(RecipeError, missing("south")):
        merge(method="fisher")
    assert not (tmp_path / "merged").exists()


def test_a_method_behind_dare_gets_its_statistics(contribute, merge):
    contribute("north", seed=1)
    contribute("south", seed=2)
    with says(RecipeError, missing(sites_in_order(merge)[0])):
        merge("b", method="dare", options={"rule": "fisher"})


def sites_in_order(merge):
    return [c["site"] for c in provenance(merge("order").folder)["contributions"]]


def test_statistics_of_a_replaced_vector_are_not_used(contribute, merge):
    contribute("north", seed=1, beside=["fisher"])
    contribute("north", seed=2)
    with says(RecipeError, missing("north")):
        merge(method="fisher")


def test_unsigned_statistics_do_not_speak_of_a_signed_vector(contribute, merge, hub):
    """Anybody could have put them there."""
    contribute("north", beside=["fisher"])
    for entry in list_entries(hub, read_federation(hub.root)):
        if entry.kind == "fisher":
            unsign(hub, entry.contribution)
    with says(RecipeError, missing("north")):
        merge(method="fisher", allow_unsigned=True)


def test_the_latest_of_several_statistics_is_used(contribute, there, hub, tmp_path):
    """Whatever the order in which they are found."""
    contribute("north", beside=["fisher"])
    root = tmp_path / "north"
    first = vectors(there())
    later = republish(hub, root, root / "runs" / "seed0", seed=7, created_at="2026-11-25T00:00:00Z")
    entries = list_entries(hub, read_federation(hub.root))
    every = [entry.contribution for entry in entries]
    assert sum(c.kind == "fisher" for c in every) == 2
    (found,) = merging.find_statistics(first, "fisher", every)
    assert found.id == later.id
    (found,) = merging.find_statistics(first, "fisher", every[::-1])
    assert found.id == later.id


def test_unsound_statistics_replace_nothing(contribute, merge, hub, tmp_path):
    contribute("north", beside=["fisher"])
    root = tmp_path / "north"
    later = republish(hub, root, root / "runs" / "seed0", seed=7)
    assert later.supersedes is not None
    (hub.root / folder_of(later) / PAYLOAD).write_bytes(b"")
    record = provenance(merge(method="fisher").folder)["contributions"]
    assert [f"sha256:{c['statistics']['fisher']}" for c in record] == [later.supersedes]


def test_damaged_statistics_stop_only_a_method_that_asks_for_them(
    contribute, hub, run_cli, tmp_path
):
    parcel = contribute("north", beside=["fisher"])
    for payload in hub.root.glob(f"contributions/north/*/{PAYLOAD}"):
        if parcel.manifest.id not in str(payload):
            payload.write_bytes(b"")
    result = run_cli("merge", hub.root, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    result = run_cli("merge", hub.root, "--method", "fisher", "--out", tmp_path / "b")
    assert (result.exit_code, result.stderr) == (1, f"Error: {missing('north')}\n")


def test_the_command_finds_the_statistics(contribute, hub, run_cli, tmp_path):
    contribute("north", seed=1, beside=["fisher", "gram"])
    contribute("south", seed=2, beside=["fisher"])
    result = run_cli("merge", hub.root, "--method", "fisher", "--out", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "fisher of 2 contributions" in result.stdout
    assert all(c["statistics"] for c in provenance(tmp_path / "m")["contributions"])
    local = list(hub.root.glob("contributions/*/*"))
    result = run_cli("merge", hub.root, *local, "--method", "fisher", "--out", tmp_path / "l")
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "l") == content(tmp_path / "m")
