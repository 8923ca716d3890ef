"""Reliability diagrams."""

from __future__ import annotations

from dataclasses import dataclass

from evaluate.document import ModelReport, ReliabilityBin
from evaluate.page.geometry import Axis
from evaluate.wording import number

# In the units of the viewBox: the diagram, below it the counts.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 300.0, 46.0, 294.0, 8.0, 208.0
COUNTS_TOP, COUNTS_BOTTOM, HEIGHT = 244.0, 286.0, 308.0
_DIGIT = 5.6


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin: its point with its interval, and its count."""

    x: float | None
    y: float | None
    low: float | None
    high: float | None
    left: float
    width: float
    top: float
    count: str
    upright: bool
    """Whether the count is too long to be written across the bar."""
    withheld: bool
    description: str


@dataclass(frozen=True, slots=True)
class Panel:
    """The reliability diagram of one model."""

    heading: str
    bars: tuple[Bar, ...]
    description: str


def reliability_panel(model: ModelReport) -> Panel:
    """Place the bins of a model: what it was confident of against how often it was right."""
    most = max((row.n for row in model.reliability if row.n is not None), default=0)
    bars = tuple(_bar(row, most) for row in model.reliability)
    told = "; ".join(bar.description for bar in bars)
    return Panel(model.name, bars, f"Reliability of {model.name}, by confidence: {told}")


def _bar(row: ReliabilityBin, most: int) -> Bar:
    across, up = Axis(0, 1, LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP)
    counts = Axis(0, max(1, most), COUNTS_BOTTOM, COUNTS_TOP)
    left, width = across.at(row.lower), round(across.at(row.upper) - across.at(row.lower), 1)
    told = f"{row.lower:.2g} to {row.upper:.2g}"
    if row.n is None:
        told, count = f"{told} withheld", "*"
    else:
        told, count = f"{told} n {row.n}", f"{row.n:,}"
    if row.observed is not None:
        told += f" right {number(row.observed)}"
    if row.low is not None and row.high is not None:
        told += f" ({number(row.low)}–{number(row.high)})"
    return Bar(
        x=None if row.confidence is None else across.at(row.confidence),
        y=None if row.observed is None else up.at(row.observed),
        low=None if row.low is None else up.at(row.low),
        high=None if row.high is None else up.at(row.high),
        left=left,
        width=width,
        top=counts.at(row.n or 0),
        count=count,
        upright=len(count) * _DIGIT > width,
        withheld=row.n is None,
        description=told,
    )
