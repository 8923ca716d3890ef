"""Whether probabilities mean what they say: Brier score, log loss, ECE, reliability diagram.

Binary functions take truth (n,) of 0 and 1 and probabilities (n,) in [0, 1]; multi-class functions
take labels (n,) in [0, C) and probabilities (n, C). No case gives nan. All raise `DataError` for
arrays that do not fit. Calibration slope and intercept stand in `recalibration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluate.metrics import checks
from evaluate.metrics.checks import Flags
from evaluate.metrics.testing import wilson_interval
from finetune.confusions import Cells, cells
from finetune.ranking import Floats, ratio
from merge_kit.errors import DataError

Scheme: TypeAlias = Literal["width", "mass"]
BINS = 15
# Keeps log loss finite at a probability of 0; scikit-learn's bound.
LOG_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class ReliabilityBins:
    """A reliability diagram, B bins from low to high probability.

    Attributes:
        edges: (B + 1,) a bin holds what is above its left edge up to its right edge; the first
            holds its left edge too.
        counts: (B,) int64 cases in each.
        predicted: (B,) their mean probability, nan for an empty bin.
        observed: (B,) the share of them that is positive, nan for an empty bin.
        low: (B,) lower bound of that share (Wilson), nan for an empty bin.
        high: (B,) upper bound.
    """

    edges: Floats
    counts: NDArray[np.int64]
    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats


def brier_score(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean squared error of binary probabilities, mean of (p - y)², from 0 to 1.

    Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2, halved as is usual for two
    classes.
    """
    flags, values = checks.binary_probabilities(truth, probabilities)
    return _mean((values - flags) ** 2)


def multiclass_brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean over cases of Σ_c (p_c - y_c)², from 0 to 2, as Brier 1950 defines it."""
    numbers, values = checks.multiclass(labels, probabilities)
    return _mean(squared_errors(numbers, values))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean of -log p of the label (nats), p kept above `LOG_EPSILON`."""
    numbers, values = checks.multiclass(labels, probabilities)
    return _mean(log_losses(numbers, values))


def binary_log_loss(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean of -y log p - (1 - y) log(1 - p), both kept above `LOG_EPSILON`."""
    flags, values = checks.binary_probabilities(truth, probabilities)
    return _mean(binary_log_losses(flags, values))


def calibration_error(
    truth: ArrayLike, probabilities: ArrayLike, *, bins: int = BINS, scheme: Scheme = "width"
) -> float:
    """Return the expected calibration error of binary probabilities.

    Σ_b n_b / n · |share of positives in b - mean probability in b| over the bins (Naeini et al.
    2015, doi:10.1609/aaai.v29i1.9602).

    Args:
        truth: (n,) of 0 and 1.
        probabilities: (n,) in [0, 1].
        bins: number of bins.
        scheme: "width" for bins of equal width, "mass" for bins of equally many cases (fewer where
            cases tie). The figure depends on both, and is biased upwards when bins hold few cases.
    """
    flags, values = checks.binary_probabilities(truth, probabilities)
    sorted_bins = bin_cells(values, bin_edges(values, bins, scheme))
    ones = np.ones((len(values), 1))
    return float(calibration_errors(sorted_bins, values - flags, ones)[0])


def top_label_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, *, bins: int = BINS, scheme: Scheme = "width"
) -> float:
    """Return the expected calibration error of the most probable class.

    `calibration_error` of the highest probability against whether its class is right (Guo et al.
    2017, arXiv:1706.04599). It says nothing of the other classes' probabilities.
    """
    right, confidence = top_label(labels, probabilities)
    return calibration_error(right, confidence, bins=bins, scheme=scheme)


def top_label(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Flags, Floats]:
    """Return whether the most probable class is right (n,), and its probability (n,)."""
    numbers, values = checks.multiclass(labels, probabilities)
    if not len(numbers):
        return np.zeros(0, np.bool_), np.zeros(0)
    right: Flags = values.argmax(axis=1) == numbers
    return right, values.max(axis=1)


def reliability_bins(
    truth: ArrayLike,
    probabilities: ArrayLike,
    *,
    bins: int = BINS,
    scheme: Scheme = "width",
    level: float = 0.95,
) -> ReliabilityBins:
    """Return a reliability diagram; for several classes give it one class, or the `top_label`.

    Args:
        truth: (n,) of 0 and 1.
        probabilities: (n,) in [0, 1].
        bins: number of bins.
        scheme: as in `calibration_error`.
        level: coverage of the bars (Wilson), in (0, 1).
    """
    flags, values = checks.binary_probabilities(truth, probabilities)
    edges = bin_edges(values, bins, scheme)
    columns = np.stack([np.ones(len(values)), values, flags], axis=1)
    n, predicted, positive = bin_cells(values, edges).sums(columns).T
    low, high = wilson_interval(positive, n, level)
    return ReliabilityBins(
        edges, n.astype(np.int64), ratio(predicted, n), ratio(positive, n), low, high
    )


def bin_edges(probabilities: Floats, bins: int, scheme: Scheme) -> Floats:
    """Return the edges of bins, from 0 to 1; (bins + 1,), or fewer for "mass" with ties.

    Raises:
        DataError: fewer than one bin, or a scheme that does not exist.
    """
    if bins < 1:
        raise DataError(f"Expected bins to be an integer larger than 0, but got {bins}.")
    if scheme not in ("width", "mass"):
        raise DataError(f"Expected scheme to be 'width' or 'mass', but got {scheme!r}.")
    even = np.linspace(0, 1, bins + 1)
    if scheme == "width" or not len(probabilities):
        return even
    last = -(-len(probabilities) * np.arange(1, bins) // bins) - 1  # of each bin but the highest
    inner = np.sort(probabilities)[last]
    return np.unique(np.concatenate([[0.0], inner, [1.0]]))


def bin_cells(probabilities: Floats, edges: Floats) -> Cells:
    """Sort cases by the bin that their probability falls into."""
    numbers = np.searchsorted(edges[1:-1], probabilities, side="left")
    return cells(numbers, len(edges) - 1)


def calibration_errors(sorted_bins: Cells, excess: Floats, weights: Floats) -> Floats:
    """Return the expected calibration error of each column of weights (n, R), (R,).

    `excess` (n,) is probability less truth: of its weighted sums in the bins, the absolute values
    are added up.
    """
    gaps = np.abs(sorted_bins.products(excess, weights)).sum(axis=0)
    return ratio(gaps, weights.sum(axis=0))


def squared_errors(labels: NDArray[np.int64], probabilities: Floats) -> Floats:
    """Return Σ_c (p_c - y_c)² of each case, (n,)."""
    errors = probabilities.copy()
    errors[np.arange(len(labels)), labels] -= 1
    squares: Floats = (errors**2).sum(axis=1)
    return squares


def log_losses(labels: NDArray[np.int64], probabilities: Floats) -> Floats:
    """Return -log p of the label of each case, (n,)."""
    chosen = probabilities[np.arange(len(labels)), labels]
    losses: Floats = -np.log(np.maximum(chosen, LOG_EPSILON))
    return losses


def binary_log_losses(truth: Flags, probabilities: Floats) -> Floats:
    """Return -log of the probability given to the truth, of each case, (n,)."""
    chosen = np.where(truth, probabilities, 1 - probabilities)
    losses: Floats = -np.log(np.maximum(chosen, LOG_EPSILON))
    return losses


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
