"""The main figures of a report, for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from evaluate.document import Figure, Report
from evaluate.scopes import MEAN
from evaluate.verdict import SCORE_NAMES, main
from evaluate.wording import percent


def table(report: Report) -> Table:
    """One row a model: the main score on all cases, over sites, at the worst site; AUROC, ECE.

    Narrow, so that 80 columns hold it: what belongs to a figure stands below it. Where it does not
    fit, text is folded and never cut.
    """
    level = percent(report.resampling.level)
    title = f"{SCORE_NAMES[report.main_score]} ({level} interval below)"
    shown = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0, leading=1
    )
    external = any(scope.kind == "external" for scope in report.scopes)
    columns = ["union", "mean of\nsites", "worst\nsite", *["external"] * external, "AUROC", "ECE"]
    shown.add_column("model", overflow="fold")
    for column in columns:
        shown.add_column(column, justify="right", overflow="fold")
    for model in report.models:
        worst, union = model.worst_site, model.on("union").figures
        cells = [
            _interval(main(report, model, "union")),
            _figure(main(report, model, MEAN)),
            f"{worst.value:.3f}\n{worst.name}" if worst else "-",
        ]
        if external:
            cells.append(_interval(main(report, model, "external")))
        cells += [_figure(union["macro_auroc"]), _figure(union["ece"])]
        shown.add_row(model.name, *cells)
    return shown


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return _figure(figure)
    return f"{_figure(figure)}\n{figure.low:.2f}-{figure.high:.2f}"


def _figure(figure: Figure) -> str:
    if figure.small:
        return "withheld"
    return "-" if figure.value is None else f"{figure.value:.3f}"
