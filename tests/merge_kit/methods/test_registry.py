"""The table of merge methods."""

from __future__ import annotations

import re

import pytest
import torch

from merge_kit.methods import METHODS
from merge_kit.methods.registry import TiesOptions

PAPERS = re.compile(r"\b\d{4}\.\d{5}\b|10\.\d{4}/")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_paper_and_says_what_it_does(name):
    method = METHODS[name]
    assert method.name == name
    assert PAPERS.search(method.paper)
    assert len(method.summary) > 20


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented_and_has_a_default(name):
    for field in METHODS[name].options.model_fields.values():
        assert field.description
        assert not field.is_required()


def test_the_defaults_are_the_papers():
    assert TiesOptions() == TiesOptions(density=0.2, scope="vector", reduction="mean")
    weights = {name: METHODS[name].weights for name in ("mean", "sum", "ties")}
    assert weights == {"mean": "examples", "sum": "uniform", "ties": "uniform"}
    assert [name for name, method in METHODS.items() if not method.normalises] == ["sum"]


class Two:
    """Two tensors of two vectors."""

    first = torch.tensor([[1.0, 2.0, 3.0], [-9.0, 8.0, -7.0]])
    second = torch.tensor([[10.0], [0.5]])

    def flat(self, index):
        return torch.cat([self.first[index], self.second[index]])

    def stacks(self):
        return iter((self.first, self.second))

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("scope", "first", "second"),
    [
        # Whole vectors of 4 values at density 1/4: k = 3, thresholds 3 and 8; the signs of the
        # sums are -, +, + and +.
        ("vector", [-9.0, 8.0, 3.0], [10.0]),
        # Each tensor by itself: k = 3 - 0 = 3 and 1 - 0 = 1; thresholds 3 and 9, then 10 and 0.5.
        ("tensor", [-9.0, 0.0, 3.0], [5.25]),
    ],
)
def test_ties_trims_over_the_vector_or_each_tensor(scope, first, second):
    method, options = METHODS["ties"], TiesOptions(density=0.25, scope=scope)
    state, weights = method.prepare(Two(), options), torch.ones(2, dtype=torch.float64)
    assert method.combine(Two.first, weights, options, state).tolist() == first
    assert method.combine(Two.second, weights, options, state).tolist() == second
