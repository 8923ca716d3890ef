"""`--method auto`: the recipe that what has arrived on a hub asks for, and why.

The table is short because the evidence is (docs/results.md): what decides is whether the sites will
calibrate the merged model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge_kit.contributions import Contribution, Entry, live

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a hub before anything is merged."""

    vectors: tuple[Contribution, ...]
    """Those that will be merged."""
    second_visits: int
    """Sites among them that have calibrated a merged model."""
    common: bool
    """Whether every vector was trained from the same classifier of the federation."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of the table: the first that fits counts."""

    fits: Callable[[Facts], bool]
    method: str
    weights: str
    because: Callable[[Facts], str]


CHOICES = (
    Choice(
        lambda facts: len(facts.vectors) == 1,
        "mean",
        "examples",
        lambda facts: "one vector has arrived, and there is nothing to merge it with",
    ),
    Choice(
        lambda facts: facts.second_visits >= 2,
        "sum",
        "examples",
        lambda facts: (
            f"{facts.second_visits} of these sites have calibrated a merged model before. When "
            "they calibrate this one, too, features that are added up give more than their mean; "
            "before that its classifier does not fit"
        ),
    ),
    Choice(
        lambda facts: facts.common,
        "mean",
        "examples",
        lambda facts: (
            "all vectors were trained from one classifier of the federation, which fits their "
            "mean; no two sites have calibrated a merged model, which a sum would need"
        ),
    ),
    Choice(
        lambda facts: True,
        "mean",
        "examples",
        lambda facts: (
            "the vectors were trained with classifiers of their own, which larger steps than the "
            "mean would not fit; let the sites calibrate the base before they train"
        ),
    ),
)


def facts_of(vectors: Sequence[Contribution], entries: Sequence[Entry], base: str) -> Facts:
    """What a hub tells of the vectors that will be merged; `base` is the base's backbone."""
    counted = live(entries)
    sites = {vector.site for vector in vectors}
    come_again = {
        c.site
        for c in counted
        if c.kind == "moments" and c.manifest.about != base and c.site in sites
    }
    heads = {c.manifest.training.head if c.manifest.training else None for c in vectors}
    return Facts(tuple(vectors), len(come_again), len(heads) == 1 and None not in heads)


def choose(facts: Facts) -> tuple[dict[str, str], str]:
    """A method with its weights, and why."""
    choice = next(choice for choice in CHOICES if choice.fits(facts))
    return {"method": choice.method, "weights": choice.weights}, choice.because(facts)
