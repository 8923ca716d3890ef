"""How deep a parameter sits, from its name."""

from __future__ import annotations

import pytest
import timm
from timm.models import group_parameters

from merge_kit.depth import block_of, depths


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.7.mlp.fc1.weight", (7,)),
        ("blocks.1.0.conv_pw.weight", (1, 0)),
        ("layer2.1.conv1.weight", (2, 1)),
        ("layer2.0.downsample.0.weight", (2, 0)),
        ("stages.0.blocks.1.norm.weight", (0, 1)),
        ("visual.trunk.blocks.3.norm1.bias", (3,)),
        ("features.denseblock1.denselayer12.conv1.weight", (1, 12)),
        ("s1.b2.conv1.conv.weight", (1, 2)),
        ("stem.0.weight", None),
        ("pos_embed", None),
        ("head.fc.weight", None),
        ("fc1.weight", None),
    ],
)
def test_the_numbers_of_stage_and_block(name, block):
    assert block_of(name) == block


def test_depth_runs_from_0_to_1_over_the_blocks():
    names = ["stem.weight", "blocks.0.a", "blocks.2.a", "blocks.10.a"]
    assert depths(names) == {
        "stem.weight": None,
        "blocks.0.a": 0.0,
        "blocks.2.a": 0.5,
        "blocks.10.a": 1.0,
    }


def test_what_stands_beside_the_blocks_of_a_stage_counts_with_the_first():
    names = ["stages.0.blocks.0.w", "stages.1.downsample.w", "stages.1.blocks.0.w"]
    assert list(depths(names).values()) == [0.0, 1.0, 1.0]


def test_one_block_or_none():
    assert depths(["blocks.0.a", "blocks.0.b", "x"]) == {
        "blocks.0.a": 0.0,
        "blocks.0.b": 0.0,
        "x": None,
    }
    assert depths([]) == {}


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [
        ("vit_tiny_patch16_224", 12),
        ("resnet50", 16),
        ("mobilenetv2_100", 17),
        ("convnext_tiny", 18),
        ("swin_tiny_patch4_window7_224", 12),
        ("efficientnet_b0", 16),
        ("regnety_002", 13),
        ("densenet121", 58),
    ],
)
def test_blocks_stand_in_the_order_that_timm_gives_them(architecture, blocks):
    model = timm.create_model(architecture)  # not on "meta": torch 2.11 cannot sort there
    groups = group_parameters(model, model.group_matcher(coarse=False))
    deep = depths([name for name, _ in model.named_parameters()])
    place = {deep[n]: i for i, names in groups.items() for n in names if deep[n] is not None}
    assert len(place) == blocks
    assert [place[depth] for depth in sorted(place)] == sorted(place.values())
