"""Training: run(config) fits a timm model to labelled images and leaves a checkpoint that carries everything."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.checkpoint import CHECKPOINT_NAME, save_checkpoint, with_metrics
from leanvit.config import TrainConfig, save_yaml
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import ConfigError, NumericalError
from leanvit.files import only_writer, write_atomic
from leanvit.progress import Bar, note, silence
from leanvit.train.accuracy import Accuracy, evaluate
from leanvit.train.augment import DROPPING, draws, erase, mix, resample, seed_of
from leanvit.train.batches import Batches, Part
from leanvit.train.distill import Answer, hint_loss, load_teacher, make_student, teacher_loss
from leanvit.train.logs import Tracker, open_trackers, write_history
from leanvit.train.optimizer import balanced_weights, freeze, learning_rate, make_optimizer, set_learning_rate
from leanvit.train.processes import Processes, connected, from_environment, shard, without_sync, wrap
from leanvit.train.setup import autocast_dtype, build_model, pick_device, some_of_each_class
from leanvit.train.state import Conditions, Progress, restore_state, save_state

BAD_BATCH_NAME = "nan_batch.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What a training run reached.

    checkpoint: file with the best weights. best: accuracy of those weights on the validation images.
    history: one dict an epoch: epoch, lr, train_loss, train_top1, seconds; where it was validated also
        val_loss, val_top1.
    """

    checkpoint: Path
    best: Accuracy
    history: list[dict[str, float]]
    seconds: float


class Trainer:
    """The state of one run in one process: model, optimizer, data and progress."""

    def __init__(self, config: TrainConfig, processes: Processes | None = None) -> None:
        """Load the data and build the model; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        self.config = config
        self.processes = processes or Processes()
        self.folder = Path(config.output)
        self.device = pick_device(config.device, self.processes.local_rank if self.processes.world > 1 else None)
        self.dtype = autocast_dtype(config.amp, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        torch.manual_seed(config.seed)
        train_images, val_images = self._load_data()
        self.model, self.info = build_model(config, train_images.classes, self.device, self.dtype, self.memory_format)
        self.learning = {name for name, p in self.model.named_parameters() if p.requires_grad}
        preprocess = self.info.preprocess
        in_memory = None if config.cache == "auto" else config.cache == "memory"
        self.train_loader = Loader(
            train_images, preprocess, config.batch_size, config.bad_images, in_memory=in_memory
        )  # fmt: skip
        self.val_loader = Loader(val_images, preprocess, 256, config.bad_images)
        self.batches = Batches(self.train_loader, config, self.processes)
        self._prepare_learner()
        self.weights = self._class_weights()
        self.trackers: list[Tracker] = []
        self.progress = Progress(self.info.architecture, 0, Conditions.here(self.processes.world))

    def _load_data(self) -> tuple[ImageSet, ImageSet]:
        config = self.config
        train_images, val_images = (
            load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed)
            for split in ("train", "val")
        )
        return some_of_each_class(train_images, config), val_images

    def _prepare_learner(self) -> None:
        """The module that learns, its optimizer, and what goes beside it: teacher, average, scaler."""
        config, size = self.config, self.info.preprocess.input_size
        if config.grad_checkpointing:
            self._checkpoint_gradients()
        self.teacher = load_teacher(config, self.info.labels, self.device) if config.teacher else None
        self.student = make_student(self.model, size, self.teacher, config) if self.teacher else None
        self.learner: nn.Module = (self.student or self.model).to(self.device)
        if self._sharded:
            shard(self.learner, self.processes, self.device)
        project = self.student.project if self.student else None
        self.optimizer = make_optimizer(self.model, config, *([project] if project else []))
        self.average = self._make_average() if config.model_ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._wrap()

    @property
    def _sharded(self) -> bool:
        """Whether weights are in shards, which all processes must gather together."""
        return self.config.fsdp and self.processes.world > 1

    @property
    def _averaged(self) -> nn.Module | None:
        """The network with the moving average of the weights."""
        return self.average.module if self.average else None

    def _checkpoint_gradients(self) -> None:
        try:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"{type(self.model).__name__} can't checkpoint gradients. Leave --grad-checkpointing out."
            ) from error

    def _make_average(self) -> Any:
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.model, decay=self.config.model_ema_decay, use_warmup=True)

    def _wrap(self) -> None:
        """(Re)make the form that runs; which parameters learn must be settled before."""
        running = self.learner if self._sharded else wrap(self.learner, self.processes, self.device)
        self.running: Any = torch.compile(running) if self.config.compile else running

    def _class_weights(self) -> Tensor | None:
        if self.config.class_weights == "none":
            return None
        images = self.train_loader.images
        return balanced_weights(images.labels, len(images.classes)).to(self.device)

    def fit(self) -> TrainResult:
        """Train what is left; after each epoch (or `save_interval` steps) everything is on disk."""
        started = time.monotonic()
        config, steps = self.config, len(self.batches)
        if config.resume:
            self._restore()
        self.trackers = open_trackers(self.folder, config) if self.processes.first else []
        with Bar("training", config.epochs * steps) as bar:
            bar.done = self.progress.epoch * steps + self.progress.step
            while self.progress.epoch < config.epochs and not self._is_out_of_patience():
                epoch_started = time.monotonic()
                loss, top1 = self._train_epoch(self.progress.epoch, bar)
                accuracy = self._validate() if self._validates(self.progress.epoch) else None
                self._record(loss, top1, accuracy, time.monotonic() - epoch_started)
        for tracker in self.trackers:
            tracker.close()
        if self.progress.best is None:
            raise ConfigError(
                f"{self.folder} holds {self.progress.epoch} finished epochs, epochs is {config.epochs}. Raise --epochs."
            )
        checkpoint, seconds = self.folder / CHECKPOINT_NAME, time.monotonic() - started
        return TrainResult(checkpoint, self.progress.best, self.progress.history, seconds)

    def _validates(self, epoch: int) -> bool:
        finished = epoch + 1
        return finished % self.config.val_interval == 0 or finished == self.config.epochs

    def _validate(self) -> Accuracy:
        return evaluate(self._averaged or self.model, self.val_loader, self.device, self.processes)

    def _is_out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought nothing better. A pure function of the history."""
        best = self.progress.best
        if not self.config.patience or best is None:
            return False
        found = (best.top1, best.loss)
        reached = [r["epoch"] for r in self.progress.history if (r.get("val_top1"), r.get("val_loss")) == found]
        return self.progress.epoch - min(reached, default=0) >= self.config.patience

    def _train_epoch(self, epoch: int, bar: Bar) -> tuple[float, float]:
        """Run the steps of an epoch that are left; mean loss and accuracy in percent of all of it."""
        config, steps = self.config, len(self.batches)
        self._set_training(epoch)
        first = self.processes.first
        # Sums so far are those over all processes, and counted by one.
        start = [v if first else 0.0 for v in (self.progress.loss, self.progress.correct, self.progress.seen)]
        totals = torch.tensor(start, dtype=torch.float64, device=self.device)
        best = f" | best val {self.progress.best.top1:.2f}%" if self.progress.best else ""
        detail = None
        for part in self.batches.epoch(epoch, self.progress.step):
            totals += self._learn(part, epoch * steps + part.step)
            if not part.last:
                continue
            self._step_optimizer(epoch * steps + part.step)
            if part.step % 10 == 0 or part.step == steps - 1:
                loss, right, seen = totals.tolist()
                detail = f"epoch {epoch + 1}/{config.epochs} loss {loss / seen:.3f} acc {right / seen:.1%}{best}"
            bar.advance(detail=detail)
            if config.save_interval and (part.step + 1) % config.save_interval == 0 and part.step + 1 < steps:
                loss, right, seen = self.processes.sum(totals.clone())[0].tolist()
                self._save(replace(self.progress, step=part.step + 1, loss=loss, correct=right, seen=seen))
        loss, right, seen = self.processes.sum(totals)[0].tolist()
        return loss / seen, 100 * right / seen

    def _set_training(self, epoch: int) -> None:
        self.running.train()
        if self.config.freeze_epochs:
            learns = {name for name, p in self.model.named_parameters() if p.requires_grad}
            freeze(self.model, self.learning, frozen=epoch < self.config.freeze_epochs)
            if learns != {name for name, p in self.model.named_parameters() if p.requires_grad}:
                self._wrap()

    def _prepare(self, part: Part, step: int) -> tuple[Tensor, Tensor]:
        """Augmented, normalised images (B, 3, H, W) and labels, or their mixture (B, classes)."""
        config, preprocess = self.config, self.info.preprocess
        x = to_input(part.images, preprocess, self.device)
        span = slice(part.position, part.position + len(x))
        uniform = draws(config.seed, step, part.total, span)
        x = resample(x, uniform, config, preprocess.input_size, crop=not self.batches.crops_files)
        x = erase(x, config, step, part.positions)
        x, target = mix(x, part.labels.to(self.device, non_blocking=True), config, step, len(self.info.labels))
        return x.to(memory_format=self.memory_format), target

    def _learn(self, part: Part, step: int) -> Tensor:
        """Gradients of one part; (loss, correct, images) summed over it, (3,) float64."""
        for reason in part.unreadable:
            note(f"left out: {reason}")
        if not len(part.labels):
            return self._take_no_part(part)
        x, target = self._prepare(part, step)
        torch.manual_seed(seed_of(DROPPING, self.config.seed, step, part.position))
        with without_sync(self.running, last=part.last):
            with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                answer = self._answer(x)
            loss = self._losses(answer, target, x).sum()
            if not loss.isfinite():
                self._refuse(loss.item(), part, x, step)
            # DistributedDataParallel takes the mean over processes; the mean over the step's images is meant.
            self.scaler.scale(loss * (self.processes.world / part.total)).backward()  # type: ignore[no-untyped-call]
        correct = (answer.logits.argmax(1) == part.labels.to(self.device)).sum()
        return torch.stack([loss.detach().double(), correct.double(), torch.full_like(loss, len(x)).double()])

    def _answer(self, x: Tensor) -> Answer:
        answer = self.running(x)
        return Answer(*answer) if isinstance(answer, tuple) and self.student else Answer(_first(answer))

    def _losses(self, answer: Answer, target: Tensor, x: Tensor) -> Tensor:
        """Loss of each image: (B,). Class weights have mean 1 over the data and are not divided by again."""
        config = self.config
        losses = F.cross_entropy(
            answer.logits.float(), target, self.weights, reduction="none", label_smoothing=config.smoothing
        )
        if self.teacher is None:
            return losses
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            taught = self.teacher(x, self.info.preprocess)
        alpha = config.distillation_alpha
        losses = (1 - alpha) * losses + alpha * teacher_loss(answer, taught, config)
        if config.hint_weight:
            losses = losses + config.hint_weight * hint_loss(answer, taught)
        return losses

    def _take_no_part(self, part: Part) -> Tensor:
        """Meet the other processes with an image that weighs nothing, where this one has none."""
        x = torch.zeros(1, 3, *self.info.preprocess.input_size, device=self.device)
        with without_sync(self.running, last=part.last):
            self.scaler.scale(self._answer(x).logits.float().sum() * 0).backward()  # type: ignore[no-untyped-call]
        return torch.zeros(3, dtype=torch.float64, device=self.device)

    def _step_optimizer(self, step: int) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(config, step, len(self.batches)))
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, step + 1)

    def _refuse(self, loss: float, part: Part, x: Tensor, step: int) -> None:
        """Save what gave a loss that is not finite, and stop. Raises NumericalError."""
        images = self.train_loader.images
        sources = "\n".join(images.name_of(index) for index in part.indices.tolist())
        tensors = {"images": part.images, "augmented": x.detach().cpu().contiguous(), "labels": part.labels}
        tensors["indices"] = torch.from_numpy(part.indices)
        path = self.folder / BAD_BATCH_NAME
        write_atomic(path, save(tensors, {"step": str(step), "sources": sources}))
        raise NumericalError(
            f"the loss is {loss} at step {step} (epoch {step // len(self.batches) + 1}). The batch is in {path}, "
            f"checkpoints up to the epoch before are in {self.folder}. Lower --lr, or go on with --resume."
        )

    def _record(self, loss: float, top1: float, accuracy: Accuracy | None, seconds: float) -> None:
        """Take in a finished epoch: best weights, then the state, then the logs that are made from it."""
        row = {
            "epoch": self.progress.epoch + 1,
            "lr": learning_rate(self.config, (self.progress.epoch + 1) * len(self.batches) - 1, len(self.batches)),
            "train_loss": loss,
            "train_top1": top1,
            "seconds": seconds,
        }
        best = self.progress.best
        if accuracy:
            row |= {"val_loss": accuracy.loss, "val_top1": accuracy.top1}
        # Equal accuracy with a lower loss is better: small validation sets tie often.
        better = accuracy is not None and (
            best is None or (accuracy.top1, -accuracy.loss) > (best.top1, -best.loss)
        )  # fmt: skip
        if accuracy and better:
            best = accuracy
            self._save_best(accuracy)
        history = [*self.progress.history, row]
        self.progress = replace(
            self.progress, epoch=self.progress.epoch + 1, step=0, loss=0.0, correct=0.0, seen=0.0,
            history=history, best=best,
        )  # fmt: skip
        self._save(self.progress)
        if self.processes.first:
            write_history(self.folder, history, self._summary())
            for tracker in self.trackers:
                tracker.log(row)

    def _save_best(self, accuracy: Accuracy) -> None:
        info = with_metrics(self.info, **asdict(accuracy), epoch=self.progress.epoch + 1)
        if self.processes.first or self._sharded:
            model = self._averaged or self.model
            save_checkpoint(self.folder / CHECKPOINT_NAME, model, info, writes=self.processes.first)

    def _save(self, progress: Progress) -> None:
        """Write the state at `progress`: after an epoch, or inside one with the sums so far."""
        if self.processes.first or self._sharded:
            progress = replace(progress, scaler=self.scaler.state_dict())
            writes = self.processes.first
            save_state(self.folder, progress, self.learner, self.optimizer, self._averaged, writes=writes)

    def _restore(self) -> None:
        progress = restore_state(self.folder, self.progress, self.learner, self.optimizer, self._averaged)
        if progress is None:
            return
        if progress.scaler:
            self.scaler.load_state_dict(progress.scaler)
        self.progress = progress
        if self.processes.first:
            # A kill between the state and the logs has left these one epoch behind.
            write_history(self.folder, progress.history, self._summary())

    def _summary(self) -> dict[str, Any]:
        return {
            "architecture": self.info.architecture,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": self.config.data,
            "train_images": len(self.train_loader.images),
            "val_images": len(self.val_loader.images),
            "autocast": str(self.dtype).removeprefix("torch.") if self.dtype else "none",
            "device": str(self.device),
            "processes": self.processes.world,
            "seed": self.config.seed,
            "left_out": {"train": self.train_loader.bad, "val": self.val_loader.bad},
            "best": asdict(self.progress.best) if self.progress.best else None,
        }


def _first(answer: Any) -> Tensor:
    tensor: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return tensor


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says; best weights, last state, log and resolved config land in config.output.

    Under torchrun this is one of several processes; the first one writes.
    Raises DataError, UnknownModelError, CheckpointError, RunLockedError, NumericalError (the checkpoints
    written before stay), EnvironmentProblem where the disk is full.
    """
    processes = from_environment()
    if processes.world == 1:
        # Before the folder is there: input that can't be used leaves nothing behind.
        trainer = Trainer(config)
        with only_writer(config.output):
            return _start(trainer)
    device = pick_device(config.device, processes.local_rank)
    if not processes.first:
        silence()
        with connected(processes, device):
            return Trainer(config, processes).fit()
    with only_writer(config.output), connected(processes, device):
        return _start(Trainer(config, processes))


def _start(trainer: Trainer) -> TrainResult:
    save_yaml(trainer.config, trainer.folder / "config.yaml")
    return trainer.fit()
