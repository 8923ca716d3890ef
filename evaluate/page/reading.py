"""Finds figures in a report; computes none."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evaluate.document import (
    CHANCE,
    ClassCurves,
    ClassFigures,
    Comparison,
    Curve,
    Figure,
    ModelReport,
    ModelScope,
    Report,
    Scope,
)
from evaluate.page.words import LOWER_IS_BETTER, WITHOUT_BEST, kind

MEAN = "mean_over_sites"
MOST_CURVES = 4
_DRAWN = ("merged", "pooled", "site")


def model_scope(model: ModelReport, key: str) -> ModelScope | None:
    """Return a model's figures on a scope, or None."""
    return next((scope for scope in model.scopes if scope.scope == key), None)


def figure(model: ModelReport, key: str, score: str) -> Figure | None:
    """Return a model's figure on a scope, or None where the report has none."""
    scope = model_scope(model, key)
    return scope.figures.get(score) if scope else None


def class_figures(model: ModelReport, key: str, name: str) -> ClassFigures | None:
    """Return what a model makes of a class on a scope, or None."""
    scope = model_scope(model, key)
    return next((row for row in scope.classes if row.name == name), None) if scope else None


def scopes(report: Report, kind: str) -> list[Scope]:
    """Return the scopes of a kind, in the report's order."""
    return [scope for scope in report.scopes if scope.kind == kind]


def scope(report: Report, key: str) -> Scope | None:
    """Return a scope, or None."""
    return next((scope for scope in report.scopes if scope.key == key), None)


def best(figures: Iterable[Figure | None], score: str) -> float | None:
    """Return the value that stands out among models: the highest, for an error the lowest."""
    values = [f.value for f in figures if f is not None and f.value is not None]
    if score in WITHOUT_BEST or len(values) < 2:
        return None
    return min(values) if score in LOWER_IS_BETTER else max(values)


def losses(report: Report) -> dict[tuple[str, str], str]:
    """Return (scope, merged model) -> "clear" or "slight" where it is below a site's own model."""
    found: dict[tuple[str, str], str] = {}
    for entry in report.comparisons:
        difference = entry.difference
        if entry.family != "own" or difference.value is None or difference.value >= 0:
            continue
        clear = entry.p_adjusted is not None and entry.p_adjusted < CHANCE
        if clear or (entry.scope, entry.model) not in found:
            found[entry.scope, entry.model] = "clear" if clear else "slight"
    return found


def family(report: Report, name: str) -> list[Comparison]:
    """Return the comparisons of a family."""
    return [entry for entry in report.comparisons if entry.family == name]


def chosen(report: Report) -> list[ModelReport]:
    """Pick the few models whose curves are drawn together.

    The best merged model, the reference, the best pooled and single-site models; then the best of
    what is left, up to four.
    """
    if len(report.models) <= MOST_CURVES:
        return list(report.models)
    ranked = sorted(report.models, key=lambda model: -_rank(model, report.main_score))
    groups = {name: [m for m in ranked if kind(m.role) == name] for name in _DRAWN}
    wanted = groups["merged"][:1]
    wanted += [model for model in ranked if model.name == report.reference]
    wanted += groups["pooled"][:1] + groups["site"][:1]
    by_name = {model.name: model for model in [*wanted, *ranked]}
    return list(by_name.values())[:MOST_CURVES]


def _rank(model: ModelReport, score: str) -> float:
    found = figure(model, "union", score)
    return -1.0 if found is None or found.value is None else found.value


def banded(report: Report, pick: Callable[[ClassCurves], Curve | None]) -> list[str] | None:
    """Return the models whose curves have a band, or None if all that have a curve do."""
    curves = {
        model.name: [curve for found in model.curves if (curve := pick(found))]
        for model in report.models
    }
    drawn = [name for name, found in curves.items() if found]
    names = [name for name in drawn if any(curve.low is not None for curve in curves[name])]
    return None if names and names == drawn else names


def calibrated(report: Report) -> bool:
    """Whether any model's outputs were divided by a temperature."""
    return any(model.temperature is not None for model in report.models)


def methods(report: Report) -> set[str]:
    """Return how the intervals of the report were made, beside the bootstrap."""
    scopes = [scope for model in report.models for scope in model.scopes]
    figures = [figure for scope in scopes for figure in scope.figures.values()]
    figures += [f for scope in scopes for row in scope.classes for f in row.figures.values()]
    found: set[str] = {figure.method for figure in figures if figure.low is not None}
    return found - {"bootstrap"}
