"""What golden.npz keeps of a task's answers, and how near another run comes to it. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import BundleError

Outputs = dict[str, NDArray[Any]]

VALUES_KEPT = 4096
"""Values of a picture's continuous output that are kept: maps of large inputs would make golden.npz larger than the
network."""

CONTINUOUS = {"detect": "objectness", "segment": "objectness", "semantic": "logits", "pose": "heatmaps"}
"""The output of each task that has no threshold in it."""

CLEAR_SCORE = 0.3
MIN_OVERLAP = 0.9
MAX_SCORE_CHANGE = 0.1


def golden_values(outputs: Outputs, task: str) -> NDArray[np.float32]:
    """A fixed choice of values (N, at most VALUES_KEPT) of the continuous output."""
    name = CONTINUOUS[task]
    if name not in outputs:
        raise BundleError(f"the graph gives {', '.join(outputs)}, expected {name} for task {task}. Export it again.")
    flat = outputs[name].reshape(len(outputs[name]), -1).astype(np.float32)
    step = -(-flat.shape[1] // VALUES_KEPT)
    return np.ascontiguousarray(flat[:, ::step])


def golden_records(outputs: Outputs) -> dict[str, NDArray[Any]]:
    """Objects of the golden pictures, as arrays for golden.npz; empty where the task finds none."""
    names = ("boxes", "scores", "labels")
    return {f"found_{name}": outputs[name] for name in names if name in outputs}


def matched_share(outputs: Outputs, records: dict[str, NDArray[Any]], count: int) -> float:
    """Share of the clear recorded objects of the first `count` pictures that are found again, 1 where there are none.

    Found again: the same label, an overlap of at least MIN_OVERLAP and a score within MAX_SCORE_CHANGE.
    """
    if "found_boxes" not in records:
        return 1.0
    clear = found = 0
    for row in range(min(count, len(records["found_boxes"]), len(outputs["boxes"]))):
        for box, score, label in zip(*(records[f"found_{n}"][row] for n in ("boxes", "scores", "labels")), strict=True):
            if score < CLEAR_SCORE:
                continue
            clear += 1
            same = (outputs["labels"][row] == label) & (np.abs(outputs["scores"][row] - score) <= MAX_SCORE_CHANGE)
            overlaps = _overlaps(outputs["boxes"][row], box)
            found += bool((same & (overlaps >= MIN_OVERLAP)).any())
    return found / clear if clear else 1.0


def _overlaps(boxes: NDArray[Any], box: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of (D, 4) boxes with one."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)
