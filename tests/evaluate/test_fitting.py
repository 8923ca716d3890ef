"""What is fitted on validation cases, and what cannot be."""

from __future__ import annotations

import numpy as np

from evaluate.fitting import Validation
from tests.evaluate.judged import cases, predictions
from tests.evaluate.judged import report as report_of


def test_validation_cases_without_annotations_give_no_temperature() -> None:
    unknown = cases(multi_label=True, targets=np.full((120, 3), -1, np.int8))
    labelled = cases(multi_label=True)
    model = predictions(labelled)
    validation = Validation(unknown, [model], calibrate=True)
    (found,) = report_of(labelled, model, validation).models
    assert found.temperature is None
    plain = report_of(labelled, model).models[0]
    assert found.on("union").figures == plain.on("union").figures
