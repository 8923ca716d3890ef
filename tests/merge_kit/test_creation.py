"""Creating a federation, and its base."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from merge_kit.creation import create
from merge_kit.errors import FederationError, MergeKitError, TensorFileError, UsageError
from merge_kit.federation import Policy, check_base, read_federation
from merge_kit.tensorfile import fingerprint, write_tensors
from tests.merge_kit.helpers import listing, load, says

WEIGHTS = "base/model.safetensors"


@pytest.fixture
def init(tmp_path):
    """Create a federation with values that a test replaces."""

    def make(folder="hub", **changes):
        values = {
            "name": "cells",
            "architecture": "test_resnet",
            "classes": ("a", "b"),
            "weights": "none",
            "model_args": {},
            "preprocessing": {},
            "policy": Policy(),
            **changes,
        }
        return create(tmp_path / folder, **values)

    return make


@pytest.fixture
def source(tmp_path):
    """The weights of a model with another head, as a safetensors file."""
    torch.manual_seed(5)
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    write_tensors(tmp_path / "weights.safetensors", state)
    return tmp_path / "weights.safetensors"


def test_a_federation_is_a_contract_and_a_base(init, tmp_path):
    made = init()
    assert listing(tmp_path / "hub") == ["base", "federation.yaml"]
    assert listing(tmp_path / "hub" / "base") == ["config.json", "model.safetensors"]
    assert read_federation(tmp_path / "hub") == made
    check_base(made, tmp_path / "hub" / WEIGHTS, "the base")


def test_the_base_loads_in_timm_without_our_code(init, tmp_path):
    init(preprocessing={"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "crop_pct": 1.0})
    model = timm.create_model(f"local-dir:{tmp_path / 'hub' / 'base'}", pretrained=True)
    state = load(tmp_path / "hub" / WEIGHTS)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "hub" / "base" / "config.json").read_text())
    assert config["label_names"] == ["a", "b"]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_the_head_starts_at_zero_with_one_row_a_class(init, tmp_path):
    init(classes=("a", "b", "c"))
    state = load(tmp_path / "hub" / WEIGHTS)
    assert state["fc.weight"].shape[0] == 3
    assert not state["fc.weight"].any()
    assert not state["fc.bias"].any()


def test_the_seed_decides_random_weights(init):
    made = [init(f"h{n}", seed=seed).base_fingerprint for n, seed in enumerate((3, 3, 4))]
    assert made[0] == made[1] != made[2]


def test_local_weights_are_taken_but_for_their_head(init, source, tmp_path):
    made = init(weights=str(source))
    given, base = load(source), load(tmp_path / "hub" / WEIGHTS)
    assert given.keys() == base.keys()
    for name in given:
        if not name.startswith("fc."):
            assert torch.equal(given[name], base[name]), name
    assert base["fc.weight"].shape[0] == 2
    assert made.weights_source.startswith("local file sha256:")
    assert made.base_fingerprint == fingerprint(base.items())


def test_half_precision_weights_become_float32(init, source, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in load(source).items()}
    write_tensors(source, half)
    init(weights=str(source))
    base = load(tmp_path / "hub" / WEIGHTS)
    assert {t.dtype for t in base.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conv1.weight": None}, "lacks the tensor 'conv1.weight' (1 in all) of 'test_resnet': "),
        ({"odd": torch.ones(1)}, "has the tensor 'odd' (1 in all), which 'test_resnet' does not "),
    ],
    ids=["missing", "extra"],
)
def test_weights_of_another_architecture_are_refused(init, source, tmp_path, change, sentence):
    state = load(source)
    name = next(n for n in state if n.endswith("conv1.weight"))
    change = {name if k == "conv1.weight" else k: v for k, v in change.items()}
    sentence = sentence.replace("'conv1.weight'", f"'{name}'")
    write_tensors(source, {k: v for k, v in {**state, **change}.items() if v is not None})
    with pytest.raises(FederationError) as caught:
        init(weights=str(source))
    assert str(caught.value).startswith(f"{source} {sentence}")
    assert str(caught.value).endswith("is it another architecture?")
    assert listing(tmp_path) == ["weights.safetensors"]


def test_weights_of_another_shape_are_refused(init, source, tmp_path):
    state = load(source)
    name = next(n for n in state if n.endswith("conv1.weight"))
    write_tensors(source, {**state, name: torch.zeros(1, 1, 1, 1)})
    with pytest.raises(FederationError, match="does not fit 'test_resnet'"):
        init(weights=str(source))
    assert listing(tmp_path) == ["weights.safetensors"]


def test_a_pickled_checkpoint_is_refused_unless_it_is_converted(init, source, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": load(source)}, path)
    with says(
        FederationError,
        f"{path} is not a safetensors file: pickled checkpoints can run code and are refused; "
        "pass --allow-pickle to convert it with torch's weights-only loader.",
    ):
        init(weights=str(path))
    converted = init("one", weights=str(path), allow_pickle=True)
    assert converted.base_fingerprint == init("two", weights=str(source)).base_fingerprint


class Sly:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_with_code_is_never_run(init, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": Sly()}, path)
    with says(
        FederationError,
        f"{path} cannot be read by torch's weights-only loader: it holds more than tensors; "
        "convert it to safetensors where you trust it.",
    ):
        init(weights=str(path), allow_pickle=True)


def test_a_pickle_that_calls_itself_safetensors_is_refused(init, tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(TensorFileError, match="is a pickled checkpoint, not safetensors"):
        init(weights=str(path), allow_pickle=True)


def test_weights_that_are_not_there_are_named(init, tmp_path):
    with says(FederationError, f"{tmp_path}/no.pth does not exist: check --weights."):
        init(weights=f"{tmp_path}/no.pth")


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"architecture": "test_resnt"},
            UsageError,
            f"timm {timm.__version__} has no model 'test_resnt'; did you mean 'test_resnet'?",
        ),
        (
            {"architecture": "0"},
            UsageError,
            f"timm {timm.__version__} has no model '0'.",
        ),
        (
            {"classes": ("a", "b", "a")},
            FederationError,
            "the class 'a' is named twice: name each class once.",
        ),
        (
            {"name": "My Cells"},
            FederationError,
            "the new federation: 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens "
            "inside (got 'My Cells').",
        ),
        (
            {"preprocessing": {"crop_pct": 2.0}},
            FederationError,
            "the preprocessing: 'crop_pct': input should be less than or equal to 1 (got 2.0).",
        ),
        (
            {"preprocessing": {"std": (0.5, 0.5, 0.0)}},
            FederationError,
            "the preprocessing: 'std.2': input should be greater than 0 (got 0.0).",
        ),
    ],
    ids=["typo", "like no other", "class twice", "name", "crop", "std"],
)
def test_faults_are_told_in_one_sentence_and_leave_nothing(
    init, tmp_path, changes, error, sentence
):
    with says(error, sentence):
        init(**changes)
    assert listing(tmp_path) == []


def test_an_argument_that_the_model_does_not_take_is_named(init):
    with pytest.raises(UsageError, match=r"^model 'test_resnet' cannot be built with .*'odd'\)"):
        init(model_args={"odd": 1})


def test_model_arguments_are_part_of_the_contract(init, tmp_path):
    made = init(model_args={"drop_rate": 0.25})
    assert made.model_args == {"drop_rate": 0.25}
    model = timm.create_model(f"local-dir:{tmp_path / 'hub' / 'base'}", pretrained=True)
    assert model.drop_rate == 0.25


def test_an_existing_folder_is_refused(init, tmp_path):
    (tmp_path / "hub").mkdir()
    with says(
        UsageError,
        f"{tmp_path}/hub exists already: choose another folder or remove this one.",
    ):
        init()


def test_a_full_disk_is_named_and_leaves_nothing(init, small_disk):
    with pytest.raises(MergeKitError, match="no space left"):
        init(small_disk / "hub")
    assert listing(small_disk) == []


def test_real_weights_make_a_base(init, shared_weights):
    """The MobileNetV2 of the shared folder; its SOURCE.md asks for pad_type and mean/std of 0.5."""
    made = init(
        architecture="mobilenetv2_100",
        weights=str(shared_weights / "mobilenetv2_100.safetensors"),
        model_args={"pad_type": "same"},
    )
    assert made.classifier == ("classifier",)
    assert made.weights_source.startswith("local file sha256:")


def test_groups_are_in_the_contract(init, tmp_path):
    made = init(classes=("a", "b", "c"), groups={"ab": ["a", "b"]})
    assert made.groups == {"ab": ("a", "b")}
    assert read_federation(tmp_path / "hub") == made


def test_a_wrong_group_is_refused_before_anything_is_made(init, tmp_path):
    sentence = "--group: the group 'ab' names 'd', which is no class: correct it."
    with says(UsageError, sentence):
        init(classes=("a", "b", "c"), groups={"ab": ["a", "d"]}, architecture="no such backbone")
    assert not (tmp_path / "hub").exists()
