"""The table of federated studies: single, cross, mix, federated in rounds, merged."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.comparisons import Contest
from evaluate.document import SurveyRow
from evaluate.intervals import Sample
from evaluate.scoring import mean_over, scalar

_SCORES = ("balanced_accuracy", "macro_auroc")
_OF_ALL = (("pooled", "mix"), ("federated", "federated"), ("merged", "merged"))


def survey(contest: Contest) -> tuple[SurveyRow, ...]:
    """Means over the same sites in every row, so that the rows can be compared.

    Single: each site's model at home. Cross: each site's model at the other sites. Mix: trained on
    all sites' images. The sites are those that have cases and a model of their own; where no site
    has one, all that have cases.
    """
    roles, samples = contest.roles, contest.samples
    own = {name: role for name, role in roles.items() if role in samples[name]}
    everywhere = [key for found in samples.values() for key in found if key.startswith("site:")]
    sites = tuple(dict.fromkeys(own.values() if own else everywhere))
    rows = []

    def add(name: str, model: str | None, found: Sequence[Sample]) -> None:
        if not found:
            return
        mean = mean_over(found, _SCORES)
        figures = {score: scalar(mean, score, contest.level) for score in _SCORES}
        rows.append(
            SurveyRow.model_validate({"name": name, "model": model, "sites": sites} | figures)
        )

    add("single", None, [samples[name][home] for name, home in own.items()])
    away = [samples[name][site] for name, home in own.items() for site in sites if site != home]
    add("cross", None, away)
    for role, name in _OF_ALL:
        for model, found in roles.items():
            if found == role:
                add(name, model, [samples[model][site] for site in sites])
    return tuple(rows)
