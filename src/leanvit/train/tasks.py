"""Training of the tasks: run(config) fits a network to annotated pictures; best weights, state and log are files."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanvit.annotations import SceneSet
from leanvit.annotations.load import SceneSplit
from leanvit.checkpoint import CHECKPOINT_NAME, CheckpointInfo, load_model, save_checkpoint, with_metrics
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, Preprocess, TaskTrainConfig, save_yaml
from leanvit.data.loader import to_input
from leanvit.data.scene_augment import Augmentation
from leanvit.data.scene_kinds import BOXES
from leanvit.data.scene_loader import SceneDataset, SceneLoader
from leanvit.errors import ConfigError, DataError, NumericalError
from leanvit.files import only_writer, write_json
from leanvit.progress import Bar, note
from leanvit.runtime.answers import METRICS
from leanvit.tasks import task_named
from leanvit.tasks.build import build_network, keypoints_of
from leanvit.tasks.features import check_strides, load_backbone
from leanvit.tasks.measure import kind_of, measure_network, require_classes
from leanvit.train.augment import DROPPING, SAMPLING, seed_of
from leanvit.train.optimizer import learning_rate, optimizer_of, set_learning_rate
from leanvit.train.setup import UnfusedAttention, autocast_dtype, pick_device
from leanvit.train.state import Conditions, Progress, restore_state, save_state

SUMMARY_NAME = "train.json"
SPLITS: tuple[SceneSplit, ...] = ("train", "val")


@dataclass(frozen=True)
class TaskResult:
    """What a run reached.

    checkpoint: file with the best weights. best: the metric of those weights (0 to 1). metrics: all of them.
    history: one dict an epoch. cpu_seconds: processor time of training and validation, all threads.
    """

    checkpoint: Path
    best: float
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    cpu_seconds: float


class TaskTrainer:
    """The state of one run: network, optimizer, data and progress."""

    def __init__(self, config: TaskTrainConfig) -> None:
        """Load data, build the network; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        self.config = config
        self.task = task_named(config.task)
        self.folder = Path(config.output)
        self.device = pick_device(config.device)
        self.dtype = autocast_dtype(config.amp, self.device)
        torch.manual_seed(config.seed)
        self.train_scenes, self.val_scenes = (
            self.task.load(config.data, split, config.annotations) for split in SPLITS
        )
        for scenes in (self.train_scenes, self.val_scenes):
            report_problems(scenes)
        self.info = task_info(config, self.train_scenes)
        check_validation(self.info, self.val_scenes)
        with UnfusedAttention(self.device, self.dtype):
            self.network = build_network(self.info)
        check_strides(self.task.features(self.network))
        if config.initial_checkpoint or config.pretrained:
            self._start_backbone()
        self.network.to(self.device)
        self.loader = SceneLoader(
            self.train_scenes, kind_of(self.task), config.img_size, config.batch_size, train=True,
            augmentation=augmentation_of(config), seed=config.seed, workers=config.workers, on_bad=config.bad_images,
        )  # fmt: skip
        self.optimizer = make_optimizer(self.network, config)
        self.average = self._make_average() if config.model_ema_decay else None
        self.progress = Progress(f"{config.task}:{self.info.architecture}", 0, Conditions.here(1))

    def _start_backbone(self) -> None:
        config = self.config
        if config.initial_checkpoint:
            classifier, _ = load_model(config.initial_checkpoint)
        else:
            from leanvit.checkpoint import build

            classifier = build(config.model, 1000, pretrained=True)
        missing = load_backbone(self.task.features(self.network), classifier)
        if missing:
            note(f"{len(missing)} tensors of the backbone start at random, e.g. {missing[0]}")

    def _make_average(self) -> Any:
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.network, decay=self.config.model_ema_decay, use_warmup=True)

    def fit(self) -> TaskResult:
        """Train what is left; after each epoch everything is on disk."""
        config, steps = self.config, len(self.loader)
        with Bar(f"training {config.task}", config.epochs * steps) as bar:
            bar.done = self.progress.epoch * steps
            while self.progress.epoch < config.epochs:
                started, cpu = time.monotonic(), time.process_time()
                row = self._train_epoch(self.progress.epoch, bar)
                row |= self._validate(self.progress.epoch + 1)
                row |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
                self._record(row)
        history = self.progress.history
        reached = [row for row in history if "metric" in row]
        if not reached:
            raise ConfigError(f"{self.folder} holds no validated epoch within epochs {config.epochs}. Raise --epochs.")
        best = max(reached, key=lambda row: row["metric"])
        total = sum(row["cpu_seconds"] for row in history)
        return TaskResult(self.folder / CHECKPOINT_NAME, best["metric"], best["metrics"], history, total)

    def _train_epoch(self, epoch: int, bar: Bar) -> dict[str, Any]:
        config, steps = self.config, len(self.loader)
        self.network.train()
        self.loader.set_epoch(epoch)
        totals: dict[str, Tensor] = {}
        for step, (images, targets) in enumerate(self.loader):
            losses = self._learn(images, targets, epoch * steps + step)
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value.detach()
            detail = None
            if step % 5 == 0 or step == steps - 1:
                mean = sum(float(value) for value in totals.values()) / (step + 1)
                detail = f"epoch {epoch + 1}/{config.epochs} loss {mean:.3f}"
            bar.advance(detail=detail)
        means = {name: float(value) / steps for name, value in totals.items()}
        rate = learning_rate(config, (epoch + 1) * steps - 1, steps)
        return {"epoch": epoch + 1, "lr": rate, "train_loss": sum(means.values()), **means}

    def _learn(self, images: Tensor, targets: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
        """One step: forward, backward, update; the losses by name. Raises NumericalError where one is not finite."""
        config = self.config
        x = to_input(images.permute(0, 2, 3, 1), self.info.preprocess, self.device)
        moved = [
            {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in target.items()}
            for target in targets
        ]
        # Dropout, drop path and the sampling of proposals are pure functions of the step: a resumed run is the same.
        torch.manual_seed(seed_of(DROPPING, config.seed, step))
        seeds = [seed_of(SAMPLING, config.seed, step, position) for position in range(len(x))]
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            each = self.task.losses(self.network, x, moved, seeds)
        losses = {name: value.mean() for name, value in each.items()}
        total = torch.stack([value.float() for value in losses.values()]).sum()
        self._require_finite("loss", total, step, losses)
        set_learning_rate(self.optimizer, learning_rate(config, step, len(self.loader)))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_grad or math.inf)
        self._require_finite("gradient's norm", norm, step, losses)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network, step + 1)
        return losses

    def _require_finite(self, name: str, value: Tensor, step: int, losses: dict[str, Tensor]) -> None:
        if not value.isfinite():
            raise NumericalError(
                f"the {name} is {value.item()} at step {step} ({_named(losses)}); checkpoints up to the epoch before "
                f"are in {self.folder}. Lower --lr, or go on with --resume."
            )

    @property
    def _averaged(self) -> nn.Module | None:
        """The network with the moving average of the weights."""
        return self.average.module if self.average else None

    def _validate(self, finished: int) -> dict[str, Any]:
        if finished % self.config.val_interval and finished != self.config.epochs:
            return {}
        answering = self._averaged or self.network
        metrics = measure_network(answering, self.info, self.val_scenes, self.config.batch_size, self.device)
        return {"metric": metrics[METRICS[self.config.task]], "metrics": metrics}

    def _record(self, row: dict[str, Any]) -> None:
        """Take in a finished epoch: best weights, then the state, then the summary that is made from it."""
        earlier = [old["metric"] for old in self.progress.history if "metric" in old]
        if "metric" in row and row["metric"] > max(earlier, default=-1.0):
            info = with_metrics(self.info, **row["metrics"], epoch=row["epoch"])
            save_checkpoint(self.folder / CHECKPOINT_NAME, self._averaged or self.network, info)
        if "metric" in row:
            note(f"epoch {row['epoch']}: {METRICS[self.config.task]} {row['metric']:.4f}")
        self.progress = replace(
            self.progress, epoch=self.progress.epoch + 1, history=[*self.progress.history, row]
        )  # fmt: skip
        save_state(self.folder, self.progress, self.network, self.optimizer, self._averaged)
        write_json(self.folder / SUMMARY_NAME, self._summary())

    def restore(self) -> None:
        """Go on from the state in the folder, where there is one. Raises CheckpointError for that of another run."""
        found = restore_state(self.folder, self.progress, self.network, self.optimizer, self._averaged)
        self.progress = found or self.progress

    def _summary(self) -> dict[str, Any]:
        history = self.progress.history
        return {
            "task": self.config.task,
            "architecture": self.info.architecture,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "data": self.config.data,
            "train_pictures": len(self.train_scenes.scenes),
            "val_pictures": len(self.val_scenes.scenes),
            "metric": METRICS[self.config.task],
            "autocast": str(self.dtype).removeprefix("torch.") if self.dtype else "none",
            "device": str(self.device),
            "seed": self.config.seed,
            "cpu_seconds": sum(row["cpu_seconds"] for row in history),
            "problems": list(self.train_scenes.problems[:100]),
            "history": history,
        }


def _named(losses: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value):.3g}" for name, value in losses.items())


def task_info(config: TaskTrainConfig, scenes: SceneSet) -> CheckpointInfo:
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


def task_preprocess(config: TaskTrainConfig) -> Preprocess:
    """The backbone's own mean and deviation, at the size of the task."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    known = timm.get_pretrained_cfg(config.model, allow_unregistered=True)
    mean, std = (known.mean, known.std) if known else (IMAGENET_MEAN, IMAGENET_STD)
    crop_mode = task_named(config.task).crop_mode
    return Preprocess(config.img_size, tuple(mean), tuple(std), "bilinear", crop_mode=crop_mode)


def augmentation_of(config: TaskTrainConfig) -> Augmentation:
    """The random changes that a configuration asks for."""
    jitter = (config.color_jitter,) * 3
    return Augmentation(config.hflip, config.scale, jitter, config.degrees)


def check_validation(info: CheckpointInfo, scenes: SceneSet) -> None:
    """Raise DataError where a split can't measure the task: before the first epoch, not after it."""
    require_classes(info.labels, scenes)
    SceneDataset(scenes, kind_of(task_named(info.task)), info.preprocess.input_size)
    if task_named(info.task).samples is BOXES and all(one.crowd for scene in scenes.scenes for one in scene.instances):
        raise DataError(f"{scenes.name}: no object is annotated, expected some to validate on. Annotate the pictures.")


def report_problems(scenes: SceneSet, shown: int = 20) -> None:
    """Name the annotations that were left out."""
    for problem in scenes.problems[:shown]:
        note(f"left out: {problem}")
    if len(scenes.problems) > shown:
        note(f"left out: {len(scenes.problems) - shown} more; leanvit data inspect names them all")


def make_optimizer(network: nn.Module, config: TaskTrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer with groups for backbone and heads, each with and without decay.

    Raises ConfigError for an optimizer that timm doesn't know.
    """
    backbone = task_named(config.task).features(network).backbone
    exempt = set(cast(Any, backbone).no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
    own = {id(parameter): name for name, parameter in backbone.named_parameters()}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in network.parameters():
        of_backbone = id(parameter) in own
        decays = parameter.ndim > 1 and own.get(id(parameter)) not in exempt
        scale = config.backbone_lr_scale if of_backbone else 1.0
        empty = {"params": [], "lr_scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
        groups.setdefault((of_backbone, decays), empty)["params"].append(parameter)
    return optimizer_of(list(groups.values()), config)


def run(config: TaskTrainConfig) -> TaskResult:
    """Train as `config` says; best weights, last state, summary and resolved config land in config.output.

    Raises DataError, UnknownModelError, CheckpointError, RunLockedError, NumericalError (the checkpoints written
    before stay), EnvironmentProblem where the disk is full.
    """
    trainer = TaskTrainer(config)
    with only_writer(config.output):
        if config.resume:
            trainer.restore()
        # Not before: a refused resume must leave the other run's settings.
        save_yaml(config, Path(config.output) / "config.yaml")
        return trainer.fit()
