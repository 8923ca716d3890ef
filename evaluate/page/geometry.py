"""Geometry of plots: from figures to coordinates and paths in the units of a viewBox."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """Places values between two ends of a plot.

    Attributes:
        low, high: the values at the ends.
        start, end: where these lie; `start` may be greater, as on a y axis.
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return where a value lies; what is beyond an end is put on it."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * min(1.0, max(0.0, share)), 1)

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers within [low, high], about as many as asked for."""
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def runs(x: Sequence[float], y: Sequence[float | None]) -> list[list[Point]]:
    """Split a line where it is undefined."""
    found: list[list[Point]] = [[]]
    for across, up in zip(x, y, strict=True):
        if up is None:
            found.append([])
        else:
            found[-1].append((across, up))
    return [run for run in found if run]


def clipped(run: Sequence[Point], floor: float) -> list[list[Point]]:
    """Keep what lies at or above a floor, cut where the line crosses it."""
    kept: list[list[Point]] = [[]]
    for number, (x, y) in enumerate(run):
        if number and (y < floor) != (run[number - 1][1] < floor):
            x0, y0 = run[number - 1]
            crossing = (x0 + (x - x0) * (floor - y0) / (y - y0), floor)
            kept[-1].append(crossing)
            if y < floor:
                kept.append([])
        if y >= floor:
            kept[-1].append((x, y))
    return [part for part in kept if len(part) > 1]


def thinned(points: Sequence[Point], tolerance: float) -> list[Point]:
    """Drop points that lie within `tolerance` of the line through their neighbours.

    Source: Douglas and Peucker 1973, doi:10.3138/FM57-6770-U75U-7727.
    """
    if len(points) < 3:
        return list(points)
    keep = {0, len(points) - 1}
    spans = [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        inner = range(first + 1, last)
        if not inner:
            continue
        far = max(inner, key=lambda index: _distance(points[index], points[first], points[last]))
        if _distance(points[far], points[first], points[last]) > tolerance:
            keep.add(far)
            spans += [(first, far), (far, last)]
    return [points[index] for index in sorted(keep)]


def _distance(point: Point, start: Point, end: Point) -> float:
    across, up = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, up)
    if not length:
        return math.hypot(point[0] - start[0], point[1] - start[1])
    return abs(across * (start[1] - point[1]) - (start[0] - point[0]) * up) / length


def path(points: Sequence[Point]) -> str:
    """Write the `d` of an open path."""
    text = [f"{x:g} {y:g}" for x, y in points]
    return f"M{text[0]}L{' '.join(text[1:])}" if len(text) > 1 else ""


def curve_path(
    x: Sequence[float],
    y: Sequence[float | None],
    across: Axis,
    up: Axis,
    *,
    tolerance: float = 0.3,
) -> str:
    """Write the `d` of a line, cut at the lower end of `up` and where it is undefined."""
    parts = [part for run in runs(x, y) for part in clipped(run, up.low)]
    placed = [[(across.at(a), up.at(b)) for a, b in part] for part in parts]
    return "".join(path(thinned(part, tolerance)) for part in placed)


def band_path(
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    across: Axis,
    up: Axis,
    *,
    tolerance: float = 0.5,
) -> str:
    """Write the `d` of the areas between two lines, where both are defined."""
    both = [None if a is None or b is None else (a, b) for a, b in zip(low, high, strict=True)]
    written = []
    start = 0
    for stop in [i for i, pair in enumerate(both) if pair is None] + [len(both)]:
        pairs = [(x[i], *pair) for i in range(start, stop) if (pair := both[i]) is not None]
        start = stop + 1
        if len(pairs) > 1:
            there = thinned([(across.at(a), up.at(b)) for a, b, _ in pairs], tolerance)
            back = thinned([(across.at(a), up.at(b)) for a, _, b in pairs], tolerance)
            written.append(f"{path([*there, *reversed(back)])}Z")
    return "".join(written)


def on_line(x: Sequence[float], y: Sequence[float | None], share: float) -> Point | None:
    """Return the point that lies at this share of a line's length, or None of an empty line."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if len(points) < 2:
        return points[0] if points else None
    lengths = [0.0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        lengths.append(lengths[-1] + math.hypot(x1 - x0, y1 - y0))
    goal = share * lengths[-1]
    index = next((i for i in range(1, len(points)) if lengths[i] >= goal), len(points) - 1)
    step = lengths[index] - lengths[index - 1]
    part = (goal - lengths[index - 1]) / step if step else 0.0
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart so that neighbours are `gap` from each other, within [low, high]."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [0.0] * len(places)
    lowest = low
    for index in order:
        moved[index] = max(places[index], lowest)
        lowest = moved[index] + gap
    highest = high
    for index in reversed(order):
        moved[index] = round(min(moved[index], highest), 1)
        highest = moved[index] - gap
    return moved
