"""Figures of classifiers, as pure functions of arrays.

Binary functions take truth (n,) of 0 and 1 and scores or probabilities (n,); multi-class functions
take labels (n,) of integers in [0, C) and probabilities (n, C). What the cases cannot give is nan;
arrays that do not fit raise `merge_kit.errors.DataError`.
"""

from evaluate.metrics.calibration import (
    ReliabilityBins,
    binary_log_loss,
    brier_score,
    calibration_error,
    log_loss,
    multiclass_brier_score,
    reliability_bins,
    top_label,
    top_label_calibration_error,
)
from evaluate.metrics.classification import (
    binary_counts,
    cohen_kappa,
    f1_score,
    macro_f1,
    negative_predictive_value,
    positive_predictive_value,
    predictive_values_at_prevalence,
    quadratic_kappa,
    sensitivity,
    specificity,
)
from evaluate.metrics.counts import Counts
from evaluate.metrics.delong import DeLongInterval, DeLongTest, delong_interval, delong_test
from evaluate.metrics.discrimination import (
    PrecisionRecallCurve,
    RocCurve,
    auroc,
    average_precision,
    precision_recall_curve,
    prevalence,
    roc_curve,
    threshold_at_specificity,
)
from evaluate.metrics.recalibration import calibration_intercept, calibration_slope
from evaluate.metrics.temperature import (
    apply_multilabel_temperature,
    apply_temperature,
    fit_multilabel_temperature,
    fit_temperature,
)
from evaluate.metrics.testing import bootstrap_p, holm, wilson_interval
from evaluate.metrics.utility import DecisionCurve, decision_curve, net_benefit
from finetune.scores import (
    accuracy,
    balanced_accuracy,
    class_recalls,
    confusion,
    macro_auroc,
    per_class_auroc,
)

__all__ = [
    "Counts",
    "DeLongInterval",
    "DeLongTest",
    "DecisionCurve",
    "PrecisionRecallCurve",
    "ReliabilityBins",
    "RocCurve",
    "accuracy",
    "apply_multilabel_temperature",
    "apply_temperature",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "binary_counts",
    "binary_log_loss",
    "bootstrap_p",
    "brier_score",
    "calibration_error",
    "calibration_intercept",
    "calibration_slope",
    "class_recalls",
    "cohen_kappa",
    "confusion",
    "decision_curve",
    "delong_interval",
    "delong_test",
    "f1_score",
    "fit_multilabel_temperature",
    "fit_temperature",
    "holm",
    "log_loss",
    "macro_auroc",
    "macro_f1",
    "multiclass_brier_score",
    "negative_predictive_value",
    "net_benefit",
    "per_class_auroc",
    "positive_predictive_value",
    "precision_recall_curve",
    "predictive_values_at_prevalence",
    "prevalence",
    "quadratic_kappa",
    "reliability_bins",
    "roc_curve",
    "sensitivity",
    "specificity",
    "threshold_at_specificity",
    "top_label",
    "top_label_calibration_error",
    "wilson_interval",
]
