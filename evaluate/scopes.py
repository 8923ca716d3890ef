"""Sets of cases that figures are computed on: all, the external ones, each site, each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluate.document import Count, Scope
from evaluate.labelled import LabelledSet
from merge_kit.errors import UsageError

MEAN = "mean_over_sites"
Kind = Literal["union", "external", "site", "group"]


@dataclass(frozen=True, slots=True)
class Part:
    """A scope and its cases."""

    scope: Scope
    rows: NDArray[np.int64]
    """(n,) indices into the labelled set."""


def parts(labelled: LabelledSet, external: Sequence[str], minimum: int) -> list[Part]:
    """All scopes that have cases: union, external, sites by name, groups by column and value.

    Parameters
    ----------
    external
        Sites that no model was trained on.
    minimum
        Scopes and classes of fewer cases are marked as small, their counts withheld.

    Raises
    ------
    UsageError
        No case is of an external site.
    """
    check_external(external, labelled)
    sites = sorted(set(labelled.sites) - {""})
    everything = np.arange(len(labelled), dtype=np.int64)
    found = [_part(labelled, "union", "union", "all cases", everything, minimum)]
    if external:
        rows = np.flatnonzero(np.isin(labelled.sites, external))
        found.append(_part(labelled, "external", "external", "external sites", rows, minimum))
    for site in sites:
        rows = labelled.rows(f"site:{site}")
        outside = site in external
        found.append(_part(labelled, f"site:{site}", "site", site, rows, minimum, external=outside))
    for column, values in labelled.columns.items():
        by_value: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            by_value.setdefault(value, []).append(row)
        for value, members in sorted(by_value.items()):
            key, rows = f"group:{column}={value}", np.array(members, dtype=np.int64)
            found.append(_part(labelled, key, "group", value, rows, minimum, column=column))
    return found


def check_external(external: Sequence[str], labelled: LabelledSet) -> None:
    """Refuse a site that no case is of, with `UsageError`."""
    sites = sorted(set(labelled.sites) - {""})
    if unknown := sorted(set(external) - set(sites)):
        raise UsageError(
            f"--external {unknown[0]}: no case is of this site (known: {', '.join(sites)})."
        )


def _part(
    labelled: LabelledSet,
    key: str,
    kind: Kind,
    name: str,
    rows: NDArray[np.int64],
    minimum: int,
    *,
    column: str | None = None,
    external: bool = False,
) -> Part:
    small = 0 < len(rows) < minimum
    counts = (labelled.targets[rows] == 1).sum(axis=0).tolist()
    scope = Scope(
        key=key,
        kind=kind,
        name=name,
        column=column,
        external=external,
        cases=None if small else len(rows),
        patients=None if small else _patients(labelled, rows),
        small=small,
        classes=tuple(
            count_of(label, n, minimum) for label, n in zip(labelled.classes, counts, strict=True)
        ),
    )
    return Part(scope, rows)


def count_of(name: str, n: int, minimum: int) -> Count:
    """A count, withheld where it is small but not 0."""
    small = 0 < n < minimum
    return Count(name=name, n=None if small else n, small=small)


def _patients(labelled: LabelledSet, rows: NDArray[np.int64]) -> int | None:
    """How many patients there are; None where some are unknown, or groups stand for them."""
    found = [labelled.patients[row] for row in rows]
    if labelled.unit != "patient" or None in found:
        return None
    return len(set(found))
