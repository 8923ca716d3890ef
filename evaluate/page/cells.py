"""Tables as plain cells, so that one macro prints all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evaluate.document import Figure
from evaluate.page.words import p_value, signed, span
from evaluate.wording import number

MOST_COLUMNS = 10
"""Figures beside each other that A4 paper has room for."""
_LETTERS = {"delong": "D", "wilson": "W"}
"""Behind intervals that are not the bootstrap's; the page's legend explains them."""


@dataclass(frozen=True, slots=True)
class Head:
    """The heading of a column or a row; `words` if its column sorts by words."""

    text: str
    sub: str = ""
    words: bool = False
    small: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: what stands in it, below it, and what it is sorted by.

    Attributes:
        state: "withheld", "undefined" or "" for a figure that is there.
        loss: "clear" or "slight" below the site's own model, or "".
        name: whether the text is a name, which may run right to left.
    """

    text: str
    sub: str = ""
    value: float | None = None
    state: str = ""
    best: bool = False
    own: bool = False
    loss: str = ""
    name: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    head: Head
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `beside` puts intervals beside figures where there is room."""

    caption: str
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    foot: tuple[Row, ...] = ()
    sortable: bool = False
    beside: bool = False

    def parts(self) -> list[Table]:
        """Return tables that fit on paper, of about equal width; one that sorts stays whole."""
        columns = len(self.heads) - 1
        size = math.ceil(columns / max(1, math.ceil(columns / MOST_COLUMNS)))
        if self.sortable or columns <= MOST_COLUMNS:
            return [self]
        return [self._part(start, min(columns, start + size)) for start in range(0, columns, size)]

    def _part(self, start: int, stop: int) -> Table:
        def cut(rows: Sequence[Row]) -> tuple[Row, ...]:
            return tuple(Row(row.head, row.cells[start:stop]) for row in rows)

        return replace(
            self,
            caption=f"{self.caption}, {start + 1}–{stop} of {len(self.heads) - 1}",
            heads=(self.heads[0], *self.heads[start + 1 : stop + 1]),
            rows=cut(self.rows),
            foot=cut(self.foot),
        )


def cell(figure: Figure | None, *, best: float | None = None, with_n: bool = False) -> Cell:
    """Write a figure with its interval."""
    if figure is None or figure.value is None:
        state = "withheld" if figure is not None and figure.small else "undefined"
        return Cell("", state=state)
    about = [span(figure)]
    if about[0] and figure.method in _LETTERS:
        about = [f"{about[0]} {_LETTERS[figure.method]}"]
    if with_n and figure.n is not None:
        about.append(f"n\N{NO-BREAK SPACE}{figure.n:,}")
    return Cell(
        number(figure.value),
        " · ".join(part for part in about if part),
        figure.value,
        best=best is not None and figure.value == best,
    )


def difference(figure: Figure) -> Cell:
    """Write a difference with its sign."""
    if figure.value is None:
        return cell(figure)
    return Cell(signed(figure.value), span(figure, with_signs=True), figure.value)


def plain(value: float | None) -> Cell:
    """Write a number without an interval."""
    if value is None:
        return Cell("", state="undefined")
    return Cell(number(value), value=value)


def counted(n: int | None, small: bool) -> Cell:
    """Write a count."""
    if n is None:
        return Cell("", state="withheld" if small else "undefined")
    return Cell(f"{n:,}", value=float(n))


def p_cell(p: float | None) -> Cell:
    """Write a p-value."""
    return Cell("", state="undefined") if p is None else Cell(p_value(p), value=p)


def named(text: str) -> Cell:
    """Write a name."""
    return Cell(text, name=True)
