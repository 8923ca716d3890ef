"""The table of an experiment: every case with its site and its split."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageEnhance, ImageFilter

from evaluate.experiments.config import Split
from finetune.cases import Case, load_cases, read_case
from finetune.splits import assign_splits
from merge_kit.errors import LabelError
from merge_kit.files import write_atomic

_COLUMNS = ["file", "label", "site", "patient", "group", "split"]


@dataclass(frozen=True, slots=True)
class Union:
    """The cases of all sites in one table."""

    path: Path
    images: Path
    """What its paths start from."""
    sites: tuple[str, ...]
    classes: tuple[str, ...]


def labels_of(path: Path) -> tuple[str, ...]:
    """The labels of a table, sorted.

    Raises
    ------
    LabelError
        It cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = {(row.get("label") or "").strip() for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{path} cannot be read as a UTF-8 table: check --data.") from error
    return tuple(sorted(found - {""}))


def natural(path: Path, classes: Sequence[str], target: Path, seed: int) -> Union:
    """The table with the sites that its column `site` names.

    Splits that it gives are kept; other cases are split by the seed, each site by itself.

    Raises
    ------
    LabelError
        The column is missing, or two sites have nearly the same name.
    """
    cases = load_cases(path, classes=classes)
    sites = sorted({case.columns.get("site", "") for case in cases})
    if "" in sites:
        raise LabelError(f"{path} lacks the column 'site', or a value in it: it must name sites.")
    names = {site: re.sub(r"[^a-z0-9]+", "-", site.lower()).strip("-") for site in sites}
    if len(set(names.values())) != len(sites):
        raise LabelError(f"{path}: two sites have nearly the same name: rename one.")
    by_site = {names[s]: [c for c in cases if c.columns["site"] == s] for s in sites}
    return _write(by_site, classes, path.parent, target, seed)


def artificial(path: Path, classes: Sequence[str], split: Split, target: Path, seed: int) -> Union:
    """The table with sites that the seed draws; cases of one patient or group stay together.

    Raises
    ------
    LabelError
        A site would have no case of two classes in training.
    """
    cases = sorted(load_cases(path, classes=classes), key=lambda case: case.file)
    generator = np.random.default_rng(seed)
    owner = _owners(cases, classes, split, generator)
    names = [f"site-{number + 1}" for number in range(split.sites)]
    by_site = {n: [c for c, o in zip(cases, owner, strict=True) if o == i]
               for i, n in enumerate(names)}  # fmt: skip
    for name, own in by_site.items():
        if len({case.label for case in own}) < 2:
            raise LabelError(
                f"{name} would have fewer than two classes with this split and seed {seed}: take "
                "fewer sites, or a larger alpha."
            )
    images = path.parent
    if split.kind == "shift":
        images = target.parent / "images"
        # The table comes last, so where it is, the images are, too.
        write = not target.is_file()
        by_site = {n: _shifted(n, own, images, generator, write) for n, own in by_site.items()}
    return _write(by_site, classes, images, target, seed)


def _owners(
    cases: Sequence[Case], classes: Sequence[str], split: Split, generator: np.random.Generator
) -> NDArray[np.intp]:
    """The site of each case."""
    units = [case.patient or case.group or case.file for case in cases]
    first = {unit: case.label for unit, case in zip(reversed(units), reversed(cases), strict=True)}
    order = generator.permutation(sorted(first)).tolist()
    shares = _shares(split, classes, generator)
    owner: dict[str, int] = {}
    for label in range(len(classes)):
        own = [unit for unit in order if first[unit] == label]
        bounds = np.floor(np.cumsum(shares[label]) * len(own) + 0.5)
        for position, unit in enumerate(own):
            owner[unit] = int(np.searchsorted(bounds[:-1], position, side="right"))
    return np.array([owner[unit] for unit in units])


def _shares(
    split: Split, classes: Sequence[str], generator: np.random.Generator
) -> NDArray[np.float64]:
    """The share of each class's cases that each site gets: (C, N)."""
    size = (len(classes), split.sites)
    if split.kind == "dirichlet":
        return generator.dirichlet(np.full(split.sites, split.alpha), len(classes))
    if split.kind == "quantity":
        return np.broadcast_to(generator.dirichlet(np.full(split.sites, split.alpha)), size)
    shares = np.ones(size)
    if split.kind == "missing":
        for site in range(split.sites):
            for step in range(split.missing):
                shares[(site * split.missing + step) % len(classes), site] = 0.0
        if odd := [classes[int(i)] for i in np.flatnonzero(shares.sum(axis=1) == 0)]:
            raise LabelError(
                f"no site would have the class '{odd[0]}': take more sites, or fewer missing."
            )
    found: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return found


def _shifted(
    site: str, cases: Sequence[Case], folder: Path, generator: np.random.Generator, write: bool
) -> list[Case]:
    """The site's images as another scanner might have taken them."""
    colour, light, contrast = generator.uniform(0.6, 1.4, 3)
    blur = float(generator.uniform(0, 1.5))
    found = []
    for number, case in enumerate(cases):
        name = f"{site}/{number:05d}.png"
        found.append(replace(case, file=name))
        if not write:
            continue
        picture = read_case(case)
        for enhance, factor in (
            (ImageEnhance.Color, colour),
            (ImageEnhance.Brightness, light),
            (ImageEnhance.Contrast, contrast),
        ):
            picture = enhance(picture).enhance(factor)
        (folder / site).mkdir(parents=True, exist_ok=True)
        picture.filter(ImageFilter.GaussianBlur(blur)).save(folder / name)
    return found


def _write(
    by_site: Mapping[str, Sequence[Case]],
    classes: Sequence[str],
    images: Path,
    target: Path,
    seed: int,
) -> Union:
    rows = []
    for site, cases in by_site.items():
        for case in assign_splits(list(cases), seed=seed):
            # A patient's or group's name holds within one site only.
            patient, group = (f"{site}:{u}" if u else "" for u in (case.patient, case.group))
            rows.append([case.file, classes[case.label], site, patient, group, case.split])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *rows])
    content = text.getvalue()
    if not target.is_file() or target.read_bytes() != content.encode():
        write_atomic(target, content)
    return Union(target, images, tuple(sorted(by_site)), tuple(classes))
