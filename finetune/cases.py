"""The labelled images of a site: rows of its table -> cases with the federation's classes.

Nothing is decoded here until `read_case`. What cannot be trusted (a label that is no class of the
federation, a file that is not there or listed twice) is refused with the place where it stands.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from finetune.images import SixteenBit, read_image
from finetune.labels import Labels, find_labels, nearest, refuse_unknown_labels
from finetune.tables import (
    NAMED_COLUMNS,
    SPLIT_NAMES,
    ArrayItem,
    Row,
    Table,
    read_array,
    read_table,
)
from merge_kit.errors import ImageError, LabelError, TensorFileError
from merge_kit.files import sha256_file
from merge_kit.predictionsfile import digest_of
from merge_kit.tensorfile import TensorFile

_ONE_READER = threading.Lock()

__all__ = [
    "ArrayItem",
    "Case",
    "case_key",
    "cases_of",
    "content_key",
    "contents_digest",
    "load_cases",
    "load_unlabelled",
    "read_case",
]


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled image of a site.

    `file` is the name as the table gives it (relative, "/" between folders); `label` is an index
    into the federation's classes and, behind them, its groups of classes, -1 when the data has no
    labels and none were required, or where a case may have several; `patient`, `group` (near
    duplicates) and `split` ("train", "val" or "test") are None when not given; `columns` holds
    every other column of the table; `targets` has for each class 1 (present), 0 (absent) or -1 (not
    annotated), where a case may have several.
    """

    file: str
    source: Path | ArrayItem
    label: int
    patient: str | None = None
    group: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    targets: tuple[int, ...] | None = None


def load_cases(
    data: Path,
    *,
    classes: Sequence[str],
    images: Path | None = None,
    label_map: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    require_labels: bool = True,
    multi_label: bool = False,
    groups: Sequence[str] = (),
    annotated: Sequence[str] | None = None,
) -> list[Case]:
    """List the labelled images of `data`, in the order of the table or of the sorted file names.

    `data` is one of
    - a folder of class folders, with or without train/val/test folders above them,
    - a CSV with a header, columns `file` and `label` and optionally `patient`, `group`, `split` and
      any others (or a folder with such a labels.csv), paths being relative to `images` or else to
      the folder of the CSV,
    - a MedMNIST .npz, where the label i means the class at position i.

    A label is first replaced as `label_map` says, then looked up in `classes` as it is written,
    then without regard to case. `where` keeps the rows whose columns have exactly these values;
    only these rows have to be right. With `require_labels=False` rows may lack a label.

    With `multi_label` a case may be of several classes or of none (`Case.targets`): a CSV has a
    column for each class, holding 1, 0 or nothing (not annotated), and no column `label`; or it has
    `label` with "|" between the classes, where `label_map` gives "" to a label that means none of
    them; or the labels of a .npz are (N, C) of 0 and 1. `annotated` names the classes of which
    these labels speak: the others are not annotated in any case. None means all of them, or those
    that have a column.

    A label may also name one of `groups`, which are counted behind the classes: the case is of one
    of the classes in that group.

    Raises DataError (a file or folder that cannot be used) and LabelError (a wrong row, with its
    line), each with one sentence.
    """
    table = read_table(data, images, multi_label=multi_label)
    return cases_of(
        table,
        classes=classes,
        label_map=label_map,
        where=where,
        require_labels=require_labels,
        multi_label=multi_label,
        groups=groups,
        annotated=annotated,
    )


def load_unlabelled(
    data: Path, *, images: Path | None = None, where: Mapping[str, str] | None = None
) -> list[Case]:
    """The images of `data`, whatever their labels are; also of a folder without class folders.

    Raises DataError and LabelError as `load_cases`.
    """
    table = read_table(data, images)
    rows = [replace(row, fields={**row.fields, "label": ""}) for row in table.rows]
    plain = Table(table.name, table.columns, rows)
    return cases_of(plain, classes=(), where=where, require_labels=False)


def cases_of(
    table: Table,
    *,
    classes: Sequence[str],
    label_map: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    require_labels: bool = True,
    multi_label: bool = False,
    groups: Sequence[str] = (),
    annotated: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a table that has been read; see `load_cases`."""
    labels = find_labels(
        table, classes, label_map or {}, require_labels, multi_label, groups, annotated
    )
    rows = _select(table, where or {})
    refuse_unknown_labels(table, rows, labels, require_labels)
    _refuse_wrong_files(rows)
    return [_case(row, labels) for row in rows]


def read_case(case: Case, *, sixteen_bit: SixteenBit = "full") -> Image.Image:
    """The image of a case, mode "RGB", uint8; raises ImageError. See `read_image`."""
    if isinstance(case.source, Path):
        return read_image(case.source, sixteen_bit=sixteen_bit)
    return Image.fromarray(_item(case.source)).convert("RGB")


def case_key(case: Case) -> str:
    """64 hexadecimal digits that change when the image file is replaced, for caches at the site.

    Made of path, size and modification time (and array and index inside a .npz), not of the
    pixels: a decoded image also depends on the options that it was read with. Raises ImageError.
    """
    if isinstance(case.source, Path):
        path, inside = case.source, ""
    else:
        path, inside = case.source.path, f"{case.source.array}[{case.source.index}]"
    size, changed = _size_and_time(path)
    identity = "\0".join((os.path.abspath(path), str(size), str(changed), inside))
    return hashlib.sha256(os.fsencode(identity)).hexdigest()


def _select(table: Table, where: Mapping[str, str]) -> list[Row]:
    for column in where:
        if column not in table.columns:
            raise LabelError(
                f"{table.name} has no column {column!r} to select by "
                f"(columns: {', '.join(table.columns)}): correct --where."
            )
    wanted = {column: value.strip() for column, value in where.items()}
    rows = [row for row in table.rows if all(row.fields[c] == v for c, v in wanted.items())]
    if not rows and wanted:
        column, value = next(
            ((c, v) for c, v in wanted.items() if all(row.fields[c] != v for row in table.rows)),
            next(iter(wanted.items())),
        )
        seen = sorted({row.fields[column] for row in table.rows})
        raise LabelError(
            f"{table.name} has no row where {' and '.join(f'{c}={v}' for c, v in wanted.items())} "
            f"({column}: {nearest(value, seen)}): correct --where."
        )
    return rows


def _refuse_wrong_files(rows: Sequence[Row]) -> None:
    places: dict[str, str] = {}
    for row in rows:
        file = row.fields["file"]
        if file in places:
            raise LabelError(
                f"{row.place} lists {file}, as does {places[file]}: remove one of the two."
            )
        places[file] = row.place
        # One question to the file system for each file, so that 100,000 take a second.
        if isinstance(row.source, Path) and not os.path.isfile(row.source):
            raise LabelError(
                f"{row.place} lists {file}, but {row.source} is no file: "
                "correct the path or pass --images FOLDER."
            )


def _case(row: Row, labels: Labels) -> Case:
    fields = row.fields
    written = fields.get("split", "")
    split = SPLIT_NAMES.get(written.lower())
    if written and split is None:
        raise LabelError(
            f"{row.place}: split {written!r} is unknown: write train, val or test, or nothing."
        )
    label, targets = labels.of(row)
    return Case(
        file=fields["file"],
        source=row.source,
        label=label,
        targets=targets,
        patient=fields.get("patient") or None,
        group=fields.get("group") or None,
        split=split,
        columns={
            name: value
            for name, value in fields.items()
            if name not in NAMED_COLUMNS and name not in labels.columns
        },
    )


def content_key(case: Case) -> str:
    """64 hexadecimal digits of the image's content: SHA-256 of the file's bytes, or of the array
    item with its dtype and shape. Raises ImageError."""
    if isinstance(case.source, ArrayItem):
        pixels = _item(case.source)
        told = f"{pixels.dtype.str} {pixels.shape}\n".encode()
        return hashlib.sha256(told + pixels.tobytes()).hexdigest()
    try:
        return sha256_file(case.source).removeprefix("sha256:")
    except OSError as error:
        raise ImageError(
            f"{case.source.as_posix()} cannot be read as an image ({error.strerror}): "
            "put the file back, or pass --skip-unreadable."
        ) from error


def contents_digest(cases: Sequence[Case]) -> str:
    """A digest of what the images hold, whatever they are called and in whatever order."""
    return digest_of([content_key(case) for case in cases])


def _item(item: ArrayItem) -> NDArray[Any]:
    size, changed = _size_and_time(item.path)
    try:
        pixels: NDArray[Any] = _pixels(item.path, item.array, size, changed)[item.index]
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TensorFileError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ImageError(
            f"{item.path.as_posix()} {item.array}[{item.index}] cannot be read as an image "
            f"({error}): replace the file, or pass --skip-unreadable."
        ) from error
    return pixels


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(
            f"{path.as_posix()} cannot be read as an image ({error.strerror}): "
            "put the file back, or pass --skip-unreadable."
        ) from error
    return status.st_size, status.st_mtime_ns


def _pixels(path: Path, array: str, size: int, changed: int) -> NDArray[Any]:
    with _ONE_READER:  # else every decoding thread would unpack the whole array for itself
        return _unpacked(path, array, size, changed)


# Three, for the three splits of a MedMNIST file: a compressed array cannot be read in parts.
@lru_cache(maxsize=3)
def _unpacked(path: Path, array: str, size: int, changed: int) -> NDArray[Any]:
    """All images of an array; size and time of the file are part of the cache's key."""
    if path.suffix == ".safetensors":
        with TensorFile(path) as file:
            images: NDArray[Any] = file.read(array).numpy()
            return images
    with zipfile.ZipFile(path) as archive:
        return read_array(archive, array)
