"""One table out of the reports of all seeds: mean and spread, and what each way costs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluate.experiments.config import Experiment
from evaluate.experiments.evaluating import OWN, REPORT, TAUGHT
from evaluate.experiments.jobs import Fold, wire_hub
from evaluate.experiments.plan import FIRST, PERSONAL, POOLED, SITES, UNCALIBRATED
from evaluate.experiments.rounds import RECORD
from evaluate.experiments.tables import Union
from merge_kit.contributions import list_entries
from merge_kit.federation import FEDERATION_FILE, read_federation
from merge_kit.hub import FolderHub

FIGURES = ("union", "mean", "worst_site", "worst_class", "unseen", "ece")
BEST, AVERAGE = "best single site", "mean single site"
BASE = "base"
_OF = ", "


@dataclass(frozen=True, slots=True)
class Row:
    """One model of one seed."""

    seed: int
    model: str
    figures: Mapping[str, float | None]
    """By `FIGURES`; balanced accuracy but for the last, expected calibration error."""
    megabytes: float | None
    """What a site sends, and for rounds receives."""
    rounds: int | None
    """How often every site has to come; None where no site takes part."""


def collect(
    folds: Sequence[Fold], experiment: Experiment, unions: Mapping[Path, Union]
) -> list[Row]:
    """All rows of all seeds; sites' own models first, their best and mean after them."""
    rows = []
    for fold in folds:
        if fold.variant is not None:
            found = _rows(fold, experiment, unions[fold.root], {})
            ours = [row for row in found if row.model != BASE]
            rows += [replace(row, model=f"{row.model}{_OF}{fold.variant}") for row in ours]
        elif fold.whole:
            unseen = _unseen(folds, fold.seed)
            rows += _rows(fold, experiment, unions[fold.root], unseen)
    return rows


def merge_of(model: str) -> str:
    """The merge that a row is of, whatever its vectors' training."""
    return model.partition(_OF)[0]


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def figures_of(model: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of one model of a report."""
    scopes = {scope["scope"]: scope["figures"] for scope in model["scopes"]}

    def value(scope: str, score: str) -> float | None:
        found = scopes.get(scope, {}).get(score)
        return None if found is None else found["value"]

    return {
        "union": value("union", "balanced_accuracy"),
        "mean": value("mean_over_sites", "balanced_accuracy"),
        "worst_site": (model["worst_site"] or {}).get("value"),
        "worst_class": (model["worst_class"] or {}).get("value"),
        "unseen": None,
        "ece": value("union", "ece"),
    }


def _unseen(folds: Sequence[Fold], seed: int) -> dict[str, float]:
    """The mean over the sites of the figure of models that have never had them."""
    found: dict[str, list[float]] = {}
    for fold in folds:
        if fold.seed == seed and fold.left_out is not None:
            for model in _report(fold.reports[REPORT])["models"]:
                value = figures_of(model)["union"]
                if value is not None:
                    found.setdefault(model["name"], []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _rows(
    fold: Fold, experiment: Experiment, union: Union, unseen: Mapping[str, float]
) -> list[Row]:
    costs = _Costs(fold, experiment)
    found = {}
    parts = {f"{site}-{kind}" for site in union.sites for kind in OWN}
    parts |= {f"{name}{PERSONAL}-{site}" for name in experiment.personal for site in union.sites}
    for model in _report(fold.reports[REPORT])["models"]:
        name = model["name"]
        if name in parts or name.startswith("fedbn-"):
            continue
        figures = {**figures_of(model), "unseen": unseen.get(name)}
        found[name] = Row(fold.seed, name, figures, *costs.of(name, union.sites))
    alone = [found[site] for site in union.sites if site in found]
    if not alone:
        return list(found.values())
    best = max(alone, key=lambda row: row.figures["union"] or 0.0)
    average = {key: _mean([row.figures[key] for row in alone]) for key in FIGURES}
    rest = [row for name, row in found.items() if name not in union.sites]
    return [
        *alone,
        Row(fold.seed, BEST, best.figures, 0.0, 0),
        Row(fold.seed, AVERAGE, average, 0.0, 0),
        *rest,
    ]


class _Costs:
    """What each way costs a site: measured from what lies on the hub."""

    def __init__(self, fold: Fold, experiment: Experiment) -> None:
        self._fold, self._told = fold, experiment
        wires = {"", *(merge.wire for merge in experiment.merges.values())}
        self._size = {wire: _megabytes(fold, wire) for wire in wires}
        self._private = {
            f"{site}-{other}"
            for merge in experiment.merges.values()
            for site, other in merge.private.items()
        }

    def of(self, name: str, sites: Sequence[str]) -> tuple[float | None, int | None]:
        """Megabytes a site, and how often it comes."""
        moments = self._size[""]["moments"]
        if name in (*sites, *self._private, BASE, "hub", OWN[TAUGHT]):
            return 0.0, 0
        if name == POOLED:
            return None, None
        if name == FIRST:
            return moments, 1
        if name.startswith("fed"):
            record = json.loads((self._fold.models[name] / RECORD).read_text(encoding="utf-8"))
            return record["bytes_per_site"] / 1e6, record["rounds"]
        name = name.removesuffix(PERSONAL)
        merge = self._told.merges.get(name)
        if name.endswith(UNCALIBRATED):
            merge = self._told.merges.get(name.removesuffix(UNCALIBRATED))
            merge = merge and merge.model_copy(update={"calibrate": False})
        restored = merge is not None and merge.restore == SITES
        again = moments if merge and merge.calibrate else 0.0
        wire = self._size[merge.wire if merge else ""]
        size = moments + wire["vector"] + again + (wire["norms"] if restored else 0.0)
        return size, 1 + bool(again) + restored


def vector_megabytes(fold: Fold, experiment: Experiment) -> dict[str, float]:
    """What a site's vector takes, by how it travels."""
    hows = {merge.compress for merge in experiment.merges.values()}
    return {how: _megabytes(fold, how)["vector"] for how in hows}


def _megabytes(fold: Fold, wire: str) -> dict[str, float]:
    """The mean size of each kind of contribution on the hub of a wire; 0 of none. Predictions stand
    in for vectors."""
    hub = FolderHub(wire_hub(fold.root, wire))
    found: dict[str, list[int]] = {"vector": [], "moments": [], "norms": []}
    if hub.has(FEDERATION_FILE):  # a fold without this merge has no such hub
        for entry in list_entries(hub, read_federation(hub.root)):
            if entry.contribution:
                kind = "vector" if entry.kind == "predictions" else entry.kind
                found[kind].append(entry.contribution.manifest.payload.size)
    return {kind: statistics.fmean(sizes or [0]) / 1e6 for kind, sizes in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True, slots=True)
class Line:
    """One model over all seeds."""

    model: str
    mean: Mapping[str, float | None]
    spread: Mapping[str, float | None]
    """Standard deviation over the seeds; None of one seed."""
    megabytes: float | None
    rounds: int | None
    way: float | None
    """How far from the mean single site (0) to the pooled model (1), on the union."""


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Means and spreads, in the order of the first seed's rows."""
    names = list(dict.fromkeys(row.model for row in rows))
    found = []
    for name in names:
        own = [row for row in rows if row.model == name]
        mean = {key: _mean([row.figures[key] for row in own]) for key in FIGURES}
        spread = {key: _spread([row.figures[key] for row in own]) for key in FIGURES}
        found.append((name, mean, spread, own[0]))
    union = {name: mean["union"] for name, mean, _, _ in found}
    low, high = union.get(AVERAGE), union.get(POOLED)
    return [
        Line(name, mean, spread, first.megabytes, first.rounds, _way(mean["union"], low, high))
        for name, mean, spread, first in found
    ]


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _way(value: float | None, low: float | None, high: float | None) -> float | None:
    if value is None or low is None or high is None or high <= low:
        return None
    return (value - low) / (high - low)


def to_csv(rows: Sequence[Row]) -> str:
    """Every seed's figures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "model", *FIGURES, "megabytes_per_site", "rounds"])
    for row in rows:
        figures = ["" if row.figures[k] is None else f"{row.figures[k]:.6f}" for k in FIGURES]
        size = "" if row.megabytes is None else f"{row.megabytes:.3f}"
        writer.writerow([row.seed, row.model, *figures, size, row.rounds])
    return text.getvalue()


HEADINGS = (
    "model", "union", "way to pooled", "mean over sites", "worst site", "worst class",
    "unseen site", "ECE", "MB per site", "visits",
)  # fmt: skip


def cells(line: Line) -> list[str]:
    """One line of the table, by `HEADINGS`."""
    figures = [_cell(line.mean[key], line.spread[key]) for key in FIGURES]
    size = "" if line.megabytes is None else f"{line.megabytes:.1f}"
    visits = "" if line.rounds is None else str(line.rounds)
    way = "" if line.way is None else f"{line.way:.0%}"
    return [line.model, figures[0], way, *figures[1:], size, visits]


def _cell(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def to_markdown(lines: Sequence[Line]) -> str:
    """The table of means and spreads."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS), *[cells(line) for line in lines]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
