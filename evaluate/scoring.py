"""One model on all scopes: every figure with its interval, what is too small withheld."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluate.comparisons import Sample, figure
from evaluate.document import ClassFigures, Figure, ModelScope
from evaluate.labelled import LabelledSet
from evaluate.metrics import delong_interval
from evaluate.metrics.calibration import BINS
from evaluate.predictions import Predictions
from evaluate.resampling import Scored, replicates
from evaluate.scopes import MEAN, Part
from finetune.scores import mean_of_defined, percentile_bounds

Floats = NDArray[np.float64]
LEVEL = 0.95
SCALARS = (
    "balanced_accuracy",
    "accuracy",
    "macro_auroc",
    "macro_auprc",
    "macro_f1",
    "kappa",
    "quadratic_kappa",
    "brier",
    "ece",
    "log_loss",
)
COMPARED = ("balanced_accuracy", "macro_auroc", "accuracy")
"""Scores whose replicates are kept, to compare models by."""
_BY_CLASS = {"class_brier": "brier", "class_ece": "ece", "class_log_loss": "log_loss"}
"""Names of class figures that would be those of scalars."""
_OF_ALL = ("brier", "log_loss")


@dataclass(frozen=True, slots=True)
class Settings:
    """How figures are made; the same for all models."""

    minimum: int = 5
    """Figures of fewer cases are withheld."""
    resamples: int = 1000
    seed: int = 0
    level: float = LEVEL
    bins: int = BINS
    ordered: bool = False
    """Whether the classes are grades."""
    prevalences: Mapping[str, float] = field(default_factory=dict)
    """Stated prevalence of a class."""
    specificities: tuple[float, ...] = (0.9, 0.95)
    """What thresholds are to reach on the validation cases."""
    external: tuple[str, ...] = ()
    """Sites that no model was trained on."""
    reference: str | None = None
    """A model that all others are compared against."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What one model reaches."""

    scopes: tuple[ModelScope, ...]
    samples: Mapping[str, Sample]
    """By scope; without those that are withheld."""


def score(
    labelled: LabelledSet,
    predictions: Predictions,
    parts: Sequence[Part],
    thresholds: Mapping[str, Floats],
    settings: Settings,
) -> Scoring:
    """All figures of one model.

    Parameters
    ----------
    thresholds
        Name of an operating point -> (C,) threshold on the probability of each class, nan where
        there is none.
    """
    scopes: list[ModelScope] = []
    samples: dict[str, Sample] = {}
    for part in parts:
        if part.scope.small or not len(part.rows):
            scopes.append(_withheld(part, settings))
            continue
        scope, sample = _score_part(labelled, predictions, part, thresholds, settings)
        scopes.append(scope)
        samples[part.scope.key] = sample
    sites = [
        samples[p.scope.key] for p in parts if p.scope.kind == "site" and p.scope.key in samples
    ]
    if any(part.scope.kind == "site" for part in parts):
        mean = _mean(sites)
        samples[MEAN] = mean
        figures = {name: _interval(mean, name, settings) for name in mean.values}
        scopes.append(ModelScope(scope=MEAN, figures=figures))
    return Scoring(tuple(scopes), samples)


def _withheld(part: Part, settings: Settings) -> ModelScope:
    empty = Figure(value=None, small=part.scope.small)
    names = [name for name in SCALARS if settings.ordered or name != "quadratic_kappa"]
    return ModelScope(scope=part.scope.key, figures=dict.fromkeys(names, empty))


def _score_part(
    labelled: LabelledSet,
    predictions: Predictions,
    part: Part,
    thresholds: Mapping[str, Floats],
    settings: Settings,
) -> tuple[ModelScope, Sample]:
    chosen = labelled.take(part.rows)
    probabilities = predictions.probabilities[part.rows]
    scored = Scored.prepare(
        chosen.targets,
        probabilities,
        multi_label=labelled.multi_label,
        ordered=settings.ordered,
        operating_points=thresholds,
        prevalences=_prevalences(labelled.classes, settings),
        bins=settings.bins,
    )
    values = scored.values()
    drawn = replicates(
        scored,
        groups=chosen.patients,
        resamples=settings.resamples,
        seed=seed_of(part.scope.key, settings.seed),
    )
    scalars = [name for name in SCALARS if name in values]
    sample = Sample(
        len(part.rows),
        {name: float(values[name]) for name in scalars},
        {name: drawn[name] for name in COMPARED if name in drawn},
    )
    figures = {}
    for name in scalars:
        low, high = percentile_bounds(drawn[name], settings.level)
        figures[name] = figure(float(values[name]), low, high, len(part.rows))
    classes = tuple(_classes(chosen, probabilities, values, drawn, settings))
    matrix = None if labelled.multi_label else _confusion(chosen, probabilities, settings.minimum)
    return ModelScope(
        scope=part.scope.key, figures=figures, classes=classes, confusion=matrix
    ), sample


def seed_of(scope: str, seed: int) -> list[int]:
    """A site's draw hangs on its name: the figures of one stay when another joins."""
    name = {"union": ""}.get(scope, scope.removeprefix("site:"))
    return [seed, zlib.crc32(name.encode())]


def _prevalences(classes: Sequence[str], settings: Settings) -> Floats | None:
    if not settings.prevalences:
        return None
    return np.array([settings.prevalences.get(name, np.nan) for name in classes])


def _classes(
    chosen: LabelledSet,
    probabilities: Floats,
    values: Mapping[str, Floats],
    drawn: Mapping[str, Floats],
    settings: Settings,
) -> Iterator[ClassFigures]:
    flagged = _flagged(probabilities, chosen.multi_label)
    size = len(chosen.classes)
    names = [n for n, v in values.items() if v.shape == (size,) and n != "prevalence"]
    for column, label in enumerate(chosen.classes):
        known = chosen.targets[:, column] >= 0
        counts = _Counts(chosen.targets[known, column] == 1, flagged[known, column])
        figures = {}
        for name in names:
            low, high = percentile_bounds(drawn[name][:, column], settings.level)
            title = _BY_CLASS.get(name, name).replace("@", "_at_")
            value = float(values[name][column])
            figures[title] = counts.figure(title, value, low, high, settings.minimum)
        if chosen.unit == "case" and figures["auroc"].value is not None:
            truth = chosen.targets[known, column]
            found = delong_interval(truth, probabilities[known, column], settings.level)
            bounds = figure(found.value, found.low, found.high, len(truth))
            figures["auroc"] = bounds.model_copy(update={"method": "delong"})
        few = 0 < counts.positives < settings.minimum
        share = values["prevalence"][column]
        prevalence = None if few or np.isnan(share) else float(share)
        yield ClassFigures(name=label, prevalence=prevalence, figures=figures)


class _Counts:
    """Cases of one class against the rest, and which of them are taken for it."""

    def __init__(self, truth: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> None:
        self.all, self.positives = len(truth), int(truth.sum())
        self.flagged = int(flagged.sum())

    def figure(self, name: str, value: float, low: float, high: float, minimum: int) -> Figure:
        """A figure with the cases behind it, withheld where they are too few."""
        n, least = self._behind(name)
        if 0 < least < minimum:
            return Figure(value=None, small=True)
        return figure(value, low, high, n)

    def _behind(self, name: str) -> tuple[int, int]:
        """The cases that a figure is of, and the fewest of a kind that it hangs on."""
        negatives = self.all - self.positives
        if name.startswith("sensitivity"):
            return self.positives, self.positives
        if name.startswith("specificity"):
            return negatives, negatives
        if name == "ppv":
            return self.flagged, self.flagged
        if name == "npv":
            return self.all - self.flagged, self.all - self.flagged
        return self.all, self.all if name in _OF_ALL else min(self.positives, negatives)


def _flagged(probabilities: Floats, multi_label: bool) -> NDArray[np.bool_]:
    """(n, C): which classes a case is taken for."""
    if multi_label:
        return probabilities >= 0.5
    chosen = probabilities.argmax(axis=1)
    result: NDArray[np.bool_] = chosen[:, None] == np.arange(probabilities.shape[1])
    return result


def _confusion(
    chosen: LabelledSet, probabilities: Floats, minimum: int
) -> tuple[tuple[int | None, ...], ...]:
    size = len(chosen.classes)
    cells = chosen.labels * size + probabilities.argmax(axis=1)
    counts = np.bincount(cells, minlength=size * size).reshape(size, size).tolist()
    return tuple(tuple(None if 0 < n < minimum else n for n in row) for row in counts)


def _mean(sites: Sequence[Sample]) -> Sample:
    """Average sites with the same weight."""

    def replicated(name: str) -> Floats:
        rows = [site.drawn[name] for site in sites]
        fixed = [bool(np.isnan(row).all()) for row in rows]
        if all(fixed):
            return np.full_like(rows[0], np.nan) if rows else np.zeros(0)
        # A site that cannot be resampled (one patient) stays as it is in every resample.
        kept = [
            np.full_like(row, site.values[name]) if still else row
            for site, row, still in zip(sites, rows, fixed, strict=True)
        ]
        return mean_of_defined(np.stack(kept, axis=1))

    names = [name for name in COMPARED if all(name in site.values for site in sites)]
    values = {name: np.array([site.values[name] for site in sites]) for name in names}
    return Sample(
        len(sites),
        {name: float(mean_of_defined(value)) for name, value in values.items()},
        {name: replicated(name) for name in names},
    )


def _interval(sample: Sample, name: str, settings: Settings) -> Figure:
    low, high = percentile_bounds(sample.drawn[name], settings.level)
    return figure(sample.values[name], low, high, sample.n)
