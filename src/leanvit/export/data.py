"""Data of any task: read, prepared to calibrate on, and as what the gate measures a bundle on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvit.annotations import Outputs, SceneSet
from leanvit.annotations.load import note_problems, require_classes
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import BadImages, Preprocess
from leanvit.data.classes import agreed
from leanvit.data.loader import Loader, to_input
from leanvit.data.scene_loader import SceneLoader
from leanvit.data.sets import ImageSet, load_split
from leanvit.data.sets.multi_label import load_multi_label
from leanvit.errors import ConfigError
from leanvit.export.gate.evaluation import Evaluation, Metrics, Run
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.gate.limits import COMPARED_PICTURES
from leanvit.imaging import Pixels
from leanvit.progress import note
from leanvit.quant.calibration_images import unlike
from leanvit.runtime.inputs import Place
from leanvit.runtime.task import Batch, Task, measure_task, task_named
from leanvit.tasks import task_named as training_task
from leanvit.tasks.build import task_of_network
from leanvit.tasks.measure import batches_of, kind_of

Data = ImageSet | SceneSet

KIND_IMAGES = 128
"""Validation images that are compared with those that calibrate: as many as calibrate by default."""

SYNTHETIC_IMAGES = 32
"""Images without data on which a bundle is compared with a network: twice as many as it has golden ones."""


def read_data(task: str, data: str, split: Any, **how: Any) -> Data:
    """Labelled images or annotated pictures of one split; what is left out of the latter is named.

    how: val_fraction and seed of a split that images are cut into. Raises DataError.
    """
    if task_named(task).data == "images":
        load = load_multi_label if task == "multilabel" else load_split
        return load(data, split, **{key: how[key] for key in ("val_fraction", "seed") if key in how})
    scenes = training_task(task).load(data, split)
    note_problems(scenes)
    return scenes


def agreed_classes(labels: tuple[str, ...], data: Data, name: str) -> tuple[tuple[str, ...], Data]:
    """A network's labels and data that speak of the same classes; see leanvit.data.classes. Raises DataError."""
    if not isinstance(data, SceneSet):
        return agreed(labels, data, name)
    require_classes(labels, data)
    return labels, data


def calibration_inputs(
    info: CheckpointInfo, data: Data, count: int, seed: int, batch_size: int = 16, bad_images: BadImages = "fail"
) -> Tensor:
    """Prepared training images (or crops of objects) without augmentation: (count, 3, H, W) float32 normalised.

    bad_images: what a corrupt image does; skipped ones are named and leave fewer; annotated pictures always skip.
    Raises ConfigError for no image, ImageError for a corrupt one, DataError where a class has none left.
    """
    if count < 1:
        raise ConfigError(f"calibration_images is {count}, expected at least 1")
    generator = np.random.default_rng(seed)
    if isinstance(data, ImageSet):
        chosen = data.subset(generator.permutation(len(data))[:count])
        loader = Loader(chosen, info.preprocess, batch_size, bad_images)
        return torch.cat([to_input(pixels, info.preprocess) for pixels, _ in loader])
    picks = np.sort(generator.permutation(len(data.scenes))[:count])
    scenes = replace(data, scenes=tuple(data.scenes[i] for i in picks))
    kind, size = kind_of(task_of_network(info)), info.preprocess.input_size
    batches = SceneLoader(scenes, kind, size, batch_size, train=False, on_bad="skip")
    return torch.cat([to_input(images.permute(0, 2, 3, 1), info.preprocess) for images, _ in batches])[:count]


def differ_in_kind(info: CheckpointInfo, x: Tensor, val: Data, seed: int) -> dict[str, float]:
    """In what calibration images x (N, 3, H, W), normalised, differ from those that a network is measured on; said.

    Returns `unlike` of them.
    """
    found = unlike(x, calibration_inputs(info, val, KIND_IMAGES, seed))
    if found:
        told = ", ".join(f"{name} by {far:.1f}" for name, far in found.items())
        note(
            f"calibration and validation images differ in kind, in standard deviations: {told}. Ranges are set for the "
            "former; calibrate on images like those that the network will see"
        )
    return found


def evaluation_of(
    task: str, data: Data, preprocess: Preprocess, before: float | None = None, batch_size: int | None = None
) -> Evaluation:
    """Labelled images or annotated pictures as what a bundle of a task is measured on.

    before: the task's metric of the float network on the same data, where it is known. batch_size: images a step, None:
    as many as the task usually takes.
    """
    row = task_named(task)
    if isinstance(data, ImageSet):
        found = _of_images(row, data, preprocess)
    else:
        found = _of_pictures(row, data, preprocess, batch_size or row.batch_size)
    return replace(found, before=before, batch_size=batch_size or 0)


def _of_images(task: Task, images: ImageSet, preprocess: Preprocess) -> Evaluation:
    batches = list(Loader(images, preprocess, 64))
    pixels = np.concatenate([x.numpy() for x, _ in batches])
    labels: NDArray[np.int64] = np.concatenate([y.numpy() for _, y in batches])
    places = [Place(i) for i in range(len(pixels))]

    def measure(run: Run) -> Metrics:
        return measure_task(task, images, [(run(pixels), places)])

    return Evaluation(images.name, pixels, images.classes, labels, measure)


def _of_pictures(task: Task, scenes: SceneSet, preprocess: Preprocess, step: int) -> Evaluation:
    size = preprocess.input_size

    def batches(run: Callable[[Any], Outputs], some: SceneSet) -> Iterator[Batch]:
        return batches_of(training_task(task.name), some, size, step, run)

    def measure(run: Run) -> Metrics:
        return measure_task(task, scenes, batches(lambda images: run(_pixels(images)), scenes))

    found: list[Pixels] = []

    def keep(images: Any) -> Outputs:
        found.append(_pixels(images))
        return {}

    for _ in batches(keep, spread(scenes)):
        pass
    return Evaluation(scenes.name, np.concatenate(found)[:COMPARED_PICTURES], scenes.classes, None, measure)


def spread(scenes: SceneSet) -> SceneSet:
    """At most COMPARED_PICTURES of some pictures, spread over all: folders are often sorted."""
    count = len(scenes.scenes)
    picks = dict.fromkeys(np.linspace(0, count - 1, min(count, COMPARED_PICTURES)).astype(int).tolist())
    return replace(scenes, scenes=tuple(scenes.scenes[i] for i in picks))


def _pixels(images: Tensor) -> Pixels:
    """(B, 3, H, W) uint8 of a loader as (B, H, W, 3)."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def synthetic_evaluation(preprocess: Preprocess) -> Evaluation:
    """Images without labels, on which a bundle is compared with the network before export."""
    pictures = synthetic_images(SYNTHETIC_IMAGES, preprocess.input_size, seed=1, channels=preprocess.channels)
    return Evaluation("synthetic images", np.stack(pictures))
