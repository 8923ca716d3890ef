"""Reporting guidelines, filled in as far as a report can: CLAIM 2024 and TRIPOD+AI.

CLAIM 2024: doi 10.1148/ryai.240300, 44 items for studies of artificial intelligence in imaging.
TRIPOD+AI: doi 10.1136/bmj-2023-078378, 27 items (some with letters) for prediction models. Topics
are named in our own words; the guidelines say what each item asks for in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from evaluate.document import ChecklistItem, Report
from evaluate.wording import percent, plural

Guideline = Literal["CLAIM 2024", "TRIPOD+AI"]
Shown = Callable[[Report], str]


@dataclass(frozen=True, slots=True)
class _Item:
    number: str
    topic: str
    add: str = ""
    """What somebody must add; nothing when the report shows all of it."""
    shown: Shown | None = None
    """What the report shows; an empty text where it shows nothing this time."""


def checklist(report: Report) -> tuple[ChecklistItem, ...]:
    """Every item of both guidelines, with what this report shows and what somebody must add."""
    filled = []
    tables: tuple[tuple[Guideline, tuple[_Item, ...]], ...] = (
        ("CLAIM 2024", _CLAIM),
        ("TRIPOD+AI", _TRIPOD),
    )
    for guideline, items in tables:
        for item in items:
            text = item.shown(report) if item.shown else ""
            filled.append(
                ChecklistItem(
                    guideline=guideline,
                    number=item.number,
                    topic=item.topic,
                    status="human" if not text else "partly" if item.add else "shown",
                    text=" ".join(filter(None, (text, item.add and f"To add: {item.add}."))),
                )
            )
    return tuple(filled)


def _counts(report: Report) -> str:
    union = next(scope for scope in report.scopes if scope.kind == "union")
    sites = sum(scope.kind == "site" for scope in report.scopes)
    parts = ["few cases" if union.cases is None else plural(union.cases, "case")]
    if union.patients is not None:
        parts.append(plural(union.patients, "patient"))
    if sites:
        parts.append(f"{plural(sites, 'site')}, each by class")
    return f"{', '.join(parts)} in the evaluated set."


def _partitions(report: Report) -> str:
    if not report.validation_cases:
        return "Evaluated cases are those of the split that the report names."
    return (
        f"{plural(report.validation_cases, 'validation case')} for thresholds and temperatures, "
        "apart from the evaluated ones."
    )


def _unit(report: Report) -> str:
    unit = report.resampling.unit
    if unit == "case":
        return "The table names no patients: whether splits share some cannot be seen here."
    return f"Intervals are by {unit}; site splits of this program never divide a {unit}."


def _metrics(report: Report) -> str:
    kappa = "" if report.task == "multi-label" else ", kappa"
    return (
        f"Ranked by {report.main_score.replace('_', ' ')}; discrimination (AUROC, AUPRC), "
        f"sensitivity, specificity, predictive values, F1{kappa}, calibration (Brier, ECE of "
        f"{report.bins} bins, slope, intercept) and net benefit."
    )


def _uncertainty(report: Report) -> str:
    drawn = report.resampling
    text = (
        f"{percent(drawn.level)} intervals: bootstrap of {drawn.resamples:,} resamples by "
        f"{drawn.unit}, DeLong for AUROC where cases are independent, Wilson for shares of 0 or 1."
    )
    if report.comparisons:
        count = plural(len(report.comparisons), "paired comparison")
        text += f" {count}, p-values adjusted by Holm."
    return text


def _external(report: Report) -> str:
    names = [scope.name for scope in report.scopes if scope.kind == "site" and scope.external]
    if not names:
        return ""
    return f"Sites that no model was trained on, in a column of their own: {', '.join(names)}."


def _internal(report: Report) -> str:
    sites = [scope for scope in report.scopes if scope.kind == "site" and not scope.external]
    return f"Test cases of {plural(len(sites), 'site')}, each by itself." if sites else ""


def _subgroups(report: Report) -> str:
    columns = list(dict.fromkeys(s.column for s in report.scopes if s.kind == "group" and s.column))
    if not columns:
        return ""
    return f"Figures by {', '.join(columns)}, with the gap between groups and its interval."


def _software(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.software.items()) + "."


def _models(report: Report) -> str:
    known = sum(model.fingerprint is not None for model in report.models)
    return (
        f"{plural(len(report.models), 'model')}, {known} of them by the fingerprint of the "
        "weights; a merged model's provenance.json names its recipe and every contribution."
    )


def _ensembling(report: Report) -> str:
    merged = sum(model.role == "merged" for model in report.models)
    if not merged:
        return ""
    return f"Merges of weights, not ensembles of outputs: {plural(merged, 'model')}."


def _performance(report: Report) -> str:
    return "Every figure with its interval, on all cases, by site and by class. " + _counts(report)


def _limits(report: Report) -> str:
    count = len(report.notes)
    return f"{plural(count, 'note')} at the end of the report." if count else ""


def _output(report: Report) -> str:
    origin = "thresholds fitted on validation cases" if report.validation_cases else ""
    kind = "one probability a class" if report.task == "multi-label" else "probabilities"
    return f"The models give {kind}" + (f"; {origin}." if origin else ".")


def _imbalance(report: Report) -> str:
    return "Prevalence of each class, AUPRC beside it; the main score weighs classes alike."


_PLACE = "where and when cases were taken, who was included and who was not"
_CLAIM = (
    _Item("1", "Title", "name the study as one of artificial intelligence, and which kind"),
    _Item("2", "Abstract", "a structured summary"),
    _Item("3", "Background", "clinical background, intended use and role"),
    _Item("4", "Aims", "objectives and hypotheses"),
    _Item("5", "Design", "prospective or retrospective"),
    _Item("6", "Goal", "what the study is to show"),
    _Item("7", "Data sources", "where the images come from", _internal),
    _Item("8", "Eligibility", _PLACE),
    _Item("9", "Preprocessing", "what was done to the images before this program read them"),
    _Item("10", "Selection of data subsets", "rows left out before the evaluation"),
    _Item("11", "De-identification", "how images were de-identified"),
    _Item("12", "Missing data", "how missing labels and columns came about"),
    _Item("13", "Acquisition", "devices and protocols"),
    _Item("14", "Reference standard", "its definition"),
    _Item("15", "Reference standard: reason", "why it was chosen"),
    _Item("16", "Annotators", "who annotated, and how they were trained"),
    _Item("17", "Annotation of the test set", "how the evaluated cases were annotated"),
    _Item("18", "Agreement of raters", "variability within and between raters"),
    _Item("19", "Partitions", "how cases were assigned to them", _partitions),
    _Item("20", "Level of the partitions", "that no patient is on two sides", _unit),
    _Item("21", "Sample size", "how it was determined"),
    _Item("22", "Model", "architecture, inputs and outputs in full", _models),
    _Item("23", "Software", shown=_software),
    _Item("24", "Initial weights", "where the base's weights come from"),
    _Item("25", "Training", "the sites' training options (their manifests have them)"),
    _Item("26", "Choice of the final model", "how it was chosen, and on which cases"),
    _Item("27", "Ensembles", shown=_ensembling, add="whether outputs were combined elsewhere"),
    _Item("28", "Metrics", shown=_metrics),
    _Item("29", "Statistical measures", shown=_uncertainty),
    _Item("30", "Robustness", "analyses beyond subgroups", _subgroups),
    _Item("31", "Explainability", "methods and their validation"),
    _Item("32", "Internal evaluation", shown=_internal),
    _Item("33", "External testing", "a data set that no model has seen", _external),
    _Item("34", "Registration", "of a clinical trial, where there is one"),
    _Item("35", "Numbers of cases", "cases excluded, and why", _counts),
    _Item("36", "Demographics", "of each partition", _subgroups),
    _Item("37", "Performance", shown=_performance),
    _Item("38", "Diagnostic performance and its precision", shown=_uncertainty),
    _Item("39", "Failures", "a look at what was misclassified"),
    _Item("40", "Limitations", "a discussion of bias and uncertainty", _limits),
    _Item("41", "Implications", "for practice"),
    _Item("42", "Protocol", "where the full protocol lies"),
    _Item("43", "Availability", "where software, model and data can be had", _models),
    _Item("44", "Funding", "sources and roles"),
)
_TRIPOD = (
    _Item("1", "Title", "name population, outcome, and development or evaluation"),
    _Item("2", "Abstract", "a structured summary"),
    _Item("3a", "Healthcare context", "diagnostic context and existing models"),
    _Item("3b", "Intended use", "population, users and place in the care pathway"),
    _Item("3c", "Health inequalities", "what is known of them"),
    _Item("4", "Objectives", "development, evaluation or both"),
    _Item("5a", "Data sources", "of training and evaluation, and how representative", _internal),
    _Item("5b", "Dates", "of the cases"),
    _Item("6a", "Setting", "kind and place of the centres", _counts),
    _Item("6b", "Eligibility", _PLACE),
    _Item("6c", "Treatments", "where they matter"),
    _Item("7", "Data preparation", "and whether it was alike in all groups"),
    _Item("8a", "Outcome", "definition and how it was assessed"),
    _Item("8b", "Outcome assessors", "qualifications"),
    _Item("8c", "Blinding", "of the assessors"),
    _Item("9a", "Predictors: choice", "why images, and which"),
    _Item("9b", "Predictors: definition", "acquisition and preparation"),
    _Item("9c", "Predictors: assessors", "where people judged them"),
    _Item("10", "Sample size", "how it was arrived at"),
    _Item("11", "Missing data", "how it was handled"),
    _Item("12a", "Use of the data", shown=_partitions),
    _Item("12b", "Handling of predictors", "in the analysis"),
    _Item("12c", "Type of model", "building steps and internal validation", _models),
    _Item("12d", "Heterogeneity across clusters", shown=_internal),
    _Item("12e", "Performance measures", shown=_metrics),
    _Item("12f", "Model updating", "recalibration, where it was done"),
    _Item("12g", "How predictions were calculated", "for evaluation", _software),
    _Item("13", "Class imbalance", shown=_imbalance),
    _Item("14", "Fairness", "measures taken, and why", _subgroups),
    _Item("15", "Output", "and the reason for thresholds", _output),
    _Item("16", "Training against evaluation", "differences of setting", _external),
    _Item("17", "Ethics", "approval and consent"),
    _Item("18a", "Funding", "sources and roles"),
    _Item("18b", "Conflicts of interest", "of all authors"),
    _Item("18c", "Protocol", "where it lies"),
    _Item("18d", "Registration", "or that there is none"),
    _Item("18e", "Data sharing", "what can be had"),
    _Item("18f", "Code sharing", "where the code of the analysis lies", _software),
    _Item("19", "Patients and public", "their part in the study"),
    _Item("20a", "Flow of participants", "into the study", _counts),
    _Item("20b", "Characteristics", "by setting and group", _subgroups),
    _Item("20c", "Comparison with the development data", "of important predictors"),
    _Item("21", "Numbers in each analysis", shown=_counts),
    _Item("22", "Full model", "that others can use", _models),
    _Item("23a", "Performance with intervals", shown=_performance),
    _Item("23b", "Heterogeneity", shown=_internal),
    _Item("24", "Updating: results", "where the model was updated"),
    _Item("25", "Interpretation", "overall, with fairness"),
    _Item("26", "Limitations", "of the study", _limits),
    _Item("27a", "Poor or missing input", "how it is to be handled in use"),
    _Item("27b", "Interaction with users", "and the expertise needed"),
    _Item("27c", "Next steps", "of research"),
)
