"""Losses and weights of images whose label is a group of classes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune import feed, losses
from finetune.options import TrainingOptions
from merge_kit.labelspace import LabelSpace
from tests.merge_kit.helpers import quick

SPACE = LabelSpace(("a", "b", "c", "d"), {"ab": ("a", "b")})
MEANING = SPACE.meaning
A, B, C, D, AB = range(5)


def test_classes_within_a_group_that_occurs_are_seen():
    seen = losses.seen_classes(torch.tensor([AB, C]), 4, MEANING)
    assert seen.tolist() == [True, True, True, False]


def test_the_loss_of_a_group_is_that_of_the_sum_of_its_probabilities():
    outputs, labels = torch.tensor([[1.0, 2.0, 3.0, 50.0], [0.5, 0.0, 1.0, 9.0]]), [AB, C]
    seen = torch.tensor([True, True, True, False])
    first = -math.log((math.e + math.e**2) / (math.e + math.e**2 + math.e**3))
    second = -math.log(math.e / (math.e**0.5 + 1 + math.e))
    found = losses.loss_on_seen(outputs, torch.tensor(labels), seen, None, MEANING)
    assert float(found) == pytest.approx((first + second) / 2)
    weights = torch.tensor([torch.nan, torch.nan, 3.0, torch.nan, 1.0])
    found = losses.loss_on_seen(outputs, torch.tensor(labels), seen, weights, MEANING)
    assert float(found) == pytest.approx((first + 3 * second) / 4)


def test_only_rows_of_seen_classes_get_a_gradient():
    outputs = torch.randn(4, 4, requires_grad=True)
    seen = torch.tensor([True, True, True, False])
    losses.loss_on_seen(outputs, torch.tensor([AB, C, AB, A]), seen, None, MEANING).backward()
    assert (outputs.grad[:, D] == 0).all()
    assert (outputs.grad[:, seen] != 0).all()
    # What is not told apart pulls both in the proportion of their probabilities.
    chances = outputs.detach()[0, :2].softmax(dim=0)
    ratio = outputs.grad[0, A] / outputs.grad[0, B]
    torch.testing.assert_close(ratio, chances[0] / chances[1])


@quick
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(0, 99))
def test_of_single_classes_it_is_the_loss_without_groups(labels, seed):
    outputs = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed))
    fine, seen = torch.tensor(labels), losses.seen_classes(torch.tensor(labels), 4)
    weights = losses.label_weights(fine, seen)
    plain = losses.loss_on_seen(outputs, fine, seen, weights)
    same = losses.label_weights(fine, seen, MEANING)
    torch.testing.assert_close(same[:4][seen], weights[seen])
    torch.testing.assert_close(losses.loss_on_seen(outputs, fine, seen, same, MEANING), plain)


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_all_classes_that_occur_weigh_alike(labels):
    """Images of a class, and their shares in images of its group, weigh 1 together."""
    found = torch.tensor(labels)
    shares = MEANING.double() / MEANING.sum(dim=1, keepdim=True)
    per_image = losses.rarity(found, MEANING)[found]
    exact = losses.seen_classes(found, 4, MEANING).double()
    assert float(per_image.sum()) == pytest.approx(float(exact.sum()))
    if AB not in labels or not {A, B} & set(labels):  # else a coarse image is of both by halves
        torch.testing.assert_close(per_image @ shares[found], exact)


def test_sampling_draws_a_group_as_often_as_its_classes_together():
    labels = torch.tensor([AB] * 900 + [C] * 60 + [D] * 40)
    options = TrainingOptions(balance="sampling")
    drawn = Counter(
        labels[feed.epoch_order(losses.rarity(labels, MEANING)[labels], 0, options)].tolist()
    )
    assert 440 < drawn[AB] < 560
    assert all(200 < drawn[label] < 300 for label in (C, D))
