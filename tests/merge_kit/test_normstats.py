"""Norm statistics that add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import normstats
from merge_kit.errors import VectorError
from merge_kit.normstats import NormSums
from merge_kit.parameters import Role
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import quick, says

SPECS = {
    "n.running_mean": TensorSpec(torch.float32, (3,)),
    "n.running_var": TensorSpec(torch.float32, (3,)),
    "n.weight": TensorSpec(torch.float32, (3,)),
}
ROLES = {
    "n.running_mean": Role.NORM_MEAN,
    "n.running_var": Role.NORM_VARIANCE,
    "n.weight": Role.WEIGHT,
}


def summed(values):
    """Of values (n, C)."""
    exact = values.double()
    return {"n": NormSums(len(exact), exact.sum(dim=0), exact.square().sum(dim=0))}


def drawn(count, seed, shift=0.0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.integers(0, 99))
@quick
def test_sites_give_the_statistics_of_all_their_values(sizes, seed):
    parts = [drawn(size, seed + i, shift=3.0 * i) for i, size in enumerate(sizes)]
    found = normstats.running_statistics(normstats.add([summed(p) for p in parts]), SPECS)
    every = torch.cat(parts).double()
    torch.testing.assert_close(found["n.running_mean"], every.mean(dim=0).float())
    torch.testing.assert_close(found["n.running_var"], every.var(dim=0).float())


def test_they_are_what_torch_keeps():
    layer = torch.nn.BatchNorm1d(3, momentum=1.0).train()
    values = drawn(40, 1, shift=2.0)
    layer(values)
    found = normstats.running_statistics(summed(values), SPECS)
    torch.testing.assert_close(found["n.running_mean"], layer.running_mean)
    torch.testing.assert_close(found["n.running_var"], layer.running_var)


def test_what_is_read_is_what_was_measured(tmp_path):
    found = summed(drawn(9, 2))
    write_tensors(tmp_path / "n.safetensors", normstats.to_tensors(found))
    with TensorFile(tmp_path / "n.safetensors") as file:
        assert normstats.looks_so(file)
        normstats.check_specs(file.specs, SPECS, ROLES, "n")
        again = normstats.read(file)
    assert again["n"].count == 9
    assert torch.equal(again["n"].sums, found["n"].sums)
    assert torch.equal(again["n"].squares, found["n"].squares)
    assert normstats.fault(again) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda n: NormSums(n.count, n.sums * torch.nan, n.squares), "NaN or infinite values"),
        (lambda n: NormSums(1, n.sums, n.squares), "is of fewer than two values for 'n'"),
        (lambda n: NormSums(n.count, n.sums + 99, n.squares), "squares that are too small"),
        (lambda n: NormSums(n.count, n.sums, -n.squares), "squares that are too small"),
    ],
)
def test_what_no_images_can_have_given_is_named(change, sentence):
    found = summed(drawn(9, 2, shift=1.0))
    assert normstats.fault(found) is None
    assert sentence in normstats.fault({"n": change(found["n"])})


def test_a_file_for_other_layers_is_refused():
    good = normstats.specs(SPECS, ROLES)
    with says(VectorError, "n lacks the tensor 'n.sum': the site must calibrate again."):
        normstats.check_specs({k: v for k, v in good.items() if k != "n.sum"}, SPECS, ROLES, "n")
    with says(VectorError, "n has the tensor 'm.sum', which this backbone does not ask."):
        normstats.check_specs({**good, "m.sum": good["n.sum"]}, SPECS, ROLES, "n")
    odd = {**good, "n.count": TensorSpec(torch.int32, (1,))}
    with pytest.raises(VectorError, match=r"n: tensor 'n\.count' is"):
        normstats.check_specs(odd, SPECS, ROLES, "n")


def test_sums_of_other_layers_are_not_added():
    sentence = "norm statistics of other layers cannot be added: take those of a model."
    with says(VectorError, sentence):
        normstats.add([summed(drawn(3, 0)), {"m": summed(drawn(3, 0))["n"]}])
