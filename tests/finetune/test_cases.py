"""Class folders, CSV tables and MedMNIST files become cases, or one exact sentence."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.cases import ArrayItem, Case, case_key, content_key, load_cases, read_case
from merge_kit.errors import DataError, ImageError, LabelError
from merge_kit.tensorfile import write_tensors

CLASSES = ["nevus", "melanoma", "Other"]
CELLS = ["neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil"]


@pytest.fixture
def wbc(shared_data: Path) -> Path:
    return shared_data / "wbc_multisite"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four images, which is the working folder so that messages are short."""
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path("labels.csv")


def picture(path: Path, value: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    return path


def load(data: Path | str, **options: Any) -> list[Case]:
    return load_cases(Path(data), classes=CLASSES, **options)


def table(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def medmnist(path: Path, **arrays: Any) -> Path:
    contents = {
        "train_images": np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4),
        "train_labels": np.array([[0], [1], [2], [0], [1]]),
        "test_images": np.full((1, 4, 4, 3), 9, np.uint8),
        "test_labels": np.array([[2]]),
    }
    np.savez_compressed(path, **{k: v for k, v in (contents | arrays).items() if v is not None})
    return path


# -- a CSV


def test_a_table_gives_a_case_for_each_row_in_its_order(site: Path) -> None:
    table(
        site,
        "file,label,patient,split,site,group\nsub/c.png,melanoma,P1,dev,x,g1\na.png,nevus,,,y,\n",
    )
    assert load(site) == [
        Case("sub/c.png", Path("sub/c.png"), 1, "P1", "g1", "val", {"site": "x"}),
        Case("a.png", Path("a.png"), 0, None, None, None, {"site": "y"}),
    ]


def test_a_folder_with_a_table_counts_as_the_table(site: Path) -> None:
    table(site, "file,label\na.png,nevus\n")
    assert load(Path()) == load(site)


def test_paths_start_at_the_image_folder_when_one_is_given(site: Path) -> None:
    table(site, "file,label\n./c.png,nevus\nd.png,melanoma\n")
    cases = load(site, images=Path("sub"))
    assert [(case.file, case.source) for case in cases] == [
        ("c.png", Path("sub/c.png")),
        ("d.png", Path("sub/d.png")),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "\ufefffile,label\na.png,nevus\n",
        "File,LABEL\r\na.png,Nevus\r\n\r\n",
        'file,label\n"a.png", nevus \n,\n',
        ",file,label\n0,a.png,nevus\n",
    ],
    ids=["bom", "case and CRLF", "quotes and blanks", "index column"],
)
def test_harmless_habits_of_spreadsheets_are_accepted(site: Path, content: str) -> None:
    assert load(table(site, content)) == [Case("a.png", Path("a.png"), 0)]


def test_backslashes_are_folders_as_on_windows(site: Path) -> None:
    assert load(table(site, "file,label\nsub\\c.png,nevus\n"))[0].file == "sub/c.png"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("valid", "val"),
        ("validation", "val"),
        ("dev", "val"),
        ("testing", "test"),
        ("", None),
    ],
)
def test_split_names_have_their_usual_synonyms(site: Path, written: str, meant: str | None) -> None:
    assert load(table(site, f"file,label,split\na.png,nevus,{written}\n"))[0].split == meant


def test_labels_are_replaced_first_then_matched_exactly_then_in_any_case(site: Path) -> None:
    table(site, "file,label\na.png,nevus\nb.png,other\nsub/c.png,akiec\n")
    cases = load(site, label_map={"nevus": "melanoma", "akiec": "nevus"})
    assert [case.label for case in cases] == [1, 2, 0]
    classes = ["Nevus", "nevus", "other", "akiec"]
    assert [case.label for case in load_cases(site, classes=classes)] == [1, 2, 3]


def test_where_selects_rows_and_forgives_the_others(site: Path) -> None:
    table(site, "file,label,site,sex\na.png,nevus,x,f\nb.png,nevus, y ,f\nno.png,typo,z,f\n")
    assert [case.file for case in load(site, where={"site": " y", "sex": "f"})] == ["b.png"]


def test_rows_without_labels_are_cases_of_label_minus_one_only_on_request(site: Path) -> None:
    table(site, "file,split\na.png,test\n")
    assert load(site, require_labels=False)[0].label == -1
    with pytest.raises(
        LabelError, match=r"labels.csv has no labels \(columns found: file, split\)"
    ):
        load(site)


MORE = "correct it or pass --map {0}=CLASS."
BAD_TABLES = {
    "empty file": (
        "",
        "labels.csv is empty: it needs a header (file,label) and a line for an image.",
    ),
    "header only": (
        "file,label\n",
        "labels.csv has a header but no image: add a line for each image.",
    ),
    "no header": (
        "a.png,nevus\n",
        "labels.csv line 1 must be a header with the columns file and label (found: a.png, nevus): "
        "add it or rename the columns.",
    ),
    "no label column": (
        "file,diagnosis\na.png,nevus\n",
        "labels.csv has no labels (columns found: file, diagnosis): "
        "add a column 'label', or sort the images into folders of classes.",
    ),
    "column twice": (
        "file,label,File\na.png,nevus,b.png\n",
        "labels.csv line 1 names the column 'file' twice: rename one.",
    ),
    "semicolons": (
        "file;label\na.png;nevus\n",
        "labels.csv is separated by semicolons: save it with commas.",
    ),
    "tabs": (
        "file\tlabel\na.png\tnevus\n",
        "labels.csv is separated by tabs: save it with commas.",
    ),
    "not UTF-8": (
        "file,label\na.png,nevus\nä.png,nevus\n".encode("latin-1"),
        "labels.csv line 3 is not UTF-8: save it as CSV UTF-8.",
    ),
    "NUL": (
        "file,label\na.png,ne\0vus\n",
        "labels.csv line 2 holds a NUL byte: save it as CSV UTF-8.",
    ),
    "open quote": (
        'file,label\na.png,nevus\n"b.png,nevus\n',
        "labels.csv line 3 is not CSV (unexpected end of data): mend its quotes.",
    ),
    "too many fields": (
        "file,label\na.png,nevus\nb.png,nevus,7\n",
        "labels.csv line 3 has 3 fields where the header has 2: "
        "correct it, and put quotes around a field that holds a comma.",
    ),
    "too few fields": (
        'file,label,note\na.png,nevus,"two\nlines"\nb.png,nevus\n',
        "labels.csv line 4 has 2 fields where the header has 3: "
        "correct it, and put quotes around a field that holds a comma.",
    ),
    "unknown label": (
        "file,label\na.png,nevus\nb.png,melanom\n",
        "labels.csv line 3: label 'melanom' is no class of this federation (nearest: melanoma): "
        + MORE.format("melanom"),
    ),
    "foreign label": (
        "file,label\na.png,zzz\n",
        "labels.csv line 2: label 'zzz' is no class of this federation "
        "(known: nevus, melanoma, Other): " + MORE.format("zzz"),
    ),
    "no label": (
        "file,label\na.png,\n",
        "labels.csv line 2 has no label: fill it in or remove the row.",
    ),
    "no file": (
        "file,label\n,nevus\n",
        "labels.csv line 2 names no file: fill it in or remove the line.",
    ),
    "file twice": (
        "file,label\na.png,nevus\nb.png,nevus\n./a.png,melanoma\n",
        "labels.csv line 4 lists a.png, as does labels.csv line 2: remove one of the two.",
    ),
    "file missing": (
        "file,label\na.png,nevus\nsub/e.png,nevus\n",
        "labels.csv line 3 lists sub/e.png, but sub/e.png is no file: "
        "correct the path or pass --images FOLDER.",
    ),
    "unknown split": (
        "file,label,split\na.png,nevus,holdout\n",
        "labels.csv line 2: split 'holdout' is unknown: write train, val or test, or nothing.",
    ),
    "parent folder": (
        "file,label\nsub/../../a.png,nevus\n",
        "labels.csv line 2: sub/../../a.png leaves the image folder: "
        "give a relative path without '..'.",
    ),
    "absolute path": (
        "file,label\n/etc/passwd,nevus\n",
        "labels.csv line 2: /etc/passwd leaves the image folder: "
        "give a relative path without '..'.",
    ),
    "Windows drive": (
        "file,label\nC:\\a.png,nevus\n",
        "labels.csv line 2: C:\\a.png leaves the image folder: give a relative path without '..'.",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_a_bad_table_is_refused_with_one_sentence(site: Path, content, sentence: str) -> None:
    table(site, content)
    with pytest.raises(LabelError) as caught:
        load(site)
    assert str(caught.value) == sentence


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "map to no class": (
        {"label_map": {"nevus": "melanome"}},
        "--map nevus=melanome names no class of this federation (nearest: melanoma): "
        "correct the part after the equals sign.",
    ),
    "map of an absent label": (
        {"label_map": {"akiec": "nevus"}},
        "--map akiec=nevus names a label that never occurs in labels.csv (known: melanoma, nevus): "
        "correct it or leave it out.",
    ),
    "no such column": (
        {"where": {"hospital": "x"}},
        "labels.csv has no column 'hospital' to select by (columns: file, label, site): "
        "correct --where.",
    ),
    "no such value": (
        {"where": {"label": "nevus", "site": "z"}},
        "labels.csv has no row where label=nevus and site=z (site: known: x, y): correct --where.",
    ),
    "no image folder": (
        {"images": Path("nowhere")},
        "nowhere is not a folder: give the folder where the CSV's paths start.",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_refused_with_one_sentence(site: Path, options, sentence: str) -> None:
    table(site, "file,label,site\na.png,nevus,x\nb.png,melanoma,y\n")
    with pytest.raises(DataError) as caught:
        load(site, **options)
    assert str(caught.value) == sentence


def test_a_missing_path_is_refused(site: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("nowhere")
    assert str(caught.value) == (
        "nowhere does not exist: give a folder of class folders, a CSV file or a MedMNIST .npz."
    )


# -- class folders


def test_class_folders_give_labels_and_empty_ones_are_fine(tmp_path: Path) -> None:
    for name in ("melanoma/b.png", "melanoma/P1/a.JPG", "nevus/c.tif"):
        picture(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "melanoma" / ".hidden.png").write_bytes(b"")
    assert [(case.file, case.label, case.split) for case in load(tmp_path)] == [
        ("melanoma/P1/a.JPG", 1, None),
        ("melanoma/b.png", 1, None),
        ("nevus/c.tif", 0, None),
    ]


def test_split_folders_above_the_class_folders_are_splits(tmp_path: Path) -> None:
    for name in ("train/nevus/a.png", "valid/nevus/b.png", "Test/melanoma/c.png"):
        picture(tmp_path / name)
    splits = {case.file: (case.label, case.split) for case in load(tmp_path)}
    assert splits == {
        "train/nevus/a.png": (0, "train"),
        "valid/nevus/b.png": (0, "val"),
        "Test/melanoma/c.png": (1, "test"),
    }
    assert len(load(tmp_path, where={"split": "train"})) == 1


def test_a_folder_of_no_known_class_is_refused_even_when_empty(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("data/nevus/a.png"))
    Path("data/akiec").mkdir()
    with pytest.raises(LabelError) as caught:
        load("data")
    assert str(caught.value) == (
        "data/akiec: label 'akiec' is no class of this federation "
        "(known: nevus, melanoma, Other): correct it or pass --map akiec=CLASS."
    )
    assert len(load("data", label_map={"akiec": "Other"})) == 1


@pytest.mark.parametrize("folder", ["", "nevus", "train/nevus"])
def test_a_folder_without_images_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "data" / folder).mkdir(parents=True)
    with pytest.raises(DataError, match="data holds no images: give a folder of class folders"):
        load(tmp_path / "data")


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert load(tmp_path, require_labels=False)[0].label == -1
    with pytest.raises(LabelError, match="has no labels"):
        load(tmp_path)


def test_files_that_are_left_out_are_reported(tmp_path: Path, caplog) -> None:
    picture(tmp_path / "nevus" / "a.png")
    picture(tmp_path / "loose.png")
    (tmp_path / "nevus" / "notes.txt").write_text("x")
    (tmp_path / "nevus" / "1.2.840").write_bytes(bytes(128) + b"DICM")
    assert [case.file for case in load(tmp_path)] == ["nevus/1.2.840", "nevus/a.png"]
    assert "2 files were left out" in caplog.text


def test_a_link_to_a_folder_above_does_not_lead_round(tmp_path: Path) -> None:
    picture(tmp_path / "nevus" / "a.png")
    (tmp_path / "nevus" / "loop").symlink_to(tmp_path / "nevus")
    assert [case.file for case in load(tmp_path)] == ["nevus/a.png"]


def test_an_image_folder_beside_class_folders_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "nevus" / "a.png")
    with pytest.raises(
        DataError, match=r"is not a CSV, so the image folder .* has no use: omit it"
    ):
        load(tmp_path, images=tmp_path)


# -- MedMNIST


def test_a_medmnist_file_gives_cases_with_splits(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "m.npz")
    cases = load(path)
    assert cases[1] == Case("train/1", ArrayItem(path, "train_images", 1), 1, split="train")
    assert [case.label for case in cases] == [0, 1, 2, 0, 1, 2]
    assert cases[-1].split == "test"
    assert [case.label for case in load(path, label_map={"2": "nevus"})] == [0, 1, 0, 0, 1, 0]


def test_a_number_is_never_a_group(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "m.npz", train_labels=np.array([[0], [1], [3], [0], [1]]))
    with pytest.raises(LabelError, match=re.escape("'3' is no class of this federation (0 to 2)")):
        load(path, groups=("dark",))
    cases = load(path, groups=("dark",), label_map={"3": "dark"})
    assert [case.label for case in cases][:3] == [0, 1, 3]


def test_grey_and_colour_images_come_out_of_a_medmnist_file(tmp_path: Path) -> None:
    cases = load(medmnist(tmp_path / "m.npz"))
    grey, colour = read_case(cases[1]), read_case(cases[-1])
    assert (grey.mode, grey.getpixel((1, 0))) == ("RGB", (17, 17, 17))
    assert colour.getpixel((3, 3)) == (9, 9, 9)


BAD_MEDMNIST: dict[str, tuple[dict[str, Any], str]] = {
    "label out of range": (
        {"train_labels": np.array([[0], [1], [7], [0], [1]])},
        "m.npz train_labels[2]: label '7' is no class of this federation (0 to 2): "
        "correct it or pass --map 7=CLASS.",
    ),
    "several labels": (
        {"train_labels": np.zeros((5, 14), np.int64)},
        "m.npz train_labels has shape (5, 14) and dtype int64 beside 5 images: "
        "give one whole number for each image.",
    ),
    "volumes": (
        {"train_images": np.zeros((5, 4, 4, 4), np.uint8)},
        "m.npz train_images has shape (5, 4, 4, 4) and dtype uint8, which is no set of 2-D images: "
        "give uint8 of shape (N, H, W) or (N, H, W, 3).",
    ),
    "no images": (
        {"train_images": None, "test_images": None},
        "m.npz holds no images under train_images, val_images or test_images "
        "(arrays: test_labels, train_labels): give a MedMNIST .npz.",
    ),
    "no labels": (
        {"test_labels": None},
        "m.npz test_labels[0] has no label: fill it in or remove the row.",
    ),
}


@pytest.mark.parametrize(("arrays", "sentence"), BAD_MEDMNIST.values(), ids=BAD_MEDMNIST.keys())
def test_a_bad_medmnist_file_is_refused(tmp_path, monkeypatch, arrays, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load(medmnist(Path("m.npz"), **arrays))
    assert str(caught.value) == sentence


def test_a_medmnist_file_that_is_damaged_or_pickled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    path.write_bytes(b"PK\3\4 broken")
    with pytest.raises(DataError, match=r"cannot be read as a MedMNIST file .*: download it again"):
        load(path)
    medmnist(path, train_labels=np.array([[0], ["x"], [None], [0], [1]], dtype=object))
    with pytest.raises(DataError, match=r"cannot be read as a MedMNIST file .*allow_pickle"):
        load(path)


# -- keys, real images, size


def test_a_key_changes_with_the_file_and_only_then(site: Path) -> None:
    for name in ("a.png", "b.png"):
        os.utime(name, ns=(0, 0))
    case, other = load(table(site, "file,label\na.png,nevus\nb.png,nevus\n"))
    key = case_key(case)
    assert key == case_key(load(site)[0]) != case_key(other)
    os.utime(case.source, ns=(1, 1))
    assert case_key(case) != key


def test_keys_inside_a_medmnist_file_differ(tmp_path: Path) -> None:
    assert len({case_key(case) for case in load(medmnist(tmp_path / "m.npz"))}) == 6


def test_a_file_that_went_away_is_an_image_error(site: Path) -> None:
    case = load(table(site, "file,label\na.png,nevus\n"))[0]
    Path("a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png cannot be read as an image"):
        case_key(case)
    with pytest.raises(ImageError, match=r"a\.png cannot be read as an image \(no such file\)"):
        read_case(case)


def test_cases_can_be_sent_to_worker_processes_and_put_in_sets(site: Path) -> None:
    cases = load(table(site, "file,label,site\na.png,nevus,x\nb.png,nevus,y\n"))
    assert pickle.loads(pickle.dumps(cases)) == cases
    assert len(set(cases + cases)) == 2


def test_every_real_image_loads(wbc: Path) -> None:
    cases = load_cases(wbc, classes=CELLS)
    assert Counter(case.split for case in cases) == {"train": 1112, "test": 457, "val": 275}
    sides = Counter((image.mode, min(image.size)) for image in map(read_case, cases))
    assert sides == {("RGB", 144): 1844}


@pytest.mark.parametrize(
    ("name", "count"), [("barcelona", 1100), ("jtsc", 299), ("cellavision", 97), ("bccd", 348)]
)
def test_one_site_is_chosen_from_the_real_table(wbc: Path, name: str, count: int) -> None:
    cases = load_cases(wbc / "labels.csv", classes=CELLS, where={"site": name})
    assert len(cases) == count
    assert all(case.file.startswith(f"images/{name}") for case in cases)
    assert len({case.label for case in cases}) == (5 if name == "barcelona" else 4)


def test_ten_thousand_rows_take_far_less_than_ten_seconds(site: Path) -> None:
    picture(Path("x.png"))
    content = "file,label\n"
    for index in range(10_000):
        os.link("x.png", f"{index}.png")
        content += f"{index}.png,nevus\n"
    table(site, content)
    start = time.perf_counter()
    assert len(load(site)) == 10_000
    assert time.perf_counter() - start < 5


def test_an_image_in_a_tensor_is_what_it_is_in_an_array(tmp_path: Path) -> None:
    pixels = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.savez(tmp_path / "a.npz", pixels=pixels)
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"pixels": torch.from_numpy(pixels)}, ("merge-kit", "{}"))
    first, second = (
        Case("x.png", ArrayItem(tmp_path / name, "pixels", 3), 0)
        for name in ("a.npz", "a.safetensors")
    )
    assert content_key(first) == content_key(second)
    assert np.array_equal(np.asarray(read_case(second)), pixels[3])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ImageError, match="cannot be read as an image"):
        read_case(second)
