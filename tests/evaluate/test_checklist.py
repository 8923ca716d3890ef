"""Reporting checklists: every item once, filled in only with what the report shows."""

from __future__ import annotations

from evaluate.checklist import checklist
from evaluate.document import ModelReport, Report, Resampling, Scope


def report(*, unit: str = "case", external: bool = False, column: str | None = None) -> Report:
    scopes = [
        Scope(key="union", kind="union", name="all cases", cases=90, patients=None),
        Scope(
            key="site:oslo", kind="site", name="oslo", external=external, cases=90, patients=None
        ),
    ]
    if column:
        group = Scope(
            key=f"group:{column}=f", kind="group", name="f", column=column, cases=9, patients=None
        )
        scopes.append(group)
    model = ModelReport(name="m", role="other", scopes=(), worst_site=None, worst_class=None)
    return Report(
        title="t",
        created="2031-01-01",
        software={"torch": "2.14"},
        task="single-label",
        classes=("a", "b"),
        main_score="balanced_accuracy",
        minimum=5,
        resampling=Resampling(unit=unit, resamples=100, level=0.95, seed=0),
        bins=15,
        scopes=tuple(scopes),
        models=(model,),
    )


def item(guideline: str, number: str, **facts: object) -> tuple[str, str]:
    (found,) = (
        entry
        for entry in checklist(report(**facts))  # type: ignore[arg-type]
        if (entry.guideline, entry.number) == (guideline, number)
    )
    return found.status, found.text


def test_both_guidelines_are_whole() -> None:
    items = checklist(report())
    claim = [entry.number for entry in items if entry.guideline == "CLAIM 2024"]
    tripod = [entry.number for entry in items if entry.guideline == "TRIPOD+AI"]
    assert claim == [str(number) for number in range(1, 45)]
    assert len(tripod) == len(set(tripod)) == 52
    assert {number.rstrip("abcdefg") for number in tripod} == {str(n) for n in range(1, 28)}


def test_external_sites_fill_the_item_on_external_testing() -> None:
    assert item("CLAIM 2024", "33") == ("human", "To add: a data set that no model has seen.")
    status, text = item("CLAIM 2024", "33", external=True)
    assert status == "partly"
    assert "oslo" in text


def test_a_table_without_patients_is_said_to_hide_shared_ones() -> None:
    assert "names no patients" in item("CLAIM 2024", "20")[1]
    assert "by patient" in item("CLAIM 2024", "20", unit="patient")[1]


def test_subgroups_are_named_by_their_columns() -> None:
    assert item("TRIPOD+AI", "14")[0] == "human"
    assert "by sex" in item("TRIPOD+AI", "14", column="sex")[1]


def test_what_the_report_shows_in_full_needs_nobody() -> None:
    assert item("CLAIM 2024", "23") == ("shown", "torch 2.14.")
