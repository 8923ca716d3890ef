"""From the predictions of several models on the same cases to the report: every figure once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.checklist import checklist
from evaluate.comparisons import Contest, adjusted, auroc_comparisons
from evaluate.curves import curves, reliability
from evaluate.data_notes import UNKNOWN
from evaluate.document import (
    Comparison,
    ModelReport,
    Report,
    Resampling,
    Scope,
    Similarity,
    Worst,
)
from evaluate.fitting import Fitted, Validation, fit
from evaluate.labelled import LabelledSet
from evaluate.predictions import Predictions
from evaluate.scopes import MEAN, Part, parts
from evaluate.scoring import Scoring, Settings, score
from evaluate.survey import survey
from evaluate.verdict import verdict
from merge_kit.errors import DataError, UsageError

Floats = NDArray[np.float64]
_ROLE = re.compile(r"base|merged|pooled|federated|other|site:.+")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the report says about itself."""

    title: str
    created: str
    software: Mapping[str, str]
    notes: tuple[str, ...] = ()
    similarity: Similarity | None = None
    inputs: str = ""


def summarise(
    labelled: LabelledSet,
    predictions: Sequence[Predictions],
    facts: Facts,
    settings: Settings | None = None,
    validation: Validation | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Compute every figure of a report; `progress` is told how many models are done, and of all.

    Raises
    ------
    DataError
        No model, two of one name, an unknown role, other classes or another number of cases.
    UsageError
        No case is of an external site, or a model was trained on it.
    """
    settings = settings or Settings()
    _check(labelled, predictions, settings)
    fitted = _fitted(predictions, validation, settings)
    found = parts(labelled, settings.external, settings.minimum)
    scorings = {}
    for done, one in enumerate(fitted):
        progress(done, len(fitted))
        thresholds = one.thresholds(labelled.classes)
        scorings[one.predictions.model] = score(
            labelled, one.predictions, found, thresholds, settings
        )
    progress(len(fitted), len(fitted))
    main_score = "macro_auroc" if labelled.multi_label else "balanced_accuracy"
    contest = Contest(
        {p.model: p.role for p in predictions},
        {name: scoring.samples for name, scoring in scorings.items()},
        main_score,
        settings.level,
    )
    leaders = contest.leaders(settings.reference)
    models = tuple(
        _model(f, scorings[f.predictions.model], found, labelled, settings, main_score, leaders)
        for f in fitted
    )
    mean = any(part.scope.kind == "site" for part in found)
    report = Report(
        title=facts.title,
        created=facts.created,
        software=dict(facts.software),
        inputs=facts.inputs,
        task="multi-label" if labelled.multi_label else "single-label",
        ordered=settings.ordered,
        classes=labelled.classes,
        main_score=main_score,
        minimum=settings.minimum,
        resampling=Resampling(
            unit=unit_of(labelled),
            resamples=settings.resamples,
            level=settings.level,
            seed=settings.seed,
        ),
        bins=settings.bins,
        prevalences=dict(settings.prevalences),
        validation_cases=len(validation.labelled) if validation else 0,
        scopes=tuple(part.scope for part in found) + ((_mean_scope(),) if mean else ()),
        models=models,
        reference=settings.reference,
        comparisons=_comparisons(contest, labelled, [f.predictions for f in fitted], settings),
        gaps=tuple(contest.gaps(_columns(found), _unknown(found))),
        survey=survey(contest),
        similarity=facts.similarity,
        notes=facts.notes,
    )
    report = report.model_copy(update={"checklist": checklist(report)})
    return report.model_copy(update={"verdict": verdict(report)})


def unit_of(labelled: LabelledSet) -> str:
    """What the bootstrap draws, in words."""
    known = [patient is not None for patient in labelled.patients]
    if not any(known):
        return "case"
    return labelled.unit if all(known) else f"{labelled.unit} or case"


def _check(labelled: LabelledSet, predictions: Sequence[Predictions], settings: Settings) -> None:
    names = [p.model for p in predictions]
    if not names:
        raise DataError("There is no model to report on: name at least one.")
    for p in predictions:
        if names.count(p.model) > 1:
            raise DataError(f"Two models are called '{p.model}': give each a name of its own.")
        if not _ROLE.fullmatch(p.role):
            raise DataError(
                f"Model '{p.model}' has the role '{p.role}', but a role is base, site:<site>, "
                "merged, pooled, federated or other."
            )
        if p.role.removeprefix("site:") in settings.external and p.role.startswith("site:"):
            raise UsageError(
                f"--external {p.role.removeprefix('site:')}: model '{p.model}' was trained on this "
                "site: leave one of the two out."
            )
        if p.classes != labelled.classes or len(p) != len(labelled):
            raise DataError(
                f"The predictions of model '{p.model}' are of {len(p)} cases and the classes "
                f"{', '.join(p.classes)}; the labelled cases are {len(labelled)} of "
                f"{', '.join(labelled.classes)}: predict again."
            )
    if settings.reference is not None and settings.reference not in names:
        raise DataError(
            f"There is no model '{settings.reference}' to compare with (known: {', '.join(names)})."
        )


def _fitted(
    predictions: Sequence[Predictions], validation: Validation | None, settings: Settings
) -> list[Fitted]:
    if validation is None:
        return [Fitted(p) for p in predictions]
    held = {p.model: p for p in validation.predictions}
    return [
        fit(p, held[p.model], validation, settings.specificities, settings.minimum)
        if p.model in held
        else Fitted(p)
        for p in predictions
    ]


def _model(
    fitted: Fitted,
    scoring: Scoring,
    found: Sequence[Part],
    labelled: LabelledSet,
    settings: Settings,
    main_score: str,
    leaders: Sequence[str],
) -> ModelReport:
    own = fitted.predictions
    return ModelReport(
        name=own.model,
        role=own.role,
        fingerprint=own.fingerprint,
        temperature=fitted.temperature,
        thresholds=fitted.points,
        scopes=scoring.scopes,
        worst_site=_worst_site(scoring, found, main_score),
        worst_class=_worst_class(scoring, labelled.multi_label),
        curves=curves(labelled, own, settings, banded=own.model in leaders),
        reliability=reliability(labelled, own, settings),
    )


def _worst_site(scoring: Scoring, found: Sequence[Part], main_score: str) -> Worst | None:
    rows = [
        (sample.values[main_score], part.scope.name, sample.n[main_score])
        for part in found
        if part.scope.kind == "site" and (sample := scoring.samples.get(part.scope.key))
    ]
    return _worst(rows)


def _worst_class(scoring: Scoring, multi_label: bool) -> Worst | None:
    name = "auroc" if multi_label else "sensitivity"
    figures = [(c.figures[name], c.name) for c in scoring.scopes[0].classes]
    return _worst([(f.value, label, f.n) for f, label in figures if f.value is not None and f.n])


def _worst(rows: Sequence[tuple[float, str, int]]) -> Worst | None:
    defined = [row for row in rows if not np.isnan(row[0])]
    if not defined:
        return None
    value, name, n = min(defined, key=lambda row: row[0])
    return Worst(name=name, value=value, n=n)


def _mean_scope() -> Scope:
    return Scope(
        key=MEAN, kind="mean_over_sites", name="mean over sites", cases=None, patients=None
    )


def _columns(found: Sequence[Part]) -> dict[str, list[str]]:
    """The groups of each column; those whose value is unknown are no group."""
    columns: dict[str, list[str]] = {}
    for part in found:
        if part.scope.column is not None and part.scope.name != UNKNOWN:
            columns.setdefault(part.scope.column, []).append(part.scope.key)
    return columns


def _unknown(found: Sequence[Part]) -> dict[str, int]:
    """How many cases each column says nothing of."""
    return {
        part.scope.column: len(part.rows)
        for part in found
        if part.scope.column is not None and part.scope.name == UNKNOWN
    }


def _comparisons(
    contest: Contest,
    labelled: LabelledSet,
    predictions: Sequence[Predictions],
    settings: Settings,
) -> tuple[Comparison, ...]:
    families = [contest.against_kinds(), contest.against_best(), contest.against_own()]
    if settings.reference is not None:
        scores = dict.fromkeys((contest.main_score, "macro_auroc"))
        families.append(contest.against_reference(settings.reference, list(scores)))
    if unit_of(labelled) == "case":
        by_name = {p.model: p for p in predictions}
        first, *others = contest.leaders(settings.reference) or [""]
        pairs = [(first, other) for other in others]
        families.append(
            auroc_comparisons(labelled, by_name, pairs, settings.level, settings.minimum)
        )
    return adjusted(*families)
