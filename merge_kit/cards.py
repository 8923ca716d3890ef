"""Pages for people: templates filled in."""

from __future__ import annotations

import re
from typing import Any

import jinja2

CARD = "README.md"


def literal(text: str) -> str:
    """A name as Markdown that shows it as it is: no link, image, table or HTML of its making."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!&~])", r"\\\1", text)


def render(template: str, **values: Any) -> str:
    """Fill in one of our templates."""
    loader = jinja2.PackageLoader("merge_kit")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters["literal"] = literal
    return environment.get_template(template).render(values)
