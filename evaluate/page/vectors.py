"""How task vectors lie to each other: cosines as a heat map, norm by depth as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.document import Similarity
from evaluate.page.geometry import Axis, curve_path, spread, ticks
from evaluate.page.words import shortened
from evaluate.wording import number

# In the units of the viewBox.
WIDTH, LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 620.0, 46.0, 460.0, 10.0, 210.0, 252.0
MOST_LINES = 8
_GAP, _NAME, _GROUP = 14.0, 22, 12


@dataclass(frozen=True, slots=True)
class Norms:
    """The norm of each vector by part of the network."""

    lines: tuple[tuple[str, int, tuple[tuple[float, float], ...], float, str], ...]
    """Path, style, points, height of the label, label."""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str
    left_out: int
    """Models that the table alone shows."""


def norms_plot(found: Similarity) -> Norms:
    """Draw relative norms from the input of the network to its head."""
    shown = list(zip(found.models, found.norms, strict=True))[:MOST_LINES]
    highest = max((value for _, values in shown for value in values), default=0.0) or 1.0
    up = Axis(0, highest * 1.05, BOTTOM, TOP)
    across = Axis(0, max(1, len(found.groups) - 1), LEFT, RIGHT)
    places = range(len(found.groups))
    ends = [up.at(values[-1]) for _, values in shown if values]
    labels = spread(ends, _GAP, TOP, BOTTOM)
    lines = tuple(
        (
            curve_path(places, values, across, up, tolerance=0),
            index,
            tuple((across.at(i), up.at(value)) for i, value in enumerate(values)),
            labels[index],
            shortened(name, _NAME),
        )
        for index, (name, values) in enumerate(shown)
        if values
    )
    return Norms(
        lines,
        tuple((across.at(i), shortened(group, _GROUP)) for i, group in enumerate(found.groups)),
        tuple((up.at(tick), f"{tick:g}") for tick in ticks(0, up.high)),
        "Norm of each vector relative to the base, by part of the network: "
        + "; ".join(_told(name, found.groups, values) for name, values in shown),
        len(found.models) - len(shown),
    )


def _told(name: str, groups: Sequence[str], values: Sequence[float]) -> str:
    pairs = zip(groups, values, strict=True)
    return f"{name} " + ", ".join(f"{group} {number(value)}" for group, value in pairs)
