"""report.json: every figure of an evaluation, as checked documents with a published JSON schema.

Whatever is shown to people (page, terminal, model card) reads these documents and computes nothing.
A figure that the data cannot give, or that too few cases stand behind, is null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from merge_kit.schema import Document

CHANCE = 0.05
"""A difference whose adjusted p-value is not below this may be chance."""
Role = str
"""base, merged, pooled, federated, other or site:<site>."""


class Figure(Document):
    """A figure with its interval."""

    value: float | None
    """null where it is undefined or withheld."""
    low: float | None = None
    high: float | None = None
    """Bounds of the interval at the report's level; null where nothing can be resampled, and where
    no resample differs."""
    n: int | None = None
    """Cases behind it: of the class for a sensitivity, of the rest for a specificity, predicted
    ones for a predictive value, sites for a mean over sites, else all; null where withheld."""
    small: bool = False
    """Withheld, because fewer cases than the minimum stand behind it."""
    method: Literal["bootstrap", "delong", "wilson"] = "bootstrap"
    """wilson: of a share that is 0 or 1, in which no resample differs; a patient counts as one
    case."""


class ClassFigures(Document):
    """One class against the rest, on one scope."""

    name: str
    prevalence: float | None
    """Fraction of the scope's cases that are of the class: the AUPRC of chance."""
    figures: dict[str, Figure]
    """By name: auroc, auprc, sensitivity, specificity, ppv, npv, f1, brier, ece,
    log_loss, calibration_slope, calibration_intercept; where the thresholds are known
    sensitivity_at_<specificity> and specificity_at_<specificity>; where a prevalence is stated
    ppv_at_prevalence and npv_at_prevalence, with thresholds also ..._at_<specificity>."""


class ModelScope(Document):
    """One model on one scope."""

    scope: str
    """The key of a `Scope`."""
    figures: dict[str, Figure]
    """By name: balanced_accuracy, accuracy, macro_auroc, macro_auprc, macro_f1, kappa,
    quadratic_kappa (ordered classes), brier, ece, log_loss."""
    classes: tuple[ClassFigures, ...] = ()
    confusion: tuple[tuple[int | None, ...], ...] | None = None
    """Row: true class, column: predicted class; small counts are null; null for several labels."""


class Curve(Document):
    """A line with its band."""

    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] | None = None
    high: tuple[float | None, ...] | None = None


class ClassCurves(Document):
    """The curves of one class against the rest, on all cases."""

    name: str
    roc: Curve | None
    """x: 1 - specificity, y: sensitivity; null where withheld or undefined."""
    precision_recall: Curve | None
    """x: recall (sensitivity), y: precision (PPV)."""
    net_benefit: Curve | None
    """x: threshold probability, y: net benefit."""
    treat_all: Curve | None


class ReliabilityBin(Document):
    """Predictions of about the same confidence."""

    lower: float
    upper: float
    confidence: float | None
    """Mean of the predicted probabilities."""
    observed: float | None
    """Fraction that is right."""
    low: float | None
    high: float | None
    n: int | None


class Operating(Document):
    """A threshold on the probability of a class, fitted on validation cases."""

    name: str
    """The class."""
    specificity: float
    """What the threshold was to reach on the validation cases."""
    threshold: float | None


class Worst(Document):
    """Where a model is at its worst."""

    name: str
    """A site or a class."""
    value: float
    n: int


class ModelReport(Document):
    """Everything about one model."""

    name: str
    role: Role
    fingerprint: str | None = None
    """Of its weights; null for imported predictions."""
    temperature: float | None = None
    """What its outputs were divided by, if they were calibrated."""
    thresholds: tuple[Operating, ...] = ()
    scopes: tuple[ModelScope, ...]
    """In the order of the report's scopes; the last is ``mean_over_sites``, if there are sites."""
    worst_site: Worst | None
    """By balanced accuracy (several labels: macro AUROC)."""
    worst_class: Worst | None
    """By sensitivity on all cases (several labels: AUROC)."""
    curves: tuple[ClassCurves, ...] = ()
    reliability: tuple[ReliabilityBin, ...] = ()

    def on(self, scope: str) -> ModelScope:
        """Its figures on the scope with this key."""
        return next(found for found in self.scopes if found.scope == scope)


class Count(Document):
    """Cases of one class."""

    name: str
    n: int | None
    """null where withheld."""
    small: bool = False


class Scope(Document):
    """A set of cases that figures are computed on."""

    key: str
    """union, external, site:<site> or group:<column>=<value>; mean_over_sites has no cases."""
    kind: Literal["union", "external", "site", "group", "mean_over_sites"]
    name: str
    """For people: the site, or the value of the column."""
    column: str | None = None
    """Of a group."""
    external: bool = False
    """A site that no model was trained on."""
    cases: int | None
    """null where withheld."""
    patients: int | None
    """null where unknown or withheld."""
    small: bool = False
    classes: tuple[Count, ...] = ()


class Comparison(Document):
    """Two models on the same cases."""

    family: Literal["kinds", "best", "own", "reference", "auroc"]
    """What the p-values are adjusted among: the best merged model against the best of each other
    kind; the best model against the others; merged models against a site's own at its site; every
    model against the reference; AUROC class by class."""
    scope: str
    score: str
    label: str | None = None
    """The class, for figures of one class."""
    model: str
    against: str
    difference: Figure
    """Of `model` minus `against`."""
    p: float | None
    """Two-sided."""
    p_adjusted: float | None
    """By Holm's method, within the family."""
    test: Literal["paired bootstrap", "paired DeLong"]


class Gap(Document):
    """Between the groups of a column on which a model does best and worst."""

    column: str
    model: str
    score: str
    best: str
    worst: str
    difference: Figure
    unknown: int = 0
    """Cases left out, because the column says nothing of them."""


class SurveyRow(Document):
    """Single, cross, mix and what is between, as federated studies print them."""

    name: Literal["single", "cross", "mix", "federated", "merged"]
    model: str | None
    """null for means over the sites' models."""
    sites: tuple[str, ...]
    """Keys of the scopes that the means are over, the same for all rows."""
    balanced_accuracy: Figure
    macro_auroc: Figure
    """`n` counts what is averaged: sites; for cross, models at another's site."""


class Similarity(Document):
    """How the models' task vectors (weights minus the base's) lie to each other."""

    models: tuple[str, ...]
    cosine: tuple[tuple[float | None, ...], ...]
    groups: tuple[str, ...]
    """Parts of the network, from the input to the head; none whose theta_0 is 0, as a new head's
    is."""
    norms: tuple[tuple[float, ...], ...]
    """By model, then by group: |tau| / |theta_0| of the part."""


class ChecklistItem(Document):
    """An item of a reporting guideline."""

    guideline: Literal["CLAIM 2024", "TRIPOD+AI"]
    number: str
    topic: str
    status: Literal["shown", "partly", "human"]
    text: str
    """What this report shows, or what somebody must add."""


class Resampling(Document):
    """How the intervals were made."""

    unit: str
    """What is drawn: patient, group or case."""
    resamples: int
    level: float
    seed: int


class Report(Document):
    """The content of report.json."""

    format: Literal[3] = 3
    title: str
    created: str
    """UTC."""
    software: dict[str, str]
    inputs: str = ""
    """Digest of the models and images that the report is on."""
    task: Literal["single-label", "multi-label"]
    ordered: bool = False
    """Whether the classes are grades, so that quadratic kappa means something."""
    classes: tuple[str, ...]
    main_score: str
    """What models are ranked by."""
    minimum: int = Field(ge=1)
    """Figures of fewer cases are withheld."""
    resampling: Resampling
    bins: int
    """Of the expected calibration error, of equal width."""
    prevalences: dict[str, float] = Field(default_factory=dict)
    """Stated prevalence of a class, for predictive values."""
    validation_cases: int = 0
    """Cases that thresholds and temperatures were fitted on."""
    scopes: tuple[Scope, ...]
    models: tuple[ModelReport, ...]
    reference: str | None = None
    """The model that others are compared against, if one was named."""
    comparisons: tuple[Comparison, ...] = ()
    gaps: tuple[Gap, ...] = ()
    survey: tuple[SurveyRow, ...] = ()
    similarity: Similarity | None = None
    checklist: tuple[ChecklistItem, ...] = ()
    notes: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()

    def model(self, name: str) -> ModelReport:
        """The model with this name."""
        return next(found for found in self.models if found.name == name)

    def sites(self) -> tuple[Scope, ...]:
        """The scopes that are sites."""
        return tuple(scope for scope in self.scopes if scope.kind == "site")
