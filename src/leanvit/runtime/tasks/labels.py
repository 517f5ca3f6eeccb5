"""Sigmoid outputs: any number of labels an image, or one logit between two. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.errors import DataError, NumericalError, ShapeError
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.inputs import Inputs, Options, Place
from leanvit.runtime.tasks import classify
from leanvit.runtime.tasks.classify import Labelled, Labels


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    wide = logits.astype(np.float64)
    small = np.exp(-np.abs(wide))
    return np.where(wide >= 0, 1, small) / (1 + small)


# --- any number of labels ---


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> Labels:
    """The labels of one picture whose probability is at least the threshold, most probable first.

    The threshold is the one that is asked for, else the bundle's own of each label, else 0.5.
    """
    row = sigmoid(outputs["logits"])[0]
    least = np.full(len(row), options.least_score)
    if options.score_threshold is None:
        least = np.asarray(manifest.answers.get("thresholds", least))
    order = np.argsort(-row, kind="stable").tolist()
    return [(manifest.labels[i], float(row[i])) for i in order if row[i] >= least[i]]


def text(found: Labels, manifest: Manifest) -> str:
    """One picture in words."""
    return classify.text(found, manifest) or "nothing"


def average_precision(scores: NDArray[Any], truth: NDArray[Any]) -> float | None:
    """Sum over thresholds of (recall - recall before) precision, as scikit-learn's average_precision_score.

    scores: (N,). truth: (N,), positive where not 0. Equal scores are one threshold. None where nothing is positive.
    """
    positive = truth.astype(bool)
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(positive[order]), scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    recall = hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0) * hits[last] / (last + 1)).sum())


def best_threshold(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """The probability from which on a label is called, so that its F1 is the largest: 2 hits / (called + positive).

    scores: (N,) probabilities. truth: (N,), positive where not 0. It lies in the middle between the least score that is
    called and the next; of equally good ones the highest is taken. 0.5 where nothing is positive.
    """
    positive = truth.astype(bool)
    if not positive.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    f1 = 2 * hits[last] / (last + 1 + hits[-1])
    place = last[int(np.argmax(f1))]
    below = ranked[place + 1] if place + 1 < len(ranked) else 0.0
    return float((ranked[place] + below) / 2)


def micro_f1(called: NDArray[Any], truth: NDArray[Any]) -> float | None:
    """F1 over all decisions (N, labels); None where nothing is called and nothing is positive."""
    said = int(called.sum() + (truth > 0).sum())
    return 2 * int((called & (truth > 0)).sum()) / said if said else None


def measure(
    data: Labelled, batches: Iterable[tuple[Outputs, Sequence[Place]]], thresholds: Sequence[float] = ()
) -> dict[str, Any]:
    """mAP: mean of the average precision of each label that an image has; f1 over all decisions at the thresholds.

    data: labels are (N, labels) int64 of 0 and 1. thresholds: least probability of each label; none: 0.5.
    best_thresholds: those with the largest F1 of each label on these images, best_f1: over all decisions at them.
    Raises ShapeError, NumericalError where a logit is not finite, DataError where no image could be read.
    """
    logits, truth = _joined(data, batches)
    if truth.ndim != 2 or truth.shape != logits.shape:
        raise ShapeError(f"logits have shape {logits.shape}, labels {truth.shape}, expected (images, labels) of both.")
    scores = sigmoid(logits)
    each = [average_precision(logits[:, i], truth[:, i]) for i in range(truth.shape[1])]
    best = [best_threshold(scores[:, i], truth[:, i]) for i in range(truth.shape[1])]
    known = [value for value in each if value is not None]
    return {
        "mAP": sum(known) / len(known) if known else None,
        "f1": micro_f1(scores >= np.asarray(thresholds or 0.5), truth),
        "images": len(truth),
        "ap_per_class": each,
        "best_f1": micro_f1(scores >= np.asarray(best), truth),
        "best_thresholds": best,
    }


def _joined(data: Labelled, batches: Iterable[tuple[Outputs, Sequence[Place]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    logits, labels = [], []
    for outputs, places in batches:
        if not np.isfinite(outputs["logits"]).all():
            raise NumericalError(
                f"the model's logits on {data.name} are NaN or infinite, expected finite numbers. Use an earlier "
                "checkpoint."
            )
        logits.append(outputs["logits"])
        labels.append(data.labels[np.array([place.index for place in places], np.int64)])
    if not logits:
        raise DataError(f"{data.name}: no image could be read, so there is nothing to measure. Check --data.")
    return np.concatenate(logits), np.concatenate(labels)


# --- one logit between two labels ---


def decode_two(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> Labels:
    """Both labels of one picture; the second label is first where its probability is at least the threshold."""
    second = float(sigmoid(outputs["logits"])[0, 0])
    pairs = [(manifest.labels[0], 1 - second), (manifest.labels[1], second)]
    return pairs[::-1] if second >= options.least_score else pairs


def measure_two(data: Labelled, batches: Iterable[tuple[Outputs, Sequence[Place]]]) -> dict[str, Any]:
    """`classify.accuracy` of logits (0, z) for one logit z: a softmax of them is its sigmoid."""
    found = classify.measure(data, ((_two(outputs), places) for outputs, places in batches))
    return {key: value for key, value in found.items() if key != "top5"}


def _two(outputs: Outputs) -> Outputs:
    logits = outputs["logits"]
    if logits.ndim != 2 or logits.shape[1] != 1:
        raise ShapeError(f"logits have shape {logits.shape}, expected (images, 1) of a network with one logit.")
    return {"logits": np.concatenate([np.zeros_like(logits), logits], axis=1)}
