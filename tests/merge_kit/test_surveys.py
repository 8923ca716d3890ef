"""First passes over all vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.blocks import BLOCK, BlockReader
from merge_kit.surveys import Survey
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.helpers import quick

SIZES = {"a": 2 * BLOCK + 17, "b": 5, "c": BLOCK}


def pair(sizes, seed=0, sites=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        for _ in range(sites)
    ]


def test_totals_are_the_same_with_any_number_of_threads(survey):
    def product(block):
        return block.values.double() @ block.values.double().T

    vectors = pair(SIZES, sites=3)
    one, four = (survey(vectors, workers).totals(product) for workers in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in SIZES)
    flat = torch.stack([torch.cat(list(v.values())) for v in vectors]).double()
    torch.testing.assert_close(survey(vectors).total(product), flat @ flat.T)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("scope", ["vector", "tensor"])
@pytest.mark.parametrize("fraction", [1e-6, 0.2, 0.999, 1.0])
def test_the_kth_largest_is_exact(survey, fraction, scope, workers):
    vectors = pair(SIZES)
    found = survey(vectors, workers).kth_largest(lambda b: b.values.abs(), fraction, scope)
    for name in SIZES:
        for index, vector in enumerate(vectors):
            values = torch.cat(list(vector.values())) if scope == "vector" else vector[name]
            ordered = np.sort(values.abs().numpy())[::-1]
            rank = int(fraction * len(ordered))
            wanted = ordered[rank] if rank < len(ordered) else 0.0
            assert found[name][index].item() == wanted


@quick
@given(
    st.lists(
        st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 0.50000006, 1.0, 3e38]), min_size=1, max_size=40
    ),
    st.floats(0.01, 1.0),
)
def test_ties_zeros_and_the_smallest_floats_are_found(tmp_path, values, fraction):
    tensor = torch.tensor(values)
    for name in ("base", "vector"):
        write_tensors(tmp_path / name, {"w": tensor})
    with TensorFile(tmp_path / "base") as base, TensorFile(tmp_path / "vector") as vector:
        found_by = Survey(BlockReader(base, (vector,), ("w",), 1))
        found = found_by.kth_largest(lambda b: b.values, fraction, "vector")["w"].item()
    rank = int(fraction * len(values))
    ordered = sorted(tensor.tolist(), reverse=True)
    assert found == (ordered[rank] if rank < len(values) else 0.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_statistics_are_exact_whatever_the_sign(survey, workers):
    vectors = pair(SIZES)
    found_by = survey(vectors, workers)
    ranks = [1, 2, 5000, found_by.size // 2, found_by.size - 1, found_by.size]
    found = found_by.order_statistics(lambda block: block.values, ranks)
    whole = torch.stack([torch.cat(list(vector.values())) for vector in vectors])
    assert found_by.size == whole.shape[1] == 3 * BLOCK + 22
    ordered = whole.sort(dim=1, descending=True).values
    assert torch.equal(found, ordered[:, [rank - 1 for rank in ranks]].T)


@quick
@given(
    st.lists(
        st.sampled_from([0.0, 1e-45, -1e-45, 0.5, -0.5, -0.50000006, 1.0, 3e38, -3e38]),
        min_size=1,
        max_size=40,
    ),
)
def test_ties_zeros_and_the_smallest_floats_have_their_rank(tmp_path, values):
    tensor = torch.tensor(values)
    for name in ("base", "vector"):
        write_tensors(tmp_path / name, {"w": tensor})
    with TensorFile(tmp_path / "base") as base, TensorFile(tmp_path / "vector") as vector:
        found_by = Survey(BlockReader(base, (vector,), ("w",), 1))
        found = found_by.order_statistics(lambda b: b.values, range(1, len(values) + 1))
    assert found[:, 0].tolist() == sorted(tensor.tolist(), reverse=True)


def test_order_statistics_of_nothing_are_zero(tmp_path):
    write_tensors(tmp_path / "base", {"w": torch.zeros(1)})
    with TensorFile(tmp_path / "base") as base:
        found_by = Survey(BlockReader(base, (base, base), (), 1))
        assert found_by.order_statistics(lambda block: block.values, [1]).tolist() == [[0.0, 0.0]]


def test_a_first_pass_inside_a_block_leaves_the_block_alone(survey):
    found_by = survey(pair(SIZES), workers=2)

    def measure(block):
        before = block.values.clone()
        found_by.total(lambda inner: inner.values.sum())
        return torch.equal(before, block.values)

    assert all(same for _, same in found_by.reader.each(measure))


@pytest.mark.parametrize("scope", ["vector", "tensor"])
def test_a_noted_measure_is_sought_in_a_few_vectors_at_a_time(survey, scope):
    together = []

    def measure(block):
        together.append(len(block.values))
        return block.values.abs()

    found_by = survey(pair({"a": 300, "b": 7}, sites=37))
    found = found_by.kth_largest(measure, 0.2, scope, "magnitude")
    assert max(together) == 16
    at_once = found_by.kth_largest(measure, 0.2, scope)
    assert max(together) == 37
    assert all(torch.equal(found[name], at_once[name]) for name in at_once)
