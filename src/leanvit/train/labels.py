"""What several labels an image add to a training: their table, binary cross entropy, mAP and thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from leanvit.config import TrainConfig
from leanvit.data.sets import ImageSet
from leanvit.data.sets.multi_label import load_multi_label
from leanvit.errors import DataError
from leanvit.progress import note
from leanvit.runtime.task import measure_task
from leanvit.runtime.task import task_named as served_task
from leanvit.tasks.measure import outputs_of_numbered
from leanvit.train.batches import Part
from leanvit.train.classify import Classification
from leanvit.train.distill import Outputs
from leanvit.train.learning import Scored, Setting


class MultiLabel(Classification):
    """Learning of a timm model on images with any number of labels; see train.learning.Learning."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        """Load the data and build the model; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        from timm.loss import BinaryCrossEntropy

        super().__init__(config, setting)
        self.counts_correct = False
        self.metric = served_task(config.task)
        # timm smooths numbers of classes; labels of 0 and 1 are softened here, as its Mixup does.
        self.entropy = BinaryCrossEntropy(smoothing=0.0, reduction="none")

    def _load_data(self) -> tuple[ImageSet, ImageSet]:
        """Training images, and validation images numbered, whose labels are `val_images`'."""
        config = self.config
        train, val = (
            load_multi_label(config.data, split, val_fraction=config.val_fraction, seed=config.seed)
            for split in ("train", "val")
        )
        train = some_images(train, config)
        require_labels(train, val)
        self.val_images = val
        return train, val.numbered()

    def losses(self, output: Outputs, target: Tensor, x: Tensor) -> Tensor:
        """Binary cross entropy of each image, mean over its labels: (B,)."""
        smoothing = self.config.smoothing
        soft = target.float() * (1 - smoothing) + smoothing / target.shape[1]
        losses: Tensor = self.entropy(output.logits.float(), soft)
        return losses.mean(1)

    def correct(self, output: Outputs, part: Part) -> Tensor | None:
        """An image with several labels is neither right nor wrong."""
        return None

    def validate(self, model: nn.Module) -> Scored:
        """mAP, and the thresholds with the best F1, over all validation images; every process measures all of them."""
        name = self.metric.metric
        model.eval()
        batches = outputs_of_numbered(model, self.info, self.val_loader.batches(), self.setting.device)
        metrics = measure_task(self.metric, self.val_images, batches)
        if self.setting.processes.first:
            note(f"{name} {metrics[name]:.4f}")
        return Scored(metrics, {"metric": metrics[name], "metrics": metrics})

    def is_better(self, new: dict[str, Any], best: dict[str, Any]) -> bool:
        """By mAP."""
        return self.metric.better(new[self.metric.metric], best[self.metric.metric])

    def is_of(self, row: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Whether a row of the history is the one with these metrics."""
        return bool(row.get("metrics") == metrics)

    def summary(self) -> dict[str, Any]:
        """What train.json says of the data."""
        return {"task": self.config.task, "metric": self.metric.metric, **super().summary()}


def some_images(images: ImageSet, config: TrainConfig) -> ImageSet:
    """The part of the training images that `train_fraction` allows; smaller parts lie in larger ones of a seed."""
    if config.train_fraction == 1.0:
        return images
    order = np.random.default_rng((config.seed, 1)).permutation(len(images))
    return images.subset(np.sort(order[: max(1, round(config.train_fraction * len(order)))]))


def require_labels(train: ImageSet, val: ImageSet) -> None:
    """Raise DataError where a label can't be learned, or nothing can be measured."""
    missing = [name for name, count in zip(train.classes, train.labels.sum(0), strict=True) if not count]
    if missing or len(train.classes) < 2:
        found = f"no training image has {', '.join(missing[:5])}" if missing else f"{len(train.classes)} labels"
        raise DataError(
            f"{train.name}: {found}, expected at least two labels and images to train on of each. Add images, or take "
            "the label out."
        )
    if not val.labels.any():
        raise DataError(f"{val.name}: no validation image has a label, expected some to measure mAP on. Add images.")
