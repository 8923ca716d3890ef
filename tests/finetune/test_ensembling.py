"""One voice out of several models: arithmetic by hand and by properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.ensembling import certainty, combined, spread, stacked
from merge_kit.errors import DataError
from tests.merge_kit.helpers import quick

ONE = torch.ones(1, 1, 1, dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand_a_class_is_told_by_those_who_know_it():
    logits = torch.tensor([[[3.0, 1.0, 99.0]], [[-99.0, 2.0, 6.0]]], dtype=torch.float64)
    known = torch.tensor([[True, True, False], [False, True, True]])
    weights = torch.tensor([1.0, 3.0]).view(2, 1, 1)
    # Relative to the means of 2 and of 4: (1, -1, -) and (-, -2, 2).
    assert combined(logits, known, weights).tolist() == [[1.0, (-1 - 6) / 4, 2.0]]


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_where_all_know_all_it_is_the_weighted_mean_of_the_logits(models, images, classes, seed):
    """FedDF's ensemble, up to a constant of each image."""
    logits = drawn(models, images, classes, seed=seed)
    weights = drawn(models, 1, 1, seed=seed + 1).exp()
    known = torch.ones(models, classes, dtype=torch.bool)
    plain = (logits * weights).sum(dim=0) / weights.sum()
    found = combined(logits, known, weights)
    torch.testing.assert_close(found.softmax(dim=1), plain.softmax(dim=1))


@quick
@given(st.integers(0, 999))
def test_what_a_model_does_not_know_and_constants_do_not_matter(seed):
    logits, generator = drawn(3, 4, 5, seed=seed), torch.Generator().manual_seed(seed)
    known = torch.rand(3, 5, generator=generator) < 0.6
    weights = torch.rand(3, 1, 5, generator=generator, dtype=torch.float64)
    other = logits + 10 * drawn(3, 4, 1, seed=seed + 1)
    other[~known[:, None, :].expand_as(other)] = 1e3
    first, second = combined(logits, known, weights), combined(other, known, weights)
    told = known.any(dim=0)
    torch.testing.assert_close(first[:, told], second[:, told])
    assert bool((first[:, ~told] == -torch.inf).all())
    order = [2, 0, 1]
    again = combined(logits[order], known[order], weights[order])
    torch.testing.assert_close(first[:, told], again[:, told])


def test_weights_of_zero_for_all_who_know_a_class_count_alike():
    logits, known = drawn(2, 3, 2), torch.ones(2, 2, dtype=torch.bool)
    weights = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]])
    alike = combined(logits, known, torch.ones(2, 1, 1))
    assert torch.equal(combined(logits, known, weights)[:, 0], alike[:, 0])


def test_certainty_by_hand():
    logits = torch.tensor([[[0.0, 0.0, 50.0], [0.0, 50.0, 0.0]]], dtype=torch.float64)
    known = torch.tensor([[True, True, False]])
    found = certainty(logits, known)
    assert found.shape == (1, 2, 1)
    assert found.flatten().tolist() == pytest.approx([0.0, 1.0])
    half = torch.tensor([[[math.log(3), 0.0, 0.0]]], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert float(certainty(half, known)) == pytest.approx(1 - entropy)


def test_a_model_of_one_class_is_certain():
    known = torch.tensor([[True, False]])
    assert float(certainty(drawn(1, 1, 2), known)) == 1.0


def test_stacking_finds_who_is_right():
    labels = torch.arange(90) % 3
    right = 3 * torch.nn.functional.one_hot(labels, 3).double() + drawn(90, 3)
    logits = torch.stack([drawn(90, 3, seed=1), right, drawn(90, 3, seed=2)])
    known = torch.ones(3, 3, dtype=torch.bool)
    found = stacked(logits, known, labels)
    assert found.shape == (3, 1, 1)
    assert float(found.sum()) == pytest.approx(3)
    assert float(found[1]) > 2.5


def test_stacking_leaves_models_of_which_nothing_is_known_alike():
    logits = drawn(1, 6, 2).expand(2, 6, 2)
    found = stacked(logits, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 1] * 3))
    assert found.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_stacking_needs_an_image_of_a_class_that_is_known():
    known = torch.tensor([[True, False]])
    with pytest.raises(DataError, match="no labelled image is of a class that a teacher knows"):
        stacked(drawn(1, 2, 2), known, torch.tensor([1, 1]))


def test_outputs_are_put_where_the_federation_has_them():
    found = spread(torch.tensor([[1.0, 2.0, 3.0]]), (2, -1, 0), 4)
    assert found.tolist() == [[3.0, 0.0, 1.0, 0.0]]
    assert found.dtype == torch.float64
