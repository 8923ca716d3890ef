"""From models and labelled images to probabilities."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch

from evaluate.models import Model
from evaluate.summary import Predictions
from finetune import network
from finetune.cases import Case
from finetune.pixels import Images, decode
from finetune.splits import split_of
from merge_kit.errors import DataError

Stage = Callable[[str, int, int], None]


def choose_cases(cases: Sequence[Case], split: str | None) -> list[Case]:
    """The cases of one split; by default the test split where the table has splits, else all.

    Raises
    ------
    DataError
        The split holds no case.
    """
    if split is None:
        split = "test" if any(case.split for case in cases) else "all"
    chosen = list(cases) if split == "all" else split_of(cases, split)
    if not chosen:
        raise DataError(
            f"no case is in the split '{split}': choose another with --split, or --split all."
        )
    return chosen


def predict(
    models: Sequence[Model],
    cases: Sequence[Case],
    device: torch.device,
    *,
    site_column: str = "site",
    skip_unreadable: bool = False,
    precision: str = "float32",
    progress: Stage | None = None,
) -> tuple[list[Predictions], list[str]]:
    """Probabilities of every model for every case; images are decoded once for models that look
    at them alike.

    Returns
    -------
    tuple
        The predictions, and a sentence for each image that was left out.

    Raises
    ------
    MergeKitError
        An image cannot be read and `skip_unreadable` is false, or a model cannot be loaded.
    """
    report = progress or (lambda name, done, of: None)
    decoded: dict[str, tuple[Images, list[str]]] = {}
    found, skipped = [], []
    for model in models:
        key = model.preprocessing.hash
        if key not in decoded:
            decoded[key] = decode(
                cases,
                model.preprocessing,
                skip_unreadable=skip_unreadable,
                progress=lambda done, of: report("decoding", done, of),
            )
            skipped = decoded[key][1]
        images = decoded[key][0]
        outputs = network.logits(
            network.load(model.folder).to(device),
            images,
            device,
            precision=precision,
            progress=lambda done, of, name=model.name: report(name, done, of),  # type: ignore[misc]
        )
        found.append(
            Predictions(
                model=model.name,
                classes=model.classes,
                files=tuple(case.file for case in images.cases),
                labels=images.labels().numpy(),
                probabilities=outputs.double().softmax(dim=1).numpy(),
                patients=tuple(case.patient or case.group for case in images.cases),
                unit="patient" if any(case.patient for case in images.cases) else "group",
                sites=tuple(case.columns.get(site_column, "") for case in images.cases),
            )
        )
    return found, skipped


def to_csv(predictions: Sequence[Predictions]) -> str:
    """predictions.csv: one row a model and case, one column a class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = predictions[0].classes
    writer.writerow(["model", "file", "site", "label", "predicted", *[f"p_{c}" for c in classes]])
    for one in predictions:
        chosen = np.argmax(one.probabilities, axis=1)
        for index, file in enumerate(one.files):
            values = [f"{p:.6f}" for p in one.probabilities[index]]
            label = classes[int(one.labels[index])]
            guess = classes[int(chosen[index])]
            writer.writerow([one.model, file, one.sites[index], label, guess, *values])
    return text.getvalue()
