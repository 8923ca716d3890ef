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

    Of several labels a case, the probability of its least likely class counts. Data URIs of JPEG
    pictures of at most 192 pixels, each with its caption.
    """
    present = np.where(labelled.targets == 1, predictions.probabilities, np.inf)
    own, lowest = present.argmin(axis=1), present.min(axis=1)
    said = predictions.probabilities.argmax(axis=1)
    wrong = np.flatnonzero((lowest < 0.5) & (said != own) & np.isfinite(lowest))
    chosen = wrong[np.argsort(lowest[wrong], kind="stable")][:count]
    found = []
    for row in chosen.tolist():
        place = f", {labelled.sites[row]}" if labelled.sites[row] else ""
        caption = (
            f"{labelled.classes[own[row]]} ({lowest[row]:.2f}), taken for "
            f"{labelled.classes[said[row]]} ({predictions.probabilities[row, said[row]]:.2f})"
            f"{place}: {labelled.files[row]}"
        )
        found.append((_thumbnail(labelled, row), caption))
    return found


def _thumbnail(labelled: LabelledSet, row: int) -> str:
    image = read_case(labelled.cases[row])
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
