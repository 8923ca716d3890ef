"""Blocks of many vectors."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from merge_kit.blocks import BLOCK, in_order, one_thread_each, stretches
from merge_kit.tensorheader import TensorSpec


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


def test_vectors_are_changed_one_by_one(read):
    vectors = pair({"a": BLOCK + 3}, sites=3)
    reader = replace(read(vectors), ids=("x", "y", "z"), change=lambda b: b.values + ord(b.ids[0]))
    assert len(reader.block(reader.stretches[0]).ids) == 3
    found = torch.cat([part for _, part in reader.each(lambda b: b.values.clone())], dim=1)
    for row, vector, identity in zip(found, vectors, "xyz", strict=True):
        assert torch.equal(row, vector["a"] + ord(identity))


def test_whole_tensors_of_any_size_share_one_buffer(read):
    vectors = pair({"a": 5, "b": 2 * BLOCK + 3, "c": BLOCK + 1})
    reader = replace(read(vectors), whole=True)
    found = [(b.values.data_ptr(), b.values.clone()) for b in map(reader.block, reader.stretches)]
    assert len({place for place, _ in found}) == 1
    for name, (_, values) in zip(vectors[0], found, strict=True):
        assert torch.equal(values, torch.stack([vector[name] for vector in vectors]))
