"""Judging models at the level of groups of classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluate import loading, models
from evaluate.labelled import LabelledSet
from evaluate.models import Model
from evaluate.predictions import Predictions
from merge_kit.errors import DataError, LabelError, VectorError
from merge_kit.federation import Preprocessing
from tests.finetune.pictures import draw, write_csv
from tests.merge_kit.helpers import says

CLASSES = ("a", "b", "c", "d")
TREE = {"bd": ("b", "d"), "bdc": ("bd", "c")}


@pytest.fixture
def table(tmp_path):
    """Five images: two classes, two groups, and a class that is in no group."""
    rows = []
    for index, label in enumerate(("a", "b", "bd", "BDC", "a")):
        Image.fromarray(draw([index % 3], seed=index)[0]).save(tmp_path / f"{index}.png")
        rows.append({"file": f"{index}.png", "label": label})
    return write_csv(tmp_path / "labels.csv", rows)


def test_every_case_is_of_an_outermost_group_or_of_a_class_outside(table):
    found = loading.load([table], CLASSES, groups=TREE, grouped=True)
    assert found.chosen.classes == ("a", "bdc")
    assert found.chosen.labels.tolist() == [0, 1, 1, 1, 0]
    assert found.chosen.groups == {"bdc": ("b", "c", "d")}
    assert found.notes[0] == (
        "All cases are judged at the level of groups (bdc: b, c, d): the probabilities of a "
        "group's classes are summed."
    )


def test_without_that_level_a_group_is_no_label(table):
    with says(
        LabelError,
        "2.png has the label 'bd', a group of classes: 'merge-kit evaluate --groups' judges models "
        "at the level of groups.",
    ):
        loading.load([table], CLASSES, groups=TREE)


def test_probabilities_of_a_group_are_summed():
    labelled = LabelledSet(
        classes=("a", "bdc"), files=("1", "2"), targets=np.eye(2, dtype=np.int8), sites=("", ""),
        groups={"bdc": ("b", "c", "d")},
    )  # fmt: skip
    chances = np.array([[0.4, 0.3, 0.2, 0.1], [0.0, 0.25, 0.25, 0.5]])
    told = Predictions("m", "other", ("b", "a", "d", "C"), chances)
    np.testing.assert_allclose(
        told.fitted_to(labelled).probabilities, [[0.3, 0.7], [0.25, 0.75]], atol=1e-15
    )
    assert told.fitted_to(labelled).classes == ("a", "bdc")
    with says(
        DataError,
        "model 'm' does not know the class 'd' (known: b, a, c): compare models on the classes in "
        "common.",
    ):
        Predictions("m", "other", ("b", "a", "c"), chances[:, :3]).fitted_to(labelled)


def test_models_with_other_groups_are_not_judged_together(tmp_path):
    one = Model("one", "other", tmp_path / "one", CLASSES, Preprocessing(), TREE)
    other = replace(one, name="other", folder=tmp_path / "other", groups={"ab": ("a", "b")})
    plain = replace(one, name="plain", groups={})
    assert models.labels_of([plain, one]).groups == TREE
    assert models.labels_of([plain]).groups == {}
    with says(
        DataError,
        f"{tmp_path / 'other'} has other groups of classes than {tmp_path / 'one'}: evaluate them "
        "separately.",
    ):
        models.labels_of([one, plain, other])


def test_groups_that_do_not_fit_the_classes_are_named(hub):
    path = hub.root / "base" / "config.json"
    config = json.loads(path.read_bytes())
    config["merge_kit"]["groups"] = {"dark": ["lobed", "spiky"]}
    path.write_text(json.dumps(config))
    with says(
        VectorError,
        f"{path}: the group 'dark' names 'spiky', which is no class: copy the whole folder again.",
    ):
        models.find_models([str(hub.root)])
    config["merge_kit"]["groups"] = ["dark"]
    path.write_text(json.dumps(config))
    with pytest.raises(VectorError, match="is no timm configuration"):
        models.find_models([str(hub.root)])
