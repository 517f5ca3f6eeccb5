"""Objects of golden pictures: what golden.npz keeps of them, and how many another run finds again. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.errors import BundleError

CLEAR_SCORE = 0.3
"""Objects from this score on are looked for, or from half the best where a network is less sure of all."""

MATCHED_SHARE = 0.95
"""Share of golden objects that must be found again: near a score's threshold or an overlap's, rounding decides."""

LEAST_SHARE = 0.6
SHARE_MARGIN = 0.05

MIN_OVERLAP = 0.9
MAX_SCORE_CHANGE = 0.1
MAX_MASK_CHANGE = 0.05
"""Mean over a mask's cells of 0 to 1."""


def golden_records(outputs: Outputs) -> dict[str, NDArray[Any]]:
    """Objects of the golden pictures, as arrays for golden.npz (masks as uint8); empty where the task finds none."""
    kept = {f"found_{name}": outputs[name] for name in ("boxes", "scores", "labels") if name in outputs}
    if "masks" in outputs:
        kept["found_masks"] = np.rint(255 * outputs["masks"]).astype(np.uint8)
    return kept


def matched_share(outputs: Outputs, records: dict[str, NDArray[Any]], count: int) -> float | None:
    """Share of the clear recorded objects of the first `count` pictures that are found again, None where none is.

    Found again: the same label, an overlap of at least MIN_OVERLAP, a score within MAX_SCORE_CHANGE and half of it,
    and a mask within MAX_MASK_CHANGE. Raises BundleError where an output is missing.
    """
    missing = [name for name in records if name.startswith("found_") and name.removeprefix("found_") not in outputs]
    if missing:
        raise BundleError(f"the graph returns {', '.join(outputs)}, golden.npz has {missing[0]} too. Export it again.")
    if "found_scores" not in records:
        return None
    scores = records["found_scores"]
    least = min(CLEAR_SCORE, float(scores.max(initial=0.0)) / 2)
    clear = [(row, place) for row, place in np.argwhere(scores[:count] >= least).tolist() if scores[row, place] > 0]
    if not clear:
        return None
    return sum(_found_again(outputs, records, row, place) for row, place in clear) / len(clear)


def least_share(exact: Outputs, records: dict[str, NDArray[Any]], count: int) -> float:
    """Share of golden objects that the gate asks for: less where the network in float64 finds fewer of them itself.

    exact: outputs of `count` golden pictures in float64.
    """
    own = matched_share(exact, records, count)
    return MATCHED_SHARE if own is None else max(LEAST_SHARE, min(MATCHED_SHARE, own - SHARE_MARGIN))


def _found_again(outputs: Outputs, records: dict[str, NDArray[Any]], row: int, place: int) -> bool:
    score = records["found_scores"][row, place]
    same = outputs["labels"][row] == records["found_labels"][row, place]
    same &= np.abs(outputs["scores"][row] - score) <= min(MAX_SCORE_CHANGE, score / 2)
    same &= _overlaps(outputs["boxes"][row], records["found_boxes"][row, place]) >= MIN_OVERLAP
    if "found_masks" in records:
        apart = np.abs(outputs["masks"][row] - records["found_masks"][row, place] / np.float32(255))
        same &= apart.mean(axis=(1, 2)) <= MAX_MASK_CHANGE
    return bool(same.any())


def _overlaps(boxes: NDArray[Any], box: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of (D, 4) boxes with one."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)
