"""Task vectors."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import vector
from merge_kit.encoding import Decoded
from merge_kit.errors import BaseMismatchError, NonFiniteError, VectorError
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.tensorfile import TensorFile, specs_of, write_tensors
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import blob, entry, load, quick, says

ZEROS, ONES = "sha256:" + "0" * 64, "sha256:" + "1" * 64
HEADER = vector.VectorHeader(base=ZEROS, federation=ONES, site="north")
BASE = {
    "conv.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
    "head.weight": torch.tensor([[0.0, 0.0]]),
    "bn.running_mean": torch.tensor([1.0]),
    "bn.num_batches_tracked": torch.tensor(5),
    "table": torch.tensor([3, 1, 2]),
}
TUNED = {
    "conv.weight": torch.tensor([[1.5, -2.0], [0.5, 2.0]]),
    "head.weight": torch.tensor([[2.0, -4.0]]),
    "bn.running_mean": torch.tensor([9.0]),
    "bn.num_batches_tracked": torch.tensor(12),
    "table": torch.tensor([3, 1, 2]),
}
ROLES = roles_of(specs_of(BASE), ("head",))


@pytest.fixture
def subtract(tmp_path):
    """Write BASE, subtract it from a tuned state, and return the vector's path."""

    def make(tuned=TUNED, base=BASE, roles=ROLES):
        write_tensors(tmp_path / "base", base)
        with TensorFile(tmp_path / "base") as file:
            vector.subtract(file, tuned, roles, HEADER, tmp_path / "vector")
        return tmp_path / "vector"

    return make


def test_a_vector_is_tuned_minus_base(subtract):
    """Counters too; constant tables are not carried."""
    found = {name: tensor.tolist() for name, tensor in load(subtract()).items()}
    assert found == {
        "conv.weight": [[0.5, 0.0], [0.0, -1.0]],
        "head.weight": [[2.0, -4.0]],
        "bn.running_mean": [8.0],
        "bn.num_batches_tracked": 7,
    }


def test_the_header_is_one_key_of_canonical_json(subtract):
    with TensorFile(subtract()) as file:
        text = file.metadata["merge-kit"]
        assert vector.read_header(file) == HEADER
    assert text == f'{{"base":"{ZEROS}","federation":"{ONES}","format":1,"site":"north"}}'


floats = st.floats(-1e3, 1e3, width=32)


@quick
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=20))
def test_base_plus_vector_gives_back_the_tuned_weights(pairs):
    """Up to one rounding: half an ulp of the difference and half an ulp of the sum."""
    start, end = (torch.tensor(column) for column in zip(*pairs, strict=True))
    back = vector.apply(start, end - start)
    eps = torch.finfo(torch.float32).eps
    assert ((back - end).abs() <= eps * ((end - start).abs() + end.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_differences_are_float32_whatever_the_base(subtract, dtype):
    base = {"w": torch.tensor([1.0, 2.0], dtype=dtype)}
    path = subtract({"w": torch.tensor([1.5, 2.0])}, base, {"w": Role.WEIGHT})
    found = load(path)["w"]
    assert (found.dtype, found.tolist()) == (torch.float32, [0.5, 0.0])
    assert vector.apply(base["w"], found).tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("tuned", "sentence"),
    [
        (
            {k: v for k, v in TUNED.items() if k != "conv.weight"},
            "the tuned model and the base differ in the tensor 'conv.weight'.",
        ),
        ({**TUNED, "x": torch.ones(1)}, "the tuned model and the base differ in the tensor 'x'."),
        (
            {**TUNED, "table": torch.tensor([1, 2, 3])},
            "the constant table 'table' differs from the base's.",
        ),
        (
            {**TUNED, "conv.weight": torch.ones(1, 2)},
            "the tuned tensor 'conv.weight' has the shape [1, 2], the base's has [2, 2].",
        ),
    ],
    ids=["missing", "extra", "table", "shape that broadcasts"],
)
def test_a_state_that_does_not_fit_is_refused(subtract, tmp_path, tuned, sentence):
    with says(VectorError, sentence):
        subtract(tuned)
    assert not (tmp_path / "vector").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(subtract, tmp_path, bad):
    tuned = {**TUNED, "conv.weight": torch.tensor([[bad, bad], [0.0, 0.0]])}
    with says(
        NonFiniteError,
        f"{tmp_path}/vector: tensor 'conv.weight' holds 2 value(s) that are NaN or infinite: "
        "the site must train again and publish a sound vector.",
    ):
        subtract(tuned)
    assert not (tmp_path / "vector").exists()


def test_infinities_that_cancel_are_found():
    with pytest.raises(NonFiniteError, match="holds 2 value"):
        vector.check_finite(torch.tensor([math.inf, -math.inf, 1.0]), "w", "here")


def test_large_finite_values_are_finite():
    """Their sum overflows float64, the values do not."""
    vector.check_finite(torch.full((4,), 1.7e308, dtype=torch.float64), "w", "here")
    vector.check_finite(torch.full((4,), 3.4e38), "w", "here")


def test_another_base_is_refused_with_both_fingerprints():
    with says(
        BaseMismatchError,
        f"here was taken from the base {ZEROS}, this federation's base is {ONES}: "
        "it cannot be merged here.",
    ):
        vector.check_header(HEADER, ONES, ONES, "here")


def test_another_federation_is_refused_with_both_hashes():
    with says(
        BaseMismatchError,
        f"here was made for the federation {ONES}, this one is {ZEROS}: it cannot be merged here.",
    ):
        vector.check_header(HEADER, ZEROS, ZEROS, "here")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (None, " is no task vector: its header lacks the metadata 'merge-kit'."),
        (("format", "pt"), " is no task vector: its header lacks the metadata 'merge-kit'."),
        (("merge-kit", "{"), ": the metadata 'merge-kit' is not JSON."),
        (("merge-kit", "[" * 100_000), ": the metadata 'merge-kit' is not JSON."),
        (("merge-kit", "{}"), ": the key 'base' is missing."),
        (
            (
                "merge-kit",
                f'{{"base":"{ZEROS}","federation":"{ONES}","format":2,"site":"north"}}',
            ),
            ": 'format': input should be 1 (got 2).",
        ),
    ],
    ids=["none", "other", "not JSON", "deep", "empty", "later format"],
)
def test_a_header_that_is_not_ours_is_refused(tmp_path, metadata, sentence):
    write_tensors(tmp_path / "v", {"w": torch.ones(1)}, metadata)
    with says(VectorError, f"{tmp_path}/v{sentence}"), TensorFile(tmp_path / "v") as file:
        vector.read_header(file)


EXPECTED = vector_specs(specs_of(BASE), ROLES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head.weight": None}, " lacks the tensor 'head.weight' that the base has."),
        ({"x": torch.ones(1)}, " has the tensor 'x' that the base does not have."),
        (
            {"conv.weight": torch.ones(4)},
            ": tensor 'conv.weight' is F32 [4], the base asks for F32 [2, 2].",
        ),
        (
            {"conv.weight": torch.ones(2, 2, dtype=torch.float16)},
            ": tensor 'conv.weight' is F16 [2, 2], the base asks for F32 [2, 2].",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_the_base_are_refused(subtract, tmp_path, change, sentence):
    made = {k: v for k, v in {**load(subtract()), **change}.items() if v is not None}
    write_tensors(tmp_path / "v", made)
    with says(VectorError, f"{tmp_path}/v{sentence}"), TensorFile(tmp_path / "v") as file:
        vector.check_specs(file, EXPECTED)


def test_a_sound_vector_fits(subtract):
    with TensorFile(subtract()) as file:
        assert vector.check_specs(file, EXPECTED) is None
        assert file.specs["bn.num_batches_tracked"] == TensorSpec(torch.int64, ())


def test_the_norm_is_over_weights_and_heads(subtract):
    """0.5^2 + 1^2 + 2^2 + 4^2 = 21.25; the running mean's 8 and the counter's 7 do not count."""
    with TensorFile(subtract()) as file:
        assert vector.norm(file, ROLES) == math.sqrt(21.25)


def test_the_norm_refuses_bad_values_in_any_tensor(subtract, tmp_path):
    bad = {**load(subtract()), "bn.running_mean": torch.tensor([math.nan])}
    write_tensors(tmp_path / "v", bad)
    with (
        TensorFile(tmp_path / "v") as file,
        says(
            NonFiniteError,
            f"{tmp_path}/v: tensor 'bn.running_mean' holds 1 value(s) that are NaN or infinite: "
            "the site must train again and publish a sound vector.",
        ),
    ):
        vector.norm(file, ROLES)


def measure(path):
    with TensorFile(path) as file:
        return vector.measure(Decoded(file, {}))


def test_one_reading_finds_the_digest_and_the_norm(subtract):
    """The norm as worked out above; the digest as any tool gives it."""
    path = subtract()
    expected = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert measure(path) == vector.Measured(sha256=expected, norm=math.sqrt(21.25))


kinds = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8])
names = st.sampled_from(["a.weight", "b.bias", "bn.running_mean", "bn.running_var", "head.weight"])


@quick
@given(
    st.dictionaries(names, st.tuples(kinds, st.sampled_from([0, 1, 5, 16384, 16385, 40000]))),
    st.integers(0, 9),
)
def test_one_reading_finds_what_two_find(tmp_path, tensors, seed):
    """Whatever lies in the file, in stretches or empty: hashlib, and `norm` with the roles."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: (torch.randn(size, generator=generator) * 9).to(dtype)
        for name, (dtype, size) in tensors.items()
    }
    write_tensors(tmp_path / "v", made)
    found = measure(tmp_path / "v")
    assert found.sha256 == "sha256:" + hashlib.sha256((tmp_path / "v").read_bytes()).hexdigest()
    head = ("head",) if "head.weight" in made else ()
    with TensorFile(tmp_path / "v") as file:
        expected = vector.norm(file, roles_of(file.specs, head))
    assert found.norm == pytest.approx(expected, rel=1e-12)


def test_one_reading_hashes_a_file_whose_tensors_are_not_in_order(tmp_path):
    header = {"b": entry(0, 3), "empty": entry(3, 3), "a": entry(3, 5)}
    (tmp_path / "v").write_bytes(blob(header, b"bbbaa"))
    expected = hashlib.sha256((tmp_path / "v").read_bytes()).hexdigest()
    assert measure(tmp_path / "v") == vector.Measured(sha256=f"sha256:{expected}", norm=0.0)


@pytest.mark.parametrize("name", ["conv.weight", "bn.running_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_reading_gives_no_norm_where_a_value_is_not_finite(subtract, tmp_path, name, value):
    made = load(subtract())
    made[name].view(-1)[0] = value
    write_tensors(tmp_path / "v", made)
    assert measure(tmp_path / "v").norm is None


def test_large_finite_values_have_a_norm(tmp_path):
    """Their squares are beyond float32."""
    write_tensors(tmp_path / "v", {"w": torch.full((4,), 3e38)})
    assert measure(tmp_path / "v").norm == pytest.approx(6e38, rel=1e-6)
