"""From a network's raw answers to objects and maps in the picture, and to the task's metric. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import ClassMap, Found, Outputs, SceneSet
from leanvit.annotations.maps import load_map
from leanvit.annotations.metrics import SegmentationScores, coco_metrics, pck
from leanvit.config import Task
from leanvit.errors import DataError
from leanvit.runtime.decode import class_map, found_objects, heatmap_keypoints
from leanvit.runtime.letterbox import Placement

METRICS: dict[str, str] = {"detect": "box_AP50", "segment": "mask_AP50", "semantic": "miou", "pose": "pck@0.1"}
"""The metric of each task by which the best epoch is chosen; all are shares from 0 to 1."""

PCK_SHARE = 0.1


@dataclass(frozen=True)
class Place:
    """Where a network input lies in its picture.

    scene: index into SceneSet.scenes. placement: of the whole picture in the input; None for a crop.
    region: (x1, y1, x2, y2) of the picture that a crop shows; None for a whole picture. instance: index of the
    object that the crop is of.
    """

    scene: int
    placement: Placement | None = None
    region: tuple[float, float, float, float] | None = None
    instance: int = 0


def decode_objects(
    outputs: Outputs, row: int, placement: Placement, size: tuple[int, int], score_threshold: float = 0.0
) -> list[Found]:
    """Objects of one picture of (height, width) pixels, best first; with masks where the outputs have them."""
    masks = outputs["masks"][row] if "masks" in outputs else None
    scores = outputs["scores"][row]
    # A score of 0 marks an empty place.
    threshold = max(score_threshold, float(np.finfo(np.float32).tiny))
    boxes, labels = outputs["boxes"][row], outputs["labels"][row]
    return found_objects(boxes, scores, labels, masks, placement, size, threshold)


def decode_map(outputs: Outputs, row: int, placement: Placement, size: tuple[int, int]) -> ClassMap:
    """Class of every pixel of one picture: (height, width) uint8."""
    return class_map(outputs["logits"][row], placement, size)


def decode_pose(outputs: Outputs, row: int, region: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """Keypoints (K, 3) of x, y in the picture and score, of the object that a crop of `region` shows."""
    return heatmap_keypoints(outputs["heatmaps"][row], region)


Batch = tuple[Outputs, list[Place]]


def measure(task: Task, scenes: SceneSet, batches: Iterable[Batch]) -> dict[str, Any]:
    """The task's metrics over a split; METRICS names the one that counts.

    batches: raw answers for whole pictures or crops, and where those lie. Raises DataError for a split without
    any annotation of this task.
    """
    ways = {"semantic": _measure_maps, "pose": _measure_pose}
    metrics = ways[task](scenes, batches) if task in ways else _measure_objects(task, scenes, batches)
    if metrics[METRICS[task]] is None:
        raise DataError(
            f"{scenes.name}: nothing is annotated that task {task} is measured on, expected some. Annotate the "
            "pictures, or give others."
        )
    return metrics


def _measure_objects(task: Task, scenes: SceneSet, batches: Iterable[Batch]) -> dict[str, Any]:
    found: dict[int, list[Found]] = {scene.image_id: [] for scene in scenes.scenes}
    for outputs, row, place in _rows(batches):
        scene = scenes.scenes[place.scene]
        if place.placement is None:
            raise DataError(f"{scene.path}: a crop among whole pictures, expected the placement of each")
        found[scene.image_id] = decode_objects(outputs, row, place.placement, scene.size)
    result = {f"box_{key}": value for key, value in coco_metrics(scenes, found, "bbox").items()}
    if task == "segment":
        result |= {f"mask_{key}": value for key, value in coco_metrics(scenes, found, "segm").items()}
    return result | {"pictures": len(scenes.scenes)}


def _rows(batches: Iterable[Batch]) -> Iterator[tuple[Outputs, int, Place]]:
    for outputs, places in batches:
        for row, place in enumerate(places):
            yield outputs, row, place


def _measure_maps(scenes: SceneSet, batches: Iterable[Batch]) -> dict[str, Any]:
    scores = SegmentationScores(len(scenes.classes))
    for outputs, row, place in _rows(batches):
        scene = scenes.scenes[place.scene]
        if place.placement is not None:
            scores.update(load_map(scene, scenes), decode_map(outputs, row, place.placement, scene.size))
    return {**scores.result(), "pictures": len(scenes.scenes)}


def _measure_pose(scenes: SceneSet, batches: Iterable[Batch]) -> dict[str, Any]:
    truths, answers, sizes = [], [], []
    found: dict[int, list[Found]] = {scene.image_id: [] for scene in scenes.scenes}
    for outputs, row, place in _rows(batches):
        scene = scenes.scenes[place.scene]
        instance = scene.instances[place.instance]
        if place.region is None or instance.keypoints is None:
            continue
        keypoints = decode_pose(outputs, row, place.region)
        truths.append(instance.keypoints)
        answers.append(keypoints)
        sizes.append(max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1]))
        score = float(keypoints[:, 2].mean())
        found[scene.image_id].append(Found(instance.label, score, instance.box, keypoints=keypoints))
    if not truths:
        raise DataError(f"{scenes.name}: no object with keypoints, expected some. Give annotations with keypoints.")
    shares = pck(np.stack(truths), np.stack(answers), np.asarray(sizes), PCK_SHARE)
    oks = {f"oks_{key}": value for key, value in coco_metrics(scenes, found, "keypoints").items()}
    return {"pck@0.1": shares["pck"], "pck_per_keypoint": shares["per_keypoint"], **oks, "objects": len(truths)}
