"""Training, validation and test parts of a site's cases, never with one patient in two of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from finetune.cases import Case
from merge_kit.errors import LabelError

# Parts of 1/4, 1/5, 3/20 ... of the data; fewer folds balance small classes better than many.
_MOST_FOLDS = 20


def assign_splits(
    cases: Sequence[Case], *, seed: int, val_fraction: float = 0.15, test_fraction: float = 0.25
) -> list[Case]:
    """Give every case a split, in the order of `cases`; the result has passed `check_splits`.

    Splits that the table gives are kept; where it gives no "val", that is taken out of "train".
    Otherwise the cases are drawn by scikit-learn's StratifiedGroupKFold: stratified by label (of
    several labels by the rarest that a case has, the first step of Sechidis, Tsoumakas and Vlahavas
    2011, doi:10.1007/978-3-642-23808-6_10), with
    all cases of a patient (or of a near-duplicate `group`, or that both connect) on one side. A
    class is never taken out of training completely: one with few patients may be missing from
    validation and test, and where too few patients are left for a split, that is an error. The
    result depends on the cases and the seed, not on the order of the rows.

    The fractions are of all cases, in [0, 1) with a sum below 1, and are met as closely as whole
    patients allow; `test_fraction=0` gives no test split. Raises LabelError.
    """
    if not (0 < val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise LabelError(
            f"the validation fraction {val_fraction} and the test fraction {test_fraction} must be "
            "positive (test may be 0) with a sum below 1: correct them."
        )
    without = [case.file for case in cases if case.split is None]
    if without and len(without) < len(cases):
        raise LabelError(
            f"{min(without)} has no split while other files have one: "
            "fill in the split of every file, or of none."
        )
    part_of_rest = val_fraction / (1 - test_fraction)
    if not without and split_of(cases, "val"):
        assigned = list(cases)
    elif not without:
        assigned = _carve(cases, "val", part_of_rest, seed)
    else:
        assigned = [replace(case, split="train") for case in cases]
        if test_fraction:
            assigned = _carve(assigned, "test", test_fraction, seed)
        assigned = _carve(assigned, "val", part_of_rest, seed)
    check_splits(assigned)
    return assigned


def check_splits(cases: Sequence[Case]) -> None:
    """Raise LabelError unless one can train on `cases`.

    That is: no patient and no group is in two splits, training and validation are not empty, and
    training holds more than one class, or of several labels a case one that some have and some not.
    """
    for name in ("patient", "group"):
        first: dict[str, Case] = {}
        for case in cases:
            key = getattr(case, name)
            if key is None or case.split is None:
                continue
            other = first.setdefault(key, case)
            if other.split != case.split:
                raise LabelError(
                    f"{name} {key} is in two splits, {other.split} ({other.file}) and "
                    f"{case.split} ({case.file}): put all images of a {name} into one."
                )
    training = split_of(cases, "train")
    for split, word in (("train", "training"), ("val", "validation")):
        if not split_of(cases, split):
            raise LabelError(
                f"the {word} split is empty ({_summary(cases)}): "
                f"give more images or patients, or say in the table which are {split}."
            )
    if training[0].targets is not None:
        if not any({0, 1} <= set(told) for told in zip(*_targets(training), strict=True)):
            raise LabelError(
                f"the training split holds no class with images that have it and images that do "
                f"not ({_summary(cases)}): annotate both."
            )
    elif len({case.label for case in training}) < 2:
        raise LabelError(
            f"the training split holds a single class ({_summary(cases)}): "
            "give images of other classes, from other patients, too."
        )


def split_of(cases: Sequence[Case], name: str) -> list[Case]:
    """The cases of one split ("train", "val" or "test"), in their order."""
    return [case for case in cases if case.split == name]


def _carve(cases: Sequence[Case], name: str, fraction: float, seed: int) -> list[Case]:
    """Move about `fraction` of the training cases into the split `name`."""
    pool = [index for index, case in enumerate(cases) if case.split == "train"]
    pool.sort(key=lambda index: cases[index].file)  # so that the order of the rows has no say
    drawn = {pool[place] for place in _draw([cases[index] for index in pool], fraction, seed)}
    return [
        replace(case, split=name) if index in drawn else case for index, case in enumerate(cases)
    ]


def _draw(pool: Sequence[Case], fraction: float, seed: int) -> list[int]:
    """Places of about `fraction` of the pool, nothing where that would empty a class of training.

    The only patient of a class stays in training. Of the folds that scikit-learn makes of the
    others, those are taken whose share of each class is nearest to `fraction`: with few patients
    some folds are empty, or hold all of a class.
    """
    classes, labels = np.unique(_strata(pool), return_inverse=True)
    units = np.array(_units(pool))
    holders = [np.unique(units[labels == label]) for label in range(len(classes))]
    only = [unit[0] for unit in holders if len(unit) == 1]
    free = np.flatnonzero(~np.isin(units, only))
    wanted = Fraction(fraction).limit_denominator(_MOST_FOLDS) or Fraction(1, _MOST_FOLDS)
    most_of_a_class = np.bincount(labels[free]).max(initial=0)
    folds = int(min(wanted.denominator, most_of_a_class, len(np.unique(units[free]))))
    if folds < 2:
        return []
    parts = [free[fold] for fold in _folds(labels[free], units[free], folds, seed)]
    counts = np.array([np.bincount(labels[part], minlength=len(classes)) for part in parts])
    totals = np.bincount(labels)

    def cost(taken: Sequence[int]) -> tuple[int, float]:
        count = counts[list(taken)].sum(axis=0)
        return int((count == totals).sum()), float(np.abs(count / totals - fraction).sum())

    taken: list[int] = []
    for _ in range(min(max(1, round(fraction * folds)), folds - 1)):
        rest = [fold for fold in range(folds) if fold not in taken]
        taken.append(min(rest, key=lambda fold: cost([*taken, fold])))
    emptied, _ = cost(taken)
    return [] if emptied else [place for fold in taken for place in parts[fold].tolist()]


def _targets(cases: Sequence[Case]) -> list[tuple[int, ...]]:
    return [case.targets or () for case in cases]


def _strata(pool: Sequence[Case]) -> list[int]:
    """By what cases are spread: the label, or the rarest of several; -1 for none of them."""
    if not pool or pool[0].targets is None:
        return [case.label for case in pool]
    positive = np.array(_targets(pool)) == 1
    counts = positive.sum(axis=0)
    rarest = np.where(positive, counts, len(pool) + 1).argmin(axis=1)
    found: list[int] = np.where(positive.any(axis=1), rarest, -1).tolist()
    return found


def _folds(
    labels: NDArray[np.intp], units: NDArray[np.intp], folds: int, seed: int
) -> list[NDArray[np.intp]]:
    """The places in each fold; whole units, the classes spread evenly."""
    alone = len(np.unique(units)) == len(units)
    # For units of one case the two do the same, and the plain one is a hundred times faster.
    splitter = StratifiedKFold if alone else StratifiedGroupKFold
    kfold = splitter(n_splits=folds, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        # A class of fewer cases than folds is missing from some of them, which _draw reckons with.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        groups = None if alone else units
        return [part for _, part in kfold.split(np.zeros(len(labels)), labels, groups)]


def _units(pool: Sequence[Case]) -> list[int]:
    """A number for each case; cases that share a patient or a group, directly or not, share it."""
    parent = list(range(len(pool)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, case in enumerate(pool):
        for kind, key in (("patient", case.patient), ("group", case.group)):
            if key is not None:
                a, b = root(index), root(first.setdefault((kind, key), index))
                parent[max(a, b)] = min(a, b)
    return [root(index) for index in range(len(pool))]


def _summary(cases: Sequence[Case]) -> str:
    counts = Counter(case.split for case in cases)
    return ", ".join(f"{name} {counts[name]}" for name in ("train", "val", "test"))
