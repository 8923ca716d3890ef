"""From the predictions of several models on the same cases to the content of metrics.json.

`summarise` computes every figure once; the table, the report and the verdict in words only read
them. Scores and intervals are those of `finetune.scores`: patients are drawn whole where they are
known, and all models are resampled alike, so that differences between two of them are paired.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evaluate.verdict import MAIN_SCORE, ranking, verdict
from finetune.scores import (
    Score,
    accuracy,
    balanced_accuracy,
    bootstrap_replicates,
    class_recalls,
    confusion,
    macro_auroc,
    mean_of_defined,
    per_class_auroc,
    percentile_bounds,
)
from merge_kit.errors import DataError

__all__ = ["SCORES", "Predictions", "Summary", "summarise", "verdict"]

Summary: TypeAlias = dict[str, Any]
Floats: TypeAlias = NDArray[np.float64]

SCHEMA_VERSION = 1
LEVEL = 0.95
SCORES: Mapping[str, Score] = {
    MAIN_SCORE: balanced_accuracy,
    "macro_auroc": macro_auroc,
    "accuracy": accuracy,
}


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model says about n labelled cases.

    Attributes:
        model: the name that the report shows.
        classes: the C class names, in the order of the columns.
        files: (n,) the image of each case.
        labels: (n,) int64 in [0, C).
        probabilities: (n, C) float64, each in [0, 1].
        patients: (n,) patient of each case, None when unknown; a name holds within its site.
        sites: (n,) site of each case, "" when unknown.
        unit: what `patients` names: "patient", or "group" for groups of near-duplicate images.

    Raises:
        DataError: lengths, labels or probabilities that do not fit.
    """

    model: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: Floats
    patients: tuple[str | None, ...]
    sites: tuple[str, ...]
    unit: str = "patient"

    def __post_init__(self) -> None:
        n, classes = len(self.files), len(self.classes)
        lengths = len(self.labels), len(self.patients), len(self.sites)
        if lengths != (n, n, n) or self.probabilities.shape != (n, classes):
            raise DataError(
                f"The predictions of model {self.model!r} do not fit its {n} files and {classes} "
                f"classes: run its predictions again."
            )
        likely = (self.probabilities >= 0) & (self.probabilities <= 1 + 1e-6)  # no to nan
        fine = np.asarray(likely.all(axis=1), dtype=bool)
        known = (self.labels >= 0) & (self.labels < classes)
        for file, likely_row, label in zip(self.files, fine, known, strict=True):
            if not likely_row:
                raise DataError(
                    f"Model {self.model!r} gives {file} a probability outside [0, 1]: check its "
                    f"weights for NaN, and that its outputs are probabilities."
                )
            if not label:
                raise DataError(f"The label of {file} is none of the {classes} classes.")


@dataclass(frozen=True, slots=True)
class _Scored:
    """One model on one set of cases: scores, their bootstrap replicates, and n of what."""

    n: int
    values: dict[str, float]
    replicates: dict[str, Floats]

    def interval(self, score: str) -> Summary:
        low, high = percentile_bounds(self.replicates[score], LEVEL)
        value = _number(self.values[score])
        return {"value": value, "low": _number(low), "high": _number(high), "n": self.n}

    def minus(self, other: _Scored) -> _Scored:
        return _Scored(
            self.n,
            {name: self.values[name] - other.values[name] for name in SCORES},
            {name: self.replicates[name] - other.replicates[name] for name in SCORES},
        )


def summarise(
    predictions: Sequence[Predictions],
    *,
    roles: Mapping[str, str] | None = None,
    minimum_cell: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Return the content of metrics.json: plain dicts, lists and numbers, None for undefined.

    Args:
        predictions: one entry a model, all on the same cases in the same order.
        roles: model name -> "base", "site:<site>", "merged", "pooled" or "other" (the default).
        minimum_cell: figures of fewer cases than this are flagged `"small": true`.
        resamples: bootstrap resamples for each interval (level 95 %).
        seed: of the bootstrap.

    Cases without a site count in the union only. The worst site of a model is the one with its
    lowest balanced accuracy, the worst class the one with its lowest sensitivity on the union;
    small ones come last in both.

    Raises:
        DataError: no model, two of one name, different cases, or an unknown role or model in
            `roles`.
    """
    roles = dict(roles or {})
    _check(predictions, roles)
    first, sites = predictions[0], sorted(set(predictions[0].sites) - {""})
    scored = {p.model: _score(p, sites, resamples, seed) for p in predictions}
    models = [
        _model(p, roles.get(p.model, "other"), sites, scored[p.model], minimum_cell)
        for p in predictions
    ]
    known = [bool(patient) for patient in first.patients]
    unit = first.unit if any(known) and all(known) else f"{first.unit} or case"
    unit = unit if any(known) else "case"
    return {
        "schema": SCHEMA_VERSION,
        "classes": list(first.classes),
        "sites": sites,
        "cases": {
            "total": len(first.files),
            "patients": len(set(_patients(first))) if unit == "patient" else None,
            "classes": _counts(first, None, minimum_cell),
            "sites": [
                {"site": site, "n": first.sites.count(site)}
                | {"classes": _counts(first, site, minimum_cell)}
                for site in sites
            ],
            "without_site": first.sites.count(""),
        },
        "minimum_cell": minimum_cell,
        "bootstrap": {"unit": unit, "resamples": resamples, "level": LEVEL, "seed": seed},
        "models": models,
        "comparisons": _comparisons(models, scored),
    }


def _check(predictions: Sequence[Predictions], roles: Mapping[str, str]) -> None:
    if not predictions:
        raise DataError("There is no model to summarise: name at least one.")
    first, names = predictions[0], [p.model for p in predictions]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"Two models are called {name!r}: give each a name of its own.")
    for name, role in roles.items():
        if name not in names:
            raise DataError(f"There is no model {name!r} to give a role: there is {names}.")
        if not re.fullmatch(r"base|merged|pooled|other|site:.+", role):
            raise DataError(
                f"Model {name!r} has the role {role!r}, but a role is base, site:<site>, merged, "
                f"pooled or other."
            )
    for other in predictions[1:]:
        if other.classes != first.classes:
            raise DataError(
                f"Models {first.model!r} and {other.model!r} have different classes or another "
                f"order of them: {list(first.classes)} and {list(other.classes)}."
            )
        if difference := _difference(first, other):
            raise DataError(
                f"Models {first.model!r} and {other.model!r} were scored on different cases "
                f"({difference}): run all predictions again on the same images."
            )


def _difference(one: Predictions, other: Predictions) -> str:
    """Say where the cases of two models first differ; nothing when they do not."""
    if len(one.files) != len(other.files):
        return f"{len(one.files)} and {len(other.files)} of them"
    cases = [
        zip(p.files, p.labels.tolist(), p.patients, p.sites, strict=True) for p in (one, other)
    ]
    for number, (a, b) in enumerate(zip(*cases, strict=True), 1):
        if a[0] != b[0]:
            return f"number {number} is {a[0]} and {b[0]}"
        if a != b:
            return f"{a[0]} has another label, patient or site"
    return ""


def _patients(p: Predictions) -> list[str | None]:
    """Name patients across sites: one number at two hospitals is two people."""
    pairs = zip(p.sites, p.patients, strict=True)
    return [f"{site}\0{patient}" if patient else None for site, patient in pairs]


def _rows(p: Predictions, site: str | None) -> NDArray[np.int64]:
    """Number the cases of a site, or of the union (None)."""
    return np.array([i for i, s in enumerate(p.sites) if site in (None, s)], dtype=np.int64)


def _score(p: Predictions, sites: Sequence[str], resamples: int, seed: int) -> dict[str, _Scored]:
    """Score one model on "union", every "site:<site>" and "mean_over_sites"."""
    patients = _patients(p)

    def on(site: str | None) -> _Scored:
        rows = _rows(p, site)
        labels, probabilities = p.labels[rows], p.probabilities[rows]
        # A site's draw hangs on its name: sites are independent of each other, and the figures
        # of one stay when another joins.
        drawn = bootstrap_replicates(
            labels,
            probabilities,
            SCORES,
            groups=[patients[row] for row in rows],
            resamples=resamples,
            seed=[seed, zlib.crc32((site or "").encode())],
        )
        values = {name: score(labels, probabilities) for name, score in SCORES.items()}
        return _Scored(len(rows), values, drawn)

    by_site = {f"site:{site}": on(site) for site in sites}
    return {"union": on(None), **by_site, "mean_over_sites": _mean(list(by_site.values()))}


def _mean(sites: Sequence[_Scored]) -> _Scored:
    """Average sites with the same weight."""

    def replicates(score: str) -> Floats:
        rows = [s.replicates[score] for s in sites]
        fixed = [bool(np.isnan(row).all()) for row in rows]
        if all(fixed):
            return np.zeros(0)
        # A site that cannot be resampled (one patient) stays as it is in every resample.
        kept = [
            np.full_like(row, s.values[score]) if still else row
            for s, row, still in zip(sites, rows, fixed, strict=True)
        ]
        return mean_of_defined(np.stack(kept, axis=1))

    values = {name: np.array([s.values[name] for s in sites]) for name in SCORES}
    return _Scored(
        len(sites),
        {name: float(mean_of_defined(value)) for name, value in values.items()},
        {name: replicates(name) for name in SCORES},
    )


def _model(
    p: Predictions,
    role: str,
    sites: Sequence[str],
    scored: Mapping[str, _Scored],
    minimum_cell: int,
) -> Summary:
    classes = _classes(p, None, minimum_cell)
    by_site = [
        {
            "site": site,
            **_figures(scored[f"site:{site}"], minimum_cell),
            "classes": _classes(p, site, minimum_cell),
        }
        for site in sites
    ]
    mean = scored["mean_over_sites"]
    return {
        "model": p.model,
        "role": role,
        "union": _figures(scored["union"], minimum_cell),
        "mean_over_sites": {name: mean.interval(name) for name in SCORES},
        "worst_site": _worst("site", by_site, lambda row: row[MAIN_SCORE]["value"]),
        "worst_class": _worst("class", classes, lambda row: row["sensitivity"]),
        "classes": classes,
        "sites": by_site,
        "confusion": confusion(p.labels, p.probabilities).tolist(),
    }


def _figures(scored: _Scored, minimum_cell: int) -> Summary:
    intervals = {name: scored.interval(name) for name in SCORES}
    return {"n": scored.n, "small": scored.n < minimum_cell, **intervals}


def _counts(p: Predictions, site: str | None, minimum_cell: int) -> list[Summary]:
    counts = np.bincount(p.labels[_rows(p, site)], minlength=len(p.classes)).tolist()
    return [
        {"class": name, "n": n, "small": n < minimum_cell}
        for name, n in zip(p.classes, counts, strict=True)
    ]


def _classes(p: Predictions, site: str | None, minimum_cell: int) -> list[Summary]:
    rows = _rows(p, site)
    recalls = class_recalls(p.labels[rows], p.probabilities[rows])
    aurocs = per_class_auroc(p.labels[rows], p.probabilities[rows])
    return [
        {**count, "sensitivity": _number(recall), "auroc": _number(auroc)}
        for count, recall, auroc in zip(
            _counts(p, site, minimum_cell), recalls.tolist(), aurocs.tolist(), strict=True
        )
    ]


def _worst(
    key: str, rows: Sequence[Summary], figure: Callable[[Summary], float | None]
) -> Summary | None:
    defined = [(row["small"], value, row) for row in rows if (value := figure(row)) is not None]
    if not defined:
        return None
    small, value, row = min(defined, key=lambda entry: entry[:2])
    return {key: row[key], "value": value, "n": row["n"], "small": small}


def _comparisons(
    models: Sequence[Summary], scored: Mapping[str, Mapping[str, _Scored]]
) -> list[Summary]:
    """List the paired differences that the verdict speaks about.

    The best model against the runner-up, on the union and on the mean over sites; and every
    merged model against each site's own model at that site.
    """
    pairs = []
    for scope in ("union", "mean_over_sites"):
        if len(order := ranking(models, scope)) > 1:
            pairs.append((scope, order[0], order[1]))
    merged = [model["model"] for model in models if model["role"] == "merged"]
    for own in models:
        if own["role"] in scored[own["model"]]:  # "site:<site>", and the site has cases
            pairs += [(own["role"], model, own["model"]) for model in merged]
    return [
        {
            "scope": scope,
            "model": model,
            "against": against,
            "score": MAIN_SCORE,
            "difference": scored[model][scope].minus(scored[against][scope]).interval(MAIN_SCORE),
        }
        for scope, model, against in pairs
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
