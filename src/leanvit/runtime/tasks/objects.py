"""Detection and instance segmentation: objects with boxes, scores and masks, best first. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from leanvit.annotations import Found, Outputs, SceneSet
from leanvit.annotations.metrics import coco_metrics
from leanvit.imaging import Pixels
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.decode import found_objects
from leanvit.runtime.inputs import Inputs, Options, Place, placement_of
from leanvit.runtime.letterbox import Placement

Batches = Iterable[tuple[Outputs, Sequence[Place]]]


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> list[Found]:
    """Objects of one picture, best first; with masks where the outputs have them."""
    return objects_of(outputs, 0, placement_of(inputs.places[0]), inputs.size, options.least_score)


def objects_of(
    outputs: Outputs, row: int, placement: Placement, size: tuple[int, int], score_threshold: float = 0.0
) -> list[Found]:
    """Objects of row `row` of a batch, in a picture of (height, width) pixels, best first."""
    masks = outputs["masks"][row] if "masks" in outputs else None
    scores = outputs["scores"][row]
    # A score of 0 marks an empty place.
    threshold = max(score_threshold, float(np.finfo(np.float32).tiny))
    boxes, labels = outputs["boxes"][row], outputs["labels"][row]
    return found_objects(boxes, scores, labels, masks, placement, size, threshold)


def plain(found: Found, labels: tuple[str, ...]) -> dict[str, Any]:
    """One object as JSON values: label, score, box, and mask or keypoints where it has them."""
    values: dict[str, Any] = {"label": labels[found.label], "score": round(found.score, 5)}
    values["box"] = [round(value, 2) for value in found.box]
    if found.mask is not None:
        from leanvit.annotations.masks import encode_mask

        values["segmentation"] = encode_mask(found.mask)
    if found.keypoints is not None:
        values["keypoints"] = np.round(found.keypoints.astype(np.float64), 3).tolist()
    return values


def line(found: list[Found], manifest: Manifest) -> dict[str, Any]:
    """What a JSON line says of one picture."""
    return {"objects": [plain(one, manifest.labels) for one in found]}


def text(found: list[Found], manifest: Manifest) -> str:
    """One picture in words: how many objects of each class."""
    counted = Counter(manifest.labels[one.label] for one in found).most_common()
    return ", ".join(f"{count} {label}" for label, count in counted) or "nothing"


COLUMNS = ("label", "score", "x1", "y1", "x2", "y2")
MASK_COLUMNS = (*COLUMNS, "segmentation")


def rows(found: list[Found], manifest: Manifest) -> list[list[Any]]:
    """One picture as rows of a table: one an object, in the order of COLUMNS, and its mask as COCO's run lengths."""
    table = []
    for one in found:
        values = plain(one, manifest.labels)
        row = [values["label"], f"{one.score:.5f}", *(f"{side:.2f}" for side in one.box)]
        table.append([*row, json.dumps(values["segmentation"])] if "segmentation" in values else row)
    return table


def draw(pixels: Pixels, found: list[Found], manifest: Manifest) -> dict[str, Pixels]:
    """The picture (height, width, 3) uint8 with its objects."""
    from leanvit.runtime.draw import draw_found

    return {"drawn": draw_found(pixels, found, manifest.labels)}


def measure_boxes(data: SceneSet, batches: Batches) -> dict[str, Any]:
    """COCO metrics of the boxes, `box_AP50` among them, each 0 to 1."""
    return _box_metrics(data, _found_in(data, batches)) | {"pictures": len(data.scenes)}


def measure_masks(data: SceneSet, batches: Batches) -> dict[str, Any]:
    """COCO metrics of boxes and masks, `mask_AP50` among them, each 0 to 1."""
    found = _found_in(data, batches)
    masks = {f"mask_{key}": value for key, value in coco_metrics(data, found, "segm").items()}
    return _box_metrics(data, found) | masks | {"pictures": len(data.scenes)}


def _box_metrics(data: SceneSet, found: dict[int, list[Found]]) -> dict[str, Any]:
    return {f"box_{key}": value for key, value in coco_metrics(data, found, "bbox").items()}


def _found_in(data: SceneSet, batches: Batches) -> dict[int, list[Found]]:
    found: dict[int, list[Found]] = {scene.image_id: [] for scene in data.scenes}
    for outputs, row, place in each_row(batches):
        scene = data.scenes[place.index]
        found[scene.image_id] = objects_of(outputs, row, placement_of(place), scene.size)
    return found


def each_row(batches: Batches) -> Iterator[tuple[Outputs, int, Place]]:
    """Outputs of a batch, number of a row in it, and the place of that row."""
    for outputs, places in batches:
        for row, place in enumerate(places):
            yield outputs, row, place
