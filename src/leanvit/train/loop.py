"""Training: run(config) fits a network to its task and leaves a checkpoint that carries everything.

One trainer for all tasks: steps, optimizer, saves, logs and processes are here; what a task adds is a Learning
(train/classify.py, train/labels.py, train/scenes.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor, nn

from leanvit.checkpoint import CHECKPOINT_NAME, save_checkpoint, with_metrics
from leanvit.config import TrainConfig, save_yaml
from leanvit.config.tasks import PICTURES_DEFAULTS
from leanvit.config.training import fill_in, refuse_options
from leanvit.errors import ConfigError, NumericalError
from leanvit.files import only_writer, write_atomic
from leanvit.progress import Bar, note, silence
from leanvit.runtime.task import task_named as served_task
from leanvit.tasks import task_named
from leanvit.tasks.task import not_trained
from leanvit.train.accuracy import Accuracy
from leanvit.train.classify import Classification
from leanvit.train.labels import MultiLabel
from leanvit.train.learning import AnyPart, Learning, Scored, Setting
from leanvit.train.logs import Tracker, numbers, open_trackers, write_history
from leanvit.train.optimizer import freeze, learning_rate, optimizer_of, set_learning_rate
from leanvit.train.processes import Processes, connected, from_environment, without_sync
from leanvit.train.scenes import SceneLearning
from leanvit.train.setup import autocast_dtype, pick_device
from leanvit.train.state import Conditions, Progress, restore_state, save_state

BAD_BATCH_NAME = "nan_batch.safetensors"

_SUMS = ("loss", "correct", "seen")

Totals = dict[str, Tensor]


@dataclass(frozen=True)
class TrainResult:
    """What a training run reached.

    checkpoint: file with the best weights. metrics: those of these weights on the validation images.
    metric: the one by which they are the best. history: one dict an epoch: epoch, lr, train_loss, seconds, and what the
    task says of training and validation. seconds: of this call. cpu_seconds: processor time, all threads.
    """

    checkpoint: Path
    metrics: dict[str, Any]
    metric: str
    history: list[dict[str, Any]]
    seconds: float
    cpu_seconds: float

    @property
    def value(self) -> float:
        """The metric by which the weights are the best."""
        return float(self.metrics[self.metric])

    @property
    def best(self) -> Accuracy:
        """Accuracy of a classifier's best weights."""
        return Accuracy(**self.metrics)


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with the defaults of its task, which may be one from outside the package.

    Raises ConfigError for an unknown task, and for an option that is given and that the task does not take.
    """
    task = task_named(config.task)
    if task.losses is not_trained:
        raise ConfigError(
            f"task is '{task.name}', whose networks are taken as they are, expected a task that is trained. Train a "
            "classifier: leanvit train --task classify"
        )
    refuse_options(config, task.name, task.options)
    config = replace(config)
    # A task of annotated pictures from outside names what differs from the others.
    fill_in(config, {**(PICTURES_DEFAULTS if task.samples else {}), **task.defaults})
    if config.data is None:
        raise ConfigError(f"no --data given, expected one. Run: leanvit train --task {task.name} --help")
    return replace(config)


class Trainer:
    """The state of one run in one process: what is learned, its optimizer and its progress."""

    def __init__(self, config: TrainConfig, processes: Processes | None = None) -> None:
        """Load the data and build the model; raises DataError, UnknownModelError, CheckpointError, ConfigError."""
        self.config = config = resolved(config)
        self.processes = processes or Processes()
        self.folder = Path(config.output)
        self.device = pick_device(config.device, self.processes.local_rank if self.processes.world > 1 else None)
        self.dtype = autocast_dtype(config.amp, self.device)
        memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        setting = Setting(self.processes, self.device, self.dtype, memory_format)
        torch.manual_seed(config.seed)
        self.learning: Learning = make_learning(config, setting)
        self.model, self.info, self.batches = self.learning.model, self.learning.info, self.learning.batches
        self.trains = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self._sharded:
            self.learning.shard()
        self.optimizer = optimizer_of(self.learning.groups(), config, *self.learning.extra)
        self.average = self._make_average() if config.model_ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.running = self.learning.running()
        self.trackers: list[Tracker] = []
        self.progress = Progress(self.learning.name(), 0, Conditions.here(self.processes.world))
        self._last: tuple[AnyPart, Any, Totals] | None = None

    @property
    def _sharded(self) -> bool:
        """Whether weights are in shards, which all processes must gather together."""
        return self.config.fsdp and self.processes.world > 1

    @property
    def _averaged(self) -> nn.Module | None:
        """The network with the moving average of the weights."""
        return self.average.module if self.average else None

    def _make_average(self) -> Any:
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.model, decay=self.config.model_ema_decay, use_warmup=True)

    def fit(self) -> TrainResult:
        """Train what is left; after each epoch (or `save_interval` steps) everything is on disk."""
        started, cpu = time.monotonic(), time.process_time()
        config, steps = self.config, len(self.batches)
        self.trackers = open_trackers(self.folder, config) if self.processes.first else []
        with Bar("training", config.epochs * steps) as bar:
            bar.done = self.progress.epoch * steps + self.progress.step
            while self.progress.epoch < config.epochs and not self._is_out_of_patience():
                epoch_started, epoch_cpu = time.monotonic(), time.process_time()
                row = self._train_epoch(self.progress.epoch, bar)
                scored = self._validate() if self._validates(self.progress.epoch) else None
                row["seconds"] = time.monotonic() - epoch_started
                row["cpu_seconds"] = time.process_time() - epoch_cpu
                self._record(row, scored)
        for tracker in self.trackers:
            tracker.close()
        if self.progress.best is None:
            raise ConfigError(
                f"{self.folder} holds {self.progress.epoch} finished epochs and none was validated, epochs is "
                f"{config.epochs}. Raise --epochs."
            )
        return TrainResult(
            self.folder / CHECKPOINT_NAME, self.progress.best, served_task(config.task).metric,
            self.progress.history, time.monotonic() - started, time.process_time() - cpu,
        )  # fmt: skip

    def _validates(self, epoch: int) -> bool:
        finished = epoch + 1
        return finished % self.config.val_interval == 0 or finished == self.config.epochs

    def _validate(self) -> Scored:
        return self.learning.validate(self._averaged or self.model)

    def _is_out_of_patience(self) -> bool:
        """Whether the last `patience` epochs brought nothing better. A pure function of the history."""
        best = self.progress.best
        if not self.config.patience or best is None:
            return False
        reached = [row["epoch"] for row in self.progress.history if self.learning.is_of(row, best)]
        return self.progress.epoch - min(reached, default=0) >= self.config.patience

    def _train_epoch(self, epoch: int, bar: Bar) -> dict[str, Any]:
        """Run the steps of an epoch that are left; its row of the history, with means over all of it."""
        config, steps = self.config, len(self.batches)
        self._set_training(epoch)
        begun = self.progress
        # Sums so far are those over all processes, and counted by one.
        sums = {name: getattr(begun, name) for name in _SUMS} | begun.losses
        totals = {name: self._number(value if self.processes.first else 0.0) for name, value in sums.items()}
        for part in self.batches.epoch(epoch, begun.step):
            step = epoch * steps + part.step
            for name, value in self._learn(part, step).items():
                totals[name] = totals.get(name, self._number(0.0)) + value
            if not part.last:
                continue
            self._step_optimizer(step)
            detail = None
            if part.step % 5 == 0 or part.step == steps - 1:
                detail = self._told(epoch, totals)
            bar.advance(detail=detail)
            if config.save_interval and (part.step + 1) % config.save_interval == 0 and part.step + 1 < steps:
                self._save(self._with_sums(replace(begun, step=part.step + 1), totals))
        return self._row(epoch, self._over_processes(totals))

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _told(self, epoch: int, totals: Totals) -> str:
        seen = max(1.0, float(totals["seen"]))
        text = f"epoch {epoch + 1}/{self.config.epochs} loss {float(totals['loss']) / seen:.3f}"
        best = self.progress.best
        name = served_task(self.config.task).metric
        return text + (f" best {name} {best[name]:.4g}" if best else "")

    def _over_processes(self, totals: Totals) -> dict[str, float]:
        names = sorted(totals)
        summed = self.processes.sum(torch.stack([totals[name] for name in names]))[0].tolist()
        return dict(zip(names, summed, strict=True))

    def _with_sums(self, progress: Progress, totals: Totals) -> Progress:
        sums = self._over_processes(totals)
        first = {name: sums.pop(name) for name in _SUMS}
        return replace(progress, **first, losses=sums)  # type: ignore[arg-type]

    def _row(self, epoch: int, sums: dict[str, float]) -> dict[str, Any]:
        """What the history says of an epoch's training."""
        steps = len(self.batches)
        seen = max(1.0, sums.pop("seen"))
        row: dict[str, Any] = {"epoch": epoch + 1, "lr": learning_rate(self.config, (epoch + 1) * steps - 1, steps)}
        row["train_loss"] = sums.pop("loss") / seen
        correct = sums.pop("correct")
        if self.learning.counts_correct:
            row["train_top1"] = 100 * correct / seen
        return row | {name: value / seen for name, value in sums.items()}

    def _set_training(self, epoch: int) -> None:
        self.learning.learner.train()
        if self.running is not self.learning.learner:
            self.running.train()
        if self.config.freeze_epochs:
            learns = {name for name, p in self.model.named_parameters() if p.requires_grad}
            frozen = epoch < self.config.freeze_epochs
            freeze(self.model, self.trains, self.learning.of_head(), frozen=frozen)
            if learns != {name for name, p in self.model.named_parameters() if p.requires_grad}:
                self.running = self.learning.running()

    def _learn(self, part: AnyPart, step: int) -> Totals:
        """Gradients of one part; sums over its images: loss, correct, seen, and each loss where there are several."""
        for reason in part.unreadable:
            note(f"left out: {reason}")
        if not len(part):
            return self._take_no_part(part)
        prepared = self.learning.prepare(part, step)
        with without_sync(self.running, last=part.last):
            learned = self.learning.learn(self.running, prepared, part, step)
            sums = {name: value.float().sum() for name, value in learned.losses.items()}
            loss = _total(sums)
            if not loss.isfinite():
                self._refuse("loss", loss.item() / len(part), step, (part, prepared, sums))
            # DistributedDataParallel takes the mean over processes; the mean over the step's images is meant.
            self.scaler.scale(loss * (self.processes.world / part.total)).backward()  # type: ignore[no-untyped-call]
        self._last = (part, prepared, {name: value.detach() for name, value in sums.items()})
        found = {"loss": loss.detach().double(), "seen": self._number(float(len(part)))}
        if learned.correct is not None:
            found["correct"] = learned.correct.double()
        return found | self._several({name: value.detach().double() for name, value in sums.items()})

    def _several(self, sums: Totals) -> Totals:
        return sums if len(sums) > 1 or "loss" not in sums else {}

    def _take_no_part(self, part: AnyPart) -> Totals:
        """Meet the other processes with an image that weighs nothing, where this one has none."""
        with without_sync(self.running, last=part.last):
            losses = self.learning.without_images(self.running)
            loss = _total({name: value.float().sum() for name, value in losses.items()})
            self.scaler.scale(loss * 0).backward()  # type: ignore[no-untyped-call]
        return self._several({name: self._number(0.0) for name in losses})

    def _step_optimizer(self, step: int) -> None:
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(config, step, len(self.batches)))
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
        if config.clip_grad or not self.scaler.is_enabled():
            norm = nn.utils.clip_grad_norm_(self.learning.learner.parameters(), config.clip_grad or math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            # float16 meets infinite gradients now and then, and its scaler leaves such a step out.
            if not self.scaler.is_enabled() and not norm.isfinite():
                self._refuse("gradient's norm", norm.item(), step, self._last)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, step + 1)

    def _refuse(self, what: str, value: float, step: int, last: tuple[AnyPart, Any, Totals] | None) -> NoReturn:
        """Save the images of this process that were not finite, if it had any, and stop. Raises NumericalError."""
        named, saved = "", ""
        if last is not None:
            part, prepared, sums = last
            kept, path = self.learning.bad_batch(part, prepared), self.folder / BAD_BATCH_NAME
            write_atomic(path, save(dict(kept.tensors), {"step": str(step), "sources": "\n".join(kept.sources)}))
            saved = f"The batch is in {path}, checkpoints"
            named = ", ".join(f"{name} {float(total) / len(part):.3g}" for name, total in self._several(sums).items())
        where = f"step {step} (epoch {step // len(self.batches) + 1})"
        raise NumericalError(
            f"the {what} is {value} at {where}{': ' if named else ''}{named}. "
            f"{saved or 'Checkpoints'} up to the epoch before are in {self.folder}. Lower --lr, or go on with --resume."
        )

    def _record(self, row: dict[str, Any], scored: Scored | None) -> None:
        """Take in a finished epoch: best weights, then the state, then the logs that are made from it."""
        best = self.progress.best
        if scored:
            row |= scored.row
        if scored and (best is None or self.learning.is_better(scored.metrics, best)):
            best = scored.metrics
            self._save_best(best)
        history = [*self.progress.history, row]
        self.progress = replace(
            self.progress, epoch=self.progress.epoch + 1, step=0, loss=0.0, correct=0.0, seen=0.0, losses={},
            history=history, best=best,
        )  # fmt: skip
        self._save(self.progress)
        if self.processes.first:
            write_history(self.folder, history, self._summary())
            for tracker in self.trackers:
                tracker.log(numbers(row))

    def _save_best(self, metrics: dict[str, Any]) -> None:
        info = with_metrics(self.info, **metrics, epoch=self.progress.epoch + 1)
        if self.processes.first or self._sharded:
            model = self._averaged or self.model
            save_checkpoint(self.folder / CHECKPOINT_NAME, model, info, writes=self.processes.first)

    def _save(self, progress: Progress) -> None:
        """Write the state at `progress`: after an epoch, or inside one with the sums so far."""
        if self.processes.first or self._sharded:
            progress = replace(progress, scaler=self.scaler.state_dict())
            writes = self.processes.first
            save_state(self.folder, progress, self.learning.saved, self.optimizer, self._averaged, writes=writes)

    def restore(self) -> None:
        """Go on from the last save in the folder, where there is one. Raises CheckpointError for another run's."""
        progress = restore_state(self.folder, self.progress, self.learning.saved, self.optimizer, self._averaged)
        if progress is None:
            return
        if progress.scaler:
            self.scaler.load_state_dict(progress.scaler)
        if progress.best is None:
            progress = replace(progress, best=self._best_of(progress.history))
        self.progress = progress
        if progress.epoch or progress.step:
            note(_going_on(progress, self.config.epochs))
        if self.processes.first:
            # A kill between the state and the logs has left these one epoch behind.
            write_history(self.folder, progress.history, self._summary())

    def _best_of(self, history: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The best metrics in a history: saves of 0.1 have those of tasks there alone."""
        best: dict[str, Any] | None = None
        for found in (row["metrics"] for row in history if "metrics" in row):
            best = found if best is None or self.learning.is_better(found, best) else best
        return best

    def _summary(self) -> dict[str, Any]:
        return {
            "architecture": self.info.architecture,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": self.config.data,
            **self.learning.summary(),
            "autocast": str(self.dtype).removeprefix("torch.") if self.dtype else "none",
            "device": str(self.device),
            "processes": self.processes.world,
            "seed": self.config.seed,
            "cpu_seconds": sum(row.get("cpu_seconds", 0.0) for row in self.progress.history),
            # Other tasks' best metrics are in the history.
            **({"best": self.progress.best} if self.learning.counts_correct else {}),
        }


def _going_on(progress: Progress, epochs: int) -> str:
    done = f"{progress.epoch} finished epochs" + (f" and {progress.step} steps" if progress.step else "")
    if progress.epoch >= epochs:
        return f"{done}, --epochs is {epochs}: nothing is left to train; raise --epochs to go on"
    return f"going on after {done}; rates are those of a schedule of {epochs} epochs"


def make_learning(config: TrainConfig, setting: Setting) -> Learning:
    """What the task of a configuration adds to a training."""
    if task_named(config.task).samples is not None:
        return SceneLearning(config, setting)
    return MultiLabel(config, setting) if config.multi_label else Classification(config, setting)


def _total(sums: Totals) -> Tensor:
    values = list(sums.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says; best weights, last state, log and resolved config land in config.output.

    Under torchrun this is one of several processes; the first one writes.
    Raises DataError, UnknownModelError, CheckpointError, RunLockedError, NumericalError (the checkpoints
    written before stay), EnvironmentProblem where the disk is full.
    """
    config = resolved(config)
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
            return _start(Trainer(config, processes))
    with only_writer(config.output), connected(processes, device):
        return _start(Trainer(config, processes))


def _start(trainer: Trainer) -> TrainResult:
    if trainer.config.resume:
        trainer.restore()
    if trainer.processes.first:
        # Not before: a refused resume must leave the other run's settings.
        save_yaml(trainer.config, trainer.folder / "config.yaml")
    return trainer.fit()
