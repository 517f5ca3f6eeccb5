"""Evaluation beyond top-1: classes, confusion, calibration, corrupted and shifted images; for any kind of model."""

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
    Answers,
    Calibration,
    CalibrationBin,
    ClassScore,
    answers,
    calibration,
    class_scores,
    confusion_matrix,
)
from leanvit.evaluation.subject import Subject, network_predict, open_subject

__all__ = [
    "CORRUPTIONS",
    "Answers",
    "Calibration",
    "CalibrationBin",
    "ClassScore",
    "CorruptionRow",
    "Evaluation",
    "Predict",
    "ShiftRow",
    "Subject",
    "answers",
    "calibration",
    "class_scores",
    "confusion_matrix",
    "corrupt",
    "corrupted_accuracy",
    "describe",
    "evaluate_detailed",
    "network_predict",
    "open_subject",
    "shift_robustness",
    "translate",
]
