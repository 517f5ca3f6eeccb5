"""Classification: labels with probabilities, and the one place where correct labels are counted. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.annotations import Outputs
from leanvit.config import Preprocess
from leanvit.errors import DataError, NumericalError, ShapeError
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.inputs import Inputs, Options, Place

Labels = list[tuple[str, float]]
"""(label, probability) pairs of one picture, best first."""


def inputs(pixels: imaging.Pixels, preprocess: Preprocess, options: Options) -> Inputs:
    """The picture (height, width, 3) uint8, resized and cropped as in training."""
    size = pixels.shape[0], pixels.shape[1]
    return Inputs(imaging.resize(pixels, preprocess)[None], (Place(),), size)


def probabilities(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Softmax of logits (N, classes) in float64: (N, classes) float32, each row sums to 1."""
    wide = logits.astype(np.float64)
    exponents = np.exp(wide - wide.max(axis=1, keepdims=True))
    return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> Labels:
    """The `top_k` most probable labels of one picture."""
    row = probabilities(outputs["logits"])[0]
    best = np.argsort(-row, kind="stable")[: options.top_k]
    return [(manifest.labels[i], float(row[i])) for i in best]


def line(found: Labels, manifest: Manifest) -> dict[str, Any]:
    """What a JSON line says of one picture."""
    return {"predictions": [{"label": label, "probability": round(p, 6)} for label, p in found]}


def text(found: Labels, manifest: Manifest) -> str:
    """One picture in words."""
    return ", ".join(f"{label} {p:.1%}" for label, p in found)


COLUMNS = ("label", "probability")


def rows(found: Labels, manifest: Manifest) -> list[list[Any]]:
    """One picture as rows of a table: one a label, in the order of COLUMNS."""
    return [[label, f"{p:.6f}"] for label, p in found]


# --- accuracy ---


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for N labelled images.

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


def predictions(logits: NDArray[Any], labels: NDArray[Any], where: str = "the images") -> Predictions:
    """What logits (N, classes) predict for images of `labels` (N,). where: names the images in errors.

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
    return Predictions(
        labels=labels,
        predicted=z.argmax(axis=1),
        confidence=np.exp(-total),
        loss=total + (z.max(axis=1) - own[:, 0]),
        rank=((z > own) | tied).sum(axis=1),
    )


def join(parts: Sequence[Predictions], where: str = "the images") -> Predictions:
    """The predictions of several batches in one. Raises DataError where there is no image."""
    if not sum(map(len, parts)):
        raise DataError(f"{where}: no image could be read, so there is nothing to measure. Check --data.")
    return Predictions(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Predictions)))


def counts(found: Predictions) -> NDArray[np.float64]:
    """Images, those whose class is predicted, those whose class is among the first five, sum of the losses: (4,).

    Counts of several batches, or of several processes, may be added up before `accuracy` takes them.
    """
    return np.array([len(found), found.correct.sum(), (found.rank < 5).sum(), found.loss.sum()], np.float64)


def accuracy(counted: NDArray[Any], where: str = "the images") -> dict[str, Any]:
    """top1 and top5 in percent, loss (mean cross-entropy in nats), images and correct, from summed `counts`.

    Raises DataError where no image was counted.
    """
    images, correct, among_five, loss = (float(value) for value in counted)
    if not images:
        raise DataError(f"{where}: no image could be read, so there is no accuracy. Check --data.")
    return {
        "top1": 100 * correct / images,
        "top5": 100 * among_five / images,
        "loss": loss / images,
        "images": int(images),
        "correct": int(correct),
    }


class Labelled(Protocol):
    """Images of known classes, such as leanvit.data.sets.ImageSet."""

    @property
    def name(self) -> str:
        """What messages call them."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class of each image."""


def measure(data: Labelled, batches: Iterable[tuple[Outputs, Sequence[Place]]]) -> dict[str, Any]:
    """`accuracy` over batches of outputs and the places of the images in `data`."""
    total = np.zeros(4)
    for outputs, places in batches:
        labels = data.labels[np.array([place.index for place in places], np.int64)]
        total += counts(predictions(outputs["logits"], labels, data.name))
    return accuracy(total, data.name)
