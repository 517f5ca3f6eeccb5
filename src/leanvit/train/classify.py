"""What classification adds to a training: labelled images, mixing, a teacher, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.checkpoint import classifier_prefixes
from leanvit.config import TrainConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.train.accuracy import Accuracy, evaluate
from leanvit.train.augment import DROPPING, draws, erase, mix, resample, seed_of
from leanvit.train.batches import Batches, Part
from leanvit.train.distill import Outputs, hint_loss, load_teacher, make_student, teacher_loss
from leanvit.train.learning import BadBatch, Learned, Scored, Setting
from leanvit.train.lone_image import running_averages
from leanvit.train.optimizer import balanced_weights, parameter_groups
from leanvit.train.outlier_loss import OutlierLoss
from leanvit.train.processes import shard, wrap
from leanvit.train.setup import build_model, checkpoint_gradients, some_of_each_class

Prepared = tuple[Tensor, Tensor]


class Classification:
    """Learning of a timm model on labelled images; see train.learning.Learning."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        """Load the data and build the model; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        self.config, self.setting = config, setting
        self.counts_correct = True
        train_images, val_images = self._load_data()
        self.model, self.info = build_model(
            config, train_images.classes, setting.device, setting.dtype, setting.memory_format
        )
        preprocess = self.info.preprocess
        in_memory = None if config.cache == "auto" else config.cache == "memory"
        self.train_loader = Loader(train_images, preprocess, config.batch_size, config.bad_images, in_memory=in_memory)
        self.val_loader = Loader(val_images, preprocess, 256, config.bad_images)
        self.batches = Batches(self.train_loader, config, setting.processes)
        if config.grad_checkpointing:
            checkpoint_gradients(self.model)
        size = preprocess.input_size
        self.teacher = load_teacher(config, self.info.labels, setting.device) if config.teacher else None
        self.student = make_student(self.model, size, self.teacher, config) if self.teacher else None
        self.learner: nn.Module = (self.student or self.model).to(setting.device)
        self.saved = self.learner
        project = self.student.project if self.student else None
        self.extra: tuple[nn.Module, ...] = (project,) if project else ()
        self.weights = self._class_weights()
        self.outliers = OutlierLoss(self.model) if config.outlier_weight else None

    def _load_data(self) -> tuple[ImageSet, ImageSet]:
        config = self.config
        train_images, val_images = (
            load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed)
            for split in ("train", "val")
        )
        return some_of_each_class(train_images, config), val_images

    def _class_weights(self) -> Tensor | None:
        if self.config.class_weights == "none":
            return None
        images = self.train_loader.images
        return balanced_weights(images.labels, len(images.classes)).to(self.setting.device)

    def name(self) -> str:
        """What a saved state is of."""
        return self.info.architecture

    def groups(self) -> list[dict[str, Any]]:
        """Groups of the model's parameters."""
        return parameter_groups(self.model, self.config)

    def of_head(self) -> Callable[[str], bool]:
        """The classifier learns where the backbone is frozen."""
        prefixes = classifier_prefixes(self.model)
        return lambda name: any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)

    def shard(self) -> None:
        """Shard the learner's parameters over the processes."""
        shard(self.learner, self.setting.processes, self.setting.device)

    def running(self) -> Any:
        """The form of the learner that runs."""
        sharded = self.config.fsdp and self.setting.sharded
        running = self.learner if sharded else wrap(self.learner, self.setting.processes, self.setting.device)
        return torch.compile(running) if self.config.compile else running

    def prepare(self, part: Part, step: int) -> Prepared:
        """Augmented, normalised images (B, 3, H, W) and labels, or their mixture (B, classes)."""
        config, preprocess, device = self.config, self.info.preprocess, self.setting.device
        x = to_input(part.images, preprocess, device)
        span = slice(part.position, part.position + len(x))
        uniform = draws(config.seed, step, part.total, span)
        x = resample(x, uniform, config, preprocess.input_size, crop=not self.batches.crops_files)
        x = erase(x, config, step, part.positions)
        x, target = mix(x, part.labels.to(device, non_blocking=True), config, step, len(self.info.labels))
        return x.to(memory_format=self.setting.memory_format), target

    def learn(self, running: Any, prepared: Prepared, part: Part, step: int) -> Learned:
        """Losses of a part and how many of its images were right."""
        x, target = prepared
        torch.manual_seed(seed_of(DROPPING, self.config.seed, step, part.position))
        if self.outliers:
            self.outliers.begin()
        with self.setting.autocast(), running_averages(self.learner, len(part)):
            output = self.output(running, x)
        losses = self.losses(output, target, x)
        if self.outliers:
            losses = losses + self.config.outlier_weight * self.outliers.losses(len(x))
        return Learned({"loss": losses}, self.correct(output, part))

    def correct(self, output: Outputs, part: Part) -> Tensor | None:
        """How many images of a part were right; None where that is no number of images."""
        return (output.logits.argmax(1) == part.labels.to(self.setting.device)).sum()

    def output(self, running: Any, x: Tensor) -> Outputs:
        """What the network returns for x."""
        found = running(x)
        if isinstance(found, tuple) and self.student:
            return Outputs(*found)
        return Outputs(found[0] if isinstance(found, tuple) else found)

    def losses(self, output: Outputs, target: Tensor, x: Tensor) -> Tensor:
        """Loss of each image: (B,). Class weights have mean 1 over the data and are not divided by again."""
        config = self.config
        losses = F.cross_entropy(
            output.logits.float(), target, self.weights, reduction="none", label_smoothing=config.smoothing
        )
        if self.teacher is None:
            return losses
        with self.setting.autocast():
            taught = self.teacher(x, self.info.preprocess)
        alpha = config.distillation_alpha
        losses = (1 - alpha) * losses + alpha * teacher_loss(output, taught, config)
        if config.hint_weight:
            losses = losses + config.hint_weight * hint_loss(output, taught)
        return losses

    def without_images(self, running: Any) -> dict[str, Tensor]:
        """The loss of one image that counts for nothing."""
        x = torch.zeros(1, 3, *self.info.preprocess.input_size, device=self.setting.device)
        return {"loss": self.output(running, x).logits.float().sum(1)}

    def validate(self, model: nn.Module) -> Scored:
        """Accuracy over the validation images."""
        found = self.accuracy(model)
        return Scored(asdict(found), {"val_loss": found.loss, "val_top1": found.top1})

    def accuracy(self, model: nn.Module) -> Accuracy:
        """Accuracy over the validation images, shared by the processes."""
        return evaluate(model, self.val_loader, self.setting.device, self.setting.processes)

    def is_better(self, new: dict[str, Any], best: dict[str, Any]) -> bool:
        """Equal accuracy with a lower loss is better: small validation sets tie often."""
        return (new["top1"], -new["loss"]) > (best["top1"], -best["loss"])

    def is_of(self, row: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Whether a row of the history is the one with these metrics."""
        return (row.get("val_top1"), row.get("val_loss")) == (metrics["top1"], metrics["loss"])

    def bad_batch(self, part: Part, prepared: Prepared) -> BadBatch:
        """The images before and after augmentation, their labels and their numbers in the set."""
        sources = tuple(self.train_loader.images.name_of(index) for index in part.indices.tolist())
        tensors = {"images": part.images, "augmented": prepared[0].detach().cpu().contiguous(), "labels": part.labels}
        return BadBatch(tensors | {"indices": torch.from_numpy(part.indices)}, sources)

    def summary(self) -> dict[str, Any]:
        """What train.json says of the data."""
        return {
            "train_images": len(self.train_loader.images),
            "val_images": len(self.val_loader.images),
            "left_out": {"train": self.train_loader.bad, "val": self.val_loader.bad},
        }
