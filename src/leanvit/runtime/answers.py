"""From a network's outputs to objects and maps in the picture, and to the task's metric. No torch.

What is left of the time before `leanvit.runtime.task`, for the modules that have not moved to it yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import ClassMap, Outputs, SceneSet
from leanvit.config import Task
from leanvit.runtime.decode import class_map, heatmap_keypoints
from leanvit.runtime.letterbox import Placement
from leanvit.runtime.task import TASKS, Batch, Place, measure_task, task_named
from leanvit.runtime.tasks.objects import objects_of as decode_objects

__all__ = ["METRICS", "Batch", "Place", "decode_map", "decode_objects", "decode_pose", "measure"]

METRICS: dict[str, str] = {name: row.metric for name, row in TASKS.items() if row.data == "scenes"}
"""The metric of each task by which the best epoch is chosen; all are shares from 0 to 1."""


def decode_map(outputs: Outputs, row: int, placement: Placement, size: tuple[int, int]) -> ClassMap:
    """Class of every pixel of one picture: (height, width) uint8."""
    return class_map(outputs["logits"][row], placement, size)


def decode_pose(outputs: Outputs, row: int, region: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """Keypoints (K, 3) of x, y in the picture and score, of the object that a crop of `region` shows."""
    return heatmap_keypoints(outputs["heatmaps"][row], region)


def measure(task: Task, scenes: SceneSet, batches: Iterable[Batch]) -> dict[str, Any]:
    """The task's metrics over a split: see `leanvit.runtime.task.measure_task`."""
    return measure_task(task_named(task), scenes, batches)
