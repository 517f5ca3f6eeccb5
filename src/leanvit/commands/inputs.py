"""What several verbs read: networks, images, and what was measured before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanvit.progress import note

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.annotations import SceneSet


def load_model(spec: str) -> Any:
    """Model and info of a checkpoint, a run folder or NAME.TAG."""
    from leanvit.checkpoint import load_model

    return load_model(spec)


def known_float_top1(model: Any, info: Any, config: configs.ExportConfig) -> float | None:
    """Float accuracy on the export's images: as measured when it was quantized, on the same data."""
    from leanvit.quant import QuantizedModel

    if isinstance(model, QuantizedModel):
        measured = model.report.get("float_accuracy") if model.report.get("data") == config.data else None
    else:
        measured = info.metrics if info.data == config.data else None
    if not measured:
        note(f"the float model was not measured on {config.data}: the accuracy drop is not checked")
    return measured["top1"] if measured else None


def bundle_images(manifest: Any, data: str, images: Any, bad_images: Any = "fail") -> Any:
    """Labelled, prepared images for a bundle."""
    import numpy as np

    from leanvit.data.loader import Loader, check_classes
    from leanvit.export.gate.verify import Evaluation

    check_classes(images.classes, manifest.labels, data)
    batches = list(Loader(images, manifest.preprocess, 64, bad_images))
    pixels = np.concatenate([x.numpy() for x, _ in batches])
    labels = np.concatenate([y.numpy() for _, y in batches])
    return Evaluation(pixels, labels, images.name, classes=images.classes)


def read_scenes(data: str, split: Any, task: str) -> SceneSet:
    from leanvit.tasks import task_named
    from leanvit.train.tasks import report_problems

    scenes = task_named(task).load(data, split)
    report_problems(scenes)
    return scenes
