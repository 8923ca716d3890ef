"""The report for people: one self-contained HTML page from the content of metrics.json.

The page asks for nothing outside itself (no font, no image, no script from elsewhere), so that it
opens in a hospital without internet and can be archived as one file. This module computes what the
template cannot: the geometry of the forest plots and which figures stand out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from evaluate.verdict import MAIN_SCORE, verdict

_WIDE = 7  # models beyond which tables are printed across the page

# Forest plot, in the units of its viewBox: a column of names, the axis from 0 to 1, the figures.
_WIDTH, _LEFT, _RIGHT = 480.0, 158.0, 424.0
_TOP, _ROW, _FOOT = 6.0, 21.0, 22.0
_NAME_LENGTH = 23


@dataclass(frozen=True, slots=True)
class _Row:
    """One model in a forest plot: where its dot and the ends of its interval lie."""

    name: str
    kind: str
    y: float
    x: float | None
    low: float | None
    high: float | None
    figure: str
    description: str


@dataclass(frozen=True, slots=True)
class _Panel:
    """The forest plot of one site, or of all cases."""

    heading: str
    n: int
    small: bool
    rows: tuple[_Row, ...]
    reference: float | None
    height: float
    description: str


def render(
    summary: Mapping[str, Any], *, title: str, created: str, notes: Sequence[str] = ()
) -> str:
    """Return the report as one HTML page.

    Args:
        summary: what `evaluate.summary.summarise` returned, or the same read from metrics.json.
        title: heading of the page.
        created: when, as the reader shall see it.
        notes: sentences for the end of the page, such as how the images were chosen.
    """
    models = summary["models"]
    template = resources.files("evaluate").joinpath("templates/report.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=_figure, span=_span, plural=_plural)
    return environment.from_string(template.read_text("utf-8")).render(
        summary=summary,
        title=title,
        created=created,
        notes=notes,
        verdict=verdict(summary),
        models=models,
        kinds={model["model"]: _kind(model["role"]) for model in models},
        roles={model["model"]: _role(model) for model in models},
        best=_best(models),
        losses=_losses(summary),
        panels=_panels(summary),
        axis=[(_across(tick / 4), f"{tick / 4:g}") for tick in range(5)],
        frame={"width": _WIDTH, "left": _LEFT, "right": _RIGHT, "top": _TOP, "foot": _FOOT},
        wide=len(models) > _WIDE,
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _span(interval: Mapping[str, Any]) -> str:
    """Write the bounds of an interval, or nothing where there are none."""
    if interval["low"] is None:
        return ""
    return f"{interval['low']:.3f}–{interval['high']:.3f}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def _kind(role: str) -> str:
    """Reduce a role to what decides its mark: base, site, merged, pooled or other."""
    return role.partition(":")[0]


def _role(model: Mapping[str, Any]) -> str:
    """Write a role in words, or nothing where the model's name says it already."""
    kind, _, site = model["role"].partition(":")
    if kind == "other" or kind == model["model"]:
        return ""
    return f"trained at {site}" if kind == "site" else str(kind)


def _best(models: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the highest figure of each column, by "<scope> <score>" or "site <name> <score>"."""
    columns: dict[str, list[float | None]] = {}
    for model in models:
        for score in (MAIN_SCORE, "macro_auroc", "accuracy"):
            for scope in ("union", "mean_over_sites"):
                columns.setdefault(f"{scope} {score}", []).append(model[scope][score]["value"])
            for site in model["sites"]:
                column = columns.setdefault(f"site {site['site']} {score}", [])
                column.append(site[score]["value"])
        worst = model["worst_site"]
        columns.setdefault("worst_site", []).append(worst["value"] if worst else None)
        for row in model["classes"]:
            columns.setdefault(f"class {row['class']}", []).append(row["sensitivity"])
    return {
        name: max((value for value in values if value is not None), default=None)
        for name, values in columns.items()
    }


def _losses(summary: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return (site, merged model) -> "clear" or "slight" where it is below the site's own model."""
    losses: dict[tuple[str, str], str] = {}
    for entry in summary["comparisons"]:
        kind, _, site = entry["scope"].partition(":")
        difference = entry["difference"]
        if kind != "site" or difference["value"] is None or difference["value"] >= 0:
            continue
        clear = difference["high"] is not None and difference["high"] < 0
        if clear or (site, entry["model"]) not in losses:
            losses[site, entry["model"]] = "clear" if clear else "slight"
    return losses


def _panels(summary: Mapping[str, Any]) -> list[_Panel]:
    models = summary["models"]
    union = _panel("All cases", "", [(model, model["union"]) for model in models])
    return [union] + [
        _panel(site, site, [(model, model["sites"][index]) for model in models])
        for index, site in enumerate(summary["sites"])
    ]


def _panel(
    heading: str, site: str, entries: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> _Panel:
    rows, reference = [], None
    for number, (model, figures) in enumerate(entries):
        own = bool(site) and model["role"] == f"site:{site}"
        row = _row(model, figures[MAIN_SCORE], number, own=own)
        reference = row.x if own else reference
        rows.append(row)
    figures = entries[0][1]
    return _Panel(
        heading=heading,
        n=figures["n"],
        small=figures["small"],
        rows=tuple(rows),
        reference=reference,
        height=_TOP + _ROW * len(rows) + _FOOT,
        description=f"Balanced accuracy, {heading}: "
        + "; ".join(row.description for row in rows)
        + ".",
    )


def _row(model: Mapping[str, Any], interval: Mapping[str, Any], number: int, *, own: bool) -> _Row:
    name, value = model["model"], interval["value"]
    words = f"{name} {_figure(value)}" if value is not None else f"{name} undefined"
    bounds = interval["low"] is not None
    return _Row(
        name=name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…",
        kind="own" if own else _kind(model["role"]),
        y=_TOP + _ROW * (number + 0.5),
        x=None if value is None else _across(value),
        low=_across(interval["low"]) if bounds else None,
        high=_across(interval["high"]) if bounds else None,
        figure=_figure(value),
        description=f"{words} ({_span(interval)})" if bounds else words,
    )


def _across(share: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * share, 1)
