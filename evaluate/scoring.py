"""One model on all scopes: every figure with its interval, what is too small withheld."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluate.document import ClassFigures, Figure, ModelScope
from evaluate.intervals import Sample, bounds, figure, share
from evaluate.labelled import LabelledSet
from evaluate.metrics import delong_interval, predictive_values_at_prevalence
from evaluate.metrics.calibration import BINS
from evaluate.predictions import Predictions
from evaluate.resampling import Scored, replicates
from evaluate.scopes import MEAN, Part
from finetune.scores import group_numbers, mean_of_defined

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
_BY_CLASS = {"class_brier": "brier", "class_ece": "ece", "class_log_loss": "log_loss"}
"""Names of class figures that would be those of scalars."""
_OF_ALL = ("brier", "log_loss")
_SHARES = ("sensitivity", "specificity", "ppv", "npv")
_AT_PREVALENCE = "_at_prevalence"


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
    names = _scalars(settings, multi_label=labelled.multi_label)
    for part in parts:
        if part.scope.small or not len(part.rows):
            empty = Figure(value=None, small=part.scope.small)
            scopes.append(ModelScope(scope=part.scope.key, figures=dict.fromkeys(names, empty)))
            continue
        scope, sample = _score_part(labelled, predictions, part, thresholds, settings)
        scopes.append(scope)
        samples[part.scope.key] = sample
    sites = [
        samples[p.scope.key] for p in parts if p.scope.kind == "site" and p.scope.key in samples
    ]
    if any(part.scope.kind == "site" for part in parts):
        mean = mean_over(sites, names)
        samples[MEAN] = mean
        figures = {name: scalar(mean, name, settings.level) for name in names}
        scopes.append(ModelScope(scope=MEAN, figures=figures))
    return Scoring(tuple(scopes), samples)


def _scalars(settings: Settings, *, multi_label: bool) -> list[str]:
    """Names of the scalars that a report of this kind has."""
    never = {"kappa", "quadratic_kappa"} if multi_label else set()
    never |= set() if settings.ordered else {"quadratic_kappa"}
    return [name for name in SCALARS if name not in never]


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
    names = _scalars(settings, multi_label=labelled.multi_label)
    n = len(part.rows)
    sample = Sample(
        dict.fromkeys(names, n),
        {name: float(values[name]) for name in names},
        {name: drawn[name] for name in names},
    )
    figures = {name: scalar(sample, name, settings.level) for name in names}
    if not labelled.multi_label:
        units = len(np.unique(group_numbers(chosen.patients, n)))
        found = sample.values["accuracy"]
        figures["accuracy"] = share(found, drawn["accuracy"], settings.level, n, units)
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
    units = group_numbers(chosen.patients, len(chosen))
    size = len(chosen.classes)
    names = [n for n, v in values.items() if v.shape == (size,) and n != "prevalence"]
    for column, label in enumerate(chosen.classes):
        known = chosen.targets[:, column] >= 0
        behind = _Behind(
            chosen.targets[known, column] == 1, flagged[known, column], units[known], settings
        )
        figures = {}
        for name in names:
            title = _BY_CLASS.get(name, name).replace("@", "_at_")
            value = float(values[name][column])
            figures[title] = behind.figure(title, value, drawn[name][:, column])
        if label in settings.prevalences:
            figures |= _certain(figures, settings.prevalences[label])
        if chosen.unit == "case" and figures["auroc"].value is not None:
            truth = chosen.targets[known, column]
            found = delong_interval(truth, probabilities[known, column], settings.level)
            figures["auroc"] = figure(found.value, found.low, found.high, len(truth), "delong")
        few = 0 < behind.positives.sum() < settings.minimum
        prevalence = values["prevalence"][column]
        known_share = None if few or np.isnan(prevalence) else float(prevalence)
        yield ClassFigures(name=label, prevalence=known_share, figures=figures)


@dataclass(frozen=True, slots=True)
class _Behind:
    """The cases of one class against the rest, and which of them are taken for it; (n,) each."""

    positives: NDArray[np.bool_]
    flagged: NDArray[np.bool_]
    units: NDArray[np.int64]
    """The patient of each case."""
    settings: Settings

    def figure(self, name: str, value: float, drawn: Floats) -> Figure:
        """A figure with the cases behind it, withheld where they are too few."""
        rows, least = self._rows(name)
        n = int(rows.sum())
        if 0 < least < self.settings.minimum:
            return Figure(value=None, small=True)
        if name.partition("_at_")[0] in _SHARES and _AT_PREVALENCE not in name:
            units = len(np.unique(self.units[rows]))
            return share(value, drawn, self.settings.level, n, units)
        about = value if name == "ece" else None
        return figure(value, *bounds(drawn, self.settings.level, about=about), n=n)

    def _rows(self, name: str) -> tuple[NDArray[np.bool_], int]:
        """Of which cases a figure is, and the fewest of a kind that it hangs on."""
        everything = np.ones(len(self.positives), dtype=bool)
        positives = int(self.positives.sum())
        negatives = len(everything) - positives
        if name.startswith("sensitivity"):
            return self.positives, positives
        if name.startswith("specificity"):
            return ~self.positives, negatives
        if name == "ppv":
            return self.flagged, int(self.flagged.sum())
        if name == "npv":
            return ~self.flagged, int((~self.flagged).sum())
        return everything, len(everything) if name in _OF_ALL else min(positives, negatives)


def _certain(figures: Mapping[str, Figure], prevalence: float) -> dict[str, Figure]:
    """Bounds of predictive values of 0 or 1 at a stated prevalence, in which no resample differs.

    Predictive values rise with sensitivity and specificity: their bounds are the values at both
    lower and at both upper ones, which is wider than need be.
    """
    found = {}
    for name, own in figures.items():
        kind, at, fixed = name.partition(_AT_PREVALENCE)
        if not at or own.value not in (0.0, 1.0):
            continue
        rates = [figures[f"{rate}{fixed}"] for rate in ("sensitivity", "specificity")]
        lows, highs = [r.low for r in rates], [r.high for r in rates]
        if None in (*lows, *highs):
            continue
        place = ("ppv", "npv").index(kind)
        low, high = (
            predictive_values_at_prevalence(ends[0] or 0.0, ends[1] or 0.0, prevalence)[place]
            for ends in (lows, highs)
        )
        found[name] = figure(own.value, low, high, own.n, "wilson")
    return found


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


def mean_over(sites: Sequence[Sample], names: Sequence[str]) -> Sample:
    """Average sites, or models at sites, with the same weight; what is undefined is left out."""

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

    values = {name: np.array([site.values[name] for site in sites]) for name in names}
    return Sample(
        {name: int((~np.isnan(value)).sum()) for name, value in values.items()},
        {name: float(mean_of_defined(value)) for name, value in values.items()},
        {name: replicated(name) for name in names},
    )


def scalar(sample: Sample, name: str, level: float) -> Figure:
    """A score of a sample as a figure of the report."""
    value = sample.values[name]
    about = value if name == "ece" else None
    return figure(value, *bounds(sample.drawn[name], level, about=about), n=sample.n[name])
