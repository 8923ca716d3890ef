"""Checkpoints as people have them, read like files and like task vectors."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn

from merge_kit import vector
from merge_kit.checkpoints import (
    Checkpoint,
    Difference,
    Start,
    WithHead,
    check_fit,
    fingerprint_checked,
)
from merge_kit.errors import MergeKitError, NonFiniteError, TensorFileError, VectorError
from merge_kit.parameters import Role, roles_of
from merge_kit.tensorfile import TensorFile, fingerprint, read_all, specs_of
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import load, quick, says

STATE = {
    "conv.weight": torch.arange(300.0).reshape(3, 100),
    "head.bias": torch.tensor([1.0, 2.0]),
    "head.weight": torch.arange(200.0).reshape(2, 100).half(),
    "bn.num_batches_tracked": torch.tensor(7),
    "table": torch.tensor([3, 1, 2]),
}
HEADER = vector.VectorHeader(base="sha256:" + "0" * 64, federation="sha256:" + "1" * 64, site="n")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def everything(path):
    with Checkpoint(path) as file:
        assert list(file.specs) == sorted(file.specs)
        found = dict(read_all(file))
        assert specs_of(found) == dict(file.specs)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def shards(folder, **parts):
    """A sharded folder by hand: the tensors of each shard, and an index that lists them."""
    folder.mkdir()
    names = {"first": FIRST, "second": SECOND}
    where = {}
    for key, tensors in parts.items():
        save_file(tensors, folder / names[key])
        where |= dict.fromkeys(tensors, names[key])
    write_index(folder, where)
    return folder


def write_index(folder, where, **metadata):
    text = json.dumps({"metadata": metadata, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("size", ["5GB", "1KB"], ids=["single", "sharded"])
def test_what_huggingface_hub_saves_is_read(tmp_path, size):
    save_torch_state_dict(STATE, tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "1KB")
    assert same(everything(tmp_path), STATE)


def test_a_file_and_a_folder_with_one_file_of_any_name_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors", {"format": "pt"})
    assert same(everything(tmp_path), STATE)
    with Checkpoint(tmp_path / "weights.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert file.path == tmp_path / "weights.safetensors"


def test_the_whole_file_counts_where_shards_lie_beside_it(tmp_path):
    save_torch_state_dict(STATE, tmp_path, max_shard_size="1KB")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(everything(tmp_path)) == ["w"]


def test_stretches_are_those_of_the_tensor(tmp_path):
    folder = shards(tmp_path / "s", first={"a": torch.arange(9.0)}, second={"b": torch.arange(5)})
    with Checkpoint(folder) as file:
        floats, integers = torch.empty(4), torch.empty(2, dtype=torch.int64)
        file.read_into("a", 3, floats)
        file.read_into("b", 1, integers)
    assert floats.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert integers.tolist() == [1, 2]


class Tied(nn.Module):
    """The last layer is the first one, transposed by nobody."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("way", ["save_model", "single", "sharded"])
def test_a_tied_tensor_is_there_under_both_names_when_the_metadata_says_so(tmp_path, way):
    model = Tied()
    if way == "save_model":
        save_model(model, str(tmp_path / "model.safetensors"))
    else:
        state = {**model.state_dict(), "more": torch.ones(100)}
        size = 300 if way == "sharded" else "5GB"
        save_torch_state_dict(state, tmp_path, max_shard_size=size)
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load(file)}
    assert "head.weight" not in stored
    found = everything(tmp_path)
    assert torch.equal(found["head.weight"], model.embed.weight)
    assert torch.equal(found["embed.weight"], model.embed.weight)


@pytest.mark.parametrize(
    "metadata", [{"format": "pt"}, {"b c": "a"}, {"../b": "a"}, {"a": "a"}], ids=str
)
def test_other_metadata_makes_no_tensors(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata)
    assert list(everything(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            [],
            " is no checkpoint: it holds no model.safetensors, no model.safetensors.index.json and "
            "no other safetensors file.",
        ),
        (
            ["a.safetensors", "b.safetensors"],
            " holds 2 safetensors files and no model.safetensors.index.json: name one of them, "
            "such as {}/a.safetensors.",
        ),
        (
            ["pytorch_model.bin"],
            "/pytorch_model.bin is a pickled checkpoint, not safetensors: pickles can run code and "
            "are not read; convert it with torch.load(weights_only=True) and "
            "safetensors.torch.save_file.",
        ),
    ],
    ids=["empty", "several", "pickle"],
)
def test_a_folder_that_is_no_checkpoint_says_what_is_wrong(tmp_path, names, sentence):
    for name in names:
        (tmp_path / name).touch()
    with says(TensorFileError, f"{tmp_path}{sentence.format(tmp_path)}"):
        Checkpoint(tmp_path)


def test_what_is_not_there_says_so(tmp_path):
    with says(TensorFileError, f"{tmp_path}/x does not exist: check the path."):
        Checkpoint(tmp_path / "x")


A, B = {"a": torch.ones(2)}, {"b": torch.ones(3)}


def bad_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda f: write_index(f, {"a": FIRST, "b": SECOND, "c": SECOND}),
            f"{{index}} lists the tensor 'c' in '{SECOND}', which does not hold it: copy the whole "
            "folder again.",
        ),
        (
            lambda f: write_index(f, {"a": FIRST, "b": FIRST}),
            f"{{index}} lists the tensor 'b' in '{FIRST}', which does not hold it: copy the whole "
            "folder again.",
        ),
        (
            lambda f: save_file({**B, "c": torch.ones(1)}, f / SECOND),
            f"{{folder}}/{SECOND} holds the tensor 'c', which the index does not list: copy the "
            "whole folder again.",
        ),
        (
            lambda f: save_file({**A, **B}, f / SECOND),
            f"the tensor 'a' is in two shards of {{index}}, '{SECOND}' and '{FIRST}': copy the "
            "whole folder again.",
        ),
        (
            lambda f: (f / SECOND).unlink(),
            f"{{index}} names the shard '{SECOND}', which is not there: copy the whole folder "
            "again.",
        ),
        (
            lambda f: write_index(f, {"a": "../x.safetensors"}),
            "{index} names the shard '../x.safetensors': a shard is a safetensors file beside the "
            "index.",
        ),
        (
            lambda f: write_index(f, {"a": "/etc/passwd"}),
            "{index} names the shard '/etc/passwd': a shard is a safetensors file beside the "
            "index.",
        ),
        (
            lambda f: write_index(f, {"a": "model.bin"}),
            "{index} names the shard 'model.bin': a shard is a safetensors file beside the index.",
        ),
        (
            lambda f: bad_index(f, "{"),
            "{index} is not valid JSON: copy it again.",
        ),
        (
            lambda f: bad_index(f, "[" * 100_000),
            "{index} is not valid JSON: copy it again.",
        ),
        (
            lambda f: bad_index(f, '{"weight_map": {"a": "x", "a": "y"}}'),
            "{index} names the key 'a' twice: it is refused.",
        ),
        (
            lambda f: bad_index(f, " " * (16 * 2**20 + 1)),
            f"{{index}} is larger than {16 * 2**20} bytes: it is no index.",
        ),
        *(
            (
                lambda f, text=text: bad_index(f, text),
                "{index} is no index of shards: its 'weight_map' must give the file of each "
                "tensor.",
            )
            for text in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}')
        ),
    ],
)
def test_an_index_that_is_not_what_the_shards_hold_is_refused(tmp_path, change, sentence):
    folder = shards(tmp_path / "s", first=A, second=B)
    change(folder)
    open_before = len(os.listdir("/dev/fd"))
    index = folder / "model.safetensors.index.json"
    with says(TensorFileError, sentence.format(index=index, folder=folder)):
        Checkpoint(folder)
    assert len(os.listdir("/dev/fd")) == open_before


def test_all_files_are_closed(tmp_path):
    folder = shards(tmp_path / "s", first=A, second=B)
    before = len(os.listdir("/dev/fd"))
    with Checkpoint(folder):
        assert len(os.listdir("/dev/fd")) == before + 2
    assert len(os.listdir("/dev/fd")) == before


dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
numbers = st.floats(-6e4, 6e4, width=32)


@quick
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30),
    dtypes,
    dtypes,
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    st.integers(1, 7),
)
def test_a_checkpoint_reads_as_the_vector_that_subtract_writes(
    tmp_path, pairs, base_dtype, dtype, counters, step
):
    """Bit for bit, zeros of either sign too, whole and by stretches of any length."""
    starts, ends = (torch.tensor(column) for column in zip(*pairs, strict=True))
    base = {"w": starts.to(base_dtype), "n.num_batches_tracked": torch.tensor(counters[0])}
    tuned = {"w": ends.to(dtype), "n.num_batches_tracked": torch.tensor(counters[1])}
    table = {"table": torch.tensor([True, False])}
    save_file({**base, **table}, tmp_path / "base.safetensors")
    save_file({**tuned, **table}, tmp_path / "tuned.safetensors")
    with (
        Checkpoint(tmp_path / "base.safetensors") as start,
        Checkpoint(tmp_path / "tuned.safetensors") as end,
    ):
        roles = roles_of(start.specs, ())
        vector.subtract(start, dict(read_all(end)), roles, HEADER, tmp_path / "vector")
        read = Difference(Start(start, roles), end)
        with TensorFile(tmp_path / "vector") as written:
            assert dict(read.specs) == written.specs
            for name in written.specs:
                expected = written.read(name)
                assert bits(read.read(name)) == bits(expected)
                flat = expected.reshape(-1)
                for begin in range(0, flat.numel(), step):
                    part = torch.empty_like(flat[begin : begin + step])
                    read.read_into(name, begin, part)
                    assert bits(part) == bits(flat[begin : begin + step])


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_threads_do_not_disturb_each_other(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two"):
        save_file({"w": torch.randn(4000, generator=generator)}, tmp_path / f"{name}.safetensors")
    tensors = {n: load(tmp_path / f"{n}.safetensors")["w"] for n in ("base", "one", "two")}
    with (
        Checkpoint(tmp_path / "base.safetensors") as base,
        Checkpoint(tmp_path / "one.safetensors") as one,
        Checkpoint(tmp_path / "two.safetensors") as two,
    ):
        start = Start(base, {"w": Role.WEIGHT})
        read = {"one": Difference(start, one), "two": Difference(start, two)}

        def check(index):
            name, begin = ("one", "two")[index % 2], index * 7 % 3900
            out = torch.empty(100)
            read[name].read_into("w", begin, out)
            part = slice(begin, begin + 100)
            return torch.equal(out, tensors[name][part] - tensors["base"][part])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(check, range(400)))


def test_a_head_of_zeros_takes_the_place_of_the_bases(tmp_path):
    save_file({"w": torch.ones(3), "fc.weight": torch.ones(4, 3)}, tmp_path / "b.safetensors")
    specs = {
        "fc.weight": TensorSpec(torch.float32, (2, 3)),
        "w": TensorSpec(torch.float32, (3,)),
    }
    with Checkpoint(tmp_path / "b.safetensors") as file:
        base = WithHead(file, specs, frozenset({"fc.weight"}))
        assert base.read("fc.weight").tolist() == [[0.0] * 3] * 2
        assert base.read("w").tolist() == [1.0] * 3
        for name, expected in (("fc.weight", [0.0, 0.0]), ("w", [1.0, 1.0])):
            out = torch.full((2,), math.nan)
            base.read_into(name, 1, out)
            assert out.tolist() == expected


@pytest.fixture
def fit(tmp_path):
    """Check a state against a base; None for what is left out."""

    def check(changes, base=STATE):
        tuned = {k: v for k, v in {**STATE, **changes}.items() if v is not None}
        save_file(base, tmp_path / "base.safetensors")
        save_file(tuned, tmp_path / "a.safetensors")
        with (
            Checkpoint(tmp_path / "base.safetensors") as start,
            Checkpoint(tmp_path / "a.safetensors") as end,
        ):
            check_fit(end, start, roles_of(start.specs, ("head",)))

    return check


def test_any_precision_fits_and_counters_may_differ(fit):
    changes = {
        "conv.weight": STATE["conv.weight"].bfloat16(),
        "head.weight": STATE["head.weight"].double(),
        "bn.num_batches_tracked": torch.tensor(99),
    }
    assert fit(changes) is None


OTHER = "is it another architecture?"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"head.bias": None, "conv.weight": None},
            f" lacks the tensor 'conv.weight' that the base has (2 in all): {OTHER}",
        ),
        (
            {"x": torch.zeros(2)},
            f" has the tensor 'x' that the base does not have (1 in all): {OTHER}",
        ),
        (
            {"head.bias": torch.zeros(3)},
            ": tensor 'head.bias' is F32 [3], the base's is F32 [2]: is it another architecture, "
            "or a head that no config.json names?",
        ),
        (
            {"conv.weight": torch.zeros(3, 100, dtype=torch.int8)},
            ": tensor 'conv.weight' is I8 [3, 100], the base's is F32 [3, 100]: convert it first.",
        ),
        (
            {"table": torch.tensor([3, 1, 2], dtype=torch.int32)},
            ": tensor 'table' is I32 [3], the base's is I64 [3]: convert it first.",
        ),
        (
            {"table": torch.tensor([1, 2, 3])},
            ": the integer table 'table' differs from the base's: is it another architecture or "
            "input size?",
        ),
        (
            {"x": STATE["conv.weight"].clone()},
            " has the tensor 'x', equal to its 'conv.weight', and the base lacks it: if they are "
            "tied, save the base with both names or with safetensors.torch.save_model, which "
            "records the tie.",
        ),
    ],
    ids=["missing", "extra", "shape", "quantised", "integers", "table", "tied in the checkpoint"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(fit, tmp_path, changes, sentence):
    with says(VectorError, f"{tmp_path}/a.safetensors{sentence}"):
        fit(changes)


def test_a_tie_that_nothing_records_is_guessed_and_said(fit, tmp_path):
    base = {**STATE, "x": STATE["conv.weight"].clone()}
    with says(
        VectorError,
        f"{tmp_path}/a.safetensors lacks the tensor 'x', which equals 'conv.weight' in the base: "
        "if they are tied, save it with both names or with safetensors.torch.save_model, which "
        "records the tie.",
    ):
        fit({}, base)


def test_equal_biases_of_zeros_are_no_tie(fit, tmp_path):
    base = {**STATE, "x.bias": torch.zeros(5), "y.bias": torch.zeros(5)}
    with pytest.raises(VectorError, match=r"lacks the tensor 'x.bias' that the base has"):
        fit({"y.bias": torch.zeros(5)}, base)


@pytest.mark.parametrize("size", [1, 2**18, 2**18 + 1, 3 * 2**18])
def test_the_fingerprint_is_that_of_the_tensors(tmp_path, size):
    state = {**STATE, "large": torch.arange(float(size))}
    save_torch_state_dict(state, tmp_path, max_shard_size="100KB")
    with Checkpoint(tmp_path) as file:
        expected = fingerprint((name, state[name]) for name in sorted(state))
        assert fingerprint_checked(file) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2**18 + 5])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, at):
    values = torch.ones(2**18 + 9, dtype=torch.bfloat16)
    values[at] = bad
    save_file({"w": values, "n": torch.tensor([1])}, tmp_path / "a.safetensors")
    with (
        Checkpoint(tmp_path / "a.safetensors") as file,
        says(
            NonFiniteError,
            f"{tmp_path}/a.safetensors: tensor 'w' holds 1 value(s) that are NaN or infinite: give "
            "a sound checkpoint.",
        ),
    ):
        fingerprint_checked(file)


def test_a_shard_that_is_no_safetensors_file_is_refused(tmp_path):
    folder = shards(tmp_path / "s", first=A, second=B)
    (folder / SECOND).write_bytes(b"x" * 40)
    with pytest.raises(MergeKitError, match=f"{SECOND}"):
        Checkpoint(folder)
