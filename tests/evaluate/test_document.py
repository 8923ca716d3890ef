"""The published schema of report.json is that of the documents."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from evaluate.document import Report
from tests.evaluate.judged import cases, four_models
from tests.evaluate.judged import report as report_of

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report.schema.json"


def test_the_published_schema_is_that_of_the_documents() -> None:
    # To make it again: Report.model_json_schema() with an indent of 1 and a newline at the end.
    expected = json.dumps(Report.model_json_schema(), indent=1) + "\n"
    assert SCHEMA.read_text(encoding="utf-8") == expected


def test_a_report_fits_the_schema_by_an_independent_validator() -> None:
    labelled = cases()
    content = json.loads(report_of(labelled, four_models(labelled)).model_dump_json())
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.validate(content, schema)
    content["models"][0]["scopes"][0]["figures"]["accuracy"]["value"] = "high"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
