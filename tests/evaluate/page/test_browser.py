"""The page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from evaluate.page import render
from tests.evaluate.reports import MODELS, made_up

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next((path for path in found if path), None)
    if program is None:
        reason = "there is no Chromium on PATH"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    long = {"a-model-with-quite-a-long-name-of-its-own": "merged"}
    report = made_up(MODELS | long, external=("kiel",), columns={"sex": ("f", "m")})
    path.write_text(render(report), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Page]:
    """The opened page, which says nothing on the console and asks for nothing but itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert said == []
    assert asked == [file.as_uri()]


def test_figures_have_size_and_a_name(page: Page) -> None:
    plots = page.get_by_role("img").all()
    assert len(plots) > 20
    for plot in plots:
        box = plot.bounding_box()
        assert plot.get_attribute("aria-label")
        assert box is None or min(box["width"], box["height"]) > 30  # None: in a closed part


def test_a_heading_sorts_its_table_up_and_down(page: Page) -> None:
    head = page.locator("#models ~ .scroll th[aria-sort]").nth(1)
    column = page.locator("#models ~ .scroll").first.locator("tbody tr td:nth-child(2)")
    for order, best in (("descending", max), ("ascending", min)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        values = [float(cell.get_attribute("data-value") or "nan") for cell in column.all()]
        assert values == sorted(values, reverse=order == "descending")
        assert values[0] == best(values)


def test_a_heading_sorts_from_the_keyboard(page: Page) -> None:
    head = page.locator("#models ~ .scroll th[aria-sort]").first
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    outline = head.get_by_role("button").evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"


def test_one_button_opens_and_closes_all_parts(page: Page) -> None:
    parts = page.locator("details")
    button = page.get_by_role("button", name="Open all parts")
    button.click()
    assert parts.evaluate_all("all => all.every(part => part.open)")
    button.click()
    assert parts.evaluate_all("all => all.every(part => !part.open)")


def test_dark_mode_changes_paper_and_ink(page: Page) -> None:
    colours = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    page.emulate_media(color_scheme="light")
    light = page.evaluate(colours)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(colours) == ["rgb(20, 25, 27)", "rgb(227, 231, 232)"]
    assert light == ["rgb(255, 255, 255)", "rgb(27, 34, 37)"]


def test_print_is_light_without_navigation_and_fits_its_pages(page: Page) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 within its margins
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_role("navigation").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    document = page.pdf(prefer_css_page_size=True)
    assert document.startswith(b"%PDF")
    assert document.count(b"/Type /Page\n") > 3


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_only_tables_scroll_sideways(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 760})
    page.get_by_role("button", name="Open all parts").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_words_in_plots_stay_readable_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 760})
    heights = page.locator("figure svg text").evaluate_all(
        "all => all.filter(t => t.checkVisibility()).map(t => t.getScreenCTM().a * "
        "parseFloat(getComputedStyle(t).fontSize)).filter(size => size > 0)"
    )
    assert min(heights) >= 9


def test_the_page_can_be_read_without_scripts(browser: Browser, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.get_by_role("table").count() > 5
    assert not page.get_by_role("button", name="Open all parts").is_visible()
    context.close()
