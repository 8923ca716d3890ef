"""The page of reports of every shape and size."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import pytest

from evaluate.document import Report
from evaluate.page import render
from tests.evaluate.page.parsed import Page
from tests.evaluate.reports import made_up

LONG = "a very long name of a model that somebody chose on a Friday afternoon " * 3
SHAPES: dict[str, dict[str, object]] = {
    "usual": {},
    "one model, no site, two classes": {
        "models": {"m": "other"}, "sites": (), "classes": ("no", "yes"), "comparisons": (),
        "survey": (), "checklist": (), "verdict": (), "notes": (), "software": {},
    },
    "one site": {"sites": ("lyon",)},
    "thirty models, forty sites": {
        "models": {f"m{i}": "merged" if i % 2 else f"site:s{i}" for i in range(30)},
        "sites": tuple(f"s{i}" for i in range(40)), "classes": ("a", "b"),
    },
    "twenty-five classes": {"classes": tuple(f"class {i}" for i in range(25)), "per_cell": 6},
    "several labels": {"multi_label": True},
    "grades": {"ordered": True},
    "long names": {"models": {LONG: "base", LONG * 2: "site:lyon", "z" * 99: "merged"}},
    "right to left": {"models": {"שלום": "merged", "مستشفى": "site:شرق"}, "sites": ("شرق",)},
    "nothing defined": {
        "classes": ("a", "b"), "undefined": ("a", "b"),
        "small": ("union", "site:lyon", "site:oslo", "site:graz"),
    },
    "no figures at all": {"models": {}, "comparisons": (), "similarity": None},
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(render(made_up(**SHAPES[request.param])))  # type: ignore[arg-type]


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_every_image_and_every_part_that_scrolls_has_a_name(page: Page) -> None:
    for tag, attributes in page.elements:
        if attributes.get("role") == "img" or "tabindex" in attributes:
            assert attributes.get("aria-label"), tag
        if tag == "svg" and attributes.get("role") != "img":
            assert attributes.get("aria-hidden") == "true"


def test_tables_have_a_caption_and_their_headings_a_scope(page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))


def test_links_within_the_page_have_a_goal(page: Page) -> None:
    goals = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(goals) == len(set(goals))
    assert {link["href"] for link in page.all("a")} <= {f"#{goal}" for goal in goals}


def test_landmarks_are_there_once(page: Page) -> None:
    for tag in ("header", "nav", "main", "footer"):
        assert len(page.all(tag)) == 1


def test_every_heading_of_a_sorting_table_is_a_button(page: Page) -> None:
    sorted_by = [head for head in page.all("th") if "aria-sort" in head]
    assert all(head["aria-sort"] == "none" for head in sorted_by)
    assert len([b for b in page.all("button") if "id" not in b]) == len(sorted_by)


def test_nine_models_eight_classes_and_five_sites_take_less_than_two_megabytes() -> None:
    report = made_up(sites=tuple("abcde"), classes=tuple("01234567"), columns={"sex": ("f", "m")})
    assert len(render(report).encode()) < 2_000_000


def test_many_models_are_drawn_a_few_together() -> None:
    models = {f"m{i}": "merged" for i in range(9)} | {"home": "site:lyon", "all": "pooled"}
    plots = Page(render(made_up(models, reference="m3"))).plots("ROC curves, basophil")
    first = [part.split()[1] for part in plots[0].split(": ")[1].split("; ")]
    assert {"home", "all", "m3"} < set(first)
    drawn = [part.split()[1] for plot in plots for part in plot.split(": ")[1].split("; ")]
    assert sorted(drawn) == sorted(models)


def test_wide_tables_come_in_parts_that_fit_on_paper() -> None:
    report = made_up({f"m{i}": "other" for i in range(25)})
    parts = [name for name in Page(render(report)).tables if name.startswith("Accuracy by site")]
    ends = ["1–9 of 25", "10–18 of 25", "19–25 of 25"]
    assert parts == [f"Accuracy by site, {end}" for end in ends]


def test_a_merged_model_below_the_sites_own_is_marked() -> None:
    report = made_up({"lyon": "site:lyon", "mean": "merged"})
    for p, mark in ((0.01, "▼ below the site’s own model: "), (0.2, "▽ below the site’s own")):
        changed = _with_loss(report, p)
        assert mark in Page(render(changed)).row("Balanced accuracy by site", "lyon")[1]


def _with_loss(report: Report, p: float) -> Report:
    (own,) = (entry for entry in report.comparisons if entry.family == "own")
    difference = own.difference.model_copy(update={"value": -0.1})
    changed = own.model_copy(update={"difference": difference, "p_adjusted": p})
    return report.model_copy(update={"comparisons": (changed,)})


def test_words_stand_out_from_their_paper_in_light_and_dark() -> None:
    css = resources.files("evaluate").joinpath("templates/page/style.css").read_text("utf-8")
    themes = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", theme))
        for name in ("ink", "muted", "faint", "accent", "warn", "second", "third"):
            pair = sorted((_luminance(colours[name]), _luminance(colours["paper"])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, name


def _luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
