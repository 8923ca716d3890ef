"""What a site lays out (class folders, a CSV, a MedMNIST file) -> rows with the place of each.

The three readers know the layouts and nothing of classes; `finetune.cases` gives labels a meaning.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.images import IMAGE_SUFFIXES, is_dicom
from merge_kit.errors import DataError, LabelError

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
NAMED_COLUMNS = ("file", "label", "patient", "group", "split")

_TABLE_NAME = "labels.csv"
_SEPARATORS = {";": "semicolons", "\t": "tabs"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArrayItem:
    """One image inside a MedMNIST .npz file (doi 10.1038/s41597-022-01721-8), or in a tensor of a
    safetensors file."""

    path: Path
    array: str
    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """One image as the site lists it; `place` is where that stands, in the words of a message."""

    place: str
    fields: Mapping[str, str]
    source: Path | ArrayItem


@dataclass(frozen=True, slots=True)
class Table:
    """All rows of a site's data, still with the site's own labels.

    `folders` maps each class folder's name to its path (no entries for other kinds of data);
    `numbered` says that labels are positions in the class list instead of names.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Row]
    folders: Mapping[str, Path] = field(default_factory=dict)
    numbered: bool = False


def read_table(data: Path, images: Path | None = None, *, multi_label: bool = False) -> Table:
    """List what `data` holds: see `finetune.cases.load_cases` for the layouts.

    Every row has a field `file`, relative and with "/" between folders. With `multi_label` the
    labels of a .npz may be (N, C) of 0 and 1: its rows then have a field for each class, named by
    its position, in place of `label`. Raises DataError for data that cannot be used as a whole,
    LabelError for a line of a CSV that cannot be understood.
    """
    if not data.exists():
        raise DataError(
            f"{data} does not exist: give a folder of class folders, a CSV file or a MedMNIST .npz."
        )
    if images is not None and not images.is_dir():
        raise DataError(f"{images} is not a folder: give the folder where the CSV's paths start.")
    if (data / _TABLE_NAME).is_file():
        return _read_csv(data / _TABLE_NAME, images)
    is_npz = data.suffix.lower() == ".npz"
    if images is not None and (is_npz or data.is_dir()):
        raise DataError(f"{data} is not a CSV, so the image folder {images} has no use: omit it.")
    if data.is_dir():
        return _read_folder(data)
    return _read_npz(data, multi_label) if is_npz else _read_csv(data, images)


def _read_csv(path: Path, images: Path | None) -> Table:
    records = csv_records(path)
    line, header = next(records, (1, []))
    if not header:
        raise LabelError(
            f"{path} is empty: it needs a header (file,label) and a line for an image."
        )
    names = _column_names(path, line, header)
    root = path.parent if images is None else images
    rows = []
    for line, record in records:
        place = f"{path} line {line}"
        if len(record) != len(names):
            raise LabelError(
                f"{place} has {len(record)} fields where the header has {len(names)}: "
                "correct it, and put quotes around a field that holds a comma."
            )
        fields = {name: value for name, value in zip(names, record, strict=True) if name}
        fields["file"] = _inside(place, fields["file"])
        rows.append(Row(place, fields, root / fields["file"]))
    if not rows:
        raise LabelError(f"{path} has a header but no image: add a line for each image.")
    return Table(str(path), [name for name in names if name], rows)


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV that hold anything, each with the number of its first line.

    Raises DataError (it cannot be read) and LabelError (a line that is not CSV or not UTF-8).
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = [value.strip() for value in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise LabelError(
                f"{path} line {line} is not CSV ({error}): mend its quotes."
            ) from error
        if any(record):
            yield line, record


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): mend its permissions."
        ) from error
    content = content.removeprefix(b"\xef\xbb\xbf")  # Excel's "CSV UTF-8" starts with this mark
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabelError(f"{path} line {line} is not UTF-8: save it as CSV UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise LabelError(f"{path} line {line} holds a NUL byte: save it as CSV UTF-8.")
    return text


def _column_names(path: Path, line: int, header: Sequence[str]) -> list[str]:
    """The names in the header; the ones that we know are recognised in any case."""
    names = [name.lower() if name.lower() in NAMED_COLUMNS else name for name in header]
    for separator, word in _SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise LabelError(f"{path} is separated by {word}: save it with commas.")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise LabelError(f"{path} line {line} names the column {twice[0]!r} twice: rename one.")
    if "file" not in names:
        raise LabelError(
            f"{path} line {line} must be a header with the columns file and label "
            f"(found: {', '.join(header)}): add it or rename the columns."
        )
    return names


def _inside(place: str, file: str) -> str:
    """The path in a normal form; one that could lead out of the image folder is refused."""
    if not file:
        raise LabelError(f"{place} names no file: fill it in or remove the line.")
    parts = file.replace("\\", "/")  # tables are written on Windows, too
    if parts.startswith("/") or parts[1:2] == ":" or ".." in parts.split("/"):
        raise LabelError(
            f"{place}: {file} leaves the image folder: give a relative path without '..'."
        )
    return posixpath.normpath(parts)


def _read_folder(data: Path) -> Table:
    top = _subfolders(data)
    left_out: list[Path] = []
    if not top:
        files = list(_images_below(data, left_out))
        rows = [Row(str(path), {"file": path.relative_to(data).as_posix()}, path) for path in files]
        return _non_empty(data, Table(str(data), ("file",), rows), left_out)
    holders = {data: ""}
    if all(folder.name.lower() in SPLIT_NAMES for folder in top):
        holders = {folder: folder.name for folder in top}
    folders: dict[str, Path] = {}
    rows = []
    for holder, split in holders.items():
        left_out += [entry for entry in _entries(holder) if not entry.is_dir()]
        for folder in _subfolders(holder):
            folders.setdefault(folder.name, folder)
            for path in _images_below(folder, left_out):
                file = path.relative_to(data).as_posix()
                fields = {"file": file, "label": folder.name, "split": split}
                rows.append(Row(str(path), fields, path))
    return _non_empty(data, Table(str(data), ("file", "label", "split"), rows, folders), left_out)


def _non_empty(data: Path, table: Table, left_out: Sequence[Path]) -> Table:
    if left_out:
        logger.warning(
            "%s: %d files were left out because they are no images or lie in no class folder "
            "(first: %s).",
            data,
            len(left_out),
            min(left_out),
        )
    if not table.rows:
        raise DataError(
            f"{data} holds no images: give a folder of class folders, or one with a {_TABLE_NAME}."
        )
    return table


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files such as .DS_Store."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}): mend its permissions."
        ) from error
    return [folder / name for name in names if not name.startswith(".")]


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _images_below(
    folder: Path, left_out: list[Path], above: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Image files in a folder and its subfolders; the others are added to `left_out`."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above would lead round for ever
        return
    for entry in _entries(folder):
        # The suffix is asked first: it saves a question to the file system for each image.
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir():
            yield entry
        elif entry.is_dir():
            yield from _images_below(entry, left_out, above | {real})
        elif _is_unnamed_dicom(entry):
            yield entry
        else:
            left_out.append(entry)


def _is_unnamed_dicom(path: Path) -> bool:
    """Scanners often name files by number, without a suffix."""
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return True  # reading it later will say what is wrong with it


def _read_npz(path: Path, multi_label: bool) -> Table:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = sorted(name.removesuffix(".npy") for name in archive.namelist())
            rows = [
                row
                for split in ("train", "val", "test")
                if f"{split}_images" in arrays
                for row in _split_rows(
                    path, archive, split, f"{split}_labels" in arrays, multi_label
                )
            ]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as a MedMNIST file ({error}): download it again."
        ) from error
    if not rows:
        raise DataError(
            f"{path} holds no images under train_images, val_images or test_images "
            f"(arrays: {', '.join(arrays)}): give a MedMNIST .npz."
        )
    return Table(str(path), tuple(rows[0].fields), rows, numbered=True)


def _split_rows(
    path: Path, archive: zipfile.ZipFile, split: str, labelled: bool, multi_label: bool
) -> list[Row]:
    shape, dtype = _shape_and_dtype(archive, f"{split}_images")
    if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise DataError(
            f"{path} {split}_images has shape {shape} and dtype {dtype}, which is no set of 2-D "
            "images: give uint8 of shape (N, H, W) or (N, H, W, 3)."
        )
    count = shape[0]
    told: list[dict[str, str]] = [{"label": ""}] * count
    if labelled:
        numbers = read_array(archive, f"{split}_labels")
        several = multi_label and numbers.ndim == 2 and numbers.shape[1] != 1
        fits = numbers.shape in ((count,), (count, 1)) or (several and len(numbers) == count)
        if numbers.dtype.kind not in "iu" or not fits:
            raise DataError(
                f"{path} {split}_labels has shape {numbers.shape} and dtype {numbers.dtype} beside "
                f"{count} images: give one whole number for each image."
            )
        names = [str(place) for place in range(numbers.shape[1])] if several else ["label"]
        rows = numbers.reshape(count, len(names)).tolist()
        texts = [[str(number) for number in row] for row in rows]
        told = [dict(zip(names, row, strict=True)) for row in texts]
    return [
        Row(
            f"{path} {split}_labels[{index}]",
            {"file": f"{split}/{index}", **fields, "split": split},
            ArrayItem(path, f"{split}_images", index),
        )
        for index, fields in enumerate(told)
    ]


def _shape_and_dtype(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Of one array, from its header alone: the pixels may be gigabytes."""
    with archive.open(f"{name}.npy") as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        header = (
            np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
    return shape, dtype


def read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an open .npz, never unpickled; raises ValueError for an array of objects."""
    with archive.open(f"{name}.npy") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
