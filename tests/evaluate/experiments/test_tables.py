"""Sites of an experiment: natural ones, and those that a seed draws."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from evaluate.experiments import tables
from evaluate.experiments.config import Split
from merge_kit.errors import LabelError
from tests.finetune.pictures import draw, write_csv
from tests.merge_kit.helpers import says

CLASSES = ("round", "lobed", "granular")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """60 images a class; every two of a class are of one patient."""
    folder = tmp_path_factory.mktemp("cells")
    rows = []
    for label, name in enumerate(CLASSES):
        for number, pixels in enumerate(draw([label] * 60, seed=label)):
            file = f"{name}{number}.png"
            Image.fromarray(pixels).save(folder / file)
            rows.append({"file": file, "label": name, "patient": f"{name}{number // 2}"})
    return write_csv(folder / "labels.csv", rows)


def read(union):
    with union.path.open(newline="") as file:
        return list(csv.DictReader(file))


def counts(rows):
    found = defaultdict(Counter)
    for row in rows:
        found[row["site"]][row["label"]] += 1
    return found


@pytest.mark.parametrize(
    "split",
    [
        Split(kind="dirichlet", sites=3, alpha=5.0),
        Split(kind="quantity", sites=3, alpha=5.0),
        Split(kind="missing", sites=3, missing=1),
    ],
    ids=lambda split: split.kind,
)
def test_every_case_is_at_one_site_and_patients_stay_together(table, tmp_path, split):
    union = tables.artificial(table, CLASSES, split, tmp_path / "all.csv", 3)
    rows = read(union)
    assert sorted(row["file"] for row in rows) == sorted(
        f"{name}{number}.png" for name in CLASSES for number in range(60)
    )
    assert set(union.sites) == {row["site"] for row in rows} == {"site-1", "site-2", "site-3"}
    homes = defaultdict(set)
    for row in rows:
        homes[row["file"].rstrip("0123456789.png"), row["patient"].split(":")[1]].add(row["site"])
    assert all(len(home) == 1 for home in homes.values())


def test_the_seed_decides(table, tmp_path):
    split = Split(kind="dirichlet", sites=3, alpha=1.0)
    one, same, other = (
        tables.artificial(table, CLASSES, split, tmp_path / f"{n}.csv", seed).path.read_bytes()
        for n, seed in ((1, 4), (2, 4), (3, 6))
    )
    assert one == same != other


def test_missing_classes_are_missing_and_the_others_shared_alike(table, tmp_path):
    split = Split(kind="missing", sites=3, missing=1)
    found = counts(read(tables.artificial(table, CLASSES, split, tmp_path / "all.csv", 0)))
    assert {site: set(CLASSES) - set(there) for site, there in found.items()} == {
        "site-1": {"round"}, "site-2": {"lobed"}, "site-3": {"granular"},
    }  # fmt: skip
    assert {n for there in found.values() for n in there.values()} == {30}


def test_quantity_skew_gives_all_classes_the_same_shares(table, tmp_path):
    split = Split(kind="quantity", sites=3, alpha=2.0)
    found = counts(read(tables.artificial(table, CLASSES, split, tmp_path / "all.csv", 1)))
    sizes = [sum(there.values()) for there in found.values()]
    assert max(sizes) > min(sizes)
    assert all(len(set(there.values())) == 1 for there in found.values())


def test_shifted_sites_look_different_and_the_originals_stay(table, tmp_path):
    split = Split(kind="shift", sites=2)
    before = table.with_name("round0.png").read_bytes()
    union = tables.artificial(table, CLASSES, split, tmp_path / "all.csv", 0)
    light = defaultdict(list)
    for row in read(union):
        light[row["site"]].append(np.asarray(Image.open(union.images / row["file"])).mean())
    first, second = (np.mean(values) for values in light.values())
    assert abs(first - second) > 2
    assert table.with_name("round0.png").read_bytes() == before


@pytest.mark.parametrize(
    ("split", "seed", "sentence"),
    [
        (
            Split(kind="missing", sites=2, missing=2),
            0,
            "no site would have the class 'round': take more sites, or fewer missing.",
        ),
        (
            Split(kind="dirichlet", sites=20, alpha=0.01),
            0,
            "site-1 would have fewer than two classes with this split and seed 0: take fewer "
            "sites, or a larger alpha.",
        ),
    ],
    ids=["missing everywhere", "one class"],
)
def test_sites_that_could_not_train_are_refused(table, tmp_path, split, seed, sentence):
    with says(LabelError, sentence):
        tables.artificial(table, CLASSES, split, tmp_path / "all.csv", seed)


def test_a_table_without_sites_is_refused(table, tmp_path):
    with says(
        LabelError,
        f"{table} lacks the column 'site', or a value in it: it must name sites.",
    ):
        tables.natural(table, CLASSES, tmp_path / "all.csv", 0)
