"""SECURITY.md names every attack that is tried, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    *(ROOT / "tests" / "merge_kit" / "attacks").glob("test_*.py"),
    ROOT / "tests" / "merge_kit" / "hub" / "huggingface" / "test_proposals.py",
)
HARMLESS = {
    "test_a_pull_request_of_a_site_may_be_merged",
    "test_what_was_added_meanwhile_is_not_the_pull_requests_doing",
    "test_other_hubs_have_none",
}


def tried() -> list[str]:
    return [n for p in PLACES for n in re.findall(r"^def (test_\w+)", p.read_text("utf-8"), re.M)]


def test_the_table_of_attacks_is_that_of_the_tests():
    rows = re.findall(r"^\|[^|]+\|[^|]+\| `(test_\w+)` \|$", read("SECURITY.md"), re.M)
    assert len(rows) == len(set(rows))
    assert len(tried()) == len(set(tried()))
    assert set(rows) == set(tried()) - HARMLESS
    assert len(rows) >= 25


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_every_line_of_the_table_is_read():
    table = read("SECURITY.md").split("## Attacks that are tried")[1]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert all(re.search(r"\| `test_\w+` \|$", line) for line in lines)


def test_the_readme_leads_there():
    assert "(SECURITY.md)" in read("README.md")
