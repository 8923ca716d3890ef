"""Forest plots: a score by site, and differences from a site's own model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.document import Comparison, Figure, ModelReport, Report, Scope
from evaluate.page import reading
from evaluate.page.geometry import Axis, ticks
from evaluate.page.words import kind, p_value, plural, said, score_name, shortened, signed
from evaluate.wording import number

# In the units of the viewBox, which is about as wide as a telephone: names, axis, figures.
WIDTH, TOP, ROW, FOOT = 350.0, 6.0, 20.0, 20.0
_SCORE_AXIS = 126.0, 304.0
_DIFFERENCE_AXIS = 104.0, 236.0
VALUE = 290.0  # where a difference ends, with its p-value to the right
_NAME, _SITE = 17, 15
_HALF = 0.05  # smallest half width of the axis of differences


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a forest plot: where its dot and the ends of its interval lie.

    `p` stands right of the figure, in plots of differences.
    """

    name: str
    kind: str
    y: float
    x: float | None
    low: float | None
    high: float | None
    figure: str
    description: str
    p: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One forest plot; `reference` is where its dashed line stands."""

    heading: str
    note: str
    small: bool
    rows: tuple[Mark, ...]
    reference: float | None
    ticks: tuple[tuple[float, str], ...]
    height: float
    description: str
    width: float = WIDTH
    value: float = WIDTH
    """Where figures end."""
    top: float = TOP
    foot: float = FOOT


def score_panels(report: Report) -> list[Panel]:
    """Return a plot of the main score for all cases and one for each site."""
    found = [*reading.scopes(report, "union"), *reading.scopes(report, "external")]
    found += reading.scopes(report, "site")
    axis = Axis(_lowest(report, found), 1.0, *_SCORE_AXIS)
    return [_score_panel(report, scope, axis) for scope in found]


def _lowest(report: Report, found: Sequence[Scope]) -> float:
    """Round the lowest bound of all plots down to a tick, so that they share one axis."""
    figures = [
        figure
        for model in report.models
        for scope in found
        if (figure := reading.figure(model, scope.key, report.main_score))
    ]
    ends = [v for f in figures for v in (f.value, f.low) if v is not None]
    return min(0.8, math.floor(5 * min(ends, default=0.0)) / 5)


def _score_panel(report: Report, scope: Scope, axis: Axis) -> Panel:
    rows = [_score_mark(report, scope, axis, n, model) for n, model in enumerate(report.models)]
    note = "" if scope.cases is None else plural(scope.cases, "case")
    return Panel(
        heading=scope.name,
        note=f"{note}, external" if scope.external else note,
        small=scope.small,
        rows=tuple(rows),
        reference=next((row.x for row in rows if row.kind == "own"), None),
        ticks=_ticks(axis),
        height=TOP + ROW * len(rows) + FOOT,
        description=f"{score_name(report.main_score)}, {scope.name}: "
        + "; ".join(row.description for row in rows),
    )


def _score_mark(report: Report, scope: Scope, axis: Axis, number_: int, model: ModelReport) -> Mark:
    figure = reading.figure(model, scope.key, report.main_score)
    x, low, high = _placed(figure, axis)
    value = None if figure is None else figure.value
    return Mark(
        name=shortened(model.name, _NAME),
        kind="own" if model.role == scope.key else kind(model.role),
        y=TOP + ROW * (number_ + 0.5),
        x=x,
        low=low,
        high=high,
        figure=_absent(figure) if value is None else number(value),
        description=f"{model.name} {said(figure)}",
    )


def difference_panels(report: Report) -> list[Panel]:
    """Return a plot for each merged model: at each site, its score minus the site's own model's."""
    entries = reading.family(report, "own")
    axis = _difference_axis([entry.difference for entry in entries])
    sites = {scope.key: scope for scope in report.scopes}
    panels = []
    for name in dict.fromkeys(entry.model for entry in entries):
        mine = [entry for entry in entries if entry.model == name]
        rows = [
            _difference_mark(n, entry, sites.get(entry.scope), axis) for n, entry in enumerate(mine)
        ]
        panels.append(
            Panel(
                heading=name,
                note="",
                small=False,
                rows=tuple(rows),
                reference=axis.at(0.0),
                value=VALUE,
                ticks=_signed_ticks(axis),
                height=TOP + ROW * len(rows) + FOOT,
                description=f"{score_name(mine[0].score)} of {name} minus the site’s own model: "
                + "; ".join(row.description for row in rows),
            )
        )
    return panels


def _difference_axis(figures: Sequence[Figure]) -> Axis:
    """Make one axis for all plots, with 0 in its middle."""
    ends = [abs(v) for f in figures for v in (f.value, f.low, f.high) if v is not None]
    half = max([_HALF, *ends])
    step = 10.0 ** math.floor(math.log10(half)) / 2
    half = math.ceil(half / step - 1e-9) * step
    return Axis(-half, half, *_DIFFERENCE_AXIS)


def _difference_mark(index: int, entry: Comparison, scope: Scope | None, axis: Axis) -> Mark:
    x, low, high = _placed(entry.difference, axis)
    value, p = entry.difference.value, entry.p_adjusted
    site = scope.name if scope else entry.scope
    figure = _absent(entry.difference) if value is None else signed(value)
    adjusted = "" if p is None else f", p adjusted {p_value(p)}"
    return Mark(
        name=shortened(site, _SITE),
        kind="merged",
        y=TOP + ROW * (index + 0.5),
        x=x,
        low=low,
        high=high,
        figure=figure,
        description=f"{site}, against {entry.against}: "
        f"{said(entry.difference, with_signs=True)}{adjusted}",
        p="" if p is None else f"p {p_value(p)}",
    )


def _placed(figure: Figure | None, axis: Axis) -> tuple[float | None, float | None, float | None]:
    if figure is None or figure.value is None:
        return None, None, None
    if figure.low is None or figure.high is None:
        return axis.at(figure.value), None, None
    return axis.at(figure.value), axis.at(figure.low), axis.at(figure.high)


def _absent(figure: Figure | None) -> str:
    return "withheld" if figure is not None and figure.small else "–"


def _ticks(axis: Axis) -> tuple[tuple[float, str], ...]:
    return tuple((axis.at(tick), f"{tick:g}") for tick in ticks(axis.low, axis.high))


def _signed_ticks(axis: Axis) -> tuple[tuple[float, str], ...]:
    """Mark 0 and one round number on either side: more would not fit."""
    side = ticks(0, axis.high, 2)[-1]
    words = (f"−{side:g}", "0", f"+{side:g}")
    return tuple((axis.at(x), word) for x, word in zip((-side, 0, side), words, strict=True))
