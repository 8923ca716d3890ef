"""The picture of a federation that grows and shrinks: accuracy after each arrival and leaving."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluate.experiments.evaluating import ARRIVALS
from evaluate.experiments.jobs import Fold
from evaluate.experiments.orders import arrival_orders, stages
from evaluate.experiments.results import figures_of

_COLOURS = ("#0b5fa5", "#b45309", "#2f7d4f", "#8a3ffc", "#8a8f98", "#c2255c")


@dataclass(frozen=True, slots=True)
class Curve:
    """One order of arrival; sites leave in the same order."""

    order: tuple[str, ...]
    union: tuple[float, ...]
    worst_site: tuple[float, ...]
    """Over all sites, also those that are not there."""


def curves(fold: Fold, sites: Sequence[str], count: int) -> list[Curve]:
    """The figures of each stage, from the report on the models of each stage."""
    report = json.loads((fold.reports[ARRIVALS] / "report.json").read_text(encoding="utf-8"))
    found = {model["name"]: figures_of(model) for model in report["models"]}
    drawn = []
    for order in arrival_orders(sites, count):
        names = [fold.arrivals[frozenset(there)] for there in stages(order)]
        union, worst = ([found[name][key] or 0.0 for name in names]
                        for key in ("union", "worst_site"))  # fmt: skip
        drawn.append(Curve(order, tuple(union), tuple(worst)))
    return drawn


def draw(found: Sequence[Curve], merge: str) -> bytes:
    """PNG."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    count = len(found[0].order)
    ticks = [f"+{n}" for n in range(1, count + 1)] + [f"−{n}" for n in range(1, count)]
    for axes, key, title in zip(
        panels, ("union", "worst_site"), ("all sites' tests", "worst site"), strict=True
    ):
        for curve, colour in zip(found, _COLOURS * len(found), strict=False):
            values = getattr(curve, key)
            label = ", ".join(curve.order)
            axes.plot(range(len(values)), values, "o-", color=colour, ms=4, lw=1.4, label=label)
        axes.axvline(count - 0.5, color="#c9cdd3", lw=1, ls="--")
        axes.set(title=title, xlabel="sites that have come (+) and gone (−)")
        axes.set_xticks(range(len(ticks)), ticks)
        axes.grid(axis="y", color="#e6e8eb")
    panels[0].set_ylabel(f"balanced accuracy of “{merge}”")
    panels[0].legend(frameon=False, fontsize=8, title="order of arrival, and of leaving")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
