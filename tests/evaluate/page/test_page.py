"""The page: self-contained, escaped, accessible, and with the figures of the report."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from evaluate.document import Figure, Report
from evaluate.page import reading, render, tables
from evaluate.page.cells import cell
from evaluate.page.words import p_value, signed
from evaluate.wording import number
from merge_kit.errors import DataError
from tests.evaluate.judged import cases, predictions
from tests.evaluate.judged import report as report_of
from tests.evaluate.page.parsed import Page
from tests.evaluate.reports import CLASSES, MODELS, SITES, made_up

PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up(
        external=("kiel",),
        columns={"sex": ("female", "male"), "age": ("0-40", "41-")},
        small=("group:age=0-40",),
        undefined=("monocyte",),
        reference="lyon",
    )


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_asks_for_nothing_outside_itself(html: str, page: Page) -> None:
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<img|<iframe", html)
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), tag


def test_the_page_forbids_every_request_and_every_script_but_its_own(html: str, page: Page) -> None:
    (policy,) = (meta for meta in page.all("meta") if meta.get("http-equiv"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><b onclick="x', "{{ 7*7 }}", "'><i x='"]
)
def test_names_titles_and_notes_are_escaped(hostile: str) -> None:
    def made(text: str) -> Report:
        return made_up(
            {text: f"site:{text}", "m": "merged", "n": f"site:{text}2"},
            sites=(text, "~"),
            classes=(text, "other"),
            columns={text: (text, "b")},
            reference=text,
            title=text,
            created=text,
            notes=(text,),
            verdict=(text,),
            software={text: text},
        )

    harmless, parsed = Page(render(made("a"))), Page(render(made(hostile)))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in harmless.elements]
    assert not any("onclick" in attributes for _, attributes in parsed.elements)
    assert "".join(parsed.text["h1"]) == hostile


def test_each_model_stands_in_the_first_table_with_its_figures(report: Report, page: Page) -> None:
    for model in report.models:
        scopes = {scope.scope: scope.figures for scope in model.scopes}
        cells = page.row("Models", model.name)
        expected = [
            scopes["union"]["balanced_accuracy"],
            scopes["union"]["macro_auroc"],
            scopes["mean_over_sites"]["balanced_accuracy"],
            scopes["external"]["balanced_accuracy"],
            scopes["union"]["ece"],
            scopes["union"]["brier"],
        ]
        assert [cells[i].split()[:2] for i in (0, 1, 2, 4, 5, 6)] == [written(f) for f in expected]
        assert model.worst_site is not None
        assert model.worst_site.name in cells[3]
        assert number(model.worst_site.value) in cells[3]


def written(figure: Figure) -> list[str]:
    assert figure.value is not None
    assert figure.low is not None
    assert figure.high is not None
    return [number(figure.value), f"{number(figure.low)}–{number(figure.high)}"]


def test_every_figure_of_a_scope_is_on_the_page(report: Report, page: Page) -> None:
    shown = {
        word for rows in page.tables.values() for row in rows for c in row for word in c.split()
    }
    figures = [
        figure
        for model in report.models
        for scope in model.scopes
        for figure in [
            *scope.figures.values(),
            *(f for c in scope.classes if scope.scope == "union" for f in c.figures.values()),
        ]
        if figure.value is not None
    ]
    assert len(figures) > 500
    assert {number(figure.value) for figure in figures if figure.value is not None} <= shown


def test_comparisons_have_their_difference_and_both_p_values(report: Report, page: Page) -> None:
    rows = [row for name, rows in page.tables.items() for row in rows if "paired" in " ".join(row)]
    assert len(rows) == len(report.comparisons)
    for entry, row in zip(report.comparisons, rows, strict=True):
        words = [cell.strip() for cell in row]
        assert entry.difference.value is not None
        assert words[:2] == [entry.model, entry.against]
        assert words[-4].startswith(signed(entry.difference.value))
        assert words[-3:-1] == [p_value(entry.p), p_value(entry.p_adjusted)]


def test_differences_have_a_plot_for_each_merged_model(report: Report, page: Page) -> None:
    plots = page.plots("Balanced accuracy of ")
    assert [plot.split(" minus ")[0].rpartition(" ")[2] for plot in plots] == ["mean", "TIES"]
    own = [entry for entry in report.comparisons if entry.family == "own"]
    for entry in own:
        plot = next(
            plot for plot in plots if plot.startswith(f"Balanced accuracy of {entry.model} ")
        )
        assert f"{entry.scope[5:]}, against {entry.against}: " in plot
        assert f"p adjusted {p_value(entry.p_adjusted)}" in plot


def test_each_site_has_a_forest_plot_that_can_be_heard(page: Page) -> None:
    for site in ("All cases", "External sites", *SITES, "kiel"):
        (said,) = page.plots(f"Balanced accuracy, {site}: ")
        assert all(f"{name} 0." in said for name in MODELS)


def test_each_class_has_its_curves_with_their_areas(report: Report, page: Page) -> None:
    for name in CLASSES:
        drawn = {
            "ROC curves": "auroc", "Precision and recall": "auprc", "Net benefit": None
        }.items()  # fmt: skip
        for what, score in drawn:
            plots = page.plots(f"{what}, {name}")
            assert len(plots) == 3  # four models, four more, and the ninth
            figures = report.models[4].scopes[0].classes[CLASSES.index(name)].figures
            if score and figures[score].value is not None:
                assert f"mean {number(figures[score].value or 0)}" in plots[0]


def test_reliability_has_the_counts_of_its_bins(report: Report, page: Page) -> None:
    plots = page.plots("Reliability of ")
    assert len(plots) == len(report.models)
    for model in report.models:
        (said,) = (plot for plot in plots if plot.startswith(f"Reliability of {model.name},"))
        for row in model.reliability:
            assert f"n {row.n} right" in said if row.n is not None else "withheld" in said


def test_confusion_matrices_hide_small_counts(report: Report, page: Page) -> None:
    for model in report.models:
        confusion = model.scopes[0].confusion
        assert confusion is not None
        rows = [[cell.strip() for cell in row[1:]] for row in page.tables[model.name][1:]]
        assert rows == [["<5" if n is None else str(n) for n in line] for line in confusion]


def test_survey_similarity_checklist_and_software_are_shown(report: Report, page: Page) -> None:
    rows = page.tables["Settings, mean over lyon, oslo, graz"][1:]
    assert [row[0].split()[0] for row in rows] == [
        "Single", "Cross", "Mix", "Federated", "Merged", "Merged"
    ]  # fmt: skip
    similarity = report.similarity
    assert similarity is not None
    cosines = [
        [cell.strip() for cell in row[1:]] for row in page.tables["Cosine between vectors"][1:]
    ]
    assert cosines == [
        [f"{value:.2f}".replace("-", "−") for value in line if value is not None]
        for line in similarity.cosine
    ]
    assert page.row("CLAIM 2024", "33")[1].split() == ["○", "to", "be", "added"]
    assert "merge-kit 0.1.0" in "".join(page.text["dd"])


def test_the_verdict_comes_before_every_table(report: Report, html: str, page: Page) -> None:
    assert [text for text in page.text["li"] if text in report.verdict] == list(report.verdict)
    assert html.index(">Verdict<") < html.index("<table")


def test_withheld_figures_say_so_and_undefined_ones_are_a_dash(page: Page) -> None:
    assert {cell.strip() for cell in page.row("Balanced accuracy by age", "0-40")} == {"withheld"}
    assert {cell.strip() for cell in page.row("AUROC by class", "monocyte")} == {"– undefined"}
    assert "n < 5, so few cases" in "".join(page.text["p"])


def test_no_missing_value_is_written_as_python_does(html: str) -> None:
    text = re.sub(r"<style.*</style>|<script.*</script>", "", html, flags=re.S)
    assert not re.search(r"\b(None|nan|inf|True|False)\b", text)


def test_images_of_mistakes_are_absent_unless_given(report: Report, html: str) -> None:
    assert "patient data" not in html.lower()
    shown = render(report, [(PIXEL, "basophil taken for monocyte")])
    (image,) = Page(shown).all("img")
    assert image == {"src": PIXEL, "alt": "Case: basophil taken for monocyte"}
    assert "This page holds patient data" in shown
    assert "img-src data:;" in shown
    assert "img-src" not in html


@pytest.mark.parametrize("image", ["https://example.org/a.png", "javascript:alert(1)", "a.png"])
def test_an_image_that_lies_elsewhere_is_refused(report: Report, image: str) -> None:
    with pytest.raises(DataError, match=r"^Image 2 of the mistakes must be a data:image/ URI\.$"):
        render(report, [(PIXEL, "a"), (image, "b")])


def test_gaps_name_their_groups_and_not_the_keys_of_these() -> None:
    labelled = replace(cases(), columns={"sex": ("f", "m") * 60})
    html = render(report_of(labelled, predictions(labelled)), [])
    assert "Gaps by sex" in html
    assert "group:sex" not in html


def test_temperatures_are_spoken_of_only_where_there_are_some(report: Report, html: str) -> None:
    assert "Temperatures were fitted" in html
    models = tuple(m.model_copy(update={"temperature": None}) for m in report.models)
    without = render(report.model_copy(update={"models": models}))
    assert "emperature" not in without


def test_figures_that_no_class_has_are_left_out() -> None:
    report = made_up()
    model = report.models[0]
    union = model.on("union")
    bare = tuple(
        row.model_copy(update={"figures": row.figures | {"ppv_at_prevalence": Figure(value=None)}})
        for row in union.classes
    )
    scopes = (union.model_copy(update={"classes": bare}), *model.scopes[1:])
    changed = model.model_copy(update={"scopes": scopes})
    heads = [row.head.text for row in tables.classes_table(report, changed).rows]
    assert "PPV at stated prevalence" not in heads
    assert "NPV at stated prevalence" in heads


def test_bands_are_spoken_of_only_where_there_are_some(report: Report, html: str) -> None:
    assert html.count("The shade around a line is its 95 % band") == 2
    first, *others = report.models
    bare = [m.model_copy(update={"curves": ()}) for m in report.models]
    none = {"low": None, "high": None}
    kinds = ("roc", "precision_recall", "net_benefit")
    changed = first.model_copy(
        update={
            "curves": tuple(
                c.model_copy(
                    update={
                        k: found.model_copy(update=none) for k in kinds if (found := getattr(c, k))
                    }
                )
                for c in first.curves
            )
        }
    )
    some = render(report.model_copy(update={"models": (changed, *others)}))
    assert some.count("point by point, of") == 2
    legend = some.split("point by point, of")[1].split("other lines have none")[0]
    assert f"<bdi>{others[0].name}</bdi>" in legend
    assert f"<bdi>{first.name}</bdi>" not in legend
    assert "point by point" not in render(report.model_copy(update={"models": tuple(bare)}))


def test_the_origin_of_an_interval_is_marked_and_explained() -> None:
    figure = Figure(value=1.0, low=0.7, high=1.0, n=9, method="wilson")
    assert cell(figure).sub.endswith(" W")
    report = made_up()
    assert "Wilson’s interval of a share" not in render(report)
    model = report.models[0]
    union = model.on("union")
    changed = union.model_copy(update={"figures": union.figures | {"accuracy": figure}})
    models = (model.model_copy(update={"scopes": (changed, *model.scopes[1:])}), *report.models[1:])
    assert "Wilson’s interval of a share" in render(report.model_copy(update={"models": models}))


def test_each_class_has_its_figure_at_each_site(report: Report, page: Page) -> None:
    best = reading.chosen(report)[0]
    rows = page.tables[f"Sensitivity of {best.name} by site"]
    assert [row[0].split()[0] for row in rows[1:]] == [s.name for s in report.sites()]
    found = next(c for c in best.on("site:oslo").classes if c.name == "lymphocyte")
    assert f"{found.figures['sensitivity'].value:.3f}" in rows[2][3]
