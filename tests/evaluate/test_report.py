"""The HTML page: self-contained, escaped, and with the figures of the summary."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from evaluate.report import render
from evaluate.summary import Predictions, Summary, summarise
from evaluate.verdict import verdict

VOID = {"meta", "br", "circle", "rect", "path", "line"}


class Page(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += f" {data.strip()}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def summary_of(
    models: dict[str, str], *, sites: tuple[str, ...] = ("lyon", "oslo"), per_site: int = 20
) -> Summary:
    rng = np.random.default_rng(0)
    n = per_site * max(1, len(sites))
    labels = rng.integers(0, 3, n)
    predictions = []
    for number, name in enumerate(models):
        logits = rng.normal(size=(n, 3)) + number * np.eye(3)[labels]
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        at = tuple(sites[index // per_site] for index in range(n)) if sites else ("",) * n
        files = tuple(f"{index}.png" for index in range(n))
        classes = ("benign", "malignant", "other")
        predictions.append(Predictions(name, classes, files, labels, chances, (None,) * n, at))
    return summarise(predictions, roles=models, resamples=50)


MODELS = {"start": "base", "Lyon": "site:lyon", "TIES": "merged", "all": "pooled", "x": "other"}


def page(summary: Summary, **options: Any) -> str:
    return render(summary, **({"title": "Skin lesions", "created": "2031-05-06"} | options))


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summary_of(MODELS)


def test_the_page_asks_for_nothing_outside_itself(summary: Summary) -> None:
    html = page(summary)
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<img|<iframe", html)
    for tag, attributes in Page(html).elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), tag


def test_the_page_forbids_every_request(summary: Summary) -> None:
    (policy,) = (m for m in Page(page(summary)).all("meta") if m.get("http-equiv"))
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><b onclick="x', "{{ 7*7 }}"])
def test_names_and_notes_are_escaped(hostile: str) -> None:
    summary = summary_of({hostile: f"site:{hostile}"}, sites=(hostile, "~"))
    summary["classes"][0] = hostile
    harmless = Page(page(summary_of({"m": "site:a"}, sites=("a", "~")), notes=["n"]))
    html = page(summary, title=hostile, created=hostile, notes=[hostile])
    parsed = Page(html)
    tags = [tag for tag, _ in parsed.elements]
    assert tags == [tag for tag, _ in harmless.elements]
    assert not any("onclick" in attributes for _, attributes in parsed.elements)
    assert "".join(parsed.text["h1"]) == hostile


def test_each_model_stands_in_the_main_table_with_its_figures(summary: Summary) -> None:
    table = page(summary).split("<table")[1]
    for model in summary["models"]:
        row = next(part for part in table.split("<tr>") if f">{model['model']}<" in part)
        for figure in (
            model["union"]["balanced_accuracy"],
            model["union"]["macro_auroc"],
            model["mean_over_sites"]["balanced_accuracy"],
        ):
            assert f">{figure['value']:.3f}</span>" in row
            assert f">{figure['low']:.3f}–{figure['high']:.3f}</span>" in row
        assert f">{model['worst_site']['value']:.3f}</span>" in row
        assert f">{model['worst_site']['site']}</span>" in row


def test_site_class_and_confusion_figures_are_those_of_the_summary(summary: Summary) -> None:
    rows = [[cell.split() for cell in row] for row in Page(page(summary)).rows]
    for model_number, model in enumerate(summary["models"]):
        for site in model["sites"]:
            found = [row for row in rows if row[0][:1] == [site["site"]]]
            for score, row in zip(("balanced_accuracy", "macro_auroc"), found, strict=False):
                assert f"{site[score]['value']:.3f}" in row[model_number + 1]
        for row in model["classes"]:
            (cells,) = (r for r in rows if r[0][0] == row["class"] and "cases" in r[0])
            expected = [f"{row['sensitivity']:.3f}", f"{row['auroc']:.3f}"]
            assert cells[model_number + 1] == expected
        counts = [[[str(count)] for count in line] for line in model["confusion"]]
        start = rows.index([["benign"], *counts[0]])
        assert [row[1:] for row in rows[start : start + 3]] == counts


def test_the_verdict_comes_before_every_table(summary: Summary) -> None:
    html = page(summary)
    said = "".join(Page(html).text["li"])
    for sentence in verdict(summary):
        assert sentence in said
    assert html.index("Verdict") < html.index("<table")


def test_each_site_has_a_forest_plot_that_can_be_heard(summary: Summary) -> None:
    plots = [svg for svg in Page(page(summary)).all("svg") if svg.get("role") == "img"]
    assert len(plots) == 1 + len(summary["sites"])
    for plot, site in zip(plots[1:], summary["sites"], strict=True):
        label = plot["aria-label"] or ""
        assert label.startswith(f"Balanced accuracy, {site}: start 0.")
        assert all(name in label for name in MODELS)


def test_dots_and_intervals_lie_where_the_figures_say(summary: Summary) -> None:
    plot = page(summary).split('role="img"')[1]
    figure = summary["models"][2]["union"]["balanced_accuracy"]
    row = next(part for part in plot.split("<g ") if part.startswith('class="merged"'))
    (zero,) = re.findall(r'x="([\d.]+)"[^>]*>0<', plot)
    (one,) = re.findall(r'x="([\d.]+)"[^>]*>1<', plot)
    ((x1, x2),) = re.findall(r'x1="([\d.]+)" x2="([\d.]+)"', row)
    (cx,) = re.findall(r'cx="([\d.]+)"', row)
    shares = [(float(x) - float(zero)) / (float(one) - float(zero)) for x in (x1, cx, x2)]
    expected = [figure["low"], figure["value"], figure["high"]]
    assert shares == pytest.approx(expected, abs=1e-3)


def test_the_headings_of_the_main_table_are_buttons_that_sort(summary: Summary) -> None:
    parsed = Page(page(summary))
    assert len(parsed.all("button")) == 5
    assert [th["aria-sort"] for th in parsed.all("th") if "aria-sort" in th] == ["none"] * 5
    assert all(th.get("scope") in ("col", "row") for th in parsed.all("th"))


def test_a_merged_model_below_the_sites_own_is_marked(summary: Summary) -> None:
    loss = {"scope": "site:lyon", "model": "TIES", "against": "Lyon", "score": "balanced_accuracy"}
    difference = {"value": -0.1, "low": -0.2, "high": -0.05, "n": 20}
    for high, mark in ((-0.05, "▼ below the site's own model:"), (0.05, "▽ below the site's own")):
        entry = loss | {"difference": difference | {"high": high}}
        others = [e for e in summary["comparisons"] if not e["scope"].startswith("site:")]
        html = page({**summary, "comparisons": [*others, entry]})
        assert mark in " ".join(" ".join(row) for row in Page(html).rows)


def test_small_cells_are_grey_and_the_page_says_so() -> None:
    html = page(summary_of(MODELS, sites=("lyon", "oslo"), per_site=4))
    assert Page(html).all("tr")[len(MODELS) + 2].get("class") == "small"
    assert "Grey: fewer than 5 cases." in html


def test_one_model_without_sites_makes_a_page() -> None:
    summary = summary_of({"m": "other"}, sites=())
    parsed = Page(page(summary))
    assert "Balanced accuracy" in "".join(parsed.text["h2"])
    assert len(parsed.all("button")) == 3


def test_undefined_figures_are_a_dash() -> None:
    empty = Predictions("m", ("a", "b"), (), np.zeros(0, np.int64), np.zeros((0, 2)), (), ())
    html = page(summarise([empty], resamples=5))
    assert "None" not in html
    assert "nan" not in re.sub(r"<style.*</style>|<script.*</script>", "", html, flags=re.S)
    assert "–" in "".join(Page(html).text["span"])


def test_twelve_models_and_twenty_sites_are_printed_across() -> None:
    models = {f"model {index}": "merged" for index in range(12)}
    html = page(summary_of(models, sites=tuple(f"s{index:02}" for index in range(20))))
    parsed = Page(html)
    assert 'class="across"' in html
    assert len([svg for svg in parsed.all("svg") if svg.get("role") == "img"]) == 21


def test_notes_and_limits_close_the_page(summary: Summary) -> None:
    html = page(summary, notes=["Taken from the test split."])
    limits = html.index("What this page does not show")
    assert limits < html.index("Taken from the test split.")
    assert "percentile bootstrap intervals (50 resamples by case, seed 0)" in html
