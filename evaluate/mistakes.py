"""The worst mistakes of a model as small pictures. They are patient data: only where asked for."""

from __future__ import annotations

import base64
import io

import numpy as np

from evaluate.labelled import LabelledSet
from evaluate.predictions import Predictions
from finetune.cases import read_case

_SIDE = 192
"""Pixels of the longer side."""


def worst_mistakes(
    labelled: LabelledSet, predictions: Predictions, count: int
) -> list[tuple[str, str]]:
    """Images whose class the model gives the least probability, and what it says instead.

    Of several labels a case, the class counts whose probability is farthest from the truth, whether
    it is missed or seen where it is not. Data URIs of JPEG pictures of at most 192 pixels, each
    with its caption.
    """
    chances, names = predictions.probabilities, labelled.classes
    present = labelled.targets == 1
    error = np.where(present, 1 - chances, chances)
    error[labelled.targets < 0] = 0  # not annotated
    if not labelled.multi_label:
        error[~present] = 0
    column, largest = error.argmax(axis=1), error.max(axis=1)
    said = chances.argmax(axis=1)
    wrong = largest > 0.5 if labelled.multi_label else said != column
    rows = np.flatnonzero(wrong)
    found = []
    for row in rows[np.argsort(-largest[rows], kind="stable")][:count].tolist():
        own, taken, place = int(column[row]), int(said[row]), labelled.sites[row]
        if not labelled.multi_label:
            told = f"{names[own]} ({chances[row, own]:.2f}), taken for "
            told += f"{names[taken]} ({chances[row, taken]:.2f})"
        else:
            told = f"{names[own] if present[row, own] else f'no {names[own]}'}"
            told += f" ({chances[row, own]:.2f} for {names[own]})"
        caption = f"{told}{f', {place}' if place else ''}: {labelled.files[row]}"
        found.append((_thumbnail(labelled, row), caption))
    return found


def _thumbnail(labelled: LabelledSet, row: int) -> str:
    image = read_case(labelled.cases[row])
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
