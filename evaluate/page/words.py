"""How the page writes figures, roles, scopes and scores."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.document import Figure
from evaluate.wording import number

SCORES = {
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "macro_auroc": "AUROC, mean over classes",
    "macro_auprc": "AUPRC, mean over classes",
    "macro_f1": "F1, mean over classes",
    "kappa": "Cohen’s kappa",
    "quadratic_kappa": "Quadratic kappa",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "ppv_at_prevalence": "PPV at stated prevalence",
    "npv_at_prevalence": "NPV at stated prevalence",
    "brier": "Brier score",
    "ece": "ECE",
    "log_loss": "Log loss",
    "calibration_slope": "Calibration slope",
    "calibration_intercept": "Calibration intercept",
}
"""Names for people, in the order in which figures are shown."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})
WITHOUT_BEST = frozenset({"calibration_slope", "calibration_intercept"})

FAMILIES = {
    "kinds": "The best merged model against the best of each other kind",
    "best": "The best model against the others",
    "own": "Merged models against a site’s own model, at its site",
    "reference": "Every model against the reference",
    "auroc": "AUROC, class by class",
}

SURVEY = {
    "single": ("Single", "each site’s model at its own site"),
    "cross": ("Cross", "each site’s model at the other sites"),
    "mix": ("Mix", "pooled training on all sites’ images"),
    "federated": ("Federated", "trained in rounds"),
    "merged": ("Merged", "one-shot merge"),
}

STATUSES = {"shown": ("●", "shown"), "partly": ("◐", "partly"), "human": ("○", "to be added")}

_ROLES = {"merged": "merged", "pooled": "pooled training", "federated": "federated in rounds"}


def score_name(key: str) -> str:
    """Name a figure; ``sensitivity_at_0.95``: where 0.95 is the specificity on validation."""
    if key in SCORES:
        return SCORES[key]
    score, _, fixed = key.rpartition("_at_")
    if score in SCORES and fixed:
        return f"{SCORES[score]} at the threshold for specificity {fixed}"
    return key.replace("_", " ").capitalize()


def in_order(keys: Sequence[str]) -> list[str]:
    """Sort figures as `SCORES` does.

    A score at a fixed one follows that score; what has no name here comes last, as it came.
    """
    order = list(SCORES)

    def place(key: str) -> tuple[int, bool]:
        score = key if key in order else key.rpartition("_at_")[0]
        return (order.index(score), key != score) if score in order else (len(order), False)

    return sorted(keys, key=place)


def signed(value: float) -> str:
    """Write a difference with its sign."""
    text = number(value)
    return text if text.startswith("−") or text == "0.000" else f"+{text}"


def span(figure: Figure, *, with_signs: bool = False) -> str:
    """Write the bounds of an interval, or nothing where there are none."""
    if figure.low is None or figure.high is None:
        return ""
    if with_signs:
        return f"{signed(figure.low)} to {signed(figure.high)}"
    joint = " to " if figure.low < 0 else "–"
    return f"{number(figure.low)}{joint}{number(figure.high)}"


def said(figure: Figure | None, *, with_signs: bool = False) -> str:
    """Write a figure for those who hear the page."""
    if figure is None or figure.value is None:
        return "withheld" if figure is not None and figure.small else "undefined"
    value = signed(figure.value) if with_signs else number(figure.value)
    bounds = span(figure, with_signs=with_signs)
    return f"{value} ({bounds})" if bounds else value


def p_value(p: float | None) -> str:
    """Write a p-value as journals do."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, noun: str) -> str:
    """Count a noun."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def kind(role: str) -> str:
    """Reduce a role to what decides its mark."""
    known = ("base", "merged", "pooled", "federated", "site")
    found = role.partition(":")[0]
    return found if found in known else "other"


def role_name(role: str, model: str) -> str:
    """Write a role in words, or nothing where the model's name says it already."""
    if role in ("other", model):
        return ""
    found, _, site = role.partition(":")
    return f"trained at {site}" if found == "site" else _ROLES.get(found, role)


def shortened(name: str, length: int) -> str:
    """Cut a name in the middle: names of a family often differ at their end."""
    if len(name) <= length:
        return name
    tail = (length - 1) * 2 // 5
    return f"{name[: length - 1 - tail]}…{name[len(name) - tail :]}"
