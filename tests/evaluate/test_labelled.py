"""Tables of labelled images -> what is known of the cases, and what a reader has to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate.labelled import LabelledSet
from evaluate.loading import Loaded, load
from merge_kit.errors import DataError, ImageError, LabelError, MergeKitError, UsageError
from tests.evaluate.helpers import draw_images

CLASSES = ("round", "lobed")


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of eight images each; the working folder, so that messages are short."""
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        draw_images(tmp_path / name, 8, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(text: str, folder: str = "a") -> Path:
    path = Path(folder) / "labels.csv"
    path.write_text(text)
    return path


def found(text: str, **options: Any) -> Loaded:
    return load([table(text)], CLASSES, **options)


def test_a_single_label_set_is_one_hot_in_the_order_of_the_classes() -> None:
    loaded = found("file,label,site\n0.png,lobed,x\n1.png,round,\n")
    assert loaded.chosen.targets.tolist() == [[0, 1], [1, 0]]
    assert loaded.chosen.targets.dtype == np.int8
    assert loaded.chosen.labels.tolist() == [1, 0]
    assert loaded.chosen.sites == ("x", "")
    assert len(loaded.chosen.keys[0]) == 64


def test_the_test_split_is_chosen_and_the_validation_split_kept_beside_it() -> None:
    text = "file,label,split\n0.png,round,test\n1.png,lobed,val\n2.png,lobed,train\n3.png,round,\n"
    loaded = found(text)
    assert loaded.chosen.files == ("0.png",)
    assert loaded.validation is not None
    assert loaded.validation.files == ("1.png",)
    assert "The table says no split for 1 image, left out." in loaded.notes
    assert loaded.listed == {"0.png", "1.png", "2.png", "3.png"}
    assert found(text, split="val").validation is None


def test_a_table_without_splits_is_used_whole_and_that_is_said() -> None:
    loaded = found("file,label\n0.png,round\n1.png,lobed\n")
    assert len(loaded.chosen) == 2
    assert loaded.validation is None
    (note,) = loaded.notes
    assert note.startswith("The table names no splits: all its images were used")


def test_several_tables_are_sites_of_their_names() -> None:
    table("file,label\n0.png,round\n1.png,lobed\n", "b")
    paths = [table("file,label,site\n0.png,round,x\n1.png,lobed,y\n"), "north=b/labels.csv"]
    loaded = load(paths, CLASSES)
    assert loaded.chosen.sites == ("x", "y", "north", "north")
    assert loaded.chosen.files == ("0.png", "1.png", "0.png", "1.png")


def test_each_table_is_split_by_its_own_column() -> None:
    table("file,label\n0.png,round\n1.png,lobed\n", "b")
    first = table("file,label,split\n0.png,round,test\n1.png,lobed,train\n")
    loaded = load([first, "b/labels.csv"], CLASSES)
    assert loaded.chosen.sites == ("a", "b", "b")
    assert [note for note in loaded.notes if note.startswith("The set 'b' names no splits")]


def test_a_label_is_mapped_where_it_occurs() -> None:
    table("file,label\n0.png,round\n1.png,lobed\n", "b")
    first = table("file,label\n0.png,ball\n1.png,lobed\n")
    loaded = load([first, "b/labels.csv"], CLASSES, label_map={"ball": "round"})
    assert loaded.chosen.labels.tolist() == [0, 1, 0, 1]


def test_patients_are_told_apart_by_site_and_a_group_stands_in_for_one() -> None:
    text = "file,label,site,patient,group\n0.png,round,x,1,\n1.png,lobed,y,1,\n2.png,lobed,y,,1\n"
    chosen = found(text).chosen
    assert len(set(chosen.patients)) == 3
    assert chosen.unit == "patient"
    grouped = found("file,label,group\n0.png,round,g\n1.png,lobed,g\n").chosen
    assert (grouped.unit, len(set(grouped.patients))) == ("group", 1)
    assert found("file,label\n0.png,round\n").chosen.unit == "case"


def test_subgroups_have_a_value_for_every_case() -> None:
    table("file,label\n0.png,round\n1.png,lobed\n", "b")
    first = table("file,label,sex\n0.png,round,f\n1.png,lobed,\n")
    loaded = load([first, "b/labels.csv"], CLASSES, by=["sex"])
    assert loaded.chosen.columns == {"sex": ("f", "unknown", "unknown", "unknown")}
    assert "The set 'b' has no column 'sex': its cases are 'unknown' there." in loaded.notes
    assert loaded.chosen.rows("group:sex=f").tolist() == [0]
    assert loaded.chosen.rows("site:b").tolist() == [2, 3]
    with pytest.raises(DataError, match="'group:age=1' names no part"):
        loaded.chosen.rows("group:age=1")


def test_one_image_twice_is_noted_and_two_labels_for_it_as_well() -> None:
    for copy in ("4.png", "5.png"):
        Path("a", copy).write_bytes(Path("a/0.png").read_bytes())
    loaded = found("file,label\n0.png,round\n1.png,lobed\n4.png,round\n")
    assert "1 image occurs more than once: each counts as a case of its own." in loaded.notes
    assert not [note for note in loaded.notes if "different labels" in note]
    assert loaded.copies == (("0.png", "4.png"),)
    loaded = found("file,label\n0.png,round\n1.png,lobed\n5.png,lobed\n")
    assert "1 image has two different labels: one of them is wrong." in loaded.notes


def test_what_is_in_two_splits_is_noted() -> None:
    Path("a/4.png").write_bytes(Path("a/0.png").read_bytes())
    text = "file,label,patient,split\n0.png,round,p,test\n4.png,round,q,val\n1.png,lobed,p,train\n"
    notes = found(text).notes
    assert (
        "1 image is in the validation split, too: thresholds and temperature have seen them."
        in notes
    )
    assert (
        "The table has 1 patient in these cases and in another split: figures are too good where a "
        "model was trained on them." in notes
    )
    apart = text.replace("patient", "patient,site").replace("p,t", "p,x,t").replace("q,", "q,y,")
    apart = apart.replace("p,x,train", "p,y,train")
    assert not [note for note in found(apart).notes if "in another split" in note]


def test_a_class_without_a_case_is_allowed_and_noted() -> None:
    assert "The table has no case of the class lobed." in found("file,label\n0.png,round\n").notes


def test_several_labels_a_case() -> None:
    loaded = found("file,round,lobed\n0.png,1,1\n1.png,,0\n", multi_label=True)
    assert loaded.chosen.targets.tolist() == [[1, 1], [-1, 0]]
    with pytest.raises(DataError, match="no single label"):
        _ = loaded.chosen.labels


def test_an_image_without_readable_bytes_is_left_out_when_asked() -> None:
    pixels = np.tile(np.arange(256, dtype=np.uint8), 100).reshape(-1, 4, 4)
    np.savez("m.npz", test_images=pixels, test_labels=np.arange(len(pixels)) % 2)
    whole = bytearray(Path("m.npz").read_bytes())
    whole[whole.index(pixels.tobytes())] ^= 1  # the checksum of test_images is wrong now
    Path("m.npz").write_bytes(whole)
    with pytest.raises(ImageError, match="cannot be read as an image"):
        load(["m.npz"], CLASSES, split="test")
    with pytest.raises(DataError, match="nothing to judge a model on"):
        load(["m.npz"], CLASSES, split="test", skip_unreadable=True)


def test_take_and_restriction_keep_the_rows_together() -> None:
    text = "file,label,site,sex\n0.png,a,x,f\n1.png,b,y,m\n2.png,c,z,f\n"
    chosen = load([table(text)], ("a", "b", "c"), by=["sex"]).chosen
    part = chosen.restricted_to(("c", "a"))
    assert (part.files, part.sites, part.classes) == (("0.png", "2.png"), ("x", "z"), ("c", "a"))
    assert part.labels.tolist() == [1, 0]
    assert part.columns == {"sex": ("f", "f")}
    assert part.keys == (chosen.keys[0], chosen.keys[2])
    assert chosen.take([2, 0]).files == ("2.png", "0.png")


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (
            {"by": ["sexe"]},
            LabelError,
            "--by sexe: a/labels.csv has no such column (nearest: sex): correct it.",
        ),
        (
            {"site_column": "hospital"},
            LabelError,
            "--site-column hospital: a/labels.csv has no such column (known: file, label, sex): "
            "correct it.",
        ),
        (
            {"split": "val"},
            DataError,
            "no case is in the split 'val': choose another with --split, or --split all.",
        ),
    ],
    ids=["by", "site column", "split"],
)
def test_a_wrong_choice_is_refused(
    options: dict[str, Any], kind: type[MergeKitError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        found("file,label,sex\n0.png,round,f\n1.png,lobed,m\n", **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            ["a", "a/labels.csv"],
            "two sets of data are called 'a': tell them apart with --data NAME=PATH.",
        ),
        (["x="], "--data x=: write it as --data NAME=PATH."),
        (
            ["x=a", "y=a"],
            "0.png is in two sets of data, 'x' and 'y': every case counts once; leave it out of "
            "one.",
        ),
    ],
    ids=["one name", "no path", "one file"],
)
def test_sets_that_cannot_be_told_apart_are_refused(data: list[str], sentence: str) -> None:
    table("file,label\n0.png,round\n")
    with pytest.raises(UsageError) as caught:
        load(data, CLASSES)
    assert str(caught.value) == sentence


def test_a_set_in_which_nothing_is_annotated_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        found("file,round,lobed\n0.png,,\n", multi_label=True)
    assert str(caught.value) == (
        "no case of a/labels.csv is labelled and can be read: there is nothing to judge a model on."
    )


@pytest.mark.parametrize(
    ("targets", "several"), [([[1, 1]], False), ([[0, 0]], False), ([[2, 0]], True), ([[1]], True)]
)
def test_targets_that_do_not_fit_are_refused(targets: list[list[int]], several: bool) -> None:
    with pytest.raises(DataError):
        LabelledSet(("a", "b"), ("0.png",), np.array(targets, np.int8), ("",), several)
