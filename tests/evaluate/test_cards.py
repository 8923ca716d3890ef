"""Figures in model cards: read back by the Hub's own library."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evaluate.cards import write_results
from evaluate.document import Figure, ModelReport, ModelScope, Report, Resampling
from merge_kit.errors import DataError

CARD = "---\nlibrary_name: timm\ntags:\n- merge\nbase_model: a/b\n---\n\n# Skin: mean of 3 sites\n"


def scope(key: str, kind: str, name: str) -> dict[str, object]:
    column = "sex" if kind == "group" else None
    return {"key": key, "kind": kind, "name": name, "column": column, "cases": 90, "patients": None}


def report(value: float | None = 0.8) -> Report:
    union = {
        "balanced_accuracy": Figure(value=value, low=0.7, high=0.9, n=90),
        "macro_auroc": Figure(value=None, n=None, small=True),
    }
    site = {"balanced_accuracy": Figure(value=0.5, n=20)}
    scopes = (
        ModelScope(scope="union", figures=union),
        ModelScope(scope="site:oslo", figures=site),
        ModelScope(scope="group:sex=f", figures=site),
    )
    model = ModelReport(name="m", role="merged", scopes=scopes, worst_site=None, worst_class=None)
    return Report.model_validate(
        {
            "title": "Skin",
            "created": "2031-01-01",
            "software": {},
            "task": "single-label",
            "classes": ("a", "b"),
            "main_score": "balanced_accuracy",
            "minimum": 5,
            "resampling": Resampling(unit="case", resamples=100, level=0.95, seed=0),
            "bins": 15,
            "scopes": (
                scope("union", "union", "all cases"),
                scope("site:oslo", "site", "oslo"),
                scope("group:sex=f", "group", "f"),
            ),
            "models": (model,),
        }
    )


def test_the_card_gets_the_figures_and_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    write_results(report(), "m", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [
        ("Skin: all cases", "balanced_accuracy", 0.8),
        ("Skin: oslo", "balanced_accuracy", 0.5),
    ]
    assert "95 % interval 0.700 to 0.900, n=90" in card.data.eval_results[0].metric_name
    assert card.data.base_model == "a/b"
    assert card.text.strip() == "# Skin: mean of 3 sites"


def test_a_second_report_replaces_the_figures_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    write_results(report(), "m", tmp_path)
    write_results(report(0.6), "m", tmp_path)
    values = [r.metric_value for r in ModelCard.load(tmp_path / "README.md").data.eval_results]
    assert values == [0.6, 0.5]


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no README\.md to put figures into"):
        write_results(report(), "m", tmp_path)


def test_a_damaged_card_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n- a list\n---\ntext\n")
    with pytest.raises(DataError, match="cannot be read as a model card"):
        write_results(report(), "m", tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\n- a list\n---\ntext\n"


@pytest.mark.parametrize("text", ["# Ours\n", "", "\n---\nlicense: mit\n---\nOurs\n"])
def test_a_card_without_front_matter_gets_one_quietly(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(text)
    write_results(report(), "m", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results
    assert text.strip().splitlines()[-1:] == card.text.strip().splitlines()[-1:]
    assert not caplog.records
