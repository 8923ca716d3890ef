"""Labels that name several classes at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.labelspace import LabelSpace, cells_of
from tests.merge_kit.helpers import quick

CLASSES = ("naevus", "melanoma", "bcc", "scc", "keratosis")
TREE = {"malignant": ("melanoma", "carcinoma"), "carcinoma": ("scc", "bcc")}
SPACE = LabelSpace(CLASSES, TREE)


def test_a_group_may_hold_groups_and_stands_for_all_their_classes():
    assert SPACE.names == (*CLASSES, "malignant", "carcinoma")
    assert SPACE.members("malignant") == ("melanoma", "bcc", "scc")
    assert SPACE.members("carcinoma") == ("bcc", "scc")
    assert SPACE.members("naevus") == ("naevus",)


def test_the_outermost_groups_and_the_classes_outside_share_all_classes():
    assert SPACE.top == ("naevus", "malignant", "keratosis")
    assert LabelSpace(CLASSES).top == CLASSES


def test_the_meaning_of_each_label_is_a_row_over_the_classes():
    assert SPACE.meaning[:5].equal(torch.eye(5, dtype=torch.bool))
    assert SPACE.meaning[5:].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"Naevus": ("bcc", "scc")}, "the group 'Naevus' has the name of a class or of another"),
        ({"bad": ("bcc", "scc"), "BAD": ("naevus", "keratosis")}, "the group 'BAD' has the name"),
        ({"bad": ("bcc",)}, "the group 'bad' has fewer than two members"),
        ({"bad": ("bcc", "wart")}, "the group 'bad' names 'wart', which is no class"),
        ({"bad": ("bcc", "bcc")}, "'bcc' is named twice in groups"),
        ({"a": ("bcc", "scc"), "b": ("bcc", "naevus")}, "'bcc' is named twice in groups"),
        ({"a": ("bcc", "b"), "b": ("scc", "a")}, "the group 'a' is within itself"),
        ({"a": ("bcc", "a")}, "the group 'a' is within itself"),
        ({"all": CLASSES}, "the group 'all' holds every class, which tells nothing"),
    ],
    ids=["class", "group", "single", "unknown", "same", "two parents", "circle", "itself", "all"],
)
def test_what_is_no_tree_of_the_classes_is_refused(groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        LabelSpace(CLASSES, groups)


def parts(*names):
    return cells_of(torch.tensor([SPACE.names.index(n) for n in names]), SPACE.meaning).tolist()


def test_classes_are_one_part_only_where_a_label_does_not_tell_them_apart():
    assert parts("naevus", "bcc") == [0, 1, 2, 3, 4]
    assert parts("naevus", "bcc", "carcinoma") == [0, 1, 2, 2, 3]
    assert parts("malignant", "carcinoma", "naevus") == [0, 1, 1, 1, 2]
    assert parts("carcinoma", "malignant") == [0, 1, 1, 1, 2]


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_every_label_lies_in_one_part_and_every_part_is_told_by_a_label_or_is_a_class(labels):
    cells = cells_of(torch.tensor(labels), SPACE.meaning)
    assert sorted(set(cells.tolist())) == list(range(int(cells.max()) + 1))
    for label in labels:
        assert len(set(cells[SPACE.meaning[label]].tolist())) == 1
    wanted = [SPACE.meaning[label].tolist() for label in labels]
    for part in range(int(cells.max()) + 1):
        mine = cells == part
        assert int(mine.sum()) == 1 or mine.tolist() in wanted
