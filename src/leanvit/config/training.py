"""Configuration of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train or fine-tune a model on an image folder or an embedded data set."""

    data: str = option("digits", "Image folder (one folder a class), 'digits', or 'fashion-mnist[:FOLDER]'.")
    model: str = option("revit_micro", "Any timm architecture; see: leanvit models.")
    output: str = option("runs/train", "Folder for checkpoints, log and resolved config.")
    epochs: int = option(30, "Passes over the training images.")
    batch_size: int = option(64, "Images a step.")
    lr: float = option(2e-3, "Peak learning rate of AdamW.")
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine.")
    warmup_epochs: float = option(2.0, "Epochs of linear warm-up.")
    weight_decay: float = option(0.05, "AdamW's decay; norms, biases and the model's no_weight_decay excepted.")
    clip_grad: float = option(1.0, "Largest gradient norm; 0 turns clipping off.")
    smoothing: float = option(0.1, "Label smoothing.")
    drop_path: float = option(0.0, "Stochastic depth rate.")
    img_size: int | None = option(None, "Input side in pixels; default: the model's own.")
    crop_scale: tuple[float, float] = option((0.7, 1.0), "Area share of the random crop, low and high.")
    hflip: float = option(0.0, "Probability of a horizontal flip.")
    degrees: float = option(10.0, "Largest random rotation, in degrees.")
    val_interval: int = option(1, "Epochs from one validation to the next; the last epoch is always validated.")
    pretrained: bool = option(False, "Start from weights that come with the architecture.")
    initial_checkpoint: str | None = option(None, "Start from this leanvit checkpoint or safetensors file.")
    val_fraction: float = option(0.2, "Share held out where the data has no validation split of its own.")
    bad_images: Literal["fail", "skip"] = option("fail", "What a corrupt training image does.")
    amp: Literal["auto", "bfloat16", "none"] = option("auto", "Autocast; auto: bfloat16 where the chip has it.")
    channels_last: bool = option(False, "Store maps as NHWC: quicker for depthwise convolutions in float32.")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    seed: int = option(0, "Seed of the split, the weights, the order and the augmentation.")
    resume: bool = option(False, "Go on from the last epoch in the output folder.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "img_size", "val_interval")
        require_at_least(self, 0, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "degrees", "seed")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}, expected more than 0")
        shares = ("smoothing", "drop_path", "hflip")
        for name in shares:
            if not 0 <= getattr(self, name) < 1 and not (name == "hflip" and self.hflip == 1):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 up to 1")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}, expected between 0 and 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ConfigError(f"crop_scale is {self.crop_scale}, expected two rising shares above 0")
