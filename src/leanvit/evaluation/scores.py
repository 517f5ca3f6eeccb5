"""What answers say of a model: accuracy, each class, confusion, calibration. NumPy only, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import DataError, NumericalError, ShapeError

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Answers:
    """A model's answers to N labelled images.

    labels, predicted: (N,) int64 indices of classes. confidence: (N,) float64, softmax of the predicted class.
    loss: (N,) float64, cross-entropy in nats. rank: (N,) int64, how many classes come before the right one, 0 best.
    Of classes with equal logits the one with the lower index comes first.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    rank: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether the predicted class is the right one."""
        return self.rank == 0


def answers(logits: NDArray[Any], labels: NDArray[Any], where: str = "the images") -> Answers:
    """What logits (N, classes) answer to images of `labels` (N,). where: names the images in errors.

    Raises ShapeError where logits are of another shape, NumericalError where one is NaN or infinite, DataError where
    a label is none of the classes.
    """
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ShapeError(f"logits have shape {logits.shape}, expected ({len(labels)}, classes) for {where}.")
    if not np.isfinite(logits).all():
        raise NumericalError(
            f"the model's logits on {where} are NaN or infinite, expected finite numbers. Use an earlier checkpoint, "
            "train again with a lower --lr, or measure with --device cpu."
        )
    classes = logits.shape[1]
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(
            f"{where}: labels are {labels.min()} to {labels.max()}, expected 0 to {classes - 1}, the model's classes. "
            "Give the data that the model was trained for."
        )
    labels = labels.astype(np.int64)
    z = logits.astype(np.float64)
    own = z[np.arange(len(z)), labels][:, None]
    tied = (z == own) & (np.arange(classes) < labels[:, None])
    total = np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1))
    return Answers(
        labels=labels,
        predicted=z.argmax(axis=1),
        confidence=np.exp(-total),
        loss=total + (z.max(axis=1) - own[:, 0]),
        rank=((z > own) | tied).sum(axis=1),
    )


def join_answers(parts: Sequence[Answers], where: str = "the images") -> Answers:
    """The answers of several batches in one. Raises DataError where there is no image."""
    if not sum(map(len, parts)):
        raise DataError(f"{where}: no image could be read, so there is nothing to measure. Check --data.")
    return Answers(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Answers)))


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
