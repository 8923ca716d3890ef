"""Head rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.heads import group_shares, merge_rows, row_counts
from merge_kit.labelspace import LabelSpace
from tests.merge_kit.helpers import quick


def test_rows_are_averaged_over_the_sites_that_have_seen_the_class():
    """Class 0: (30 * 1 + 10 * 5) / 40 = 2. Class 1: the second site alone. Class 2: nobody."""
    rows = torch.tensor([[[1.0], [7.0], [8.0]], [[5.0], [3.0], [9.0]]])
    counts = torch.tensor([[30.0, 0.0, 0.0], [10.0, 2.5, 0.0]], dtype=torch.float64)
    merged = merge_rows(rows, counts)
    assert merged.tolist() == [[2.0], [3.0], [0.0]]
    assert merged.dtype == torch.float64


def test_a_bias_and_a_convolution_are_rows_too():
    counts = torch.tensor([[1.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([[4.0, 9.0], [0.0, 2.0]])
    assert merge_rows(bias, counts).tolist() == [1.0, 2.0]
    convolution = bias.reshape(2, 2, 1, 1, 1).expand(2, 2, 5, 1, 1)
    assert merge_rows(convolution, counts).shape == (2, 5, 1, 1)
    assert merge_rows(convolution, counts)[:, 4, 0, 0].tolist() == [1.0, 2.0]


@quick
@given(st.integers(1, 5), st.integers(0, 99))
def test_equal_rows_stay_what_they_are(sites, seed):
    row = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    counts = torch.arange(1, 3 * sites + 1, dtype=torch.float64).reshape(sites, 3)
    merged = merge_rows(row.expand(sites, 3, 4), counts)
    torch.testing.assert_close(merged, row.double(), rtol=1e-12, atol=1e-12)


# Sites with coarser labels

SPACE = LabelSpace(("a", "b", "c", "d"), {"ab": ("a", "b"), "abc": ("ab", "c")})


def test_images_of_a_group_are_shared_equally_among_its_classes():
    assert group_shares(SPACE, {"ab": 10, "abc": 0}) == (5, 5, 0, 0)
    assert group_shares(SPACE, {"abc": 6, "ab": 2.5}) == (3.25, 3.25, 2, 0)


def test_rows_come_from_sites_with_images_of_the_class_itself_where_there_are_any():
    """Class a: the first site alone, though the second has many images of its group; b: both
    coarse sites by their shares; c: nobody."""
    counts = row_counts([[3, 0, 0], [0, 0, 0], [0, 0, 0]], [(), (50, 50, 0), (10, 10, 0)])
    assert counts.tolist() == [[3, 0, 0], [0, 50, 0], [0, 10, 0]]
    rows = torch.tensor([[1.0, 9.0, 9.0], [5.0, 2.0, 9.0], [6.0, 8.0, 9.0]])
    assert merge_rows(rows, counts).tolist() == [1.0, (50 * 2 + 10 * 8) / 60, 0.0]


def test_without_groups_the_counts_are_those_of_the_classes():
    counts = [[1.0, 2.0], [2.5, 0.0]]
    assert row_counts(counts, [(), ()]).tolist() == counts
