"""Tensors that a vector's file does not store dense: read as dense, whatever the cut."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import forms, vector
from merge_kit.errors import MergeKitError, NonFiniteError, VectorError
from merge_kit.files import canonical_json
from merge_kit.forms import Factors
from merge_kit.parameters import roles_of
from merge_kit.tensorfile import TensorFile, specs_of, write_tensors
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import load, quick, says

ORIGIN = {"base": "sha256:" + "0" * 64, "federation": "sha256:" + "1" * 64, "site": "north"}
HEADER = vector.VectorHeader.model_validate(ORIGIN)
ZERO = {"form": "zero", "dtype": "F32", "shape": [3]}
FACTORS = {"form": "factors", "dtype": "F32", "shape": [3, 4]}


@pytest.fixture
def write(tmp_path):
    """A vector's file with these tensors and this encoding."""

    def make(tensors, told):
        header = canonical_json({**ORIGIN, "format": 1, "encoding": told}).decode()
        write_tensors(tmp_path / "v", tensors, (vector.METADATA_KEY, header))
        return tmp_path / "v"

    return make


def pair(rank=2, rows=3, columns=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator) * scale
    return Factors(left, torch.randn(rank, columns, generator=generator))


def stored(factors, name="w"):
    return {f"{name}@left": factors.left, f"{name}@right": factors.right}


def test_a_product_by_hand(write):
    left, right = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.5], [1.0, 4.0]])
    told = {"w": {"form": "factors", "dtype": "F32", "shape": [2, 2]}}
    with vector.opened(write(stored(Factors(left, right)), told)) as file:
        assert file.read("w").tolist() == [[5.0, 8.5], [-1.0, -4.0]]
        assert file.specs == {"w": TensorSpec(torch.float32, (2, 2))}


@quick
@given(st.data())
def test_a_product_has_the_same_bits_however_it_is_cut(write, data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rank = data.draw(st.integers(1, min(rows, columns)))
    factors = pair(rank, rows, columns, data.draw(st.integers(0, 99)), scale=1e3)
    told = {"w": {"form": "factors", "dtype": "F32", "shape": [rows, columns]}}
    begin = data.draw(st.integers(0, rows * columns))
    out = torch.empty(data.draw(st.integers(0, rows * columns - begin)))
    with vector.opened(write(stored(factors), told)) as file:
        whole = file.read("w")
        file.read_into("w", begin, out)
    assert torch.equal(out, whole.reshape(-1)[begin:][: out.numel()])
    assert torch.equal(whole, forms.product(factors))
    exact = factors.left.double() @ factors.right.double()
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=1e-9 * 1e3)


def test_a_convolution_has_the_factors_of_its_matrix(write):
    factors = pair(2, 3, 8)
    told = {"w": {"form": "factors", "dtype": "F32", "shape": [3, 2, 2, 2]}}
    with vector.opened(write(stored(factors), told)) as file:
        assert torch.equal(file.read("w"), forms.product(factors).reshape(3, 2, 2, 2))


@pytest.mark.parametrize(("dtype", "kind"), [("F32", torch.float32), ("I64", torch.int64)])
def test_zeros_take_no_room_and_are_read(write, dtype, kind):
    path = write({"x": torch.ones(2)}, {"w": {**ZERO, "dtype": dtype}})
    with vector.opened(path) as file:
        assert list(file.specs) == ["w", "x"]
        assert torch.equal(file.read("w"), torch.zeros(3, dtype=kind))
        assert file.read("x").tolist() == [1.0, 1.0]


FAULTS = {
    "unknown form": (
        {},
        {"w": {**ZERO, "form": "int4"}},
        ": tensor 'w' is stored as 'int4', which this version does not read (known are factors, "
        "zero, bf16, int8, sparse): install a newer merge-kit.",
    ),
    "half is missing": (
        {"w@left": torch.ones(3, 2)},
        {"w": FACTORS},
        ": tensor 'w' is stored as factors, but its part 'w@right' is missing: it is refused.",
    ),
    "ranks differ": (
        {"w@left": torch.ones(3, 2), "w@right": torch.ones(1, 4)},
        {"w": FACTORS},
        ": tensor 'w' has the factors F32 [3, 2] and F32 [1, 4], and needs F32 [3, r] and "
        "F32 [r, 4] of one rank r: it is refused.",
    ),
    "half precision": (
        {"w@left": torch.ones(3, 2).half(), "w@right": torch.ones(2, 4)},
        {"w": FACTORS},
        ": tensor 'w' has the factors F16 [3, 2] and F32 [2, 4], and needs F32 [3, r] and "
        "F32 [r, 4] of one rank r: it is refused.",
    ),
    "rank too large": (
        {"w@left": torch.ones(3, 4), "w@right": torch.ones(4, 4)},
        {"w": FACTORS},
        ": tensor 'w' has factors of the rank 4, and a rank is 1 to 3 here: it is refused.",
    ),
    "rank of nothing": (
        {"w@left": torch.ones(3, 0), "w@right": torch.ones(0, 4)},
        {"w": FACTORS},
        ": tensor 'w' has factors of the rank 0, and a rank is 1 to 3 here: it is refused.",
    ),
    "a row": (
        {"w@left": torch.ones(3, 1), "w@right": torch.ones(1, 1)},
        {"w": {**FACTORS, "shape": [3]}},
        ": tensor 'w' is F32 [3], and only float32 matrices have factors: it is refused.",
    ),
    "twice": (
        {"w": torch.ones(3)},
        {"w": ZERO},
        ": tensor 'w' is stored twice, dense and as zero: it is refused.",
    ),
    "part of another": (
        {"w@left": torch.ones(3, 1), "w@right": torch.ones(1, 4)},
        {"w": FACTORS, "w@left": ZERO},
        ": tensor 'w@left' is stored twice, dense and as zero: it is refused.",
    ),
    "unsafe name": (
        {},
        {"../w": ZERO},
        " encodes a tensor of the unsafe name '../w': it is refused.",
    ),
    "no such dtype": (
        {},
        {"w": {**ZERO, "dtype": "F8"}},
        ": 'encoding.w.dtype': input should be 'F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'I16', "
        "'I8', 'U8' or 'BOOL' (got 'F8').",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "told", "sentence"), FAULTS.values(), ids=list(FAULTS))
def test_what_is_stored_wrongly_gives_its_sentence(write, tensors, told, sentence):
    path = write({"x": torch.ones(1), **tensors}, told)
    with says(VectorError, f"{path}{sentence}"), vector.opened(path):
        pass


def test_a_part_that_nothing_claims_is_an_extra_tensor(write):
    path = write({"w@left": torch.ones(3, 1)}, {"w": ZERO})
    with (
        vector.opened(path) as file,
        says(VectorError, f"{path} has the tensor 'w@left' that the base does not have."),
    ):
        vector.check_specs(file, {"w": TensorSpec(torch.float32, (3,))})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_product_that_is_not_finite_is_refused_by_name(write, bad):
    """3e38 is a sound factor, its product with 2 is not."""
    path = write(
        {"w@left": torch.full((3, 1), bad), "w@right": torch.full((1, 4), 2.0)}, {"w": FACTORS}
    )
    with vector.opened(path) as file:
        assert vector.measure(file).norm is None
        with pytest.raises(NonFiniteError, match=r"tensor 'w' holds 12 value\(s\) that are NaN or"):
            vector.norm(file, roles_of(file.specs, ()))


def test_a_factor_of_infinity_cannot_hide_behind_zeros(write):
    path = write(
        {"w@left": torch.full((3, 1), math.inf), "w@right": torch.zeros(1, 4)}, {"w": FACTORS}
    )
    with vector.opened(path) as file:
        assert vector.measure(file).norm is None


BASE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.ones(5),
    "bn.num_batches_tracked": torch.tensor(3),
    "head.weight": torch.zeros(2, 3),
}
ROLES = roles_of(specs_of(BASE), ("head",))


@pytest.fixture
def subtracted(tmp_path):
    """The same vector with factors and dense; gives both paths."""

    def make(factors, head=2.0):
        tuned = {**BASE, "head.weight": torch.full((2, 3), head)}
        tuned["a.weight"] = BASE["a.weight"] + forms.product(factors)
        write_tensors(tmp_path / "base", BASE)
        with TensorFile(tmp_path / "base") as base:
            small, dense = tmp_path / "small", tmp_path / "dense"
            vector.subtract(base, tuned, ROLES, HEADER, small, {"a.weight": factors})
            vector.subtract(base, tuned, ROLES, HEADER, dense)
        return small, dense

    return make


def test_a_vector_with_factors_stores_only_what_has_changed(subtracted):
    small, _ = subtracted(pair())
    assert sorted(load(small)) == ["a.weight@left", "a.weight@right", "head.weight"]
    with vector.opened(small) as file:
        assert {n: told.form for n, told in file.encoding.items()} == {
            "a.weight": "factors", "b.weight": "zero", "bn.num_batches_tracked": "zero",
        }  # fmt: skip
        vector.check_specs(file, {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in BASE.items()})


def test_one_reading_of_factors_finds_the_norm_of_the_product(subtracted):
    factors = pair(seed=3)
    small, _ = subtracted(factors)
    expected = math.sqrt(float(forms.product(factors).double().square().sum()) + 6 * 4.0)
    with vector.opened(small) as file:
        assert vector.measure(file).norm == pytest.approx(expected, rel=1e-12)
        assert vector.norm(file, ROLES) == pytest.approx(expected, rel=1e-12)


def test_factors_that_have_learnt_nothing_are_not_stored(subtracted):
    small, _ = subtracted(Factors(torch.zeros(3, 2), torch.ones(2, 4)), head=0.0)
    assert load(small) == {}


def test_factors_that_overflow_are_not_written(subtracted, tmp_path):
    with pytest.raises(NonFiniteError, match=r"tensor 'a\.weight' holds 12"):
        subtracted(Factors(torch.full((3, 1), 3e38), torch.full((1, 4), 2.0)))
    assert not (tmp_path / "small").exists()


def test_a_dense_vector_says_nothing_of_forms(subtracted):
    _, dense = subtracted(pair())
    with TensorFile(dense) as file:
        assert set(json.loads(file.metadata["merge-kit"])) == {
            "base",
            "federation",
            "format",
            "site",
        }


def test_statistics_have_no_forms():
    from merge_kit.schema import parse
    from merge_kit.statistics import StatisticsHeader

    told = {**ORIGIN, "kind": "fisher", "about": ORIGIN["base"], "encoding": {"w": ZERO}}
    with pytest.raises(MergeKitError, match="unknown key 'encoding'"):
        parse(StatisticsHeader, told, "here", MergeKitError)
