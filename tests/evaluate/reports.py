"""Reports with made-up figures: plausible, in every shape, and true of no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluate.document import (
    ClassCurves,
    ClassFigures,
    Comparison,
    Count,
    Curve,
    Figure,
    Gap,
    ModelReport,
    ModelScope,
    Operating,
    ReliabilityBin,
    Report,
    Resampling,
    Scope,
    Worst,
)
from tests.evaluate.sentences import CHECKLIST, VERDICT, similarity, survey

MODELS = {
    "base": "base",
    "lyon": "site:lyon",
    "oslo": "site:oslo",
    "graz": "site:graz",
    "mean": "merged",
    "TIES": "merged",
    "pooled": "pooled",
    "rounds": "federated",
    "x": "other",
}
SITES = ("lyon", "oslo", "graz")
CLASSES = ("basophil", "eosinophil", "lymphocyte", "monocyte")
SCORES = (
    "balanced_accuracy", "accuracy", "macro_auroc", "macro_auprc", "macro_f1", "kappa",
    "brier", "ece", "log_loss",
)  # fmt: skip
CLASS_SCORES = (
    "auroc", "auprc", "sensitivity", "specificity", "ppv", "npv", "f1", "brier", "ece",
    "calibration_slope", "calibration_intercept", "sensitivity_at_0.95", "specificity_at_0.95",
    "ppv_at_prevalence", "npv_at_prevalence",
)  # fmt: skip


@dataclass
class Maker:
    """Draws the figures of one report."""

    models: Mapping[str, str]
    sites: Sequence[str]
    external: Sequence[str]
    classes: Sequence[str]
    columns: Mapping[str, Sequence[str]]
    multi_label: bool
    ordered: bool
    minimum: int
    rng: np.random.Generator
    small: frozenset[str] = frozenset()
    undefined: frozenset[str] = frozenset()
    counts: dict[str, list[int]] = field(default_factory=dict)

    def keys(self) -> list[str]:
        groups = [
            f"group:{column}={value}" for column in self.columns for value in self.columns[column]
        ]
        extra = ["external"] if self.external else []
        return ["union", *extra, *[f"site:{s}" for s in (*self.sites, *self.external)], *groups]

    def figure(self, value: float, n: int, low: float = 0.0, high: float = 1.0) -> Figure:
        width = 0.9 / np.sqrt(n + 1)
        below, above = (
            value - width * self.rng.uniform(0.7, 1),
            value + width * self.rng.uniform(0.5, 0.8),
        )
        return Figure(value=value, low=max(low, below), high=min(high, above), n=n)

    def level(self, model: str) -> float:
        return {"base": 0.55, "site": 0.74, "merged": 0.83, "pooled": 0.88}.get(
            self.models[model].partition(":")[0], 0.8
        )

    def scope(self, key: str) -> Scope:
        kind, _, name = key.partition(":")
        counts = self.counts[key]
        hidden = key in self.small
        classes = tuple(
            Count(
                name=c,
                n=None if n < self.minimum or hidden else n,
                small=n < self.minimum or hidden,
            )
            for c, n in zip(self.classes, counts, strict=True)
        )
        column = next((c for c in self.columns if name.startswith(f"{c}=")), "")
        value = name.removeprefix(f"{column}=")
        total = sum(counts)
        return Scope(
            key=key,
            kind=kind,  # type: ignore[arg-type]
            name={"union": "All cases", "external": "External sites"}.get(key, value or name),
            column=column if kind == "group" else None,
            external=name in self.external,
            cases=None if hidden else total,
            patients=None if hidden else int(total * 0.7),
            small=hidden,
            classes=classes,
        )

    def model_scope(self, model: str, key: str) -> ModelScope:
        counts, level = self.counts[key], self.level(model) + self.rng.normal(0, 0.04)
        if key in self.small:
            nothing = {name: Figure(value=None, small=True) for name in SCORES}
            return ModelScope(scope=key, figures=nothing)
        total = sum(counts)
        names = [*SCORES, "quadratic_kappa"] if self.ordered else SCORES
        figures = {name: self.score(name, level, total) for name in names}
        classes = tuple(self.class_figures(c, i, key, level) for i, c in enumerate(self.classes))
        matrix = None if self.multi_label else self.confusion(counts, level)
        return ModelScope(scope=key, figures=figures, classes=classes, confusion=matrix)

    def score(self, name: str, level: float, n: int) -> Figure:
        good = float(np.clip(level + self.rng.normal(0, 0.02), 0.05, 0.99))
        if name in ("brier", "ece", "log_loss"):
            return self.figure(
                (1 - good) * {"brier": 0.8, "ece": 0.4, "log_loss": 2.0}[name], n, 0, 9
            )
        if "auroc" in name:
            return self.figure(1 - (1 - good) / 2, n).model_copy(update={"method": "delong"})
        return self.figure(good, n)

    def class_figures(self, name: str, index: int, key: str, level: float) -> ClassFigures:
        n, total = self.counts[key][index], sum(self.counts[key])
        if name in self.undefined:
            figures = {score: Figure(value=None, n=0) for score in CLASS_SCORES}
        elif n < self.minimum:
            figures = {score: Figure(value=None, small=True) for score in CLASS_SCORES}
        else:
            figures = {score: self.score(score, level, n) for score in CLASS_SCORES}
            figures["calibration_slope"] = self.figure(self.rng.uniform(0.6, 1.3), n, -9, 9)
            figures["calibration_intercept"] = self.figure(self.rng.normal(0, 0.3), n, -9, 9)
        return ClassFigures(name=name, prevalence=n / total if total else None, figures=figures)

    def confusion(self, counts: Sequence[int], level: float) -> tuple[tuple[int | None, ...], ...]:
        size = len(counts)
        chances = np.full((size, size), (1 - level) / max(1, size - 1))
        np.fill_diagonal(chances, level)
        chances /= chances.sum(axis=1, keepdims=True)
        rows = [self.rng.multinomial(n, p) for n, p in zip(counts, chances, strict=True)]
        return tuple(
            tuple(None if 0 < int(v) < self.minimum else int(v) for v in row) for row in rows
        )

    def curves(self, model: str, scope: ModelScope) -> tuple[ClassCurves, ...]:
        found = []
        for row in scope.classes:
            auroc, prevalence = row.figures["auroc"].value, row.prevalence or 0.0
            if auroc is None:
                nothing = {"roc": None, "precision_recall": None, "net_benefit": None}
                found.append(ClassCurves(name=row.name, treat_all=None, **nothing))
                continue
            x = np.linspace(0, 1, 101)
            tpr = x ** ((1 - auroc) / auroc)
            recall = np.linspace(0, 1, 101)
            fpr = recall ** (auroc / (1 - auroc))
            precision = (
                prevalence * recall / np.maximum(prevalence * recall + (1 - prevalence) * fpr, 1e-9)
            )
            precision[0] = precision[1]
            t = np.linspace(0.01, 0.99, 99)
            false = (1 - t) ** (4 + 20 * (auroc - 0.5))
            true = false ** ((1 - auroc) / auroc)
            net = prevalence * true - (1 - prevalence) * false * t / (1 - t)
            everyone = prevalence - (1 - prevalence) * t / (1 - t)
            found.append(
                ClassCurves(
                    name=row.name,
                    roc=_curve(x, tpr, 0.06 * np.sin(np.pi * x)),
                    precision_recall=_curve(recall, precision, 0.05 * recall),
                    net_benefit=_curve(t, net, np.full_like(t, 0.015), floor=-np.inf),
                    treat_all=Curve(x=tuple(t), y=tuple(everyone)),
                )
            )
        return tuple(found)

    def reliability(self, total: int) -> tuple[ReliabilityBin, ...]:
        shares = self.rng.dirichlet(np.linspace(0.2, 4, 10))
        bins = []
        for index, share in enumerate(shares):
            n, middle = int(total * share), (index + 0.5) / 10
            if n < self.minimum:
                hidden = {
                    "confidence": None,
                    "observed": None,
                    "low": None,
                    "high": None,
                    "n": None,
                }
                bins.append(ReliabilityBin(lower=index / 10, upper=(index + 1) / 10, **hidden))
                continue
            observed = float(np.clip(middle - 0.08 + self.rng.normal(0, 0.04), 0.02, 0.98))
            width = 1 / np.sqrt(n + 4)
            bins.append(
                ReliabilityBin(
                    lower=index / 10,
                    upper=(index + 1) / 10,
                    confidence=middle,
                    observed=observed,
                    low=max(0.0, observed - width),
                    high=min(1.0, observed + width),
                    n=n,
                )
            )
        return tuple(bins)

    def model(self, name: str) -> ModelReport:
        scopes = [self.model_scope(name, key) for key in self.keys()]
        at_sites = [s for s in scopes if s.scope.startswith("site:")]
        main = "macro_auroc" if self.multi_label else "balanced_accuracy"
        values = [(v, s) for s in at_sites if (v := s.figures[main].value) is not None]
        if at_sites:
            mean = float(np.mean([v for v, _ in values])) if values else None
            figures = {k: Figure(value=None, n=0) for k in SCORES}
            if mean is not None:
                figures = {
                    k: self.score(k, mean, 200).model_copy(update={"n": len(values)})
                    for k in SCORES
                }
            scopes.append(ModelScope(scope="mean_over_sites", figures=figures))
        worst = min(values, key=lambda pair: pair[0], default=None)
        return ModelReport(
            name=name,
            role=self.models[name],
            fingerprint=f"sha256:{abs(hash(name)) % 16**8:08x}",
            temperature=1.3 if self.models[name] == "merged" else None,
            thresholds=tuple(
                Operating(name=c, specificity=0.95, threshold=float(self.rng.uniform(0.2, 0.8)))
                for c in self.classes
            ),
            scopes=tuple(scopes),
            worst_site=worst
            and Worst(name=worst[1].scope[5:], value=worst[0], n=sum(self.counts[worst[1].scope])),
            worst_class=Worst(name=self.classes[0], value=0.5, n=self.counts["union"][0]),
            curves=self.curves(name, scopes[0]),
            reliability=self.reliability(sum(self.counts["union"])),
        )

    def comparison(
        self, family: str, scope: str, model: str, against: str, label: str | None = None
    ) -> Comparison:
        value = float(self.level(model) - self.level(against) + self.rng.normal(0, 0.05))
        p = float(np.exp(-abs(value) * 60))
        return Comparison(
            family=family,  # type: ignore[arg-type]
            scope=scope,
            score="auroc" if label else "balanced_accuracy",
            label=label,
            model=model,
            against=against,
            difference=self.figure(value, sum(self.counts.get(scope, [200])), -1, 1),
            p=p,
            p_adjusted=min(1.0, 4 * p),
            test="paired DeLong" if label else "paired bootstrap",
        )

    def comparisons(self, reference: str | None) -> tuple[Comparison, ...]:
        names = list(self.models)
        best = max(names, key=self.level, default="")
        others = [name for name in names if name != best]
        found = [self.comparison("best", "union", best, name) for name in others]
        own = {role[5:]: name for name, role in self.models.items() if role.startswith("site:")}
        found += [
            self.comparison("own", f"site:{site}", name, own[site])
            for name, role in self.models.items() if role == "merged"
            for site in self.sites if site in own and f"site:{site}" not in self.small
        ]  # fmt: skip
        if reference:
            found += [
                self.comparison("reference", "union", n, reference) for n in names if n != reference
            ]
        found += [
            self.comparison("auroc", "union", best, n, c) for n in others[:1] for c in self.classes
        ]
        return tuple(found)


def _curve(x: np.ndarray, y: np.ndarray, width: np.ndarray, floor: float = 0.0) -> Curve:
    low, high = np.maximum(floor, y - width), np.minimum(1.0, y + width)
    return Curve(x=tuple(x), y=tuple(y), low=tuple(low), high=tuple(high))


def made_up(
    models: Mapping[str, str] = MODELS,
    *,
    sites: Sequence[str] = SITES,
    external: Sequence[str] = (),
    classes: Sequence[str] = CLASSES,
    columns: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    multi_label: bool = False,
    ordered: bool = False,
    per_cell: int = 40,
    minimum: int = 5,
    small: Sequence[str] = (),
    undefined: Sequence[str] = (),
    seed: int = 0,
    **changes: object,
) -> Report:
    """A report of models (name: role); `small` scopes and `undefined` classes have no figures."""
    rng = np.random.default_rng(seed)
    columns = columns or {}
    maker = Maker(
        models, sites, external, classes, columns, multi_label, ordered, minimum, rng,
        frozenset(small), frozenset(undefined),
    )  # fmt: skip
    for key in maker.keys():
        maker.counts[key] = [int(n) for n in rng.poisson(per_cell, len(classes))]
    if sites or external:
        cells = [maker.counts[f"site:{site}"] for site in (*sites, *external)]
        maker.counts["union"] = np.sum(cells, axis=0).tolist()
    for name in undefined:
        for counts in maker.counts.values():
            counts[list(classes).index(name)] = 0
    own = [name for name, role in models.items() if role.startswith("site:")]
    made = tuple(maker.model(name) for name in models)
    gaps = tuple(
        Gap(column=column, model=name, score="balanced_accuracy", best=values[0], worst=values[-1],
            difference=maker.figure(0.06, 200, -1, 1))
        for column, values in columns.items() for name in models
    )  # fmt: skip
    content: dict[str, object] = {
        "title": "White blood cells (made-up figures)",
        "created": "2031-05-06 07:08 UTC",
        "software": {"merge-kit": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
        "task": "multi-label" if multi_label else "single-label",
        "ordered": ordered,
        "classes": tuple(classes),
        "main_score": "macro_auroc" if multi_label else "balanced_accuracy",
        "minimum": minimum,
        "resampling": Resampling(unit="patient", resamples=2000, level=0.95, seed=0),
        "bins": 10,
        "prevalences": {classes[0]: 0.02},
        "validation_cases": 240,
        "scopes": tuple(maker.scope(key) for key in maker.keys()),
        "models": made,
        "reference": reference,
        "comparisons": maker.comparisons(reference),
        "gaps": gaps,
        "survey": survey(),
        "similarity": similarity(own, rng) if len(own) > 1 else None,
        "checklist": CHECKLIST,
        "notes": ("These figures are made up.",),
        "verdict": VERDICT,
    }
    return Report.model_validate(content | changes)
