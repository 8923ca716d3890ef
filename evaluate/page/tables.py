"""The tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evaluate.document import Count, ModelReport, Report, Scope
from evaluate.page import reading
from evaluate.page.cells import (
    Cell,
    Head,
    Row,
    Table,
    cell,
    counted,
    difference,
    named,
    p_cell,
    plain,
)
from evaluate.page.words import SURVEY, in_order, plural, role_name, score_name
from evaluate.wording import number

# A name that runs right to left keeps what stands beside it in place.
_FIRST_STRONG, _POP = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"


def _model_head(model: ModelReport) -> Head:
    return Head(model.name, role_name(model.role, model.name))


def _column(models: Sequence[ModelReport], key: str, score: str) -> list[Cell]:
    figures = [reading.figure(model, key, score) for model in models]
    top = reading.best(figures, score)
    return [cell(figure, best=top) for figure in figures]


def _rows_of(models: Sequence[ModelReport], columns: Sequence[Sequence[Cell]]) -> tuple[Row, ...]:
    return tuple(
        Row(_model_head(model), tuple(column[index] for column in columns))
        for index, model in enumerate(models)
    )


def models_table(report: Report) -> Table:
    """One row a model: what decides between them."""
    models, main = report.models, report.main_score
    name = score_name(main)
    union = reading.scope(report, "union")
    heads = [Head("Model", words=True), Head(name, _with_n("all cases", union))]
    columns = [_column(models, "union", main)]
    if main != "macro_auroc":
        heads.append(Head("AUROC", "mean over classes"))
        columns.append(_column(models, "union", "macro_auroc"))
    if sites := reading.scopes(report, "site"):
        heads += [Head(name, f"mean over {plural(len(sites), 'site')}"), Head(name, "worst site")]
        columns += [_column(models, reading.MEAN, main), _worst_sites(models)]
    if external := reading.scope(report, "external"):
        heads.append(Head(name, _with_n("external sites", external)))
        columns.append(_column(models, "external", main))
    heads += [Head("ECE", "lower is better"), Head("Brier score", "lower is better")]
    columns += [_column(models, "union", "ece"), _column(models, "union", "brier")]
    return Table("Models", tuple(heads), _rows_of(models, columns), sortable=True)


def _with_n(text: str, scope: Scope | None) -> str:
    cases = scope.cases if scope else None
    return text if cases is None else f"{text}, n\N{NO-BREAK SPACE}{cases:,}"


def _worst_sites(models: Sequence[ModelReport]) -> list[Cell]:
    top = max((model.worst_site.value for model in models if model.worst_site), default=None)
    return [
        Cell(
            number(worst.value),
            f"{_FIRST_STRONG}{worst.name}{_POP} · n {worst.n:,}",
            worst.value,
            best=len(models) > 1 and worst.value == top,
            name=True,
        )
        if (worst := model.worst_site)
        else Cell("", state="undefined")
        for model in models
    ]


def all_scores_table(report: Report) -> Table:
    """Every figure of every model on all cases."""
    keys = in_order(
        list(
            dict.fromkeys(
                key
                for model in report.models
                if (on := reading.model_scope(model, "union"))
                for key in on.figures
            )
        )
    )
    columns = [_column(report.models, "union", key) for key in keys]
    heads = (Head("Model", words=True), *(Head(score_name(key)) for key in keys))
    return Table("All scores on all cases", heads, _rows_of(report.models, columns), sortable=True)


def survey_table(report: Report) -> Table:
    """Single, cross, mix, federated and merged, as federated studies print them."""
    heads = (
        Head("Setting", words=True),
        Head("Model", words=True),
        Head("Balanced accuracy"),
        Head("AUROC", "mean over classes"),
    )
    rows = tuple(
        Row(
            Head(*SURVEY[row.name]),
            (
                named(row.model if row.model is not None else "mean over the sites’ models"),
                cell(row.balanced_accuracy),
                cell(row.macro_auroc),
            ),
        )
        for row in report.survey
    )
    names = {scope.key: scope.name for scope in report.scopes}
    sites = [names.get(key, key) for key in report.survey[0].sites] if report.survey else []
    over = f", mean over {', '.join(sites)}" if sites else ""
    return Table(f"Settings{over}", heads, rows)


def scopes_table(report: Report, found: Sequence[Scope], score: str, first: str) -> Table:
    """One row a scope and one column a model; sites have a foot."""
    losses = reading.losses(report) if score == report.main_score else {}
    rows = []
    for scope in found:
        figures = [reading.figure(model, scope.key, score) for model in report.models]
        top = reading.best(figures, score)
        cells = tuple(
            replace(
                cell(figure, best=top),
                own=model.role == scope.key,
                loss=losses.get((scope.key, model.name), ""),
            )
            for figure, model in zip(figures, report.models, strict=True)
        )
        rows.append(Row(_scope_head(scope), cells))
    foot = _site_foot(report, found, score) if found and found[0].kind == "site" else ()
    heads = (Head(first), *(Head(model.name) for model in report.models))
    return Table(f"{score_name(score)} by {first.lower()}", heads, tuple(rows), foot)


def _site_foot(report: Report, found: Sequence[Scope], score: str) -> tuple[Row, ...]:
    external = reading.scope(report, "external")
    rows = [(_scope_head(external), "external")] if external else []
    if len(found) > 1:
        rows.append((Head("Mean over sites", plural(len(found), "site")), reading.MEAN))
    return tuple(Row(head, tuple(_column(report.models, key, score))) for head, key in rows)


def _scope_head(scope: Scope) -> Head:
    cases = "" if scope.cases is None else plural(scope.cases, "case")
    about = " · ".join(part for part in (cases, "external" if scope.external else "") if part)
    return Head(scope.name, about, small=scope.small)


def gaps_table(report: Report, column: str) -> Table:
    """Between the groups on which each model does best and worst."""
    heads = (
        Head("Model", words=True),
        Head("Score", words=True),
        Head("Best group", words=True),
        Head("Worst group", words=True),
        Head("Gap"),
        Head("Left out", "cases without a value"),
    )
    names = {scope.key: scope.name for scope in report.scopes}
    rows = tuple(
        Row(
            Head(gap.model),
            (
                named(score_name(gap.score)),
                named(names.get(gap.best, gap.best)),
                named(names.get(gap.worst, gap.worst)),
                difference(gap.difference),
                Cell(f"{gap.unknown:,}", value=float(gap.unknown)),
            ),
        )
        for gap in report.gaps
        if gap.column == column
    )
    return Table(f"Gaps by {column}", heads, rows, beside=True)


def comparisons_table(report: Report, family: str, caption: str) -> Table:
    """Paired differences with their tests."""
    entries = reading.family(report, family)
    names = {scope.key: scope.name for scope in report.scopes} | {reading.MEAN: "mean over sites"}
    labelled = any(entry.label is not None for entry in entries)
    heads = (
        Head("Model", words=True),
        Head("Against", words=True),
        Head("On", words=True),
        *((Head("Class", words=True),) if labelled else ()),
        Head("Score", words=True),
        Head("Difference"),
        Head("p"),
        Head("p adjusted", "Holm"),
        Head("Test", words=True),
    )
    rows = tuple(
        Row(
            Head(entry.model),
            (
                named(entry.against),
                named(names.get(entry.scope, entry.scope)),
                *((named(entry.label or "all"),) if labelled else ()),
                named(score_name(entry.score)),
                difference(entry.difference),
                p_cell(entry.p),
                p_cell(entry.p_adjusted),
                Cell(entry.test, name=True),
            ),
        )
        for entry in entries
    )
    return Table(caption, heads, rows, sortable=True, beside=True)


def classes_table(report: Report, model: ModelReport) -> Table:
    """One row a figure and one column a class: all that a model makes of it on all cases.

    What is undefined for every class is left out.
    """
    on = reading.model_scope(model, "union")
    classes = on.classes if on else ()
    keys = in_order(list(dict.fromkeys(key for found in classes for key in found.figures)))
    counts = _counts_of(reading.scope(report, "union"))
    rows = [
        Row(Head("Cases"), tuple(_of_class(counts.get(own.name)) for own in classes)),
        Row(Head("Prevalence", "AUPRC of chance"), tuple(plain(c.prevalence) for c in classes)),
    ]
    found = [
        Row(Head(score_name(key)), tuple(cell(c.figures.get(key), with_n=True) for c in classes))
        for key in keys
    ]
    thresholds = {(entry.name, entry.specificity): entry.threshold for entry in model.thresholds}
    found += [
        Row(
            Head(f"Threshold for specificity {fixed:g}", "from validation cases"),
            tuple(plain(thresholds.get((own.name, fixed))) for own in classes),
        )
        for fixed in dict.fromkeys(entry.specificity for entry in model.thresholds)
    ]
    rows += [row for row in found if any(c.state != "undefined" for c in row.cells)]
    heads = [Head(own.name, _stated(report, own.name)) for own in classes]
    return Table(f"Figures by class of {model.name}", (Head("Figure"), *heads), tuple(rows))


def _stated(report: Report, name: str) -> str:
    stated = report.prevalences.get(name)
    return "" if stated is None else f"stated prevalence {stated:g}"


def classes_by_site_table(report: Report, model: ModelReport) -> Table:
    """One row a site and one column a class: how a model finds each class at each site."""
    score = "auroc" if report.task == "multi-label" else "sensitivity"
    rows = []
    for scope in reading.scopes(report, "site"):
        found = [reading.class_figures(model, scope.key, name) for name in report.classes]
        cells = tuple(
            cell(row.figures.get(score), with_n=True)
            if row
            else Cell("", state="withheld" if scope.small else "undefined")
            for row in found
        )
        rows.append(Row(_scope_head(scope), cells))
    heads = (Head("Site"), *(Head(name) for name in report.classes))
    return Table(f"{score_name(score)} of {model.name} by site", heads, tuple(rows))


def class_by_model_table(report: Report, score: str) -> Table:
    """One row a class and one column a model."""
    counts = _counts_of(reading.scope(report, "union"))
    rows = []
    for name in report.classes:
        found = [reading.class_figures(model, "union", name) for model in report.models]
        figures = [row.figures.get(score) if row else None for row in found]
        top = reading.best(figures, score)
        count = counts.get(name)
        about = plural(count.n, "case") if count and count.n is not None else ""
        cells = tuple(cell(figure, best=top) for figure in figures)
        rows.append(Row(Head(name, about, small=bool(count and count.small)), cells))
    heads = (Head("Class"), *(Head(model.name) for model in report.models))
    return Table(f"{score_name(score)} by class", heads, tuple(rows))


def calibration_table(report: Report) -> Table:
    """How far each model's probabilities are from the truth."""
    keys = ("ece", "brier", "log_loss")
    columns = [_column(report.models, "union", key) for key in keys]
    heads = [Head("Model", words=True), *(Head(score_name(key), "lower is better") for key in keys)]
    if reading.calibrated(report):
        columns.append([plain(model.temperature) for model in report.models])
        heads.append(Head("Temperature", "its outputs were divided by"))
    return Table("Calibration", tuple(heads), _rows_of(report.models, columns), sortable=True)


def cases_table(report: Report) -> Table:
    """Cases by scope and class."""
    heads = (
        Head("Cases of"),
        *(Head(name) for name in report.classes),
        Head("All"),
        Head("Patients"),
    )
    sites, groups = reading.scopes(report, "site"), reading.scopes(report, "group")
    rows = [_counts(report, scope) for scope in [*sites, *groups]]
    totals = [*reading.scopes(report, "external"), *reading.scopes(report, "union")]
    foot = [_counts(report, scope) for scope in totals]
    return Table("Cases by class", heads, tuple(rows), tuple(foot))


def _counts_of(scope: Scope | None) -> dict[str, Count]:
    return {count.name: count for count in scope.classes} if scope else {}


def _of_class(count: Count | None) -> Cell:
    return Cell("", state="undefined") if count is None else counted(count.n, count.small)


def _counts(report: Report, scope: Scope) -> Row:
    counts = _counts_of(scope)
    cells = [
        counted(found.n, found.small)
        if (found := counts.get(name))
        else Cell("", state="undefined")
        for name in report.classes
    ]
    cells += [counted(scope.cases, scope.small), counted(scope.patients, scope.small)]
    about = "external" if scope.external else ""
    text = f"{scope.column}: {scope.name}" if scope.kind == "group" else scope.name
    return Row(Head(text, about, small=scope.small), tuple(cells))


def weights_table(report: Report) -> Table:
    """Which weights the figures are of."""
    heads = (Head("Model", words=True), Head("Role", words=True), Head("Fingerprint", words=True))
    rows = tuple(
        Row(
            Head(model.name),
            (
                named(role_name(model.role, "") or "other"),
                named(model.fingerprint or "none: imported predictions"),
            ),
        )
        for model in report.models
    )
    return Table("Weights", heads, rows)


def thresholds_table(report: Report) -> Table:
    """Thresholds fitted on validation cases."""
    heads = (
        Head("Model", words=True),
        Head("Class", words=True),
        Head("Specificity", "to reach on validation"),
        Head("Threshold"),
    )
    rows = tuple(
        Row(
            Head(model.name),
            (named(entry.name), Cell(f"{entry.specificity:g}"), plain(entry.threshold)),
        )
        for model in report.models
        for entry in model.thresholds
    )
    return Table("Thresholds", heads, rows)


def norms_table(report: Report) -> Table:
    """Norm of each task vector by depth."""
    found = report.similarity
    if found is None:
        return Table("Norm by depth", (), ())
    heads = (Head("Model"), *(Head(group) for group in found.groups))
    rows = tuple(
        Row(Head(name), tuple(plain(value) for value in values))
        for name, values in zip(found.models, found.norms, strict=True)
    )
    return Table("Norm by depth", heads, rows)
