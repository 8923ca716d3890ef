"""Two models on the same cases: paired differences, their p-values, and gaps between groups.

All models are resampled alike, so a difference of two replicates is a replicate of the difference.
P-values are adjusted by Holm's method within their family, the comparisons that a reader would look
at together; see `document.Comparison`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluate.document import Comparison, Gap
from evaluate.intervals import Sample, figure
from evaluate.labelled import LabelledSet
from evaluate.metrics import delong_test, holm
from evaluate.predictions import Predictions
from evaluate.scopes import MEAN


@dataclass(frozen=True, slots=True)
class Contest:
    """All models of a report, ready to be compared."""

    roles: Mapping[str, str]
    """Of each model, in the order of the report."""
    samples: Mapping[str, Mapping[str, Sample]]
    """By model, then by scope; small scopes are not among them."""
    main_score: str
    level: float

    def ranking(self, scope: str) -> list[str]:
        """Models with a defined main score, the highest first."""
        values = {
            name: found[scope].values[self.main_score]
            for name, found in self.samples.items()
            if scope in found
        }
        return sorted((n for n, v in values.items() if not np.isnan(v)), key=lambda n: -values[n])

    def leaders(self, reference: str | None = None) -> list[str]:
        """Who is looked at most closely: best of all, best of each kind, and the reference."""
        best = self.ranking("union")[:1]
        chosen = [*best, *([reference] if reference else []), *self._first_of_kinds().values()]
        return list(dict.fromkeys(chosen))

    def _first_of_kinds(self) -> dict[str, str]:
        """The best model of each kind on all cases, the best kind first."""
        first: dict[str, str] = {}
        for name in self.ranking("union"):
            first.setdefault(self.roles[name].partition(":")[0], name)
        return first

    def against_best(self) -> Iterator[Comparison]:
        """The best model against every other, on all cases and on the mean over sites."""
        for scope in ("union", MEAN):
            order = self.ranking(scope)
            for other in order[1:]:
                yield self._compare("best", scope, self.main_score, order[0], other)

    def against_kinds(self) -> Iterator[Comparison]:
        """The best merged model against the best of every other kind, on all cases."""
        first = self._first_of_kinds()
        if merged := first.pop("merged", None):
            for other in first.values():
                yield self._compare("kinds", "union", self.main_score, merged, other)

    def against_own(self) -> Iterator[Comparison]:
        """Every merged model against each site's own model, at that site."""
        merged = [name for name, role in self.roles.items() if role == "merged"]
        for own, role in self.roles.items():
            if role in self.samples[own]:  # "site:<site>", and the site has cases
                yield from (self._compare("own", role, self.main_score, m, own) for m in merged)

    def against_reference(self, reference: str, scores: Sequence[str]) -> Iterator[Comparison]:
        """Every model against one that was named."""
        for scope in ("union", "external", MEAN):
            for name in self.roles:
                if name != reference and scope in self.samples[name]:
                    for score in scores:
                        yield self._compare("reference", scope, score, name, reference)

    def _compare(self, family: str, scope: str, score: str, model: str, against: str) -> Comparison:
        one, other = self.samples[model][scope], self.samples[against][scope]
        difference, p = one.minus(other, score, self.level)
        return Comparison.model_validate(
            {
                "family": family,
                "scope": scope,
                "score": score,
                "model": model,
                "against": against,
                "difference": difference,
                "p": p,
                "p_adjusted": None,
                "test": "paired bootstrap",
            }
        )

    def gaps(
        self, columns: Mapping[str, Sequence[str]], unknown: Mapping[str, int]
    ) -> Iterator[Gap]:
        """Between the groups (scopes) of each column on which a model does best and worst.

        `unknown` has the number of cases of each column that are of no group. The two groups are
        chosen by their figures, which makes the gap look large: with many groups some gap is always
        there.
        """
        for column, scopes in columns.items():
            for model, samples in self.samples.items():
                found = {scope: samples[scope] for scope in scopes if scope in samples}
                values = {s: sample.values[self.main_score] for s, sample in found.items()}
                defined = sorted((s for s, v in values.items() if not np.isnan(v)), key=values.get)  # type: ignore[arg-type]
                if len(defined) < 2:
                    continue
                worst, best = defined[0], defined[-1]
                difference, _ = found[best].minus(found[worst], self.main_score, self.level)
                yield Gap(
                    column=column,
                    model=model,
                    score=self.main_score,
                    best=best,
                    worst=worst,
                    difference=difference.model_copy(update={"n": found[worst].n[self.main_score]}),
                    unknown=unknown.get(column, 0),
                )


def auroc_comparisons(
    labelled: LabelledSet,
    models: Mapping[str, Predictions],
    pairs: Sequence[tuple[str, str]],
    level: float,
    minimum: int,
) -> Iterator[Comparison]:
    """AUROC of each class by the paired test of DeLong; only for cases that are independent."""
    for one, other in pairs:
        for column, label in enumerate(labelled.classes):
            known = labelled.targets[:, column] >= 0
            truth = labelled.targets[known, column]
            if min(truth.sum(), len(truth) - truth.sum()) < minimum:
                continue
            first, second = (models[n].probabilities[known, column] for n in (one, other))
            found = delong_test(truth, first, second, level=level)
            yield Comparison(
                family="auroc",
                scope="union",
                score="auroc",
                label=label,
                model=one,
                against=other,
                difference=figure(found.difference, found.low, found.high, len(truth)),
                p=None if np.isnan(found.p) else found.p,
                p_adjusted=None,
                test="paired DeLong",
            )


def adjusted(*families: Iterator[Comparison]) -> tuple[Comparison, ...]:
    """All comparisons, p-values adjusted within each family."""
    found: list[Comparison] = []
    for family in families:
        entries = list(family)
        tested = [entry for entry in entries if entry.p is not None]
        new = iter(holm([entry.p or 0.0 for entry in tested]).tolist())
        found += [
            entry if entry.p is None else entry.model_copy(update={"p_adjusted": next(new)})
            for entry in entries
        ]
    return tuple(found)
