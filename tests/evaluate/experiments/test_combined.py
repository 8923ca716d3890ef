"""Ensembles and models by site, from the probabilities that were written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluate.experiments.combined import Outputs, by_site, ensemble, read_outputs, write_outputs
from tests.merge_kit.helpers import quick


def outputs(logits):
    """Outputs of models with these logits, (models, n, C)."""
    values = torch.tensor(np.asarray(logits), dtype=torch.float64).softmax(dim=-1).numpy()
    size, classes = values.shape[1:]
    return Outputs(
        [f"{i}.png" for i in range(size)],
        ["north" if i % 2 else "south" for i in range(size)],
        tuple(f"c{i}" for i in range(classes)),
        {f"m{i}": one for i, one in enumerate(values)},
    )


@given(st.integers(0, 1000))
@quick
def test_the_ensemble_is_the_softmax_of_the_mean_logits(seed):
    generator = np.random.default_rng(seed)
    logits, weights = generator.normal(0, 3, (3, 5, 4)), generator.uniform(0.1, 2, 3)
    mean = np.tensordot(weights / weights.sum(), logits, axes=1)
    expected = torch.tensor(mean).softmax(dim=1).numpy()
    found = ensemble(outputs(logits), ["m0", "m1", "m2"], weights)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_weight_of_nothing_leaves_a_model_out():
    told = outputs(np.random.default_rng(0).normal(0, 1, (2, 3, 3)))
    np.testing.assert_allclose(ensemble(told, ["m0", "m1"], [1, 0]), told.probabilities["m0"])


def test_a_class_that_a_model_rules_out_stays_a_number():
    told = outputs([[[800.0, 0.0]], [[0.0, 1.0]]])
    assert np.isfinite(ensemble(told, ["m0", "m1"], [1, 1])).all()


def test_each_case_is_seen_by_the_model_of_its_site():
    told = outputs(np.random.default_rng(1).normal(0, 1, (2, 4, 3)))
    found = by_site(told, {"south": "m0", "north": "m1"})
    for index, row in enumerate(found):
        assert np.array_equal(row, told.probabilities[f"m{index % 2}"][index])


def test_what_is_written_is_read_again(tmp_path):
    told = outputs(np.random.default_rng(2).normal(0, 1, (1, 4, 3)))
    write_outputs(tmp_path / "p.csv", told, told.probabilities["m0"])
    lines = (tmp_path / "p.csv").read_text().splitlines()
    rows = [lines[0].replace("file,", "model,file,"), *[f"m0,{line}" for line in lines[1:]]]
    (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    again = read_outputs(tmp_path / "p.csv")
    assert (again.files, again.sites, again.classes) == (told.files, told.sites, told.classes)
    assert again.probabilities["m0"] == pytest.approx(told.probabilities["m0"], abs=1e-9)
