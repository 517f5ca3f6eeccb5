"""What tasks of annotated pictures add to a training: backbone and heads, named losses an image, the task's metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from leanvit.annotations import SceneSet
from leanvit.annotations.load import SceneSplit, note_problems, require_classes
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, LoadOptions, Preprocess, TrainConfig
from leanvit.data.loader import to_input
from leanvit.data.scene_augment import Augmentation
from leanvit.data.scene_kinds import BOXES
from leanvit.data.scene_loader import SceneDataset, SceneLoader
from leanvit.errors import ConfigError, DataError
from leanvit.load.api import load_classifier
from leanvit.progress import note
from leanvit.runtime.task import task_named as served_task
from leanvit.tasks import TrainingTask, task_named
from leanvit.tasks.build import build_network, keypoints_of
from leanvit.tasks.features import Features, check_strides, load_backbone
from leanvit.tasks.measure import kind_of, measure_network
from leanvit.tasks.task import Targets
from leanvit.train.augment import DROPPING, SAMPLING, seed_of
from leanvit.train.learning import BadBatch, Learned, Scored, Setting
from leanvit.train.lone_image import running_averages
from leanvit.train.optimizer import parameter_groups
from leanvit.train.processes import shard, wrap
from leanvit.train.scene_batches import SceneBatches, ScenePart
from leanvit.train.setup import UnfusedAttention, checkpoint_gradients

SPLITS: tuple[SceneSplit, ...] = ("train", "val")

Prepared = tuple[Tensor, Targets]


class LossNetwork(nn.Module):
    """A task's network whose forward returns its losses: what wraps modules only sees forward."""

    def __init__(self, task: TrainingTask, network: nn.Module) -> None:
        """Share the weights of `network`."""
        super().__init__()
        self.task = task
        self.network = network

    def forward(self, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
        """Named losses (B,) of x (B, 3, H, W)."""
        return self.task.losses(self.network, x, targets, seeds)


class SceneLearning:
    """Learning of a task on annotated pictures; see train.learning.Learning."""

    def __init__(self, config: TrainConfig, setting: Setting) -> None:
        """Load data, build the network; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        self.config, self.setting = config, setting
        self.counts_correct = False
        self.task = task_named(config.task)
        self.metric = served_task(config.task)
        train_scenes, self.val_scenes = (self.task.load(config.data, split, config.annotations) for split in SPLITS)
        for scenes in (train_scenes, self.val_scenes):
            note_problems(scenes)
        self.train_scenes = some_scenes(train_scenes, config)
        self.info = task_info(config, self.train_scenes)
        check_validation(self.info, self.val_scenes)
        with UnfusedAttention(setting.device, setting.dtype):
            self.model = build_network(self.info)
        self.features: Features | None = self.task.features(self.model)
        self._set_up_backbone()
        self.model.to(setting.device, memory_format=setting.memory_format)  # type: ignore[call-overload]
        self.learner: nn.Module = LossNetwork(self.task, self.model)
        self.saved = self.model
        self.extra: tuple[nn.Module, ...] = ()
        self.loader = SceneLoader(
            self.train_scenes, kind_of(self.task), self.info.preprocess.input_size, config.batch_size, train=True,
            augmentation=augmentation_of(config), seed=config.seed, workers=config.workers, on_bad=config.bad_images,
        )  # fmt: skip
        self.batches = SceneBatches(self.loader, config, setting.processes)

    def _set_up_backbone(self) -> None:
        config = self.config
        asked = [
            name
            for name, on in (
                ("initial_checkpoint", config.initial_checkpoint), ("pretrained", config.pretrained),
                ("layer_decay", config.layer_decay), ("freeze_epochs", config.freeze_epochs),
                ("grad_checkpointing", config.grad_checkpointing),
            )
            if on
        ]  # fmt: skip
        if self.features is None:
            if asked:
                raise ConfigError(f"{asked[0]} is of the backbone, and task '{config.task}' names none. Leave it out.")
            return
        check_strides(self.features)
        if config.initial_checkpoint or config.pretrained:
            self._start_backbone(self.features)
        if config.grad_checkpointing:
            checkpoint_gradients(self.features.backbone)
        if config.compile:
            self.features.backbone.compile()

    def _start_backbone(self, features: Features) -> None:
        config = self.config
        if config.initial_checkpoint:
            classifier, _ = load_classifier(
                config.initial_checkpoint, LoadOptions(model_name=config.model, ema=config.ema)
            )
        else:
            from leanvit.checkpoint import build

            classifier = build(config.model, 1000, pretrained=True)
        missing = load_backbone(features, classifier)
        if missing:
            note(f"{len(missing)} tensors of the backbone start at random, e.g. {missing[0]}")

    def name(self) -> str:
        """What a saved state is of."""
        return f"{self.config.task}:{self.info.architecture}"

    def groups(self) -> list[dict[str, Any]]:
        """Backbone and heads, each with and without decay."""
        return scene_groups(self.model, self.features.backbone if self.features else None, self.config)

    def of_head(self) -> Callable[[str], bool]:
        """All but the backbone learns where that is frozen."""
        if self.features is None:
            return lambda name: True
        backbone = self.features.backbone
        prefix = next(name for name, module in self.model.named_modules() if module is backbone)
        return lambda name: name != prefix and not name.startswith(f"{prefix}.")

    def shard(self) -> None:
        """Shard the network over the processes: the backbone's blocks, and the rest as one group.

        A head runs as often as a process has images, so that it must not wait for the others.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        blocks = self.features.backbone if self.features else nn.Identity()
        shard(self.model, self.setting.processes, self.setting.device, blocks=blocks)
        if hasattr(self.model, "losses"):
            register_fsdp_forward_method(self.model, "losses")

    def running(self) -> Any:
        """The form of the learner that runs."""
        if self.config.fsdp and self.setting.sharded:
            return self.learner
        # Not all that is built learns: pose reads the backbone's last map only.
        return wrap(self.learner, self.setting.processes, self.setting.device, all_learn=False)

    def prepare(self, part: ScenePart, step: int) -> Prepared:
        """Normalised pictures (B, 3, H, W) and their targets; augmentation has been done where they were read."""
        device = self.setting.device
        x = to_input(part.images.permute(0, 2, 3, 1), self.info.preprocess, device)
        targets = [{key: value.to(device) for key, value in target.items()} for target in part.targets]
        return x.to(memory_format=self.setting.memory_format), targets

    def learn(self, running: Any, prepared: Prepared, part: ScenePart, step: int) -> Learned:
        """Named losses of a part: what is sampled in them depends on the picture's place in the step only."""
        x, targets = prepared
        seed = self.config.seed
        seeds = [seed_of(SAMPLING, seed, step, position) for position in part.positions]
        torch.manual_seed(seed_of(DROPPING, seed, step, part.position))
        with self.setting.autocast(), running_averages(self.learner, len(part)):
            return Learned(running(x, targets, seeds))

    def without_images(self, running: Any) -> dict[str, Tensor]:
        """The losses of one picture that counts for nothing."""
        device = self.setting.device
        image, target = self.loader.any_sample()
        x = to_input(image[None].permute(0, 2, 3, 1), self.info.preprocess, device)
        moved = {key: value.to(device) for key, value in target.items()}
        losses: dict[str, Tensor] = running(x.to(memory_format=self.setting.memory_format), [moved], [0])
        return losses

    def validate(self, model: nn.Module) -> Scored:
        """The task's metrics on all validation pictures. Every process measures all of them and finds the same."""
        size = min(self.config.batch_size, 16)
        metrics = measure_network(model, self.info, self.val_scenes, size, self.setting.device)
        value = metrics[self.metric.metric]
        if self.setting.processes.first:
            note(f"{self.metric.metric} {value:.4f}")
        return Scored(metrics, {"metric": value, "metrics": metrics})

    def is_better(self, new: dict[str, Any], best: dict[str, Any]) -> bool:
        """By the task's metric."""
        return self.metric.better(new[self.metric.metric], best[self.metric.metric])

    def is_of(self, row: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Whether a row of the history is the one with these metrics."""
        return bool(row.get("metrics") == metrics)

    def bad_batch(self, part: ScenePart, prepared: Prepared) -> BadBatch:
        """The augmented pictures and their targets, numbered by their place in the part."""
        tensors = {"images": part.images}
        for row, target in enumerate(part.targets):
            tensors |= {f"{row}.{name}": value.contiguous() for name, value in target.items()}
        scenes = [self.loader.dataset.scene_of(int(target["index"])) for target in part.targets]
        return BadBatch(tensors, tuple(str(self.train_scenes.scenes[scene].path) for scene in scenes))

    def summary(self) -> dict[str, Any]:
        """What train.json says of the data."""
        return {
            "task": self.config.task,
            "metric": self.metric.metric,
            "train_pictures": len(self.train_scenes.scenes),
            "val_pictures": len(self.val_scenes.scenes),
            "left_out": {"train": self.loader.bad},
            "problems": list(self.train_scenes.problems[:100]),
        }


def some_scenes(scenes: SceneSet, config: TrainConfig) -> SceneSet:
    """The pictures that `train_fraction` allows, at least one, in their order; smaller parts lie in larger ones."""
    if config.train_fraction == 1.0:
        return scenes
    order = np.random.default_rng((config.seed, 1)).permutation(len(scenes.scenes))
    kept = np.sort(order[: max(1, round(config.train_fraction * len(order)))])
    return replace(scenes, scenes=tuple(scenes.scenes[index] for index in kept.tolist()))


def task_info(config: TrainConfig, scenes: SceneSet) -> CheckpointInfo:
    """What checkpoints of this run will say of themselves."""
    task = task_named(config.task)
    return CheckpointInfo(
        architecture=config.model.split(".")[0],
        labels=scenes.classes,
        preprocess=task_preprocess(config),
        kwargs={"drop_path_rate": config.drop_path} if config.drop_path else {},
        data=config.data,
        seed=config.seed,
        task=config.task,
        head=task.head(config),
        keypoints=keypoints_of(scenes.keypoints) if task.keypoints else None,
    )


def task_preprocess(config: TrainConfig) -> Preprocess:
    """The backbone's own mean and deviation, at the size of the task."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    known = timm.get_pretrained_cfg(config.model, allow_unregistered=True)
    mean, std = (known.mean, known.std) if known else (IMAGENET_MEAN, IMAGENET_STD)
    size = config.input_size
    if size is None:
        raise ConfigError(f"no img_size given, expected one for task '{config.task}'. Give --img-size.")
    return Preprocess(size, tuple(mean), tuple(std), "bilinear", crop_mode=task_named(config.task).crop_mode)


def augmentation_of(config: TrainConfig) -> Augmentation:
    """The random changes that a configuration asks for."""
    jitter = (config.color_jitter,) * 3
    return Augmentation(config.hflip or 0.0, config.scale, jitter, config.degrees or 0.0)


def check_validation(info: CheckpointInfo, scenes: SceneSet) -> None:
    """Raise DataError where a split can't measure the task: before the first epoch, not after it."""
    require_classes(info.labels, scenes)
    kind = kind_of(task_named(info.task))
    SceneDataset(scenes, kind, info.preprocess.input_size)
    if kind is BOXES and all(one.crowd for scene in scenes.scenes for one in scene.instances):
        raise DataError(f"{scenes.name}: no object is annotated, expected some to validate on. Annotate the pictures.")


def scene_groups(network: nn.Module, backbone: nn.Module | None, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of a network's parameters: those of the backbone by `layer_decay` and `backbone_lr_scale`, then the rest.

    What the backbone's no_weight_decay names, norms and biases are not decayed.
    """
    own = {id(p): name for name, p in backbone.named_parameters()} if backbone is not None else {}
    layers = []
    if backbone is not None and config.layer_decay is not None:
        # features_only may wrap the network that knows its layers.
        layers = parameter_groups(getattr(backbone, "model", backbone), config)
        layers = [{**group, "lr_scale": config.backbone_lr_scale * group["lr_scale"]} for group in layers]
    layered = {id(parameter) for group in layers for parameter in group["params"]}
    exempt = set(cast(Any, backbone).no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in network.parameters():
        if id(parameter) in layered:
            continue
        of_backbone = id(parameter) in own
        decays = parameter.ndim > 1 and own.get(id(parameter)) not in exempt
        scale = config.backbone_lr_scale if of_backbone else 1.0
        empty = {"params": [], "lr_scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
        groups.setdefault((of_backbone, decays), empty)["params"].append(parameter)
    return [*layers, *groups.values()]
