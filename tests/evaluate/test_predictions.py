"""Predictions, and the CSV files that they are written to and read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate.labelled import LabelledSet
from evaluate.models import find_models
from evaluate.predictions import Predictions, read_imported, to_csv
from merge_kit.errors import DataError, LabelError

CLASSES = ("round", "lobed")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, so that messages are short."""
    monkeypatch.chdir(tmp_path)


def labelled(
    files: tuple[str, ...] = ("0.png", "1.png"), sites: tuple[str, ...] = ("x", "y"), **more: Any
) -> LabelledSet:
    targets = np.eye(2, dtype=np.int8)[np.arange(len(files)) % 2]
    return LabelledSet(CLASSES, files, targets, sites, **more)


def read(text: str, cases: LabelledSet | None = None, **options: Any) -> np.ndarray:
    Path("p.csv").write_text(text)
    told = read_imported(Path("p.csv"), cases or labelled(), **{"model": "m", **options})
    return told.probabilities


def test_what_is_written_is_read_again_bit_for_bit_but_for_nine_digits() -> None:
    chances = np.random.default_rng(0).dirichlet([0.1, 0.1], 2)
    both = [
        Predictions(name, "other", CLASSES, chances[::step]) for name, step in (("a", 1), ("b", -1))
    ]
    text = to_csv(both, labelled())
    assert text.splitlines()[0] == "model,file,site,label,predicted,p_round,p_lobed"
    np.testing.assert_allclose(read(text, model="b"), chances[::-1], rtol=1e-8)


def test_classes_of_a_multi_label_case_are_joined() -> None:
    targets = np.array([[1, 1], [0, -1]], np.int8)
    cases = LabelledSet(CLASSES, ("0.png", "1.png"), targets, ("", ""), multi_label=True)
    chances = np.array([[0.5, 0.9], [0.2, 0.1]])
    text = to_csv([Predictions("m", "other", CLASSES, chances, multi_label=True)], cases)
    assert text.splitlines()[1:] == [
        "m,0.png,,round|lobed,round|lobed,0.5,0.9",
        "m,1.png,,,,0.2,0.1",
    ]
    assert read(text, cases).tolist() == chances.tolist()


def test_columns_and_rows_may_stand_in_any_order() -> None:
    text = "p_Lobed,note,file,p_round\n0.25,?,1.png,0.75\n0.5,,0.png,0.5\n"
    assert read(text).tolist() == [[0.5, 0.5], [0.75, 0.25]]


def test_a_site_tells_two_files_of_one_name_apart() -> None:
    cases = labelled(("0.png", "0.png"))
    text = "site,file,p_round,p_lobed\ny,0.png,1,0\nx,0.png,0,1\nz,0.png,1,0\n"
    assert read(text, cases).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(LabelError, match=r"0.png is a case of x and of y: add a column site"):
        read("file,p_round,p_lobed\n0.png,1,0\n", cases)


def test_files_that_were_not_chosen_may_be_there() -> None:
    text = "file,p_round,p_lobed\n0.png,1,0\n7.png,1,0\n1.png,0,1\n"
    assert read(text, listed={"7.png"}).tolist() == [[1, 0], [0, 1]]


HEADER = "file,p_round,p_lobed\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            HEADER + "0.png,1,0\n",
            "p.csv has no prediction for 1.png (1 missing in all): every model answers for the "
            "same cases.",
        ),
        (
            HEADER + "0.png,1,0\n01.png,1,0\n",
            "p.csv line 3: 01.png is no image of the data (nearest: 1.png): correct the name or "
            "remove the line.",
        ),
        (
            HEADER + "0.png,1,0\n0.png,1,0\n",
            "p.csv line 3 lists 0.png, as does line 2: remove one of the two.",
        ),
        (
            HEADER + "0.png,1.5,-0.5\n",
            "p.csv line 2: the column p_round holds '1.5': give a probability between 0 and 1.",
        ),
        (
            HEADER + "0.png,nan,1\n",
            "p.csv line 2: the column p_round holds 'nan': give a probability between 0 and 1.",
        ),
        (
            HEADER + "0.png,,1\n",
            "p.csv line 2: the column p_round holds '': give a probability between 0 and 1.",
        ),
        (
            HEADER + "0.png,0.9,0.8\n",
            "p.csv line 2: the probabilities sum to 1.7, not to 1: give softmax outputs; where a "
            "case may have several classes, say so with --multi-label.",
        ),
        (
            HEADER + "0.png,1\n",
            "p.csv line 2 has 2 fields where the header has 3: correct it, and put quotes around "
            "a field that holds a comma.",
        ),
        ("file,p_round\n0.png,1\n", "p.csv line 1 has no column p_lobed (known: round): add it."),
        (
            "file,p_round,p_lobed,p_other\n0.png,1,0,0\n",
            "p.csv line 1: the column p_other is of no class (known: round, lobed): rename or "
            "remove it.",
        ),
        (
            "file,p_round,p_lobed,p_Lobed\n0.png,1,0,0\n",
            "p.csv line 1 has two columns p_lobed: rename one.",
        ),
        (
            "name,p_round\n0.png,1\n",
            "p.csv line 1 must be a header with the column file and a column p_<class> for each "
            "class (found: name, p_round): add it or rename the columns.",
        ),
        (
            "model,file,p_round,p_lobed\na,0.png,1,0\nb,0.png,1,0\n",
            "p.csv has predictions of a, b and none of 'm': name one of them with NAME=FILE.",
        ),
    ],
    ids=[
        "missing case", "unknown file", "twice", "above one", "nan", "empty", "sum", "fields",
        "missing class", "unknown class", "one class twice", "header", "model",
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        read(text)
    assert str(caught.value) == sentence


def test_sums_are_free_where_a_case_may_have_several_classes() -> None:
    told = read(HEADER + "0.png,0.9,0.8\n1.png,0,0\n", labelled(multi_label=True))
    assert told.tolist() == [[0.9, 0.8], [0, 0]]


def test_probabilities_on_the_classes_in_common_sum_to_one() -> None:
    chances = np.array([[0.2, 0.2, 0.6], [0, 0, 1]])
    told = Predictions("m", "other", ("a", "B", "c"), chances)
    np.testing.assert_allclose(told.restricted_to(("b", "a")).probabilities, 0.5)
    assert told.restricted_to(("c", "a")).probabilities[0].tolist() == [0.6 / 0.8, 0.2 / 0.8]
    several = Predictions("m", "other", ("a", "B", "c"), chances, multi_label=True)
    assert several.restricted_to(("c", "a")).probabilities[0].tolist() == [0.6, 0.2]
    with pytest.raises(DataError, match="does not know the class 'd'"):
        told.restricted_to(("a", "d"))


@pytest.mark.parametrize("chances", [[[np.nan, 1]], [[1.1, -0.1]], [[1.0]]])
def test_what_are_no_probabilities_is_refused(chances: list[list[float]]) -> None:
    with pytest.raises(DataError):
        Predictions("m", "other", CLASSES, np.array(chances))


def test_a_file_of_predictions_is_a_model() -> None:
    Path("clinic.csv").write_text("file,p_lobed,p_round\n0.png,1,0\n")
    (one,) = find_models(["clinic.csv"])
    assert (one.name, one.role, one.classes) == ("clinic", "other", ("lobed", "round"))
    (named,) = find_models(["theirs=clinic.csv"], pooled=["theirs"])
    assert (named.name, named.role) == ("theirs", "pooled")
