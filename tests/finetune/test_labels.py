"""Tables in which a case may be of several classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cases import Case, content_key, load_cases
from merge_kit.errors import DataError, LabelError

CLASSES = ("oedema", "mass", "Nodule")


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in the working folder, so that messages are short."""
    for index in range(3):
        Image.new("L", (4, 4), index).save(tmp_path / f"{index}.png")
    monkeypatch.chdir(tmp_path)


def load(text: str, **options: Any) -> list[Case]:
    Path("t.csv").write_text(text)
    return load_cases(Path("t.csv"), classes=CLASSES, multi_label=True, **options)


def npz(labels: np.ndarray) -> Path:
    images = np.arange(len(labels) * 16, dtype=np.uint8).reshape(-1, 4, 4)
    np.savez("m.npz", test_images=images, test_labels=labels)
    return Path("m.npz")


def test_a_column_for_each_class_holds_one_zero_or_nothing() -> None:
    cases = load("file,Mass,nodule,oedema,sex\n0.png,1,0,,f\n1.png,0.0,1.0,1,m\n")
    assert [case.targets for case in cases] == [(-1, 1, 0), (1, 0, 1)]
    assert [case.label for case in cases] == [-1, -1]
    assert [case.columns for case in cases] == [{"sex": "f"}, {"sex": "m"}]


def test_a_class_without_a_column_is_not_annotated() -> None:
    (case,) = load("file,mass,nodule\n0.png,1,0\n")
    assert case.targets == (-1, 1, 0)


def test_a_column_is_renamed_by_the_map() -> None:
    (case,) = load("file,mass,edema\n0.png,1,0\n", label_map={"edema": "oedema"})
    assert case.targets == (0, 1, -1)


def test_a_label_may_name_several_classes_or_none_of_them() -> None:
    text = "file,label\n0.png,mass|Oedema\n1.png,No Finding\n2.png,nodule\n"
    cases = load(text, label_map={"No Finding": ""})
    assert [case.targets for case in cases] == [(1, 1, 0), (0, 0, 0), (0, 0, 1)]


def test_medmnist_labels_may_be_a_row_of_zeros_and_ones() -> None:
    path = npz(np.array([[1, 0, 1], [0, 0, 0]]))
    cases = load_cases(path, classes=CLASSES, multi_label=True)
    assert [case.targets for case in cases] == [(1, 0, 1), (0, 0, 0)]
    assert [(case.split, case.columns) for case in cases] == [("test", {}), ("test", {})]


def test_medmnist_labels_of_one_number_are_one_class() -> None:
    cases = load_cases(npz(np.array([[2], [0]])), classes=CLASSES, multi_label=True)
    assert [case.targets for case in cases] == [(0, 0, 1), (1, 0, 0)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "file,mass\n0.png,1\n1.png,-1\n",
            "t.csv line 3: the column 'mass' holds '-1': write 1 (present), 0 (absent) or nothing "
            "(not annotated).",
        ),
        (
            "file,mass,Mass\n0.png,1,1\n",
            "t.csv has two columns for the class 'mass', 'mass' and 'Mass': rename one, or "
            "correct --map.",
        ),
        (
            "file,sex\n0.png,f\n",
            "t.csv has no labels and none named after a class (columns found: file, sex): add a "
            "column 'label', or sort the images into folders of classes.",
        ),
        (
            "file,label\n0.png,mass|nodul\n",
            "t.csv line 2: label 'nodul' is no class of this federation (nearest: Nodule): "
            "correct it or pass --map nodul=CLASS.",
        ),
        ("file,label\n0.png,|\n", "t.csv line 2 has no label: fill it in or remove the row."),
    ],
    ids=["uncertain", "two columns", "no class", "unknown label", "only a separator"],
)
def test_a_bad_table_is_refused_with_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(LabelError) as caught:
        load(text)
    assert str(caught.value) == sentence


def test_medmnist_labels_of_other_classes_are_refused() -> None:
    with pytest.raises(LabelError) as caught:
        load_cases(npz(np.zeros((2, 4), int)), classes=CLASSES, multi_label=True)
    assert str(caught.value) == (
        "m.npz has labels of 4 classes, the model has 3 (oedema, mass, Nodule): give the data that "
        "it was made for."
    )


def test_several_labels_are_refused_where_one_is_wanted() -> None:
    Path("t.csv").write_text("file,mass,nodule\n0.png,1,1\n")
    with pytest.raises(LabelError, match="read such columns with --multi-label"):
        load_cases(Path("t.csv"), classes=CLASSES)
    with pytest.raises(DataError, match="give one whole number for each image"):
        load_cases(npz(np.ones((2, 3), int)), classes=CLASSES)


def test_content_keys_speak_of_the_bytes_and_not_of_the_place() -> None:
    Path("3.png").write_bytes(Path("0.png").read_bytes())
    Path("t.csv").write_text("file,label\n0.png,mass\n1.png,mass\n3.png,mass\n")
    keys = [content_key(case) for case in load_cases(Path("t.csv"), classes=CLASSES)]
    assert keys[0] == keys[2] != keys[1]
    first = load_cases(npz(np.array([[2], [0]])), classes=CLASSES)
    before = [content_key(case) for case in first]
    np.savez("n.npz", test_images=np.arange(16, dtype=np.uint8).reshape(1, 4, 4), test_labels=[1])
    (other,) = load_cases(Path("n.npz"), classes=CLASSES)
    assert content_key(other) == before[0] != before[1]


# Which classes the labels speak of


def test_labels_speak_of_the_classes_that_are_said_to_be_annotated() -> None:
    cases = load("file,label\n0.png,mass\n1.png,oedema|mass\n", annotated=["Mass", "oedema"])
    assert [case.targets for case in cases] == [(0, 1, -1), (1, 1, -1)]
    cases = load("file,mass,nodule\n0.png,1,0\n1.png,,1\n", annotated=["nodule"])
    assert [case.targets for case in cases] == [(-1, -1, 0), (-1, -1, 1)]


@pytest.mark.parametrize(
    ("text", "annotated", "sentence"),
    [
        (
            "file,label\n0.png,mass\n",
            ["mas"],
            "--annotated mas names no class of this federation (nearest: mass): correct it.",
        ),
        (
            "file,mass\n0.png,1\n",
            ["mass", "nodule"],
            "--annotated names the class 'Nodule', for which t.csv has no column: add the column, "
            "or leave the class out.",
        ),
        (
            "file,label\n0.png,mass\n1.png,nodule\n",
            ["mass"],
            "t.csv line 3: label 'nodule' is a class that --annotated does not name: name it "
            "there, or pass --map nodule= where it means none of those.",
        ),
    ],
)
def test_what_contradicts_the_annotated_classes_is_refused(text, annotated, sentence) -> None:
    with pytest.raises(LabelError) as caught:
        load(text, annotated=annotated)
    assert str(caught.value) == sentence


def test_a_label_may_mean_none_of_the_annotated_classes() -> None:
    cases = load(
        "file,label\n0.png,mass\n1.png,nodule\n", annotated=["mass"], label_map={"nodule": ""}
    )
    assert [case.targets for case in cases] == [(-1, 1, -1), (-1, 0, -1)]
