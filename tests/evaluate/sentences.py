"""The made-up parts of a report that do not follow from its shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluate.document import ChecklistItem, Figure, Similarity, SurveyRow


def survey() -> tuple[SurveyRow, ...]:
    def row(name: str, model: str | None, value: float) -> SurveyRow:
        figures = {
            score: Figure(value=v, low=v - 0.03, high=v + 0.03, n=3)
            for score, v in (("balanced_accuracy", value), ("macro_auroc", value + 0.08))
        }
        sites = ("site:lyon", "site:oslo", "site:graz")
        return SurveyRow.model_validate({"name": name, "model": model, "sites": sites} | figures)

    return (
        row("single", None, 0.74),
        row("cross", None, 0.61),
        row("mix", "pooled", 0.88),
        row("federated", "rounds", 0.85),
        row("merged", "mean", 0.82),
        row("merged", "TIES", 0.83),
    )


def similarity(models: Sequence[str], rng: np.random.Generator) -> Similarity:
    size, groups = len(models), ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "head")
    upper = np.triu(rng.uniform(-0.1, 0.6, (size, size)), 1)
    norms = rng.uniform(0.01, 0.05, (size, len(groups))) * np.array([1, 1, 1.5, 2, 3, 9])
    return Similarity(
        models=tuple(models),
        cosine=tuple(map(tuple, (upper + upper.T + np.eye(size)).tolist())),
        groups=groups,
        norms=tuple(map(tuple, norms.tolist())),
    )


CHECKLIST = tuple(
    ChecklistItem.model_validate(
        dict(zip(("guideline", "number", "topic", "status", "text"), item, strict=True))
    )
    for item in (
        ("CLAIM 2024", "20", "Data partitions", "shown", "Cases by site and class are above."),
        ("CLAIM 2024", "33", "Reference standard", "human", "Say how it was set, and by whom."),
        ("TRIPOD+AI", "12e", "Performance measures", "partly", "Say which of them mattered."),
    )
)

VERDICT = (
    "“pooled” has the highest balanced accuracy on all 480 cases, 0.884 (95 % interval 0.851 to "
    "0.912); the next, “TIES”, is lower by 0.041 (0.012 to 0.071).",
    "The worst site of “pooled” is graz: 0.851 on 160 cases.",
    "“TIES” falls below the site's own model at 1 of 3 sites: oslo by 0.031 (−0.012 to 0.070, may "
    "be chance).",
    "Calibration and net benefit are in the figures below; no figure here clears a model for use.",
)
