"""What labels mean: the federation's classes and groups, or classes of a site's own."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from finetune import network
from finetune.labelling import Labelling, own_labelling
from merge_kit import site as sites
from merge_kit.errors import UsageError
from tests.merge_kit.helpers import load, says

GROUPS = {"dark": ("lobed", "granular")}


@pytest.fixture
def grouped(federation):
    """The contract with a group."""
    return federation.model_copy(update={"groups": GROUPS})


def test_images_of_classes_alone_are_learnt_as_without_groups(grouped):
    assert Labelling(grouped).meaning(torch.tensor([0, 2, 1])) is None
    assert Labelling(grouped).meaning(torch.tensor([0, 3])).int().tolist()[3] == [0, 1, 1]


def test_counts_of_groups_are_told_where_there_are_any(grouped):
    labels = torch.tensor([0] * 6 + [1] * 2 + [3] * 9)
    assert Labelling(grouped).counts(labels) == {
        "class_counts": {"round": 6, "lobed": "<5", "granular": 0},
        "group_counts": {"dark": 9},
    }
    assert set(Labelling(grouped).counts(labels[:8])) == {"class_counts"}


def test_images_of_own_classes_count_for_no_class_of_the_federation(grouped):
    labelling = Labelling(grouped, ("cyst", "stone"))
    none = dict.fromkeys(grouped.classes, 0)
    assert labelling.counts(torch.tensor([0, 1, 1, 0, 1, 1, 1])) == {
        "class_counts": none, "other_images": 7
    }  # fmt: skip
    assert labelling.counts(torch.tensor([0, 1]))["other_images"] == "<5"


def test_the_base_under_an_own_classifier_is_a_plain_timm_model(hub, federation, tmp_path):
    site = sites.join(hub, "north", tmp_path / "north")
    labelling = Labelling(federation, ("cyst", "stone"))
    model = labelling.base(site)
    assert model(torch.zeros(1, 3, 32, 32)).tolist() == [[0.0, 0.0]]
    assert json.loads(labelling.config)["label_names"] == ["cyst", "stone"]
    plain = timm.create_model("test_resnet", num_classes=2)
    plain.load_state_dict(model.state_dict())
    base = load(hub.root / "base" / "model.safetensors")
    shared = labelling.shared(site, model.state_dict())
    assert {n: tuple(t.shape) for n, t in shared.items()} == {
        n: tuple(t.shape) for n, t in base.items()
    }


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet", "test_resnet"])
def test_a_classifier_is_replaced_wherever_it_stands(name):
    model = timm.create_model(name, num_classes=5)
    before = model.forward_features(torch.ones(1, 3, 96, 96))
    network.with_classes(model.eval(), 2)
    assert model(torch.ones(1, 3, 96, 96)).shape == (1, 2)
    assert before.shape == model.forward_features(torch.ones(1, 3, 96, 96)).shape


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["cyst"], "--own-classes: name at least two classes of at most 100 characters, with"),
        (["cyst", "x" * 101], "--own-classes: name at least two classes of at most 100"),
        (["cyst", "stone", "Cyst"], "--own-classes names the class 'cyst' twice: name each once."),
        (["Round", "lobed"], "--own-classes: the federation has all of these classes: leave it"),
    ],
    ids=["one", "long", "twice", "known"],
)
def test_own_classes_are_checked(federation, names, sentence):
    with pytest.raises(UsageError) as caught:
        own_labelling(federation, names)
    assert str(caught.value).startswith(sentence)


def test_some_own_classes_may_be_called_as_in_the_federation(federation):
    assert own_labelling(federation, ["round", "other"]).space.names == ("round", "other")
    with says(UsageError, "--own-classes names the class 'a' twice: name each once."):
        own_labelling(federation, ["a", "a"])
