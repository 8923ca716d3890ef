"""The evaluation of each federation of an experiment, by the command that everybody uses."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluate.experiments import combined, running
from evaluate.experiments.config import Experiment
from evaluate.experiments.jobs import Fold
from evaluate.experiments.plan import PERSONAL, POOLED
from evaluate.experiments.tables import Union
from evaluate.processes import Group
from finetune.run import TEACHER
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.runs import latest_run

REPORT, ARRIVALS = "report", "arrivals"
SHARED = "shared"
"""Ends the name of a site's own part of the federation: trained from the common classifier."""
TAUGHT = "teacher"
"""Ends the name of a site's private teacher."""
OWN = {SHARED: "own-published", TAUGHT: "own-teacher"}
"""Every site's images by its own model, which is no one network."""


def evaluate(
    folds: list[Fold],
    experiment: Experiment,
    union: Callable[[Fold], Union],
    jobs: int,
    say: Callable[[str], None],
    device: str | None,
    group: Group,
) -> None:
    """Evaluate what has been made; then, from the probabilities, what is no one network."""
    for fold in folds:
        _first(fold, experiment, union(fold))
    running.run(folds, jobs, say, device, group)
    again = [fold for fold in folds if _combinations(fold, experiment)]
    for fold in again:
        _combined(fold, experiment, union(fold), group)
    running.run(again, jobs, say, device, group)


def members_of(fold: Fold, union: Union) -> dict[str, Path]:
    """The models that the sites have published, by name."""
    sites = [site for site in union.sites if site != fold.left_out]
    return {f"{site}-{SHARED}": fold.root / "sites" / site for site in sites}


def teachers_of(fold: Fold, union: Union) -> dict[str, Path]:
    """The private teachers that have stayed at the sites, by name."""
    if fold.teacher is None or fold.left_out is not None:
        return {}
    runs = {site: latest_run(fold.root / "sites" / site) for site in union.sites}
    return {f"{site}-{TAUGHT}": run / TEACHER for site, run in runs.items() if run}


def _combinations(fold: Fold, experiment: Experiment) -> list[str]:
    """What is evaluated of a federation beside single networks."""
    found = []
    if fold.whole and "ensemble" in experiment.baselines:
        found.append("ensemble")
    if fold.whole and "fedbn" in experiment.strategies:
        found.append("fedbn")
    if fold.whole and experiment.personal:
        found.append(PERSONAL)
    if fold.left_out is None and fold.teacher:
        found += [SHARED, TAUGHT]
    elif fold.whole and any("mutual" in v for v in experiment.variants.values()):
        found.append(SHARED)
    return found


def _models(fold: Fold, experiment: Experiment, union: Union) -> dict[str, Path]:
    there = set(fold.arrivals.values()) - set(experiment.merges)
    found = {name: path for name, path in fold.models.items() if name not in there}
    if fold.whole or fold.teacher:
        found |= members_of(fold, union) | teachers_of(fold, union)
    for name in [name for name in found if _is_of_each_site(name)]:
        folder = found.pop(name)
        found |= {f"{name}-{site}": folder / site for site in union.sites}
    return found


def _is_of_each_site(name: str) -> bool:
    """Whether a model is one for every site."""
    return name == "fedbn" or name.endswith(PERSONAL)


def _folder(fold: Fold, kind: str, models: Mapping[str, Path]) -> Path:
    """A report of other models lies elsewhere: what is found there is always what was asked for."""
    told = {name: str(path) for name, path in models.items()}
    fold.reports[kind] = fold.root / f"{kind}-{sha256_bytes(canonical_json(told))[7:15]}"
    return fold.reports[kind]


def _add(fold: Fold, union: Union, models: Mapping[str, Path], out: Path, *more: object) -> None:
    roles = [("--pooled", POOLED)] if POOLED in models else []
    roles += [("--federated", n) for n in models if n.startswith("fed")]
    fold.add(
        "evaluate", fold.root / "hub", *[f"{name}={path}" for name, path in models.items()],
        "--data", union.path, "--images", union.images, *[part for role in roles for part in role],
        *more, "--replace", "--out", out, after=list(fold.jobs),
    )  # fmt: skip


def _first(fold: Fold, experiment: Experiment, union: Union) -> None:
    before = list(fold.jobs)
    models = _models(fold, experiment, union)
    out = _folder(fold, REPORT, models)
    if fold.left_out is not None:
        only = ("--where", f"site={fold.left_out}", "--external", fold.left_out, "--split", "all")
        _add(fold, union, models, out, *only)
        return
    _add(fold, union, models, out)
    arrived = {name: fold.models[name] for name in sorted(fold.arrivals.values())}
    if arrived:
        fold.add(
            "evaluate", *[f"{name}={path}" for name, path in arrived.items()],
            "--data", union.path, "--images", union.images, "--replace",
            "--out", _folder(fold, ARRIVALS, arrived), after=before,
        )  # fmt: skip


def _combined(fold: Fold, experiment: Experiment, union: Union, group: Group) -> None:
    """Write the combined predictions, and evaluate again with them: no network runs twice."""
    models = _models(fold, experiment, union)
    outputs = combined.read_outputs(fold.reports[REPORT] / "predictions.csv")
    found: dict[str, NDArray[np.float64]] = {}
    wanted = _combinations(fold, experiment)
    if "ensemble" in wanted:
        members, sizes = members_of(fold, union), training_images(union)
        for name, weigh in (("uniform", lambda n: 1.0), ("sqrt", math.sqrt)):
            weights = [weigh(sizes[site]) for site in union.sites]
            found[f"ensemble-{name}"] = combined.ensemble(outputs, list(members), weights)
    for name in filter(_is_of_each_site, fold.models):
        own = {site: f"{name}-{site}" for site in union.sites}
        found[name] = combined.by_site(outputs, own)
    for kind, name in OWN.items():
        if kind in wanted:
            own = {site: f"{site}-{kind}" for site in union.sites}
            found[name] = combined.by_site(outputs, own)
    with group.together():
        for name, probabilities in found.items():
            models[name] = fold.root / "combined" / f"{name}.csv"
            if group.first:
                combined.write_outputs(models[name], outputs, probabilities)
    _add(fold, union, models, fold.reports[REPORT])


def training_images(union: Union) -> dict[str, int]:
    """Training images of each site."""
    with union.path.open(encoding="utf-8", newline="") as file:
        found = Counter(row["site"] for row in csv.DictReader(file) if row["split"] == "train")
    return dict(found)
