"""The metric of a task, of a torch network or of anything else that gives raw answers for prepared pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from leanvit.annotations import Outputs, SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Task
from leanvit.data.loader import to_input
from leanvit.data.scene_loader import SceneLoader
from leanvit.data.scene_samples import pose_objects
from leanvit.errors import DataError
from leanvit.progress import track
from leanvit.runtime.answers import Batch, Place, measure
from leanvit.runtime.decode import pose_region
from leanvit.runtime.letterbox import place
from leanvit.runtime.task_predictor import TaskPredictor
from leanvit.tasks.build import raw_answers


def batches_of(
    task: Task, scenes: SceneSet, size: tuple[int, int], batch_size: int, answer: Callable[[Tensor], Outputs]
) -> Iterator[Batch]:
    """Raw answers to every prepared picture or crop of a split; answer takes (B, 3, H, W) uint8."""
    loader = SceneLoader(scenes, task, size, batch_size, train=False)
    objects = pose_objects(scenes) if task == "pose" else ()
    for images, targets in track(loader, f"measuring {task}", len(loader)):
        yield answer(images), [_place(int(target["index"]), scenes, objects, size) for target in targets]


def _place(index: int, scenes: SceneSet, objects: tuple[tuple[int, int], ...], size: tuple[int, int]) -> Place:
    if not objects:
        return Place(index, place(scenes.scenes[index].size, size))
    scene, instance = objects[index]
    box = scenes.scenes[scene].instances[instance].box
    return Place(scene, region=pose_region(box, size[1] / size[0]), instance=instance)


def measure_network(
    network: nn.Module, info: CheckpointInfo, scenes: SceneSet, batch_size: int, device: torch.device | None = None
) -> dict[str, Any]:
    """Metrics of a torch network on a split; see leanvit.runtime.answers.METRICS.

    Raises DataError where the split has other classes than the network.
    """
    require_classes(info.labels, scenes)
    task = cast(Task, info.task)
    where = device or torch.device("cpu")
    network.eval()

    def answer(images: Tensor) -> Outputs:
        return raw_answers(network, task, to_input(images.permute(0, 2, 3, 1), info.preprocess, where))

    return measure(task, scenes, batches_of(task, scenes, info.preprocess.input_size, batch_size, answer))


def require_classes(labels: tuple[str, ...], scenes: SceneSet) -> None:
    """Raise DataError where a split has other classes than a network, or in another order."""
    if scenes.classes != labels:
        raise DataError(
            f"{scenes.name} has classes {', '.join(scenes.classes[:4])}... ({len(scenes.classes)}), the network has "
            f"{', '.join(labels[:4])}... ({len(labels)}), expected the same in the same order."
        )


def measure_bundle(predictor: TaskPredictor, scenes: SceneSet, batch_size: int = 8) -> dict[str, Any]:
    """The task's metrics of a bundle, executed."""

    def answer(images: Tensor) -> Outputs:
        return predictor.outputs(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))

    task = cast(Task, predictor.manifest.task)
    return measure(task, scenes, batches_of(task, scenes, predictor.size, batch_size, answer))
