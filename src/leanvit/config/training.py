"""Configuration of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import DATA_KINDS
from leanvit.errors import ConfigError

Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train or fine-tune a model on an image folder or an embedded data set."""

    data: str = option("digits", f"Labelled images: {DATA_KINDS}.")
    model: str = option("revit_micro", "Any timm architecture; see: leanvit models.")
    output: str = option("runs/train", "Folder for checkpoints, log and resolved config.")
    epochs: int = option(30, "Passes over the training images.")
    batch_size: int = option(64, "Images an optimizer step: over all processes and accumulated parts.")
    grad_accum_steps: int = option(1, "Parts of a step that each process works on one after another.")
    opt: str = option("adamw", "Optimizer, by timm's name: adamw, sgd, lamb, lion, ...")
    momentum: float = option(0.9, "Momentum of optimizers that have one.")
    lr: float = option(2e-3, "Peak learning rate.")
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine.")
    warmup_epochs: float = option(2.0, "Epochs of linear warm-up.")
    weight_decay: float = option(0.05, "Decay; norms, biases and the model's no_weight_decay excepted.")
    layer_decay: float | None = option(None, "Factor of the learning rate from one layer to the one before it.")
    freeze_epochs: int = option(0, "First epochs in which only the classifier learns; all of them: a linear probe.")
    clip_grad: float = option(1.0, "Largest gradient norm; 0 turns clipping off.")
    smoothing: float = option(0.1, "Label smoothing.")
    class_weights: Literal["none", "balanced"] = option("none", "Weigh classes by one over their number of images.")
    drop: float = option(0.0, "Dropout rate of the classifier and the MLPs.")
    drop_path: float = option(0.0, "Stochastic depth rate.")
    model_ema_decay: float = option(0.0, "Validate and keep a moving average of the weights; 0: none.")
    img_size: int | None = option(None, "Input side in pixels; default: the model's own.")
    crop_scale: tuple[float, float] = option((0.7, 1.0), "Area share of the random crop, low and high.")
    crop_ratio: tuple[float, float] = option((1.0, 1.0), "Aspect ratio of the random crop, low and high.")
    hflip: float = option(0.0, "Probability of a horizontal flip.")
    degrees: float = option(10.0, "Largest random rotation, in degrees.")
    aa: str | None = option(None, "timm's AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5-inc1.")
    reprob: float = option(0.0, "Probability of erasing a random rectangle.")
    mixup: float = option(0.0, "Parameter of Mixup's beta distribution; 0 turns it off.")
    cutmix: float = option(0.0, "Parameter of CutMix' beta distribution; 0 turns it off.")
    mixup_prob: float = option(1.0, "Share of steps that are mixed, where mixup or cutmix is on.")
    mixup_switch_prob: float = option(0.5, "Share of mixed steps that use CutMix, where both are on.")
    teacher: str | None = option(None, "Checkpoint, run folder or NAME.TAG to learn from.")
    distillation: Literal["soft", "hard", "token"] = option(
        "soft", "Learn the teacher's probabilities, its top label, or its top label on DeiT's token."
    )
    distillation_alpha: float = option(0.5, "Share of the teacher in the loss.")
    distillation_tau: float = option(2.0, "Temperature of soft labels.")
    hint_weight: float = option(0.0, "Weight of the distance between feature maps of student and teacher.")
    patience: int = option(0, "Stop after so many epochs without a better validation; 0: never.")
    val_interval: int = option(1, "Epochs from one validation to the next; the last epoch is always validated.")
    save_interval: int = option(0, "Steps between saves inside an epoch; 0: only after each epoch.")
    pretrained: bool = option(False, "Start from weights that come with the architecture.")
    initial_checkpoint: str | None = option(None, "Start from this leanvit checkpoint or safetensors file.")
    val_fraction: float = option(0.2, "Share held out where the data has no validation split of its own.")
    train_fraction: float = option(1.0, "Share of every class' training images to use.")
    images_per_class: int | None = option(None, "Training images of each class to use.")
    cache: Literal["auto", "memory", "none"] = option(
        "auto", "Keep prepared images in memory and crop those, or crop files anew; auto: up to 4 GiB in memory."
    )
    workers: int = option(0, "Processes that load images; 0: this one, with threads.")
    bad_images: Literal["fail", "skip"] = option("fail", "What a corrupt training image does.")
    amp: Literal["auto", "bfloat16", "float16", "none"] = option(
        "auto", "Autocast; auto: bfloat16 where the chip has it."
    )
    grad_checkpointing: bool = option(False, "Compute activations again in the backward pass: less memory, more time.")
    channels_last: bool = option(False, "Store maps as NHWC: quicker for depthwise convolutions in float32.")
    compile: bool = option(False, "Train through torch.compile; on CPUs it costs more than it gives.")
    fsdp: bool = option(False, "Shard parameters and optimizer over the processes (FSDP2) instead of copying them.")
    trackers: tuple[Tracker, ...] = option((), "Also log there: tensorboard, wandb (offline), mlflow (local files).")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    seed: int = option(0, "Seed of the split, the weights, the order and the augmentation.")
    resume: bool = option(False, "Go on from the last save in the output folder.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "epochs", "batch_size", "img_size", "val_interval", "grad_accum_steps", "images_per_class"
        )
        require_at_least(
            self, 0, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "degrees", "seed", "mixup", "cutmix",
            "patience", "save_interval", "workers", "freeze_epochs", "hint_weight",
        )  # fmt: skip
        for name in ("lr", "distillation_tau"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("smoothing", "drop", "drop_path", "model_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 up to 1")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}, expected between 0 and 1")
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(f"train_fraction is {self.train_fraction}, expected a share above 0")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}, expected more than 0 and up to 1")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected two rising numbers above 0")
        if self.fsdp and self.model_ema_decay:
            raise ConfigError("fsdp and model_ema_decay are both given, expected one: the average needs whole weights")

    @property
    def mixes(self) -> bool:
        """Whether images of a step are mixed."""
        return self.mixup > 0 or self.cutmix > 0
