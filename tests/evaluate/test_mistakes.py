"""Which images are shown as mistakes, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluate.labelled import LabelledSet
from evaluate.mistakes import worst_mistakes
from evaluate.predictions import Predictions
from finetune.cases import Case
from tests.evaluate.helpers import draw_images


def said(tmp_path: Path, targets: list[list[int]], chances: list[list[float]]) -> list[str]:
    files = tuple(draw_images(tmp_path, len(targets)))
    several = any(sum(value == 1 for value in row) != 1 for row in targets)
    labelled = LabelledSet(
        ("a", "b"),
        files,
        np.array(targets, np.int8),
        ("",) * len(files),
        multi_label=several,
        cases=tuple(Case(file, tmp_path / file, -1) for file in files),
    )
    model = Predictions("m", "other", ("a", "b"), np.array(chances), multi_label=several)
    found = worst_mistakes(labelled, model, 9)
    assert all(image.startswith("data:image/jpeg;base64,") for image, _ in found)
    return [caption for _, caption in found]


def test_the_least_probable_truth_comes_first(tmp_path: Path) -> None:
    found = said(tmp_path, [[1, 0], [0, 1], [1, 0]], [[0.4, 0.6], [0.9, 0.1], [0.7, 0.3]])
    assert found == ["b (0.10), taken for a (0.90): 1.png", "a (0.40), taken for b (0.60): 0.png"]


def test_of_several_labels_false_alarms_count_as_well_as_misses(tmp_path: Path) -> None:
    found = said(tmp_path, [[0, 0], [1, 1], [1, -1]], [[0.97, 0.1], [0.02, 0.9], [0.6, 0.99]])
    assert found == ["a (0.02 for a): 1.png", "no a (0.97 for a): 0.png"]


@pytest.mark.parametrize("chance", [0.5, 0.4])
def test_what_is_no_mistake_is_not_shown(tmp_path: Path, chance: float) -> None:
    assert said(tmp_path, [[0, 0]], [[chance, chance]]) == []
