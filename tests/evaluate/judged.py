"""Labelled sets and predictions that are made up, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluate.document import Report
from evaluate.fitting import Validation
from evaluate.labelled import LabelledSet
from evaluate.predictions import Predictions
from evaluate.scoring import Settings
from evaluate.summary import Facts, summarise

CLASSES = ("benign", "malignant", "other")
SITES = ("lyon", "oslo")
FACTS = Facts("Skin", "2031-01-01", {"torch": "2.14"})


def cases(n: int = 120, *, seed: int = 0, **changes: Any) -> LabelledSet:
    """Three classes at two sites, patients of two images."""
    labels = np.random.default_rng(seed).integers(0, 3, n)
    sites = tuple(SITES[index % 6 == 5] for index in range(n))
    found = LabelledSet(
        classes=CLASSES,
        files=tuple(f"{index:03}.png" for index in range(n)),
        targets=np.eye(3, dtype=np.int8)[labels],
        sites=sites,
        patients=tuple(f"{site}\0p{index // 2}" for index, site in enumerate(sites)),
        unit="patient",
    )
    return replace(found, **changes)


def predictions(
    labelled: LabelledSet, model: str = "merged", role: str = "other", skill: float = 1.0
) -> Predictions:
    """The more skill, the more often right."""
    noise = np.random.default_rng(sum(model.encode()))
    logits = noise.normal(size=labelled.targets.shape) + skill * (labelled.targets == 1)
    odds = np.exp(logits)
    chances = odds / (1 + odds) if labelled.multi_label else odds / odds.sum(axis=1, keepdims=True)
    return Predictions(model, role, labelled.classes, chances, multi_label=labelled.multi_label)


def letters(truth: str, sites: str, **changes: Any) -> LabelledSet:
    """One case a letter: its class ("a", "b") and its site, a blank being unknown."""
    columns = [ord(letter) - ord("a") for letter in truth]
    found = LabelledSet(
        classes=("a", "b"),
        files=tuple(f"{index}.png" for index in range(len(truth))),
        targets=np.eye(2, dtype=np.int8)[columns].reshape(-1, 2),
        sites=tuple(site.strip() for site in sites),
    )
    return replace(found, **changes)


def certain(said: str, model: str = "m", role: str = "other") -> Predictions:
    """One case a letter: the class that it is taken for, with certainty."""
    columns = [ord(letter) - ord("a") for letter in said]
    return Predictions(model, role, ("a", "b"), np.eye(2)[columns].reshape(-1, 2))


def four_models(labelled: LabelledSet) -> list[Predictions]:
    skills = {"merged": 1.5, "own": 2.5, "pooled": 3.0, "start": 0.0}
    roles = {"merged": "merged", "own": "site:lyon", "pooled": "pooled", "start": "base"}
    return [predictions(labelled, name, roles[name], skill) for name, skill in skills.items()]


def many_and_few() -> tuple[LabelledSet, list[Predictions]]:
    """Two merged models: "many" is right at the large site x alone, "few" at y and often at x."""
    large, small = "ab" * 40, "ab" * 5
    models = [
        certain(large + "ba" * 5, "many", "merged"),
        certain("ba" * 12 + "ab" * 28 + small, "few", "merged"),
    ]
    return letters(large + small, "x" * 80 + "y" * 10), models


def report(
    labelled: LabelledSet,
    models: Sequence[Predictions] | Predictions,
    validation: Validation | None = None,
    **settings: Any,
) -> Report:
    given: Mapping[str, Any] = {"resamples": 50, **settings}
    found = [models] if isinstance(models, Predictions) else models
    return summarise(labelled, found, FACTS, Settings(**given), validation)
