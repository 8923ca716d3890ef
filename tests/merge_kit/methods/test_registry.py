"""The table of merge methods."""

from __future__ import annotations

import re

import pytest

from merge_kit.methods import METHODS
from merge_kit.methods.interference import TiesOptions

PAPERS = re.compile(r"\b\d{4}\.\d{5}\b|10\.\d{4}/")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_paper_and_says_what_it_does(name):
    method = METHODS[name]
    assert method.name == name
    assert PAPERS.search(method.paper) or method.paper.endswith("; no paper")
    assert len(method.summary) > 20


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_documented_and_has_a_default(name):
    for field in METHODS[name].options.model_fields.values():
        assert field.description
        assert not field.is_required()


def test_the_defaults_are_the_papers():
    assert TiesOptions() == TiesOptions(
        density=0.2, scope="vector", reduction="mean", vote="values"
    )
    weights = {name: METHODS[name].weights for name in ("mean", "sum", "ties")}
    assert weights == {"mean": "examples", "sum": "uniform", "ties": "uniform"}
    plain = [name for name, method in METHODS.items() if not method.normalises]
    assert plain == ["sum", "consensus"]
