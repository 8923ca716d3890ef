"""Small multiples of curves: ROC, precision and recall, and net benefit, by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluate.document import ClassCurves, Curve, ModelReport, Report
from evaluate.page import reading
from evaluate.page.geometry import Axis, band_path, curve_path, on_line, ticks
from evaluate.page.words import said, shortened, span
from evaluate.wording import number

# In the units of the viewBox.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 250.0, 46.0, 244.0, 8.0, 178.0
KEY, LINE = 212.0, 15.0  # where the key starts, and what a line of it takes
LETTERS = "ABCD"
_NAME = 11
_BESIDE = "–"


@dataclass(frozen=True, slots=True)
class Line:
    """One model's curve: its path, its band, and the letter on it."""

    letter: str
    style: int
    path: str
    band: str
    x: float | None
    y: float | None
    key_y: float
    name: str
    figure: str
    description: str


@dataclass(frozen=True, slots=True)
class Panel:
    """The curves of one class."""

    heading: str
    across: str
    up: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    chance: str
    everyone: str
    nobody: str
    empty: str
    height: float
    description: str
    frame: tuple[float, float, float, float] = (LEFT, RIGHT, TOP, BOTTOM)
    width: float = WIDTH


def roc_panels(report: Report, models: Sequence[ModelReport]) -> list[Panel]:
    """Return the ROC curves of each class."""
    across, up = Axis(0, 1, LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP)
    chance = curve_path((0, 1), (0, 1), across, up)
    return [
        _panel(
            report, models, name, "ROC curves", ("1 − specificity", "sensitivity"), (across, up),
            lambda curves: curves.roc, score="auroc", at=0.45, chance=chance,
        )
        for name in report.classes
    ]  # fmt: skip


def precision_recall_panels(report: Report, models: Sequence[ModelReport]) -> list[Panel]:
    """Return precision against recall of each class, with its prevalence."""
    across, up = Axis(0, 1, LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP)
    panels = []
    for name in report.classes:
        found = [reading.class_figures(model, "union", name) for model in models]
        prevalence = next((r.prevalence for r in found if r and r.prevalence is not None), None)
        chance = "" if prevalence is None else curve_path((0, 1), (prevalence,) * 2, across, up)
        panels.append(
            _panel(
                report, models, name, "Precision and recall", ("recall", "precision"), (across, up),
                lambda curves: curves.precision_recall, score="auprc", at=0.5, chance=chance,
                about="" if prevalence is None else f"prevalence {number(prevalence)}",
            )
        )  # fmt: skip
    return panels


def net_benefit_panels(report: Report, models: Sequence[ModelReport]) -> list[Panel]:
    """Return the decision curves of each class, with treating all and treating none."""
    panels = []
    for name in report.classes:
        found = [_of(model, name) for model in models]
        lines = [c.net_benefit for c in found if c and c.net_benefit]
        everyone = next((c.treat_all for c in found if c and c.treat_all), None)
        across, up = _benefit_axes(lines)
        treat_all = "" if everyone is None else curve_path(everyone.x, everyone.y, across, up)
        panels.append(
            _panel(
                report, models, name, "Net benefit", ("threshold probability", "net benefit"),
                (across, up), lambda curves: curves.net_benefit, at=0.4, everyone=treat_all,
                nobody=curve_path((across.low, across.high), (0, 0), across, up) if lines else "",
            )
        )  # fmt: skip
    return panels


def _benefit_axes(lines: Sequence[Curve]) -> tuple[Axis, Axis]:
    """Show what is above the net benefit of treating none, and a little of what is below."""
    xs = [x for line in lines for x in line.x]
    tops = [y for line in lines for y in (*line.y, *(line.high or ())) if y is not None]
    top = max([0.01, *tops]) * 1.08
    if not xs or min(xs) == max(xs):
        return Axis(0, 1, LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP)
    return Axis(min(xs), max(xs), LEFT, RIGHT), Axis(-0.2 * top, top, BOTTOM, TOP)


def _of(model: ModelReport, name: str) -> ClassCurves | None:
    return next((curves for curves in model.curves if curves.name == name), None)


def _panel(
    report: Report,
    models: Sequence[ModelReport],
    name: str,
    what: str,
    words: tuple[str, str],
    axes: tuple[Axis, Axis],
    pick: Callable[[ClassCurves], Curve | None],
    *,
    at: float,
    score: str = "",
    chance: str = "",
    everyone: str = "",
    nobody: str = "",
    about: str = "",
) -> Panel:
    across, up = axes
    lines = []
    for index, model in enumerate(models):
        found = _of(model, name)
        curve = pick(found) if found else None
        row = reading.class_figures(model, "union", name)
        figure = row.figures.get(score) if row else None
        told = said(figure) if score else _heights(curve)
        shown = "" if figure is None or figure.value is None else number(figure.value)
        if shown and figure is not None and span(figure):
            shown = f"{shown} ({span(figure)})"
        place = at + 0.1 * index  # letters of neighbouring lines stand apart
        lines.append(
            _line(index, curve, across, up, place, (model.name, shown if score else "", told))
        )
    drawn = [line for line in lines if line.path]
    extra = 2 * LINE if everyone or nobody else 0.0
    empty = "" if drawn else "withheld or undefined"
    labels = "; ".join(f"{line.letter}, {line.description}" for line in lines)
    about = f", {about}" if about else ""
    return Panel(
        heading=name,
        across=words[0],
        up=words[1],
        x_ticks=_ticks(across),
        y_ticks=_ticks(up),
        lines=tuple(lines),
        chance=chance,
        everyone=everyone,
        nobody=nobody,
        empty=empty,
        height=KEY + LINE * len(lines) + extra,
        description=f"{what}, {name}{about}: {labels}",
    )


def _line(
    index: int,
    curve: Curve | None,
    across: Axis,
    up: Axis,
    place: float,
    words: tuple[str, str, str],
) -> Line:
    model, figure, told = words
    path = band = ""
    point = None
    if curve is not None:
        path = curve_path(curve.x, curve.y, across, up)
        if curve.low is not None and curve.high is not None:
            band = band_path(curve.x, curve.low, curve.high, across, up)
        heights = [up.at(y) if y is not None and up.holds(y) else None for y in curve.y]
        point = on_line([across.at(x) for x in curve.x], heights, place)
    return Line(
        letter=LETTERS[index],
        style=index,
        path=path,
        band=band,
        x=point and round(point[0], 1),
        y=point and round(point[1], 1),
        key_y=KEY + LINE * index,
        name=shortened(model, _NAME if figure else 2 * _NAME),
        figure=figure if path else "withheld" if told == "withheld" else _BESIDE,
        description=f"{model} {told}" if told else model,
    )


def _heights(curve: Curve | None) -> str:
    """Say a curve without a summary figure by a few of its points."""
    if curve is None:
        return "withheld or undefined"
    goals = (0.1, 0.25, 0.5)
    nearest = [min(range(len(curve.x)), key=lambda i: abs(curve.x[i] - goal)) for goal in goals]
    told = [(curve.x[i], y) for i in dict.fromkeys(nearest) if (y := curve.y[i]) is not None]
    return ", ".join(f"{number(y)} at {x:.2g}" for x, y in told)


def _ticks(axis: Axis) -> tuple[tuple[float, str], ...]:
    return tuple(
        (axis.at(tick), f"{tick:g}".replace("-", "−")) for tick in ticks(axis.low, axis.high)
    )
