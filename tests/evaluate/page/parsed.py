"""Reads a page as a browser would, and refuses one whose tags do not nest."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "img"}
Attributes = dict[str, str | None]


class Page(HTMLParser):
    """Elements with their attributes, the text of elements, and the tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Attributes]] = []
        self.text: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self._caption = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.text.setdefault(self._open[-1], []).append(data)
        if "caption" in self._open:
            self._caption += data
        if "td" in self._open or "th" in self._open:
            self.tables[self._caption][-1][-1] += f"{data.strip()} "

    def all(self, tag: str) -> list[Attributes]:
        return [attributes for name, attributes in self.elements if name == tag]

    def plots(self, start: str = "") -> list[str]:
        """What is said of each plot whose description starts so."""
        said = [svg.get("aria-label") or "" for svg in self.all("svg") if svg.get("role") == "img"]
        return [words for words in said if words.startswith(start)]

    def row(self, caption: str, name: str) -> list[str]:
        """The cells beside the heading that starts with `name`."""
        rows = self.tables[caption]
        return next(
            row[1:] for row in rows if row and row[0].split("  ")[0].strip().startswith(name)
        )
