"""Splits keep patients together, keep classes in training, and do not depend on the row order."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cases import Case
from finetune.splits import assign_splits, check_splits, split_of
from merge_kit.errors import LabelError


def cases_of(*labels_by_patient: str, split: str | None = None) -> list[Case]:
    """One patient for each argument, one image for each digit (its label) in it."""
    return [
        Case(
            f"p{patient}_{i}.png",
            Path(f"p{patient}_{i}.png"),
            int(label),
            f"p{patient}",
            None,
            split,
        )
        for patient, labels in enumerate(labels_by_patient)
        for i, label in enumerate(labels)
    ]


def by_file(cases: list[Case]) -> dict[str, str | None]:
    return {case.file: case.split for case in cases}


def shares(cases: list[Case], label: int) -> list[int]:
    count = Counter(case.split for case in cases if case.label == label)
    return [count[name] for name in ("train", "val", "test")]


def test_single_images_are_split_60_15_25_in_every_class() -> None:
    cases = [replace(case, patient=None) for case in cases_of("0" * 200, "1" * 40)]
    assigned = assign_splits(cases, seed=0)
    assert shares(assigned, 0) == [120, 30, 50]
    assert shares(assigned, 1) == [24, 6, 10]


def test_patients_stay_together_and_classes_stay_balanced() -> None:
    assigned = assign_splits(cases_of(*["000", "11", "0011"] * 40), seed=3)
    assert len({(c.patient, c.split) for c in assigned}) == 120
    for label, total in ((0, 200), (1, 160)):
        found = [count / total for count in shares(assigned, label)]
        assert found == pytest.approx([0.6, 0.15, 0.25], abs=0.05)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows() -> None:
    cases = cases_of(*["01", "0", "1"] * 10)
    shuffled = random.Random(1).sample(cases, len(cases))
    assigned = assign_splits(cases, seed=5)
    assert by_file(assign_splits(shuffled, seed=5)) == by_file(assigned)
    assert [case.file for case in assign_splits(shuffled, seed=5)] == [c.file for c in shuffled]
    assert by_file(assign_splits(cases, seed=6)) != by_file(assigned)


def test_near_duplicates_stay_together_across_patients() -> None:
    cases = cases_of(*["01"] * 12)
    chained = [replace(case, group=f"g{int(case.patient[1:]) // 2}") for case in cases]
    assigned = assign_splits(chained, seed=0)
    assert len({(case.group, case.split) for case in assigned}) == 6
    assert {case.split for case in assigned} == {"train", "val", "test"}


def test_given_splits_are_kept() -> None:
    cases = [
        replace(case, split={"p0": "val", "p1": "test"}.get(case.patient or "", "train"))
        for case in cases_of(*["01"] * 20)
    ]
    assert assign_splits(cases, seed=0) == cases


def test_a_missing_validation_split_is_taken_out_of_training_only() -> None:
    training, test = cases_of(*["01"] * 20, split="train"), cases_of("01", split="test")
    test = [replace(case, file=f"t{case.file}", patient="t") for case in test]
    assigned = assign_splits(training + test, seed=0)
    assert assigned[-2:] == test
    assert Counter(case.split for case in assigned) == {"train": 32, "val": 8, "test": 2}


def test_without_a_test_fraction_there_is_no_test_split() -> None:
    assigned = assign_splits(cases_of(*["01"] * 20), seed=0, test_fraction=0, val_fraction=0.25)
    assert Counter(case.split for case in assigned) == {"train": 30, "val": 10}


def test_a_class_of_one_patient_stays_in_training() -> None:
    for seed in range(10):
        assigned = assign_splits(cases_of(*["0", "1"] * 10, "22"), seed=seed)
        assert shares(assigned, 2) == [2, 0, 0]


def test_three_patients_are_enough() -> None:
    assigned = assign_splits(cases_of("0101", "01", "001"), seed=0)
    assert {case.split for case in assigned} == {"train", "val", "test"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("012", min_size=1, max_size=5), min_size=1, max_size=12),
    st.integers(0, 2**40),
    st.sampled_from([(0.15, 0.25), (0.1, 0.1), (0.3, 0.0), (0.02, 0.5)]),
)
def test_any_site_gets_a_sound_split_or_a_reason(patients, seed, fractions) -> None:
    val, test = fractions
    cases = cases_of(*patients)
    enough = all(sum(label in patient for patient in patients) >= 5 for label in "012")
    try:
        assigned = assign_splits(cases, seed=seed, val_fraction=val, test_fraction=test)
    except LabelError:
        assert not enough
    else:
        labels = {case.label for case in cases}
        assert {case.label for case in split_of(assigned, "train")} == labels
        assert split_of(assigned, "val")
        assert bool(split_of(assigned, "test")) == (test > 0)


@pytest.mark.parametrize(
    ("patients", "val"),
    [(["0", "01", "02"], 0.15), (["0", "0", "0", "1", "1", "2", "2", "3", "3"], 0.75)],
    ids=["single patients", "pairs"],
)
def test_a_split_that_would_cost_training_a_class_is_refused(patients, val: float) -> None:
    with pytest.raises(LabelError, match="the validation split is empty"):
        assign_splits(cases_of(*patients), seed=0, val_fraction=val, test_fraction=0)


BAD = {
    "patient in two splits": (
        [("a.png", 0, "P7", None, "train"), ("b.png", 1, "P7", None, "test")],
        "patient P7 is in two splits, train (a.png) and test (b.png): "
        "put all images of a patient into one.",
    ),
    "group in two splits": (
        [("a.png", 0, "P1", "g", "train"), ("b.png", 1, "P2", "g", "val")],
        "group g is in two splits, train (a.png) and val (b.png): "
        "put all images of a group into one.",
    ),
    "some without a split": (
        [
            ("a.png", 0, None, None, "train"),
            ("c.png", 1, None, None, None),
            ("b.png", 1, None, None, None),
        ],
        "b.png has no split while other files have one: "
        "fill in the split of every file, or of none.",
    ),
    "no training": (
        [("a.png", 0, None, None, "val"), ("b.png", 1, None, None, "test")],
        "the training split is empty (train 0, val 1, test 1): "
        "give more images or patients, or say in the table which are train.",
    ),
    "one patient": (
        [("a.png", 0, "P", None, None), ("b.png", 1, "P", None, None)],
        "the validation split is empty (train 2, val 0, test 0): "
        "give more images or patients, or say in the table which are val.",
    ),
    "one class": (
        [("a.png", 0, None, None, "train"), ("b.png", 1, None, None, "val")],
        "the training split holds a single class (train 1, val 1, test 0): "
        "give images of other classes, from other patients, too.",
    ),
    "no cases": (
        [],
        "the training split is empty (train 0, val 0, test 0): "
        "give more images or patients, or say in the table which are train.",
    ),
}


@pytest.mark.parametrize(("rows", "sentence"), BAD.values(), ids=BAD.keys())
def test_a_bad_split_is_refused_with_one_sentence(rows, sentence: str) -> None:
    cases = [Case(row[0], Path(row[0]), *row[1:]) for row in rows]
    with pytest.raises(LabelError) as caught:
        assign_splits(cases, seed=0)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.25), (0.5, 0.5), (0.1, -0.1)])
def test_fractions_that_leave_nothing_are_refused(val: float, test: float) -> None:
    with pytest.raises(LabelError, match="must be positive"):
        assign_splits(cases_of("01", "01", "01"), seed=0, val_fraction=val, test_fraction=test)


def test_a_patient_may_have_many_images_in_one_split() -> None:
    check_splits([*cases_of("0101", split="train"), Case("v", Path("v"), 0, "v", None, "val")])


# Cases of several classes


def findings(*targets: tuple[int, ...], each: int = 1, name: str = "") -> list[Case]:
    return [
        Case(f"{name}{i}_{j}.png", Path(f"{name}{i}_{j}.png"), -1, targets=told)
        for i, told in enumerate(targets)
        for j in range(each)
    ]


def test_cases_of_several_classes_are_spread_by_the_rarest_of_them() -> None:
    cases = findings((1, 0, -1), (1, 1, -1), (0, 0, 0), each=40) + findings(
        (0, 1, 1), each=20, name="rare"
    )
    assigned = assign_splits(cases, seed=0)
    for first, size in (("0", 40), ("1", 40), ("2", 40)):
        here = Counter(c.split for c in assigned if c.file.startswith(f"{first}_"))
        assert (here["train"], here["val"], here["test"]) == (size * 0.6, size * 0.15, size * 0.25)
    rare = Counter(c.split for c in assigned if c.targets == (0, 1, 1))
    assert rare == {"train": 12, "val": 3, "test": 5}
    by_name = {case.file: case.split for case in assigned}
    again = assign_splits(cases[::-1], seed=0)
    assert {case.file: case.split for case in again} == by_name


def test_training_needs_a_class_that_some_images_have_and_some_do_not() -> None:
    cases = [
        replace(case, split=split)
        for case, split in zip(
            findings((1, -1), (1, 0), (0, 1)), ("train", "train", "val"), strict=True
        )
    ]
    with pytest.raises(LabelError) as caught:
        check_splits(cases)
    assert str(caught.value) == (
        "the training split holds no class with images that have it and images that do not "
        "(train 2, val 1, test 0): annotate both."
    )
