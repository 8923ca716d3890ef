"""The role of each entry of a state dict."""

from __future__ import annotations

import pytest
import timm
import torch

from merge_kit.errors import VectorError
from merge_kit.parameters import Role, role_of, roles_of, variance_of, vector_specs
from merge_kit.tensorfile import specs_of
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import says

FLOAT, WHOLE = TensorSpec(torch.float32, (2,)), TensorSpec(torch.int64, ())


@pytest.mark.parametrize(
    ("name", "spec", "role"),
    [
        ("conv.weight", FLOAT, Role.WEIGHT),
        ("bn.weight", FLOAT, Role.WEIGHT),
        ("pos_embed", FLOAT, Role.WEIGHT),
        ("head.weight", FLOAT, Role.HEAD),
        ("head.bias", FLOAT, Role.HEAD),
        ("head.norm.weight", FLOAT, Role.WEIGHT),
        ("ahead.weight", FLOAT, Role.WEIGHT),
        ("bn.running_mean", FLOAT, Role.NORM_MEAN),
        ("bn.running_var", FLOAT, Role.NORM_VARIANCE),
        ("bn.num_batches_tracked", WHOLE, Role.COUNTER),
        ("attn.relative_position_index", WHOLE, Role.CONSTANT),
        ("mask", TensorSpec(torch.bool, (2,)), Role.CONSTANT),
    ],
)
def test_roles_follow_names_and_dtypes(name, spec, role):
    assert role_of(name, spec, ("head",)) is role


def test_a_classifier_that_is_not_there_is_named():
    with says(
        VectorError,
        "the classifier 'fc' has no tensor 'fc.weight': "
        "correct 'classifier' in the base's config.json.",
    ):
        roles_of({"head.weight": FLOAT}, ("fc",))


def test_roles_are_sorted_so_that_a_mean_comes_before_its_variance():
    names = ["bn.running_var", "fc.weight", "bn.running_mean", "a.weight"]
    roles = roles_of(dict.fromkeys(names, FLOAT), ("fc",))
    assert list(roles) == ["a.weight", "bn.running_mean", "bn.running_var", "fc.weight"]


def test_the_variance_of_a_mean():
    assert variance_of("layer.running_mean.bn.running_mean") == "layer.running_mean.bn.running_var"


def test_a_vector_carries_floats_as_float32_and_counters():
    base = {
        "conv.weight": TensorSpec(torch.float16, (2,)),
        "head.weight": TensorSpec(torch.float64, (3, 2)),
        "bn.num_batches_tracked": WHOLE,
        "table": TensorSpec(torch.int32, (4,)),
    }
    assert vector_specs(base, roles_of(base, ("head",))) == {
        "conv.weight": TensorSpec(torch.float32, (2,)),
        "head.weight": TensorSpec(torch.float32, (3, 2)),
        "bn.num_batches_tracked": WHOLE,
    }


@pytest.mark.parametrize(
    ("model", "head", "statistics"),
    [("test_resnet", "fc", True), ("test_vit", "head", False), ("test_convnext", "head.fc", False)],
)
def test_roles_of_real_models(model, head, statistics):
    made = timm.create_model(model, num_classes=3)
    roles = roles_of(specs_of(made.state_dict()), (head,))
    heads = [name for name, role in roles.items() if role is Role.HEAD]
    assert heads == [f"{head}.bias", f"{head}.weight"]
    assert (Role.NORM_MEAN in roles.values()) is statistics
    learnt = {name for name, _ in made.named_parameters()}
    assert {n for n, r in roles.items() if r in (Role.WEIGHT, Role.HEAD)} == learnt
