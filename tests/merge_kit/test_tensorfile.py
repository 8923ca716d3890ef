"""Reading and writing safetensors files."""

from __future__ import annotations

import os
import random

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import MergeKitError, TensorFileError
from merge_kit.files import sha256_bytes
from merge_kit.tensorfile import (
    TensorFile,
    TensorWriter,
    fingerprint,
    fingerprint_file,
    specs_of,
    write_tensors,
)
from merge_kit.tensorheader import DTYPES, TensorSpec
from tests.merge_kit.helpers import listing, load, quick, says

TINY = {"a": torch.tensor([1.0, -2.0]), "n": torch.tensor(3)}
TINY_HEADER = (
    b'{"__metadata__":{"k":"v"},'
    b'"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text("abcdefghij._éß中", min_size=1, max_size=12).filter(lambda t: ".." not in t)


def tensor_of(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    count = TensorSpec(dtype, shape).nbytes
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(left, right):
    """Equal bit for bit, NaN included."""
    assert left.keys() == right.keys()
    for name in left:
        one, two = left[name].contiguous(), right[name].contiguous()
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        bits = [t.reshape(-1).view(torch.uint8) for t in (one, two)]
        assert torch.equal(*bits)


tensors = st.dictionaries(
    NAMES,
    st.builds(tensor_of, st.sampled_from(list(DTYPES.values())), SHAPES, st.integers(0, 99)),
    max_size=6,
)


def test_written_bytes_are_golden(tmp_path):
    """Widest dtype first, header padded with blanks to a multiple of 8, little endian."""
    write_tensors(tmp_path / "t", TINY, ("k", "v"))
    assert (tmp_path / "t").read_bytes() == (
        (136).to_bytes(8, "little")
        + TINY_HEADER
        + b" " * (136 - len(TINY_HEADER))
        + b"\x03\0\0\0\0\0\0\0"
        + b"\0\0\x80\x3f\0\0\0\xc0"
    )


def test_the_fingerprint_is_golden():
    described = (
        b"merge-kit-tensors-v1\n"
        b'["a","F32",[2]]\n\0\0\x80\x3f\0\0\0\xc0'
        b'["n","I64",[]]\n\x03\0\0\0\0\0\0\0'
    )
    assert fingerprint(TINY.items()) == sha256_bytes(described)
    assert sha256_bytes(described) == (
        "sha256:0934bb432801f90bd340503656a3305402d47fb36e54ed731122a116090e5c97"
    )


def test_the_fingerprint_speaks_of_tensors_and_not_of_the_file(tmp_path):
    write_tensors(tmp_path / "ours", TINY, ("k", "v"))
    safetensors.torch.save_file(TINY, tmp_path / "theirs", {"another": "key", "and": "one more"})
    found = {fingerprint_file(tmp_path / name) for name in ("ours", "theirs")}
    assert found == {fingerprint(TINY.items())}


@pytest.mark.parametrize(
    "other",
    [
        {"a": TINY["a"]},
        {**TINY, "a": torch.tensor([1.0, 2.0])},
        {**TINY, "a": TINY["a"].reshape(1, 2)},
        {**TINY, "a": TINY["a"].view(torch.int32)},
        {"b": TINY["a"], "n": TINY["n"]},
    ],
    ids=["missing", "value", "shape", "dtype", "name"],
)
def test_the_fingerprint_changes_with_everything(other):
    assert fingerprint(other.items()) != fingerprint(TINY.items())


@quick
@given(tensors)
def test_what_we_write_safetensors_reads(tmp_path, made):
    write_tensors(tmp_path / "t", made, ("key", "välue"))
    same(safetensors.torch.load_file(tmp_path / "t"), made)
    with safetensors.safe_open(tmp_path / "t", "pt") as file:
        assert file.metadata() == {"key": "välue"}


@quick
@given(tensors)
def test_what_safetensors_writes_we_read(tmp_path, made):
    safetensors.torch.save_file(made, tmp_path / "t", {"one": "1", "two": "2"})
    same(load(tmp_path / "t"), made)
    with TensorFile(tmp_path / "t") as file:
        assert file.metadata == {"one": "1", "two": "2"}
        assert file.specs == specs_of(made)
        assert list(file.specs) == sorted(made)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path, name, shape):
    made = {"t": tensor_of(DTYPES[name], shape, 0)}
    write_tensors(tmp_path / "t", made)
    same(load(tmp_path / "t"), made)


def test_tensors_that_are_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    made = {"turned": whole.T, "column": whole[:, 1], "wide": torch.ones(1).expand(5)}
    write_tensors(tmp_path / "t", made)
    same(load(tmp_path / "t"), made)


@quick
@given(tensors, st.randoms(use_true_random=False))
def test_the_order_of_writing_never_matters(tmp_path, made, shuffler: random.Random):
    names = list(made)
    shuffler.shuffle(names)
    write_tensors(tmp_path / "sorted", dict(sorted(made.items())))
    with TensorWriter(tmp_path / "shuffled", {n: specs_of(made)[n] for n in names}) as writer:
        for name in reversed(names):
            writer.write(name, made[name])
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / "shuffled").read_bytes()


def test_a_tensor_is_read_into_memory_of_its_own(tmp_path):
    write_tensors(tmp_path / "t", TINY)
    with TensorFile(tmp_path / "t") as file:
        first = file.read("a")
        first.zero_()
        assert torch.equal(file.read("a"), TINY["a"])
    assert torch.equal(first, torch.zeros(2))


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    write_tensors(tmp_path / "t", TINY)
    with TensorFile(tmp_path / "t") as file:
        os.truncate(tmp_path / "t", (tmp_path / "t").stat().st_size - 1)
        with says(
            TensorFileError,
            f"{tmp_path}/t: tensor 'a' ends early, the file was cut while it was read: "
            "copy it again.",
        ):
            file.read("a")


def test_the_written_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "t", TINY)
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640


def test_a_tensor_that_was_never_written_is_refused(tmp_path):
    with (
        says(TensorFileError, f"{tmp_path}/t: tensor 'n' was never written; nothing is kept."),
        TensorWriter(tmp_path / "t", specs_of(TINY)) as writer,
    ):
        writer.write("a", TINY["a"])
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("tensor", "found"),
    [(torch.zeros(3), "F32 [3]"), (torch.zeros(2, dtype=torch.float64), "F64 [2]")],
    ids=["shape", "dtype"],
)
def test_a_tensor_other_than_announced_is_refused(tmp_path, tensor, found):
    with (
        says(TensorFileError, f"{tmp_path}/t: tensor 'a' should be F32 [2] and is {found}."),
        TensorWriter(tmp_path / "t", specs_of(TINY)) as writer,
    ):
        writer.write("a", tensor)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    write_tensors(tmp_path / "t", TINY)
    before = (tmp_path / "t").read_bytes()

    def interrupted():
        with TensorWriter(tmp_path / "t", specs_of(TINY)) as writer:
            writer.write("a", TINY["a"] * 2)
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert (tmp_path / "t").read_bytes() == before
    assert listing(tmp_path) == ["t"]


@pytest.mark.parametrize(
    "sizes", [[100_000], [4_000] * 40, [10] * 900], ids=["one", "many", "thin"]
)
def test_a_full_disk_is_named_and_leaves_nothing(small_disk, sizes):
    """The disk fills up in a big write, at a flush of many small ones, or in the header."""
    made = {f"{'x' * 60}{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    with says(
        MergeKitError,
        f"{small_disk}/t cannot be written: no space left (0 MiB free): "
        "make room and run the same command again.",
    ):
        write_tensors(small_disk / "t", made)
    assert listing(small_disk) == []


def test_a_disk_that_fills_up_at_the_last_flush_is_named(small_disk):
    (small_disk / "filler").write_bytes(b"x" * 61_440)
    with says(
        MergeKitError,
        f"{small_disk}/t cannot be written: no space left (0 MiB free): "
        "make room and run the same command again.",
    ):
        write_tensors(small_disk / "t", {"a": torch.zeros(5000, dtype=torch.uint8)})
    assert listing(small_disk) == ["filler"]


def test_a_read_only_disk_is_named(read_only_disk):
    with says(
        MergeKitError,
        f"{read_only_disk}/t cannot be written: Read-only file system: "
        "choose a folder that you may write to.",
    ):
        write_tensors(read_only_disk / "t", TINY)
