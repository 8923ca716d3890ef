"""Blocks of many vectors, and what is found in a first pass over them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.blocks import BLOCK, BlockReader, in_order, one_thread_each, stretches
from merge_kit.tensorfile import TensorFile, TensorSpec, write_tensors
from tests.merge_kit.helpers import quick


def pair(sizes, seed=0, sites=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        for _ in range(sites)
    ]


SIZES = {"a": 2 * BLOCK + 17, "b": 5, "c": BLOCK}


def test_tensors_are_cut_into_blocks():
    specs = {
        "a": TensorSpec(torch.float32, (2, BLOCK)),
        "b": TensorSpec(torch.float32, ()),
        "c": TensorSpec(torch.float32, (0,)),
    }
    cut = [(s.tensor, s.begin, s.size) for s in stretches(specs, specs)]
    assert cut == [("a", 0, BLOCK), ("a", BLOCK, BLOCK), ("b", 0, 1)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_value_is_seen_once_and_in_order(read, workers):
    vectors = pair(SIZES)
    reader = read(vectors, workers)
    seen = {name: [] for name in SIZES}
    for stretch, values in reader.each(lambda block: block.values.clone()):
        assert stretch.begin == sum(part.shape[1] for part in seen[stretch.tensor])
        seen[stretch.tensor].append(values)
    for name, parts in seen.items():
        whole = torch.stack([vector[name] for vector in vectors])
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_block_knows_its_tensor_and_the_base(read):
    reader = read(pair(SIZES))
    block = reader.block(reader.stretches[1])
    assert (block.tensor, block.shape, block.begin) == ("a", (SIZES["a"],), BLOCK)
    assert torch.equal(block.start, torch.ones(BLOCK, dtype=torch.float64))


def test_totals_are_the_same_with_any_number_of_threads(read):
    def product(block):
        return block.values.double() @ block.values.double().T

    vectors = pair(SIZES, sites=3)
    one, four = (read(vectors, workers).totals(product) for workers in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in SIZES)
    flat = torch.stack([torch.cat(list(v.values())) for v in vectors]).double()
    torch.testing.assert_close(read(vectors).total(product), flat @ flat.T)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("scope", ["vector", "tensor"])
@pytest.mark.parametrize("fraction", [1e-6, 0.2, 0.999, 1.0])
def test_the_kth_largest_is_exact(read, fraction, scope, workers):
    vectors = pair(SIZES)
    found = read(vectors, workers).kth_largest(lambda b: b.values.abs(), fraction, scope)
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
        reader = BlockReader(base, [vector], ("w",), 1)
        found = reader.kth_largest(lambda b: b.values, fraction, "vector")["w"].item()
    rank = int(fraction * len(values))
    ordered = sorted(tensor.tolist(), reverse=True)
    assert found == (ordered[rank] if rank < len(values) else 0.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_statistics_are_exact_whatever_the_sign(read, workers):
    vectors = pair(SIZES)
    reader = read(vectors, workers)
    ranks = [1, 2, 5000, reader.size // 2, reader.size - 1, reader.size]
    found = reader.order_statistics(lambda block: block.values, ranks)
    whole = torch.stack([torch.cat(list(vector.values())) for vector in vectors])
    assert reader.size == whole.shape[1] == 3 * BLOCK + 22
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
        reader = BlockReader(base, [vector], ("w",), 1)
        found = reader.order_statistics(lambda b: b.values, range(1, len(values) + 1))
    assert found[:, 0].tolist() == sorted(tensor.tolist(), reverse=True)


def test_order_statistics_of_nothing_are_zero(tmp_path):
    write_tensors(tmp_path / "base", {"w": torch.zeros(1)})
    with TensorFile(tmp_path / "base") as base:
        reader = BlockReader(base, [base, base], (), 1)
        assert reader.order_statistics(lambda block: block.values, [1]).tolist() == [[0.0, 0.0]]


def test_a_first_pass_inside_a_block_leaves_the_block_alone(read):
    reader = read(pair(SIZES), workers=2)

    def measure(block):
        before = block.values.clone()
        reader.total(lambda inner: inner.values.sum())
        return torch.equal(before, block.values)

    assert all(same for _, same in reader.each(measure))


def test_results_come_in_the_order_of_the_items():
    gate = threading.Event()

    def slow_first(item):
        if item == 0:
            gate.wait(10)
        else:
            gate.set()
        return item

    assert list(in_order(slow_first, range(50), 3)) == list(range(50))


def test_an_error_in_a_worker_reaches_the_reader():
    def fail(item):
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        list(in_order(fail, range(50), 3))


def test_torch_works_with_one_thread_meanwhile():
    before = torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers == before
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
