"""The picture of what smaller vectors cost: accuracy against the bytes that a site sends."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluate.experiments.config import Experiment
from evaluate.experiments.results import Line

_COLOURS = ("#0b5fa5", "#b45309", "#2f7d4f", "#8a3ffc")
WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Point:
    """One way to send a vector."""

    how: str
    megabytes: float
    """Of one site's vector."""
    union: float
    worst_site: float


def curves(
    experiment: Experiment, lines: Sequence[Line], megabytes: Mapping[str, float]
) -> dict[str, list[Point]]:
    """Merges that differ in nothing but how their vectors travel, by the name of the first.

    Parameters
    ----------
    megabytes
        Of a vector, by how it travels.
    """
    found = {line.model: line for line in lines}
    alike: dict[str, list[str]] = {}
    for name, merge in experiment.merges.items():
        alike.setdefault(merge.model_copy(update={"compress": ""}).model_dump_json(), []).append(
            name
        )
    drawn = {}
    for names in alike.values():
        if len(names) < 2 or any(name not in found for name in names):
            continue
        points = []
        for name in names:
            how, line = experiment.merges[name].compress, found[name]
            union, worst = line.mean["union"] or 0.0, line.mean["worst_site"] or 0.0
            points.append(Point(how or WHOLE, megabytes[how], union, worst))
        drawn[names[0]] = sorted(points, key=lambda point: (-point.megabytes, point.how))
    return drawn


def draw(found: Mapping[str, Sequence[Point]]) -> bytes:
    """PNG; megabytes on a logarithmic axis, large ones left."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    titles = (("union", "all sites' tests"), ("worst_site", "worst site"))
    for axes, (key, title) in zip(panels, titles, strict=True):
        for (name, points), colour in zip(found.items(), _COLOURS * len(found), strict=False):
            sizes = [point.megabytes for point in points]
            values = [getattr(point, key) for point in points]
            axes.plot(sizes, values, "o-", color=colour, ms=4, lw=1, label=name)
            for turn, point in enumerate(points):
                axes.annotate(
                    point.how, (point.megabytes, getattr(point, key)), fontsize=7, color=colour,
                    xytext=(0, 6 if turn % 2 else -11), textcoords="offset points", ha="center",
                )  # fmt: skip
        axes.set(title=title, xlabel="MB of one site's vector", xscale="log")
        axes.invert_xaxis()
        axes.margins(x=0.12, y=0.2)
        axes.grid(axis="y", color="#e6e8eb")
    panels[0].set_ylabel("balanced accuracy")
    if len(found) > 1:
        panels[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
