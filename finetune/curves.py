"""The picture of a run: loss and validation figures by step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TRAIN, _VALIDATION, _AUROC = "#8a8f98", "#0b5fa5", "#b45309"


def draw(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of the training curves from the lines of metrics.jsonl."""
    steps = [line for line in lines if line["event"] == "step"]
    checks = [line for line in lines if line["event"] == "validation"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=_TRAIN, lw=0.8)
    marks = [c["step"] for c in checks]
    left.plot(marks, [c["validation_loss"] for c in checks], "o-", color=_VALIDATION, ms=4)
    left.set(xlabel="step", ylabel="loss", title="loss")
    left.legend(["training batch", "validation"], frameon=False)
    for key, label, colour in (
        ("balanced_accuracy", "balanced accuracy", _VALIDATION),
        ("macro_auroc", "macro AUROC", _AUROC),
    ):
        values = [float("nan") if c[key] is None else c[key] for c in checks]
        right.plot(marks, values, "o-", color=colour, ms=4, label=label)
    if checks:
        right.axvline(checks[-1]["best_step"], color=_TRAIN, ls=":", lw=1, label="kept")
    right.set(xlabel="step", ylim=(0, 1.02), title="own validation images")
    right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
