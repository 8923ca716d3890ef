"""What of findings is held back so that no sums give single images away."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.withholding import withhold
from tests.merge_kit.helpers import quick


def repeated(*rows):
    """Targets (n, C) of (labels, how many images)."""
    return torch.tensor([told for told, count in rows for _ in range(count)])


def test_what_enough_images_have_and_lack_is_told_as_it_is():
    targets = repeated(((1, 0), 5), ((0, 1), 5), ((1, -1), 6), ((0, -1), 5), ((-1, -1), 2))
    assert torch.equal(withhold(targets, 5), targets)


def test_a_finding_that_too_few_have_or_lack_is_held_back_alone():
    targets = repeated(((1, 0, 1), 4), ((0, 1, 1), 6), ((0, 0, 1), 6), ((0, 0, 0), 5))
    assert withhold(targets, 5)[:, 0].tolist() == [-1] * 21
    assert torch.equal(withhold(targets, 5)[:, 1:], targets[:, 1:])
    flipped = targets.clone()
    flipped[:, 0] = 1 - flipped[:, 0]
    assert withhold(flipped, 5)[:, 0].tolist() == [-1] * 21
    assert torch.equal(withhold(targets, 4), targets)


def test_a_finding_that_nobody_has_gives_nobody_away():
    targets = repeated(((1, 0), 6), ((0, 0), 6))
    assert torch.equal(withhold(targets, 5), targets)


def test_each_pattern_is_looked_at_by_itself():
    """Sums of a pattern of three images are theirs, however many others there are."""
    targets = repeated(((1, 0), 9), ((0, 1), 9), ((1, -1), 3), ((0, -1), 9))
    found = withhold(targets, 5)
    assert torch.equal(found[:18], targets[:18])
    assert (found[18:] == -1).all()


def test_images_join_the_pattern_of_what_is_left():
    """Neither 4 nor 7 images could be told alone; without the first finding they are 11 of one."""
    targets = repeated(((1, 1), 2), ((0, 0), 2), ((-1, 1), 3), ((-1, 0), 4))
    found = withhold(targets, 5)
    assert (found[:, 0] == -1).all()
    assert torch.equal(found[:, 1], targets[:, 1])


def test_two_findings_that_differ_in_few_images_are_not_both_told():
    """Else their sums' difference is that of three images; the rarer one is held back."""
    targets = repeated(((1, 1), 9), ((0, 1), 3), ((0, 0), 9))
    found = withhold(targets, 5)
    assert (found[:, 0] == -1).all()
    assert torch.equal(found[:, 1], targets[:, 1])


def test_two_findings_that_are_all_but_opposites_are_not_both_told():
    """The sum of all images less both sums is minus that of three, of two kinds."""
    kinds = (((0, 1), 5), ((1, 0), 5))
    targets = repeated(*[((*told, third), n) for told, n in kinds for third in (0, 1)],
                       ((1, 1, 0), 2), ((1, 1, 1), 1))  # fmt: skip
    assert (withhold(targets, 5)[:, 0] == -1).all()
    assert torch.equal(withhold(targets, 3), targets)


def test_a_rare_set_of_labels_that_follows_from_three_sums_is_not_told():
    """granulocyte - neutrophil - eosinophil leaves the two basophils, which are no finding here."""
    targets = repeated(((1, 1, 0), 9), ((1, 0, 1), 9), ((1, 0, 0), 2), ((0, 0, 0), 9))
    found = withhold(targets, 5)
    assert (found == -1).any(dim=0).sum() == 1
    assert torch.equal(withhold(targets, 2), targets)


@quick
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(10, 60))
def test_no_sum_or_difference_of_two_is_of_too_few_images(seed, minimum, size):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(4, generator=generator)
    targets = (torch.rand(size, 4, generator=generator) < rates).long()
    targets[torch.rand(size, generator=generator) < 0.3, :2] = -1
    found = withhold(targets, minimum)
    assert ((found == targets) | (found == -1)).all()
    for pattern in torch.unique(found >= 0, dim=0):
        rows = ((found >= 0) == pattern).all(dim=1)
        columns = [found[rows][:, c] == 1 for c in pattern.nonzero().flatten().tolist()]
        if not columns:
            continue
        columns.append(torch.ones_like(columns[0]))
        told = [int(c.sum()) for c in columns]
        told += [int((a ^ b).sum()) for a, b in itertools.combinations(columns, 2)]
        told += [int((~(a ^ b)).sum()) for a, b in itertools.combinations(columns[:-1], 2)]
        assert all(count == 0 or count >= minimum for count in told)
    assert torch.equal(withhold(found, minimum), found)
    order = torch.randperm(size, generator=generator)
    assert torch.equal(withhold(targets[order], minimum), found[order])
