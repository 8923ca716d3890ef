"""The report for people: one self-contained HTML page from the content of report.json."""

from __future__ import annotations

from evaluate.page.render import Mistake, render

__all__ = ["Mistake", "render"]
