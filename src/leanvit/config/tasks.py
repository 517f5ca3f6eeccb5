"""Configuration of training for detection, instance and semantic segmentation, and pose."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.errors import ConfigError

Task = Literal["detect", "segment", "semantic", "pose"]

STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class TaskTrainConfig:
    """Train a detector, segmenter or pose network on annotated pictures, on any backbone."""

    task: Task = option(
        MISSING, "detect: boxes; segment: boxes and masks; semantic: a class a pixel; pose: keypoints in given boxes."
    )
    data: str = option(
        MISSING, "Folder of `leanvit data compose`, COCO root, YOLO data.yaml, ADE20K, Cityscapes or image + mask root."
    )
    model: str = option("vitaev2_small", "Backbone: an architecture, ours or timm's, with `features_only`.")
    output: str = option("runs/task", "Folder for checkpoints, log and resolved config.")
    epochs: int = option(12, "Training epochs.")
    batch_size: int = option(16, "Pictures a step.")
    img_size: tuple[int, int] = option((640, 640), "Height and width of the input in pixels, multiples of 32.")
    opt: str = option("adamw", "Optimizer, any name that timm knows.")
    momentum: float = option(0.9, "Momentum of optimizers that have one.")
    lr: float = option(1e-4, "Peak learning rate of the heads.")
    backbone_lr_scale: float = option(1.0, "Learning rate of the backbone as a share of that of the heads.")
    min_lr: float = option(1e-6, "Learning rate at the end of the cosine.")
    warmup_epochs: float = option(0.5, "Epochs of linear warm-up.")
    weight_decay: float = option(0.05, "Decay; norms, biases and the backbone's no_weight_decay excepted.")
    clip_grad: float = option(10.0, "Largest gradient norm; 0 turns clipping off.")
    drop_path: float = option(0.0, "Stochastic depth rate of the backbone.")
    model_ema_decay: float = option(0.0, "Validate and keep a moving average of the weights; 0: none.")
    channels: int = option(256, "Channels of the feature pyramid (detect, segment).")
    anchor_scale: float = option(8.0, "Side of an anchor in strides of its level (detect, segment).")
    head_width: int = option(1024, "Width of the box head's two layers (detect, segment).")
    mask_width: int = option(256, "Channels of the mask head (segment).")
    mask_layers: int = option(4, "Convolutions of the mask head (segment).")
    proposals: int = option(1000, "Boxes that the second stage looks at (detect, segment).")
    sampled: int = option(512, "Boxes a picture that the second stage learns from (detect, segment).")
    detections: int = option(100, "Most objects in an answer (detect, segment).")
    decoder: Literal["upernet", "fpn"] = option("upernet", "Head: the papers' UPerNet or a light FPN (semantic).")
    decoder_width: int = option(256, "Channels of the head (semantic, pose).")
    dice: float = option(0.0, "Weight of the soft Dice loss beside cross entropy (semantic).")
    hflip: float = option(0.5, "Probability of a horizontal flip.")
    scale: tuple[float, float] = option((0.5, 1.5), "Random size of the picture, low and high (all but pose).")
    color_jitter: float = option(0.2, "Strength of random brightness, contrast and saturation.")
    degrees: float = option(30.0, "Largest random rotation, in degrees (pose).")
    pretrained: bool = option(False, "Start the backbone from weights that come with the architecture.")
    initial_checkpoint: str | None = option(None, "Start the backbone from this classifier: file, run or NAME.TAG.")
    val_interval: int = option(1, "Epochs from one validation to the next; the last epoch is always validated.")
    annotations: Literal["skip", "fail"] = option("skip", "What a broken annotation does; all are named.")
    bad_images: Literal["fail", "skip"] = option("fail", "What a corrupt training image does.")
    workers: int = option(0, "Processes that load images; 0: this one.")
    amp: Literal["auto", "bfloat16", "none"] = option("auto", "Autocast; auto: bfloat16 where the chip has it.")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    seed: int = option(0, "Seed of the weights, the order and the augmentation.")
    resume: bool = option(False, "Go on from the last save in the output folder.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "epochs", "batch_size", "val_interval", "channels", "head_width", "mask_width", "mask_layers",
            "proposals", "sampled", "detections", "decoder_width",
        )  # fmt: skip
        require_at_least(
            self, 0, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "degrees", "seed", "workers", "dice"
        )
        for name in ("lr", "anchor_scale", "backbone_lr_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("drop_path", "model_ema_decay", "color_jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 up to 1")
        if not 0 <= self.hflip <= 1:
            raise ConfigError(f"hflip is {self.hflip}, expected 0 to 1")
        low, high = self.scale
        if not 0 < low <= high:
            raise ConfigError(f"scale is {self.scale}, expected two rising numbers above 0")
        if any(side < STRIDE or side % STRIDE for side in self.img_size):
            raise ConfigError(f"img_size is {self.img_size}, expected two multiples of {STRIDE}")
