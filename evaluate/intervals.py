"""Figures with their intervals, and scores of one model with their replicates.

The interval is the percentile interval of the resamples, except where that would mislead:

- Where no resample differs from the sample (a perfect score) percentiles would claim certainty:
  there is no interval, and a share gets that of Wilson.
- Resamples spread cases more unevenly over the bins of a calibration error than the sample does,
  which raises it in every one of them: its bounds are moved by the mean rise, so that they lie
  about the figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluate.document import Figure
from evaluate.metrics import bootstrap_p, wilson_interval
from finetune.scores import percentile_bounds

Floats = NDArray[np.float64]
Method = Literal["bootstrap", "delong", "wilson"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Scores of one model on one scope, with their replicates."""

    n: Mapping[str, int]
    """Cases behind each score; for the mean over sites, sites that have it."""
    values: Mapping[str, float]
    drawn: Mapping[str, Floats]
    """(R,) each, all nan where there is nothing to resample."""

    def minus(self, other: Sample, score: str, level: float) -> tuple[Figure, float | None]:
        """The difference with its interval, and the two-sided p-value of no difference."""
        value = self.values[score] - other.values[score]
        drawn = self.drawn[score] - other.drawn[score]
        p = bootstrap_p(drawn)
        known = not (np.isnan(p) or np.isnan(value))
        found = figure(value, *bounds(drawn, level), n=self.n[score])
        return found, p if known else None


def figure(
    value: float,
    low: float = np.nan,
    high: float = np.nan,
    n: int | None = None,
    method: Method = "bootstrap",
) -> Figure:
    """A figure of the report; nan is null, and bounds without width are none."""
    if low == high:
        low = high = np.nan
    value_, low_, high_ = (None if np.isnan(v) else float(v) for v in (value, low, high))
    return Figure(value=value_, low=low_, high=high_, n=n, method=method)


def bounds(drawn: Floats, level: float, *, about: float | None = None) -> tuple[float, float]:
    """Percentile bounds of replicates (R,); moved to lie about a figure in [0, 1] if one is given.

    nan where nothing is defined.
    """
    low, high = percentile_bounds(drawn, level)
    if about is None or np.isnan(low):
        return low, high
    rise = float(np.nanmean(drawn)) - about
    return max(0.0, low - rise), min(1.0, high - rise)


def share(value: float, drawn: Floats, level: float, n: int, units: int) -> Figure:
    """A share of n cases of `units` patients; Wilson's interval where it is 0 or 1.

    A patient then counts as one case, which is right where a patient's cases are alike and
    cautious where they are not.
    """
    if value in (0.0, 1.0) and not np.isnan(drawn).all():
        low, high = wilson_interval(value * units, units, level)
        return figure(value, float(low), float(high), n, "wilson")
    return figure(value, *bounds(drawn, level), n=n)
