"""How long the bootstrap of every figure takes, beside a plain loop over scikit-learn.

    python tests/benchmarks/bootstrap.py
    python tests/benchmarks/bootstrap.py --cases 100000 --resamples 500 --loop 2
    python tests/benchmarks/bootstrap.py --band

The loop draws the same resamples and calls scikit-learn for each figure that it has; it has no
calibration intercept and no decision curve. It runs a few resamples only, and its time for all is
extrapolated. Both are given in seconds of the clock and of the processor: on a busy machine only
the latter says something. `--band` times the ROC and precision-recall bands of one class instead.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable

import numpy as np
from sklearn import metrics as sklearn
from sklearn.linear_model import LogisticRegression

from evaluate.bands import curve_bands
from evaluate.metrics import threshold_at_specificity, top_label_calibration_error
from evaluate.resampling import Scored, replicates


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--loop", type=int, default=5, help="resamples of the plain loop")
    parser.add_argument("--threads", type=int, help="all cores if not given")
    parser.add_argument("--band", action="store_true")
    chosen = parser.parse_args()
    labels, probabilities = _sample(chosen.cases, chosen.classes)
    targets = np.eye(chosen.classes, dtype=np.int8)[labels]
    print(
        f"{chosen.resamples} resamples of {chosen.cases} cases, {chosen.classes} classes; CPU "
        f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    if chosen.band:
        clock, processor, _ = _timed(
            lambda: curve_bands(targets[:, 0], probabilities[:, 0], resamples=chosen.resamples)
        )
        print(f"bands of one class  {clock:8.2f} s  processor {processor:8.2f} s")
        return
    points = {
        name: [
            threshold_at_specificity(targets[:, c], probabilities[:, c], wanted)
            for c in range(chosen.classes)
        ]
        for name, wanted in (("0.90", 0.9), ("0.95", 0.95))
    }
    clock, processor, scored = _timed(
        lambda: Scored.prepare(
            targets,
            probabilities,
            ordered=True,
            operating_points=points,
            prevalences=np.full(chosen.classes, 0.1),
            thresholds=np.arange(1, 100) / 100,
        )
    )
    print(f"prepare             {clock:8.2f} s  processor {processor:8.2f} s")
    clock, processor, found = _timed(
        lambda: replicates(scored, resamples=chosen.resamples, threads=chosen.threads)
    )
    print(
        f"all {len(found)} figures      {clock:8.2f} s  processor {processor:8.2f} s  peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )
    rng = np.random.default_rng(0)

    def loop() -> None:
        for _ in range(chosen.loop):
            rows = rng.integers(0, chosen.cases, chosen.cases)
            _by_scikit_learn(labels[rows], probabilities[rows])

    loop_clock, loop_processor, _ = _timed(loop)
    scale = chosen.resamples / chosen.loop
    print(
        f"plain loop          {loop_clock * scale:8.0f} s  processor {loop_processor * scale:8.0f} "
        f"s  (from {chosen.loop} resamples)\n"
        f"ratio               {loop_clock * scale / clock:8.0f}    processor "
        f"{loop_processor * scale / processor:8.0f}"
    )


def _sample(cases: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, cases)
    logits = rng.normal(size=(cases, classes))
    logits[np.arange(cases), labels] += 1.5
    powers = np.exp(logits)
    return labels, powers / powers.sum(axis=1, keepdims=True)


def _timed(work: Callable[[], object]) -> tuple[float, float, object]:
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - processor, result


def _by_scikit_learn(labels: np.ndarray, probabilities: np.ndarray) -> None:
    predicted = probabilities.argmax(axis=1)
    sklearn.accuracy_score(labels, predicted)
    sklearn.balanced_accuracy_score(labels, predicted)
    sklearn.cohen_kappa_score(labels, predicted)
    sklearn.cohen_kappa_score(labels, predicted, weights="quadratic")
    sklearn.log_loss(labels, probabilities)
    sklearn.brier_score_loss(labels, probabilities, scale_by_half=False)
    sklearn.precision_recall_fscore_support(labels, predicted)
    sklearn.multilabel_confusion_matrix(labels, predicted)
    top_label_calibration_error(labels, probabilities)
    for c in range(probabilities.shape[1]):
        truth, scores = labels == c, probabilities[:, c]
        sklearn.roc_auc_score(truth, scores)
        sklearn.average_precision_score(truth, scores)
        sklearn.brier_score_loss(truth, scores)
        sklearn.log_loss(truth, scores)
        logits = np.log(scores / (1 - scores))[:, None]
        LogisticRegression(C=np.inf).fit(logits, truth)


if __name__ == "__main__":
    main()
