"""From a report to its page.

The page asks for nothing outside itself (no font, no image, no script from elsewhere), so that it
opens in a hospital without internet and can be archived as one file; its content security policy
forbids every request, and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, TypeAlias

import jinja2

from evaluate.document import ModelReport, Report
from evaluate.page import calibration, curves, forest, reading, tables, vectors, words
from evaluate.wording import number, percent
from merge_kit.errors import DataError

Mistake: TypeAlias = tuple[str, str]
"""An image as a data URI, and what to say about it."""

_IMAGE = "data:image/"
_FIRST_CLASSES = 8  # whose curves are open; the others' can be opened
_FIRST_PANELS = 9


def render(report: Report, mistakes: Sequence[Mistake] = (), of: str = "") -> str:
    """Return the report as one self-contained HTML page.

    Args:
        report: the content of report.json; the page shows its figures and computes none.
        mistakes: images that a model was most wrong about. They are patient data, and the page
            says so; without them it holds none.
        of: the name of that model.

    Raises:
        DataError: an image that is not a ``data:image/`` URI, which the page could not show.
    """
    for place, (image, _) in enumerate(mistakes, start=1):
        if not image.startswith(_IMAGE):
            raise DataError(f"Image {place} of the mistakes must be a {_IMAGE} URI.")
    loader = jinja2.PackageLoader("evaluate", "templates/page")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=loader,
    )
    environment.filters.update(plural=words.plural, percent=percent, number=number)
    script = _source("page.js")
    content = {
        "report": report,
        "mistakes": mistakes,
        "mistaken": of,
        "style": _source("style.css") + _source("plots.css") + _source("print.css"),
        "script": script,
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "words": words,
        "tables": tables,
        **_plots(report),
        **_parts(report),
    }
    return environment.get_template("page.html.j2").render(content)


def _source(name: str) -> str:
    """Read what stands in the page as it is: the line ends are those that are hashed."""
    text = resources.files("evaluate").joinpath(f"templates/page/{name}").read_text("utf-8")
    return text.replace("\r\n", "\n")


def _plots(report: Report) -> dict[str, Any]:
    chosen = reading.chosen(report)
    rest = [model for model in report.models if model not in chosen]
    size = reading.MOST_CURVES
    groups = [rest[start : start + size] for start in range(0, len(rest), size)]
    found = report.similarity
    return {
        "chosen": chosen,
        "rest": rest,
        "score_panels": _split(forest.score_panels(report), _FIRST_PANELS),
        "difference_panels": _split(forest.difference_panels(report), _FIRST_PANELS),
        "curves": [
            (heading, _curves(report, draw, chosen, groups))
            for heading, draw in (
                ("ROC curves", curves.roc_panels),
                ("Precision and recall", curves.precision_recall_panels),
            )
        ],
        "benefit": _curves(report, curves.net_benefit_panels, chosen, groups),
        "reliability": [calibration.reliability_panel(m) for m in chosen if m.reliability],
        "reliability_rest": [calibration.reliability_panel(m) for m in rest if m.reliability],
        "norms": vectors.norms_plot(found) if found and found.groups else None,
        "calibration": calibration,
        "vectors": vectors,
    }


def _curves(
    report: Report,
    draw: Any,
    chosen: Sequence[ModelReport],
    groups: Sequence[Sequence[ModelReport]],
) -> dict[str, Any]:
    """Draw the chosen models together, then the others in groups of as many."""
    first, more = _split(draw(report, chosen), _FIRST_CLASSES)
    others = [(", ".join(model.name for model in group), draw(report, group)) for group in groups]
    return {"first": first, "more": more, "others": others}


def _split(panels: Sequence[Any], at: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return panels[:at], panels[at:]


def _parts(report: Report) -> dict[str, Any]:
    """Find what the report has, which decides what sections the page has."""
    union = reading.scope(report, "union")
    columns = {scope.column: None for scope in reading.scopes(report, "group") if scope.column}
    columns |= {gap.column: None for gap in report.gaps}
    sites = reading.scopes(report, "site")
    return {
        "union": union,
        "sites": sites,
        "external": any(scope.external for scope in sites),
        "groups": {
            column: [s for s in reading.scopes(report, "group") if s.column == column]
            for column in columns
        },
        "families": {
            name: caption
            for name, caption in words.FAMILIES.items()
            if reading.family(report, name)
        },
        "kinds": _kinds(report, bool(sites)),
        "scores": words.in_order(
            list(
                dict.fromkeys(
                    key for m in report.models for scope in m.scopes for key in scope.figures
                )
            )
        ),
        "matrices": [
            (model, scope.confusion)
            for model in report.models
            if (scope := reading.model_scope(model, "union")) and scope.confusion is not None
        ],
        "guidelines": {
            name: [item for item in report.checklist if item.guideline == name]
            for name in dict.fromkeys(item.guideline for item in report.checklist)
        },
        "calibrated": reading.calibrated(report),
        "methods": reading.methods(report),
        "bands": reading.banded(report, lambda curves: curves.roc),
        "benefit_bands": reading.banded(report, lambda curves: curves.net_benefit),
        "level": percent(report.resampling.level),
        "main": words.score_name(report.main_score),
    }


def _kinds(report: Report, sites: bool) -> list[str]:
    found = {words.kind(model.role) for model in report.models}
    own = {"own"} if "site" in found and sites else set()
    order = ("merged", "own", "site", "pooled", "federated", "base", "other")
    return [kind for kind in order if kind in found | own]
