"""Figures of a report in the form of model cards: the ``model-index`` of a Hugging Face README."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from evaluate.document import Report
from merge_kit.cards import CARD
from merge_kit.errors import DataError
from merge_kit.files import write_atomic

_METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "macro_auroc": "AUROC, mean over classes",
    "macro_auprc": "AUPRC, mean over classes",
    "accuracy": "Accuracy",
    "macro_f1": "F1, mean over classes",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "ece": "Expected calibration error",
}
_TYPE = "labelled-images"
"""The Hub asks for the kind of data set; patients' images are not on it."""


def results(report: Report, model: str) -> list[EvalResult]:
    """One model's figures on all cases and on every site, each interval in the metric's name.

    Withheld and undefined figures are left out.
    """
    names = {scope.key: scope.name for scope in report.scopes if scope.kind in ("union", "site")}
    listed = []
    for scope in report.model(model).scopes:
        for key, title in _METRICS.items():
            figure = scope.figures.get(key)
            if scope.scope not in names or figure is None or figure.value is None:
                continue
            span = ""
            if figure.low is not None and figure.high is not None:
                level = f"{report.resampling.level:.0%}".replace("%", " %")
                span = f" ({level} interval {figure.low:.3f} to {figure.high:.3f}, n={figure.n})"
            listed.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=_TYPE,
                    dataset_name=f"{report.title}: {names[scope.scope]}",
                    # The Hub tells data sets apart by type, configuration and split, not by name.
                    dataset_config=scope.scope,
                    metric_type=key,
                    metric_name=title + span,
                    metric_value=round(figure.value, 6),
                )
            )
    return listed


def write_results(report: Report, model: str, folder: Path) -> None:
    """Put a model's figures into the README.md of its folder; the text stays as it is.

    Figures of an earlier report are replaced.

    Raises
    ------
    DataError
        The folder has no model card, or one whose front matter cannot be read.
    """
    card = read_card(folder)
    assert isinstance(card.data, ModelCardData)
    card.data.model_name = model
    card.data.eval_results = results(report, model)
    write_atomic(folder / CARD, str(card))


def read_card(folder: Path) -> ModelCard:
    """The model card in a folder.

    Raises
    ------
    DataError
        There is none, or its front matter cannot be read.
    """
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):
            text = f"---\n{{}}\n---\n{text}"  # else the library prints a notice of its own
        return ModelCard(text, ignore_metadata_errors=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {CARD} to put figures into: leave --cards out."
        ) from error
    except (ValueError, TypeError, OSError, YAMLError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path} cannot be read as a model card ({detail}): correct it.") from error
