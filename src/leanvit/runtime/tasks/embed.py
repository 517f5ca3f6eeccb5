"""Embeddings: a vector an image, and the accuracy of a vote among nearest neighbours. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.errors import DataError, ShapeError
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.inputs import Inputs, Options, Place
from leanvit.runtime.neighbours import nearest, unit
from leanvit.runtime.tasks.classify import Labelled

NEIGHBOURS = 10
"""That vote for a label; with fewer images as many as there are. As DINO's evaluation (arXiv 2104.14294) tries 10, 20,
100 and 200, and class folders are often small."""

TEMPERATURE = 0.07
"""Of the votes' weights exp(cosine / temperature): Wu et al. 2018, arXiv 1805.01978, section 3.4, and DINO after it."""

VOTERS = 1024
"""Images whose votes are counted at a time: votes are a number an image and class."""

Vector = NDArray[np.float32]


class Near(NamedTuple):
    """One of the nearest images. path: as the vectors' file names it. cosine: -1 to 1."""

    path: str
    cosine: float


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> Vector:
    """The embedding of one picture: (D,) float32, of length 1 where the bundle was exported so."""
    vectors = outputs["embeddings"].astype(np.float32)
    return np.asarray((unit(vectors) if manifest.answers.get("normalize") else vectors)[0])


def line(found: Vector | list[Near], manifest: Manifest) -> dict[str, Any]:
    """What a JSON line says of one picture: its embedding, or the images near to it."""
    if isinstance(found, list):
        return {"nearest": [{"path": near.path, "cosine": round(near.cosine, 6)} for near in found]}
    # Nine digits tell every float32 from all others.
    return {"embedding": [float(f"{value:.9g}") for value in found.tolist()]}


def text(found: Vector | list[Near], manifest: Manifest) -> str:
    """One picture in words."""
    if isinstance(found, list):
        return ", ".join(f"{near.path} {near.cosine:.4f}" for near in found)
    length = float(np.sqrt(np.square(found.astype(np.float64)).sum()))
    return f"{len(found)} numbers, length {length:.4g}: {', '.join(f'{v:.4g}' for v in found[:4].tolist())}, ..."


def knn_labels(
    vectors: NDArray[Any], labels: NDArray[np.int64], count: int = NEIGHBOURS
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the neighbours of each image vote for, and the label of the nearest alone: (N,) int64 each.

    vectors: (N, D). labels: (N,) int64, at least 0. No image votes for itself. Of labels with equal votes the lowest.
    """
    places, cosine = nearest(vectors, vectors, count, but_itself=True)
    voted = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), VOTERS):
        near, weight = labels[places[start : start + VOTERS]], cosine[start : start + VOTERS].astype(np.float64)
        votes = np.zeros((len(near), int(labels.max()) + 1))
        np.add.at(votes, (np.arange(len(near))[:, None], near), np.exp((weight - weight[:, :1]) / TEMPERATURE))
        voted[start : start + VOTERS] = votes.argmax(1)
    return voted, labels[places[:, 0]]


def measure(data: Labelled, batches: Iterable[tuple[Outputs, Sequence[Place]]]) -> dict[str, Any]:
    """Share of images that their neighbours among the others call by their label, and of those whose nearest does.

    Raises ShapeError where embeddings are no vectors, NumericalError where one is not finite, DataError for fewer than
    two images.
    """
    vectors, labels = [], []
    for outputs, places in batches:
        if outputs["embeddings"].ndim != 2:
            raise ShapeError(f"embeddings have shape {outputs['embeddings'].shape}, expected (images, D).")
        vectors.append(outputs["embeddings"].astype(np.float32))
        labels.append(data.labels[np.array([place.index for place in places], np.int64)])
    count = sum(map(len, labels))
    if count < 2:
        raise DataError(f"{data.name}: {count} images could be read, expected at least two to be neighbours. Add some.")
    truth = np.concatenate(labels)
    voted, alone = knn_labels(np.concatenate(vectors), truth)
    return {
        "knn_top1": float((voted == truth).mean()),
        "nearest_top1": float((alone == truth).mean()),
        "images": count,
    }
