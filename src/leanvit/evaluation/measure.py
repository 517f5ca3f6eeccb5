"""A model measured over images: on them as they are, corrupted, and shifted.

A model is any function from images (N, H, W, 3) uint8 to logits (N, classes) float32, so that a network in PyTorch, a
simulated quantized one and a bundle in any runtime are measured by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.config import Padding
from leanvit.errors import ConfigError, DataError, ShapeError
from leanvit.evaluation.corruptions import corrupt
from leanvit.evaluation.scores import Calibration, ClassScore, calibration, class_scores, confusion_matrix
from leanvit.runtime.tasks.classify import Predictions, accuracy, counts, join, predictions

Pixels = NDArray[np.uint8]
Predict = Callable[[Pixels], NDArray[np.float32]]
Batches = Iterable[tuple[Any, Any]]
"""Images (B, H, W, 3) uint8 and labels (B,), as arrays or CPU tensors; can be iterated over again and again."""
Tick = Callable[[str], None]


def _ignore(what: str) -> None:
    """Nobody is told of the progress."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does on images as they are.

    top1, top5: accuracy in percent. loss: mean cross-entropy in nats. balanced: mean recall in percent of the classes
    that have images. confusion: (classes, classes) int64, true by predicted. images_per_second: of the calls of the
    model alone. predictions: image by image.
    """

    top1: float
    top5: float
    loss: float
    images: int
    correct: int
    balanced: float
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    calibration: Calibration
    images_per_second: float
    predictions: Predictions


def plain_accuracy(predict: Predict, batches: Batches, tick: Tick = _ignore) -> dict[str, Any]:
    """top1, top5, loss, images and correct (`leanvit.runtime.tasks.classify.accuracy`), and nothing else.

    Raises ShapeError, NumericalError and DataError as `predictions` does.
    """
    total = np.zeros(4)
    for pixels, labels in _arrays(batches):
        total += counts(predictions(predict(pixels), labels))
        tick("images as they are")
    return accuracy(total)


def evaluate_detailed(predict: Predict, batches: Batches, names: Sequence[str], tick: Tick = _ignore) -> Evaluation:
    """Accuracy, each class, confusion, calibration and throughput.

    names: of the classes, in the order of the logits. tick: called with what is done, once a batch.
    Raises ShapeError where the logits are not as many as the names, NumericalError where one is not finite, DataError
    where there is no image or a label is none of the classes.
    """
    found: list[Predictions] = []
    seconds = 0.0
    for pixels, labels in _arrays(batches):
        if not found:
            predict(pixels)  # the first call prepares memory and kernels
        started = time.perf_counter()
        logits = predict(pixels)
        seconds += time.perf_counter() - started
        if logits.shape[1:] != (len(names),):
            raise ShapeError(f"logits have shape {logits.shape}, expected (images, {len(names)}), one for each class.")
        found.append(predictions(logits, labels))
        tick("images as they are")
    joined = join(found)
    confusion = confusion_matrix(joined.labels, joined.predicted, len(names))
    classes = class_scores(confusion, names)
    recalls = [entry.recall for entry in classes if entry.recall is not None]
    return Evaluation(
        **accuracy(counts(joined)),
        balanced=sum(recalls) / len(recalls),
        classes=classes,
        confusion=confusion,
        calibration=calibration(joined.confidence, joined.correct),
        images_per_second=len(joined) / max(seconds, 1e-9),
        predictions=joined,
    )


def describe(found: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON values; the confusion matrix as [true, predicted, images] of its cells above zero."""
    rows, columns = np.nonzero(found.confusion)
    return {
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss,
        "images": found.images,
        "correct": found.correct,
        "balanced_accuracy": found.balanced,
        "classes": [asdict(entry) for entry in found.classes],
        "confusion": np.stack([rows, columns, found.confusion[rows, columns]], axis=1).tolist(),
        "calibration": asdict(found.calibration),
    }


def _arrays(batches: Batches) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    return ((np.asarray(pixels), np.asarray(labels)) for pixels, labels in batches if len(labels))


@dataclass(frozen=True)
class CorruptionRow:
    """Accuracy (percent), mean cross-entropy (nats) and ECE (0 to 1) under one corruption of one severity."""

    name: str
    severity: int
    top1: float
    loss: float
    ece: float
    images: int
    correct: int


def corrupted_accuracy(
    predict: Predict, batches: Batches, name: str, severity: int, *, seed: int = 0, tick: Tick = _ignore
) -> CorruptionRow:
    """A model on images under one corruption; image i of the batches takes the noise of (seed, i).

    name, severity: see `corrupt`. Raises ConfigError, NumericalError, DataError.
    """
    found: list[Predictions] = []
    done, what = 0, f"{name} {severity}"
    for pixels, labels in _arrays(batches):
        found.append(
            predictions(
                predict(corrupt(pixels, name, severity, seed=seed, first_index=done)), labels, f"images with {what}"
            )
        )
        done += len(labels)
        tick(what)
    joined = join(found)
    under = accuracy(counts(joined))
    del under["top5"]
    return CorruptionRow(name, severity, ece=calibration(joined.confidence, joined.correct).ece, **under)


def translate(images: Pixels, down: int, right: int, padding: Padding = "edge") -> Pixels:
    """Images (N, H, W, 3) moved by whole pixels, negative ones up and left; same shape and dtype.

    padding: what comes in, "edge" the border again and again, "reflect" the image mirrored at it, "zero" black.
    """
    height, width = images.shape[1:3]
    margins = ((0, 0), (max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0))
    padded = np.pad(images, margins, "constant" if padding == "zero" else padding)
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + height, left : left + width]


def shifts_at(distance: int) -> list[tuple[int, int]]:
    """(down, right) of the eight shifts by `distance` pixels along rows, columns and diagonals; at 0 one, no shift."""
    steps = (-distance, 0, distance)
    return [(down, right) for down in steps for right in steps if (down, right) != (0, 0)] if distance else [(0, 0)]


@dataclass(frozen=True)
class ShiftRow:
    """Images moved by one distance, all numbers in percent.

    top1: accuracy over images and the `shifts` of this distance. agreement: share of these whose prediction is that of
    the image where it was. consistency: share of (image, pair of different shifts of at most this distance, none
    included) whose two predictions are equal.
    """

    distance: int
    shifts: int
    top1: float
    agreement: float
    consistency: float


def shift_robustness(
    predict: Predict, batches: Batches, distance: int, padding: Padding = "edge", tick: Tick = _ignore
) -> tuple[ShiftRow, ...]:
    """Accuracy and consistency of predictions where images are moved by 0 to `distance` pixels.

    Consistency as in Zhang, Making Convolutional Networks Shift-Invariant Again, ICML 2019, arXiv 1904.11486, over all
    pairs of the 8 `distance` + 1 shifts of `shifts_at` and not a random one for each image.
    Returns a row for each distance, 0 first. Raises ConfigError where a shift leaves nothing of an image,
    NumericalError, DataError.
    """
    counts = np.zeros((distance + 1, 3))
    images = 0
    for pixels, labels in _arrays(batches):
        if distance >= min(pixels.shape[1:3]):
            raise ConfigError(
                f"shifts is {distance}, expected less than the images' side of {min(pixels.shape[1:3])} pixels"
            )
        counts += _count_shifts(predict, pixels, labels, padding, distance, tick)
        images += len(labels)
    if not images:
        raise DataError("no image could be read, so there is nothing to measure. Check --data.")
    rows = []
    for step, (correct, agreeing, pairs) in enumerate(counts.tolist()):
        shifts, seen = len(shifts_at(step)), 8 * step + 1
        all_pairs = images * seen * (seen - 1) // 2
        consistency = 100 * pairs / all_pairs if all_pairs else 100.0
        top1, agreement = (100 * value / (images * shifts) for value in (correct, agreeing))
        rows.append(ShiftRow(step, shifts, top1, agreement, consistency))
    return tuple(rows)


def _count_shifts(
    predict: Predict, pixels: Pixels, labels: NDArray[np.int64], padding: Padding, distance: int, tick: Tick
) -> NDArray[np.float64]:
    """Of one batch, for each distance: right predictions, predictions as without a shift, equal pairs up to it."""
    counts = np.zeros((distance + 1, 3))
    votes: NDArray[np.int64] | None = None
    still = labels
    for step in range(distance + 1):
        for down, right in shifts_at(step):
            moved = translate(pixels, down, right, padding)
            logits = predict(moved)
            found = predictions(logits, labels, f"images shifted by ({down}, {right})")
            still = found.predicted if step == 0 else still
            votes = np.zeros(logits.shape, np.int64) if votes is None else votes
            votes[np.arange(len(labels)), found.predicted] += 1
            counts[step, :2] += found.correct.sum(), (found.predicted == still).sum()
            tick(f"shift {step}")
        if votes is not None:
            counts[step, 2] = (votes * (votes - 1) // 2).sum()
    return counts
