"""Training: run(config) fits a timm model to a folder of images and leaves a checkpoint that carries everything."""

from __future__ import annotations

import csv
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointInfo,
    build,
    load_weights,
    read_tensors,
    save_checkpoint,
    with_metrics,
)
from leanvit.config import TrainConfig, save_yaml
from leanvit.data import Loader, epoch_order, load_split, make_augmentation, preprocess_for, to_input
from leanvit.errors import CheckpointError, ConfigError, NumericalError
from leanvit.files import only_writer, read_json, write_atomic, write_json
from leanvit.progress import Bar, note

LAST_NAME = "last.safetensors"
SUMMARY_NAME = "train.json"
HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "seconds")


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over `images` images, in percent; loss is the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int
    correct: int


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


def pick_device(name: str) -> torch.device:
    """The device called `name`; 'auto' is CUDA where there is one. Raises ConfigError for an absent one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' is unknown, expected cpu, cuda, cuda:1 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' is not on this machine. Use --device cpu.")
    return device


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for full precision."""
    if amp == "none":
        return None
    if amp == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, device: torch.device | str = "cpu") -> Accuracy:
    """Top-1 and top-5 of `model` over all images of `loader`, each counted once, in float32."""
    model.eval()
    correct = correct5 = images = 0
    loss = 0.0
    for pixels, labels in loader:
        logits = model(to_input(pixels, loader.preprocess, device)).float()
        labels = labels.to(logits.device)
        if not logits.isfinite().all():
            raise NumericalError("the model's logits are NaN or infinite. Train again with a lower --lr.")
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        correct += int(top[:, 0].sum())
        correct5 += int(top.sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        images += len(labels)
    return Accuracy(100 * correct / images, 100 * correct5 / images, loss / images, images, correct)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine to `min_lr`: a pure function of the step."""
    warmup = max(1, round(config.warmup_epochs * steps_per_epoch))
    total = max(warmup + 1, config.epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / (total - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms, biases and what the model's `no_weight_decay` names are not decayed."""
    exempt = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


class Trainer:
    """The state of one run: model, optimizer, data and history."""

    def __init__(self, config: TrainConfig) -> None:
        """Load the data and build the model; raises DataError, UnknownModelError, CheckpointError."""
        self.config = config
        self.folder = Path(config.output)
        self.device = pick_device(config.device)
        self.dtype = autocast_dtype(config.amp, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        torch.manual_seed(config.seed)
        train_images, val_images = (
            load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed)
            for split in ("train", "val")
        )
        self.model, self.info = self._build_model(train_images.classes)
        preprocess = self.info.preprocess
        self.train_loader = Loader(train_images, preprocess, config.batch_size, config.bad_images)
        self.val_loader = Loader(val_images, preprocess, 256, config.bad_images)
        self.augment = make_augmentation(
            crop_scale=config.crop_scale,
            degrees=config.degrees,
            hflip=config.hflip,
            size=preprocess.input_size,
        )
        self.optimizer = make_optimizer(self.model, config)
        self.history: list[dict[str, float]] = []
        self.best: Accuracy | None = None

    def _build_model(self, classes: tuple[str, ...]) -> tuple[nn.Module, CheckpointInfo]:
        config = self.config
        kwargs: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        size = {"img_size": config.img_size} if config.img_size else {}
        with UnfusedAttention(self.device, self.dtype):
            try:
                model = build(config.model, len(classes), pretrained=config.pretrained, **kwargs, **size)
            except ConfigError:
                # A convolutional network takes any size and has no argument for it.
                if not size:
                    raise
                size = {}
                model = build(config.model, len(classes), pretrained=config.pretrained, **kwargs)
        if config.initial_checkpoint:
            tensors, _ = read_tensors(config.initial_checkpoint)
            load_weights(model, tensors, config.initial_checkpoint, head=False)
        info = CheckpointInfo(
            architecture=config.model.split(".")[0],
            labels=classes,
            preprocess=preprocess_for(model, config.img_size),
            kwargs=size,
            data=config.data,
            val_fraction=config.val_fraction,
            seed=config.seed,
        )
        return model.to(self.device, memory_format=self.memory_format), info  # type: ignore[call-overload]

    def fit(self) -> TrainResult:
        """Train all epochs that are left; after each one the best and the last weights are on disk."""
        started = time.monotonic()
        steps = len(self.train_loader)
        first = self._restore() if self.config.resume else 0
        with Bar("training", self.config.epochs * steps) as bar:
            bar.done = first * steps
            for epoch in range(first, self.config.epochs):
                epoch_started = time.monotonic()
                loss, top1 = self._train_epoch(epoch, bar)
                accuracy = evaluate(self.model, self.val_loader, self.device) if self._validates(epoch) else None
                self._record(epoch, loss, top1, accuracy, time.monotonic() - epoch_started)
        if self.best is None:
            raise ConfigError(
                f"{self.folder} holds {first} finished epochs, epochs is {self.config.epochs}. Raise --epochs."
            )
        return TrainResult(self.folder / CHECKPOINT_NAME, self.best, self.history, time.monotonic() - started)

    def _validates(self, epoch: int) -> bool:
        finished = epoch + 1
        return finished % self.config.val_interval == 0 or finished == self.config.epochs

    def _train_epoch(self, epoch: int, bar: Bar) -> tuple[float, float]:
        self.model.train()
        config, steps = self.config, len(self.train_loader)
        order = epoch_order(len(self.train_loader.images), config.seed, epoch)
        total_loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        seen = 0
        for index, (pixels, labels) in enumerate(self.train_loader.batches(order)):
            step = epoch * steps + index
            generator = torch.Generator().manual_seed(hash((config.seed, step)) & 0x7FFFFFFF)
            x = self.augment(to_input(pixels, self.info.preprocess, self.device), generator)
            x = x.to(memory_format=self.memory_format)
            labels = labels.to(self.device, non_blocking=True)
            loss, logits = self._step(x, labels, learning_rate(config, step, steps), step)
            total_loss += loss * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            best = f" | best val {self.best.top1:.2f}%" if self.best else ""
            if index % 10 == 0 or index == steps - 1:
                detail = (
                    f"epoch {epoch + 1}/{config.epochs} loss {total_loss / seen:.3f} acc {correct / seen:.1%}{best}"
                )
            bar.advance(detail=detail)
        return float(total_loss / seen), float(100 * correct / seen)

    def _step(self, x: Tensor, labels: Tensor, lr: float, step: int) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.smoothing)
        if not loss.isfinite():
            raise NumericalError(
                f"the loss is {loss.item()} at step {step} (epoch {step // len(self.train_loader) + 1}). "
                f"Checkpoints up to the epoch before are in {self.folder}. Lower --lr, or go on with --resume."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        return loss.detach(), logits.detach()

    def _record(self, epoch: int, loss: float, top1: float, accuracy: Accuracy | None, seconds: float) -> None:
        row = {
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_top1": top1,
            "seconds": seconds,
        }
        self.history.append(row)
        if accuracy:
            row |= {"val_loss": accuracy.loss, "val_top1": accuracy.top1}
        # Equal accuracy with a lower loss is better: small validation sets tie often.
        if accuracy and (self.best is None or (accuracy.top1, -accuracy.loss) > (self.best.top1, -self.best.loss)):
            self.best = accuracy
            info = with_metrics(self.info, **asdict(accuracy), epoch=epoch + 1)
            save_checkpoint(self.folder / CHECKPOINT_NAME, self.model, info)
        self._save_last(epoch + 1)
        self._write_log()

    def _save_last(self, finished: int) -> None:
        tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
        metadata = {"finished_epochs": str(finished), "architecture": self.info.architecture}
        write_atomic(self.folder / LAST_NAME, save(tensors, metadata))

    def _restore(self) -> int:
        path = self.folder / LAST_NAME
        if not path.is_file():
            note(f"{path} does not exist yet: training starts at epoch 1")
            return 0
        tensors, metadata = read_tensors(path)
        if metadata.get("architecture") != self.info.architecture:
            raise CheckpointError(
                f"{path} is of {metadata.get('architecture')}, not of {self.info.architecture}. Check --model."
            )
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        load_weights(self.model, weights, path)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        summary = read_json(self.folder / SUMMARY_NAME)
        finished = int(metadata["finished_epochs"])
        self.history = summary["history"][:finished]
        self.best = Accuracy(**summary["best"]) if summary["best"] else None
        return finished

    def _write_log(self) -> None:
        rows = io.StringIO()
        writer = csv.DictWriter(rows, fieldnames=HISTORY_COLUMNS)
        writer.writeheader()
        writer.writerows(self.history)
        write_atomic(self.folder / "log.csv", rows.getvalue().encode())
        parameters = sum(p.numel() for p in self.model.parameters())
        left_out = {"train": self.train_loader.bad, "val": self.val_loader.bad}
        write_json(
            self.folder / SUMMARY_NAME,
            {
                "architecture": self.info.architecture,
                "parameters": parameters,
                "data": self.config.data,
                "train_images": len(self.train_loader.images),
                "val_images": len(self.val_loader.images),
                "autocast": str(self.dtype).removeprefix("torch.") if self.dtype else "none",
                "device": str(self.device),
                "seed": self.config.seed,
                "left_out": left_out,
                "best": asdict(self.best) if self.best else None,
                "history": self.history,
            },
        )


class UnfusedAttention:
    """Build models with attention written out where that trains faster: bfloat16 on a CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Take effect for a CPU with autocast only (specs: fused backward is nine times slower there)."""
        self.active = device.type == "cpu" and dtype is not None

    def __enter__(self) -> None:
        """Switch timm's fused attention off."""
        from timm.layers import set_fused_attn, use_fused_attn

        self.before = bool(use_fused_attn())
        if self.active:
            set_fused_attn(False)

    def __exit__(self, *error: object) -> None:
        """Restore timm's setting."""
        from timm.layers import set_fused_attn

        if self.active:
            set_fused_attn(self.before)


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says; best weights, last state, log and resolved config land in config.output.

    Raises DataError, UnknownModelError, CheckpointError, RunLockedError, NumericalError (the checkpoints
    written before stay), EnvironmentProblem where the disk is full.
    """
    trainer = Trainer(config)
    with only_writer(config.output):
        save_yaml(config, Path(config.output) / "config.yaml")
        return trainer.fit()


__all__ = ["Accuracy", "TrainResult", "evaluate", "pick_device", "run"]
