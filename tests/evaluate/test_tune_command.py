"""merge-kit tune on a real federation and generated images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evaluate import tuning
from evaluate.candidates import base_network, states
from evaluate.tuning import Coefficients, Settings
from finetune import network
from finetune.cases import load_cases
from finetune.pixels import decode
from merge_kit.contributions import list_entries
from merge_kit.errors import DataError, RecipeError
from merge_kit.federation import BASE_WEIGHTS, read_federation
from merge_kit.material import opened
from merge_kit.payloads import check_payloads
from merge_kit.recipe import make_recipe, read_recipe
from tests.conftest import CLASSES
from tests.evaluate.helpers import draw_images
from tests.merge_kit.helpers import load

SITES = ("north", "south", "west")
CPU = torch.device("cpu")
START = {"method": "sum", "weights": "examples"}


@pytest.fixture
def three(hub, contribute):
    for seed, name in enumerate(SITES):
        contribute(name, seed=seed)
    return hub


@pytest.fixture
def table(tmp_path):
    """Twelve images for validation; the one for testing cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["file,label,split"]
    rows += [f"{f},{CLASSES[i % 3]},val" for i, f in enumerate(draw_images(folder, 12))]
    (folder / "test.png").write_bytes(b"not to be looked at")
    rows.append(f"test.png,{CLASSES[0]},test")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


@pytest.fixture
def material(three):
    """The three vectors, open, with the federation."""
    federation = read_federation(three.root)
    base = three.root / BASE_WEIGHTS
    entries = check_payloads(list_entries(three, federation), federation, base)
    with opened(federation, base, [entry.contribution for entry in entries]) as found:
        yield found, federation


@pytest.fixture
def pictures(table, material):
    cases = [c for c in load_cases(table, classes=CLASSES) if c.split == "val"]
    return decode(cases, material[1].preprocessing)[0]


@pytest.fixture
def tune(three, table, tmp_path, run_cli):
    """Run the command; the recipe goes to a file of its own."""

    def run(*more):
        out = ("--out-recipe", tmp_path / "tuned.yaml")
        return run_cli("tune", three.root, "--data", table, "--steps", 3, *out, *more)

    return run


@pytest.mark.parametrize("start", [{"method": "mean"}, START, {"method": "sum", "scale": 0.5}])
def test_it_starts_at_the_recipe(material, start):
    found, _ = material
    recipe = make_recipe(start, "x")
    (merged,) = states(found, found.sources, recipe, (1.0,))
    state = Coefficients(found, recipe, CPU).state()
    assert state.keys() == merged.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_a_step_goes_down_the_gradient_of_the_entropy(material, pictures):
    found, federation = material
    recipe = make_recipe({**START, "scale": 0.3}, "x")
    model = base_network(federation, found.base.path)
    how = Settings("entropy", steps=30, batch_size=12, learning_rate=0.02)
    tuned = tuning.tune(found, recipe, model, pictures, how, CPU)
    assert tuned.after < tuned.before
    assert bool((tuned.coefficients >= 0).all())
    moved = tuned.coefficients - 0.3 * torch.ones_like(tuned.coefficients)
    assert float(moved.std(dim=0).max()) > 1e-4  # blocks by themselves, not the whole vector


def test_labels_lower_the_loss_on_them(material, pictures):
    found, federation = material
    model = base_network(federation, found.base.path)
    how = Settings("labels", steps=30, batch_size=12, learning_rate=0.02)
    tuned = tuning.tune(found, make_recipe(START, "x"), model, pictures, how, CPU)
    assert tuned.after < tuned.before


def test_the_recipe_gives_the_model_that_was_tuned(tune, three, tmp_path, run_cli, material):
    assert tune("--method", "sum", "--by", "labels").exit_code == 0
    recipe = read_recipe(tmp_path / "tuned.yaml")
    result = run_cli(
        "merge", three.root, "--recipe", tmp_path / "tuned.yaml", "--out", tmp_path / "merged"
    )
    assert result.exit_code == 0, result.output
    assert run_cli("verify", tmp_path / "merged", "--hub", three.root).exit_code == 0
    merged = load(tmp_path / "merged" / "model.safetensors")
    (state,) = states(material[0], material[0].sources, recipe, (1.0,))
    assert all(torch.equal(merged[name], state[name]) for name in state)
    blocks = {group.depth for group in recipe.groups}
    assert len(blocks) == len(recipe.groups) > 1
    assert {tuple(sorted(rule.weights)) for rule in recipe.rules} == {SITES}


def test_the_same_seed_gives_the_same_recipe(tune, tmp_path):
    tune()
    first = (tmp_path / "tuned.yaml").read_bytes()
    assert tune("--replace").exit_code == 0
    assert (tmp_path / "tuned.yaml").read_bytes() == first
    assert tune("--replace", "--seed", 1).exit_code == 0
    assert (tmp_path / "tuned.yaml").read_bytes() != first


def test_by_entropy_no_label_is_read(tune, table, tmp_path):
    assert tune().exit_code == 0
    first = (tmp_path / "tuned.yaml").read_bytes()
    text = table.read_text()
    for name in CLASSES:
        text = text.replace(f",{name},", ",unheard of,")
    table.write_text(text)
    assert tune("--replace").exit_code == 0
    assert (tmp_path / "tuned.yaml").read_bytes() == first


def test_one_class_for_all_images_is_no_result(material, pictures):
    found, federation = material
    model = base_network(federation, found.base.path)
    started = []

    def swallow(module, inputs, outputs):  # the further the features go, the more of one class
        started.append(inputs[0].mean().detach())
        push = 0.5 + 200 * (inputs[0].mean() - started[0])
        return torch.zeros_like(outputs) + torch.tensor([1.0, 0.0, 0.0]) * push

    network.head_of(model).register_forward_hook(swallow)
    how = Settings("entropy", steps=60, batch_size=12, learning_rate=0.05)
    recipe = make_recipe({"method": "sum", "scale": 0.3}, "x")
    with pytest.raises(DataError, match="became nearly all the same class"):
        tuning.tune(found, recipe, model, pictures, how, CPU)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "ties"], "coefficients are learnt from the method 'mean' or 'sum'"),
        (["--split", "all"], "has 1 images of the split 'test', which must not choose a model"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tune, arguments, sentence, tmp_path):
    result = tune(*arguments)
    assert result.exit_code != 0
    assert sentence in result.stderr
    assert not (tmp_path / "tuned.yaml").exists()


def test_an_earlier_recipe_is_kept(tune, tmp_path):
    (tmp_path / "tuned.yaml").write_text("mine")
    assert tune().exit_code == 2
    assert (tmp_path / "tuned.yaml").read_text() == "mine"


def test_two_vectors_of_a_site_are_refused(hub, contribute, material):
    found, _ = material
    twice = (*found.sources, found.sources[0])
    with pytest.raises(RecipeError, match="has several vectors: coefficients are learnt for one"):
        Coefficients(replace(found, sources=twice), make_recipe(START, "x"), CPU)
