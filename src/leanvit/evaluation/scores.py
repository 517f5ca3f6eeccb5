"""What predictions say of a model: each class, confusion, calibration. NumPy only, in float64.

Accuracy itself is counted in leanvit.runtime.tasks.classify, for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import DataError

CALIBRATION_BINS = 15


def confusion_matrix(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How often images of class i were called j, at [i, j]: (classes, classes) int64."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class ClassScore:
    """One class: `images` that are of it, `predicted` that are called it, `correct` both.

    recall: correct / images, its accuracy. precision: correct / predicted. In percent, None where nothing is divided.
    """

    name: str
    images: int
    predicted: int
    correct: int
    recall: float | None
    precision: float | None


def class_scores(confusion: NDArray[np.int64], names: Sequence[str]) -> tuple[ClassScore, ...]:
    """Recall and precision of every class from the confusion matrix, in the order of `names`."""
    rows = zip(names, confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diagonal().tolist(), strict=True)
    return tuple(
        ClassScore(name, images, predicted, correct, _percent(correct, images), _percent(correct, predicted))
        for name, images, predicted, correct in rows
    )


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


@dataclass(frozen=True)
class CalibrationBin:
    """Images whose confidence lies in (low, high]: mean confidence and accuracy in 0 to 1, None where there is none."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """ece: expected calibration error in 0 to 1. bins: the reliability diagram, in rising confidence."""

    ece: float
    bins: tuple[CalibrationBin, ...]


def calibration(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS
) -> Calibration:
    """Expected calibration error over bins of equal width.

    ECE = sum over bins of (images in it / N) |accuracy - mean confidence|, bin m being ((m - 1) / bins, m / bins]:
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599, equation 3.

    confidence: (N,) in 0 to 1. correct: (N,). Raises DataError without images.
    """
    if not len(confidence):
        raise DataError("no images, expected at least one to measure calibration on. Check --data.")
    edges = np.arange(bins + 1) / bins
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    counts = np.bincount(place, minlength=bins)
    sums = np.stack([np.bincount(place, weights, bins) for weights in (confidence, correct.astype(np.float64))])
    found = []
    for index, count in enumerate(counts.tolist()):
        mean, share = (sums[:, index] / count).tolist() if count else (None, None)
        found.append(CalibrationBin(float(edges[index]), float(edges[index + 1]), count, mean, share))
    return Calibration(float(np.abs(sums[1] - sums[0]).sum() / len(confidence)), tuple(found))
