"""The loss on findings of which not all were annotated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from finetune.objectives import FindingObjective, seen_findings
from finetune.pixels import Images
from tests.finetune import pictures
from tests.merge_kit.helpers import quick

BY_HAND = [(1, 0, -1), (0, 0, 1), (-1, 1, 1), (1, -1, -1)]


def images(targets) -> Images:
    found = pictures.images([0] * len(targets))
    cases = tuple(
        replace(case, label=-1, targets=tuple(told))
        for case, told in zip(found.cases, targets, strict=True)
    )
    return Images(cases, found.pixels, found.preprocessing)


def objective(targets, validation=None) -> FindingObjective:
    train = images(targets)
    return FindingObjective(train, images(validation or targets), seen_findings(train.targets()))


def test_a_finding_is_learnt_where_some_images_have_it_and_some_do_not():
    assert seen_findings(images(BY_HAND).targets()).tolist() == [True, True, False]


def test_the_loss_is_the_mean_over_what_is_known():
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    known = [(i, f) for i, told in enumerate(BY_HAND) for f in (0, 1) if told[f] >= 0]
    expected = sum(
        functional.binary_cross_entropy_with_logits(
            outputs[i, f], torch.tensor(float(BY_HAND[i][f]))
        )
        for i, f in known
    ) / len(known)
    found = objective(BY_HAND).loss(outputs, None, weighted=False)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_not_known_gets_a_gradient_of_exactly_zero(weighted):
    outputs = torch.randn(4, 3, requires_grad=True)
    objective(BY_HAND).loss(outputs, None, weighted=weighted).backward()
    known = torch.tensor([[t >= 0 and f < 2 for f, t in enumerate(told)] for told in BY_HAND])
    assert (outputs.grad[~known] == 0).all()
    assert (outputs.grad[known] != 0).all()


def test_weights_and_chances_by_hand():
    """Of finding 0 two have it and one does not, of finding 1 one and two."""
    found = objective(BY_HAND)
    assert found.chances.tolist() == [1 / 2 + 1 / 2, 1 + 1 / 2, 1, 1 / 2]
    assert found.masses(weighted=False).tolist() == [2, 2, 1, 1]
    assert found.masses(weighted=True).tolist() == [
        3 / 4 + 3 / 4, 3 / 2 + 3 / 4, 3 / 2, 3 / 4,
    ]  # fmt: skip


@quick
@given(
    st.lists(st.tuples(*[st.sampled_from([1, 0, -1])] * 3), min_size=2, max_size=12).filter(
        lambda t: seen_findings(torch.tensor(t)).any()
    ),
    st.booleans(),
    st.integers(0, 99),
)
def test_batches_add_up_to_the_whole_and_both_sides_weigh_alike(targets, weighted, seed):
    found = objective(targets)
    outputs = torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(seed))
    masses = found.masses(weighted=weighted)
    whole = found.loss(outputs, None, weighted=weighted)
    middle = len(targets) // 2
    parts = [list(range(middle)), list(range(middle, len(targets)))]
    total = sum(
        float(found.loss(outputs[part], part, weighted=weighted)) * float(masses[part].sum())
        for part in parts
    )
    assert total / float(masses.sum()) == pytest.approx(float(whole), rel=1e-5)
    exact, seen = torch.tensor(targets), seen_findings(torch.tensor(targets))
    present, absent = ((exact == mark) & seen for mark in (1, 0))
    # Pulling every known output up by one changes the weighted loss as pulling down does at 0.
    flat = torch.zeros(len(targets), 3, requires_grad=True)
    found.loss(flat, None, weighted=True).backward()
    up, down = -flat.grad[present].sum(), flat.grad[absent].sum()
    assert float(up) == pytest.approx(float(down), rel=1e-5)
    assert float(found.chances.sum()) == pytest.approx(2 * int(seen.sum()))


def test_a_batch_of_which_nothing_is_known_has_no_loss_and_no_gradient():
    found = objective([(1, 0, -1), (0, 1, -1), (-1, -1, 1)])
    outputs = torch.randn(1, 3, requires_grad=True)
    loss = found.loss(outputs, [2], weighted=False)
    loss.backward()
    assert loss.item() == 0
    assert not outputs.grad.any()


def test_validation_is_judged_on_known_entries_of_findings_that_were_learnt():
    found = objective(BY_HAND, [(1, 0, 1), (0, -1, 0)])
    outputs = torch.tensor([[2.0, -1.0, 3.0], [-2.0, 5.0, 1.0]])
    truth, chances = found.judged(outputs)
    assert truth.tolist() == [[1, 0, -1], [0, -1, -1]]
    np.testing.assert_allclose(chances, outputs.double().sigmoid())
    losses = [np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(-2))]
    assert found.validation_loss(outputs) == pytest.approx(np.mean(losses), rel=1e-6)
