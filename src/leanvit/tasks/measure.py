"""The metric of a task, of a torch network or of anything else that returns raw outputs for prepared pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.annotations import Outputs, SceneSet
from leanvit.annotations.load import require_classes
from leanvit.checkpoint import CheckpointInfo
from leanvit.data.loader import Loader, to_input
from leanvit.data.scene_loader import SceneLoader
from leanvit.data.scene_samples import SampleKind
from leanvit.data.sets import ImageSet
from leanvit.errors import ConfigError
from leanvit.progress import track
from leanvit.runtime.inputs import Place
from leanvit.runtime.task import Batch, measure_task
from leanvit.runtime.task import task_named as served_task
from leanvit.tasks import TrainingTask
from leanvit.tasks.build import task_of_network


def measure_images(network: nn.Module, info: CheckpointInfo, images: ImageSet, batch_size: int) -> dict[str, Any]:
    """Metrics of a torch network on labelled images, where those of its task are not counted as top-1."""
    task = task_of_network(info)
    network.eval()
    loader = Loader(images.numbered(), info.preprocess, batch_size)
    batches = track(loader, f"measuring {task.name}", -(-len(images) // batch_size))
    return measure_task(served_task(task.name), images, outputs_of_numbered(network, info, batches))


def outputs_of_numbered(
    network: nn.Module,
    info: CheckpointInfo,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Raw outputs of batches (pixels, numbers) of images that were numbered (ImageSet.numbered), and their places."""
    task, where = task_of_network(info), device or torch.device("cpu")
    for pixels, numbers in batches:
        x = to_input(pixels, info.preprocess, where)
        yield task.outputs(network, x), [Place(int(number)) for number in numbers]


def batches_of(
    task: TrainingTask, scenes: SceneSet, size: tuple[int, int], batch_size: int, run: Callable[[Tensor], Outputs]
) -> Iterator[Batch]:
    """Raw outputs of every prepared picture or crop of a split; run takes (B, 3, H, W) uint8."""
    loader = SceneLoader(scenes, kind_of(task), size, batch_size, train=False)
    for images, targets in track(loader, f"measuring {task.name}", len(loader)):
        yield run(images), [loader.dataset.place_of(int(target["index"])) for target in targets]


def kind_of(task: TrainingTask) -> SampleKind:
    """What a sample of a task is. Raises ConfigError for a task of labelled images."""
    if task.samples is None:
        raise ConfigError(f"task '{task.name}' has labelled images, expected a task of annotated pictures.")
    return task.samples


def measure_network(
    network: nn.Module, info: CheckpointInfo, scenes: SceneSet, batch_size: int, device: torch.device | None = None
) -> dict[str, Any]:
    """Metrics of a torch network on a split; the task's row in leanvit.runtime.task names the one that counts.

    Raises DataError where the split has other classes than the network.
    """
    require_classes(info.labels, scenes)
    task = task_of_network(info)
    where = device or torch.device("cpu")
    network.eval()

    def run(images: Tensor) -> Outputs:
        return task.outputs(network, to_input(images.permute(0, 2, 3, 1), info.preprocess, where))

    batches = batches_of(task, scenes, info.preprocess.input_size, batch_size, run)
    return measure_task(served_task(task.name), scenes, batches)
