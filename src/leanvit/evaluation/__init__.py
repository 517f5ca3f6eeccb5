"""Evaluation of any kind of model on any task: metrics, classes, calibration, corrupted and shifted pictures."""

from leanvit.evaluation.corruptions import CORRUPTIONS, corrupt
from leanvit.evaluation.measure import (
    CorruptionRow,
    Evaluation,
    Predict,
    ShiftRow,
    corrupted_accuracy,
    describe,
    evaluate_detailed,
    shift_robustness,
    translate,
)
from leanvit.evaluation.scores import (
    Calibration,
    CalibrationBin,
    ClassScore,
    calibration,
    class_scores,
    confusion_matrix,
)
from leanvit.evaluation.subject import Subject, network_predict, open_subject
from leanvit.runtime.tasks.classify import Predictions, predictions

__all__ = [
    "CORRUPTIONS",
    "Calibration",
    "CalibrationBin",
    "ClassScore",
    "CorruptionRow",
    "Evaluation",
    "Predict",
    "Predictions",
    "ShiftRow",
    "Subject",
    "calibration",
    "class_scores",
    "confusion_matrix",
    "corrupt",
    "corrupted_accuracy",
    "describe",
    "evaluate_detailed",
    "network_predict",
    "open_subject",
    "predictions",
    "shift_robustness",
    "translate",
]
