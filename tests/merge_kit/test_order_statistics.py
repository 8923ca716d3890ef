"""The exact k-th largest, whatever the sample says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import order_statistics
from merge_kit.methods.base import Block
from merge_kit.order_statistics import Stretch, keys_of, kth_largest, signed_keys_of, values_of
from tests.merge_kit.helpers import quick


class Rows:
    """Vectors in memory, which remember what was read of them."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)
        self.read = 0

    def __len__(self):
        return len(self.values)

    def each(self, function, parts=None):
        for part in parts:
            self.read += part.size
            values = self.values[:, part.begin : part.begin + part.size]
            yield part, function(Block("w", (), part.begin, values, values[0], (), (), 0))


class Workers(Rows):
    """The same, read by several threads at once."""

    def __init__(self, values, workers):
        super().__init__(values)
        self.workers, self.pieces = workers, []

    def each(self, function, parts=None):
        self.pieces += [part.size for part in parts]

        def work(part):
            return next(super(Workers, self).each(function, [part]))

        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(work, parts)


def parts_of(size, step=4096):
    return [Stretch("w", at, min(step, size - at)) for at in range(0, size, step)]


def select(rows, ranks, **options):
    size = rows.values.shape[1]
    found = kth_largest(rows, lambda b: keys_of(b.values), parts_of(size), ranks, **options)
    return found.view(np.float32)


def by_sorting(rows, ranks):
    ordered = np.sort(rows.values.numpy(), axis=1)[:, ::-1]
    return np.array([ordered[:, rank - 1] for rank in ranks])


def normal(seed, sites, size):
    return np.abs(np.random.default_rng(seed).normal(size=(sites, size))).astype(np.float32)


@pytest.mark.parametrize("divisible", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 20_000, 399_999, 400_000])
def test_it_is_what_sorting_finds(rank, divisible):
    rows = Rows(normal(0, 3, 400_000))
    ranks = [rank, 50_000]
    found = select(rows, ranks, divisible=divisible)
    np.testing.assert_array_equal(found, by_sorting(rows, ranks))


def test_the_values_are_read_once_and_the_sample_besides():
    rows = Rows(normal(1, 2, 2_000_000))
    found = select(rows, [400_000])
    np.testing.assert_array_equal(found, by_sorting(rows, [400_000]))
    assert rows.read < 1.2 * 2_000_000


@pytest.mark.parametrize("rank", [1, 200, 40_000, 1_960_001, 1_999_999, 2_000_000])
def test_ranks_near_the_ends_take_one_reading_and_no_sample(rank):
    """A sample of one value in eight would hardly know the 200 largest."""
    rows = Rows(normal(5, 2, 2_000_000))
    np.testing.assert_array_equal(select(rows, [rank]), by_sorting(rows, [rank]))
    assert rows.read == 2_000_000


def test_values_that_are_far_apart_are_kept_and_not_counted():
    """Near the rank there are forty times as many floats as the histogram has cells."""
    rows = Rows(np.exp(15 * normal(6, 2, 2_000_000), dtype=np.float32))
    np.testing.assert_array_equal(select(rows, [200_000]), by_sorting(rows, [200_000]))
    assert rows.read < 1.15 * 2_000_000


def test_many_small_tensors_do_not_mislead_the_sample():
    """A twentieth of the blocks, a thousandth of the values, and all much larger than the rest."""
    size, step = 2_000_000, 4096
    values = normal(5, 2, size)
    values[:, :2000] += 100
    small = [Stretch("w", at, 50) for at in range(0, 2000, 50)]
    large = [Stretch("w", at, min(step, size - at)) for at in range(2000, size, step)]
    rows = Rows(values)
    found = kth_largest(rows, lambda b: keys_of(b.values), [*small, *large], [400_000])
    np.testing.assert_array_equal(found.view(np.float32), by_sorting(rows, [400_000]))
    assert rows.read < 1.2 * size


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_sample_that_misleads_about_values_far_apart_costs_no_exactness_either(factor):
    """Looked for too low, then too high."""
    values = np.exp(10 * normal(6, 2, 600_000), dtype=np.float32)
    for part in parts_of(600_000):
        values[:, part.begin : part.begin + 1800] *= factor
    rows = Rows(values)
    np.testing.assert_array_equal(select(rows, [120_000]), by_sorting(rows, [120_000]))
    assert rows.read > 3 * 600_000


def test_negative_values_have_keys_that_sort_like_them():
    values = [-3e38, -1.0, -0.5, -1e-45, 0.0, 1e-45, 0.5, 1.0, 3e38]
    keys = signed_keys_of(torch.tensor([values]))
    assert keys[0].tolist() == sorted(keys[0].tolist())
    assert values_of(keys)[0].tolist() == torch.tensor(values).tolist()


def test_ranks_of_every_kind_are_found_together_by_several_workers():
    """Each worker meets only some of the blocks."""
    values = normal(7, 3, 300_000) - 0.5
    values[1] = np.exp(15 * values[1])
    reader = Workers(values, 3)
    ranks = [1, 3_000, 90_000, 299_990]
    parts = parts_of(300_000)
    keys = kth_largest(reader, lambda b: signed_keys_of(b.values), parts, ranks)
    np.testing.assert_array_equal(values_of(keys), by_sorting(reader, ranks))
    # The sample, and once.
    assert sum(reader.pieces) < 2 * 300_000


def test_a_sample_that_misleads_costs_two_more_readings_and_no_exactness():
    """What is sampled, the beginning of every block, is much smaller than the rest."""
    values = normal(2, 2, 2_000_000) + 10
    for part in parts_of(2_000_000):
        values[:, part.begin : part.begin + 600] *= 1e-3
    rows = Rows(values)
    found = select(rows, [400_000])
    np.testing.assert_array_equal(found, by_sorting(rows, [400_000]))
    assert rows.read > 3 * 2_000_000


def test_a_rank_beyond_the_values_gives_zero():
    for size in (50_000, 300_000):
        rows = Rows(normal(3, 2, size))
        found = select(rows, [size + 1, 1])
        assert found[0].tolist() == [0.0, 0.0]
        np.testing.assert_array_equal(found[1], rows.values.max(dim=1).values.numpy())
        assert select(rows, [size + 1]).tolist() == [[0.0, 0.0]]


@quick
@given(
    st.integers(0, 999),
    st.sampled_from(["zeros", "equal", "few", "wide", "tiny"]),
    st.floats(0.0001, 0.9999),
)
def test_hard_distributions(seed, kind, share):
    values = normal(seed, 2, 300_000)
    if kind == "zeros":
        values[values < 1.5] = 0
    elif kind == "equal":
        values[:] = 3
    elif kind == "few":
        values = np.round(values * 3)
    elif kind == "wide":
        values = np.exp(15 * values, dtype=np.float32)
    else:
        values = (values * np.float32(1e-44)).astype(np.float32)
    rows, rank = Rows(values), int(share * 300_000) + 1
    np.testing.assert_array_equal(select(rows, [rank]), by_sorting(rows, [rank]))


def test_the_width_of_the_search_bounds_the_memory(monkeypatch):
    monkeypatch.setattr(order_statistics, "_WIDTH", 16)
    rows = Rows(normal(4, 2, 300_000))
    np.testing.assert_array_equal(select(rows, [60_000]), by_sorting(rows, [60_000]))
