"""Configuration of training: one for all tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import BAD_IMAGES, DATA_KINDS, BadImages
from leanvit.config.load import NETWORK_KINDS
from leanvit.config.scale import RayOptions
from leanvit.config.tasks import (
    CLASSIFY,
    DEFAULTS,
    IMAGES_DEFAULTS,
    LABELLED,
    MULTILABEL,
    OBJECTS,
    PART_PICTURES,
    PICTURES,
    PICTURES_DEFAULTS,
    STRIDE,
)  # fmt: skip
from leanvit.errors import ConfigError
from leanvit.progress import note

Tracker = Literal["tensorboard", "wandb", "mlflow"]

_IMAGES, _ONE_LABEL = LABELLED, (CLASSIFY,)

OLD_DEGREES = 30.0
"""What config.yaml of leanvit 0.1 says of `degrees` for every task of annotated pictures."""


def by_task(name: str, help: str, **metadata: Any) -> Any:
    """The option `name`, whose default is the task's own (config.tasks.DEFAULTS); None until it is known."""
    images, pictures = IMAGES_DEFAULTS.get(name), PICTURES_DEFAULTS.get(name)
    if images is not None and pictures is not None:
        help += f" Default: {images}." if images == pictures else f" Default: {images}, {pictures} for other tasks."
    elif name == "data":
        help += f" Default: {images}; other tasks need one."
    return option(None, help, by_task=True, **metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RayOptions):
    """Train or fine-tune: a classifier on labelled images, or another task on annotated pictures, on any backbone."""

    task: str = option(
        CLASSIFY,
        "classify: a label an image; multilabel: any number of labels an image; detect: boxes; segment: boxes and "
        "masks; semantic: a class a pixel; pose: "
        "keypoints in given boxes.",
    )
    multi_label: bool = option(
        False, "The same as --task multilabel: every class is a label of its own (sigmoid), from a table of images."
    )
    data: str = by_task(
        "data",
        f"Labelled images: {DATA_KINDS}; of multilabel a table (.csv, .jsonl); for other tasks a folder of `leanvit "
        "data compose`, COCO root, YOLO data.yaml, ADE20K, Cityscapes or image + mask root.",
    )
    model: str = by_task("model", "Any timm architecture; see: leanvit models.")
    output: str = by_task("output", "Folder for checkpoints, log and resolved config.")
    epochs: int = by_task("epochs", "Passes over the training images.")
    batch_size: int = by_task("batch_size", "Images an optimizer step: over all processes and accumulated parts.")
    grad_accum_steps: int = by_task(
        "grad_accum_steps",
        f"Parts of a step that each process works on one after another; of detectors as many as leave {PART_PICTURES} "
        "pictures a part.",
    )
    opt: str = option("adamw", "Optimizer, by timm's name: adamw, sgd, lamb, lion, ...")
    momentum: float = option(0.9, "Momentum of optimizers that have one.")
    lr: float = by_task("lr", "Peak learning rate.")
    backbone_lr_scale: float = option(1.0, "Learning rate of the backbone as a share of the heads'.", tasks=PICTURES)
    min_lr: float = by_task("min_lr", "Learning rate at the end of the cosine.")
    warmup_epochs: float = by_task("warmup_epochs", "Epochs of linear warm-up.")
    weight_decay: float = option(0.05, "Decay; norms, biases and the model's no_weight_decay excepted.")
    layer_decay: float | None = option(None, "Factor of the learning rate from one layer to the one before it.")
    freeze_epochs: int = option(0, "First epochs in which only the classifier or the heads learn; all: a linear probe.")
    clip_grad: float = by_task("clip_grad", "Largest gradient norm; 0 turns clipping off.")
    smoothing: float = option(0.1, "Label smoothing.", tasks=_IMAGES)
    class_weights: Literal["none", "balanced"] = option(
        "none", "Weigh classes by one over their number of images.", tasks=_ONE_LABEL
    )
    drop: float = option(0.0, "Dropout rate of the classifier and the MLPs.", tasks=_IMAGES)
    drop_path: float = option(0.0, "Stochastic depth rate.")
    model_ema_decay: float = option(0.0, "Validate and keep a moving average of the weights; 0: none.")
    img_size: int | tuple[int, ...] | None = by_task(
        "img_size",
        "Input side in pixels, or height and width; default: the model's own, 640 for other tasks (multiples of 32).",
    )
    keep_tokens: float = option(
        1.0, "Share of the tokens of a ViT, DeiT or DINO that its last block still has: alike ones are merged before.",
        tasks=_IMAGES,
    )  # fmt: skip
    crop_scale: tuple[float, float] = option((0.7, 1.0), "Area share of the random crop, low and high.", tasks=_IMAGES)
    crop_ratio: tuple[float, float] = option(
        (1.0, 1.0), "Aspect ratio of the random crop, low and high.", tasks=_IMAGES
    )
    scale: tuple[float, float] = option(
        (0.5, 1.5), "Random size of the picture, low and high.", tasks=(*OBJECTS, "semantic")
    )
    hflip: float = by_task("hflip", "Probability of a horizontal flip.")
    color_jitter: float = option(0.2, "Strength of random brightness, contrast and saturation.", tasks=PICTURES)
    degrees: float = by_task(
        "degrees", "Largest random rotation, in degrees. Default: 10, 30 for pose.", tasks=(*LABELLED, "pose")
    )
    aa: str | None = option(None, "timm's AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5-inc1.", tasks=_IMAGES)
    reprob: float = option(0.0, "Probability of erasing a random rectangle.", tasks=_IMAGES)
    mixup: float = option(0.0, "Parameter of Mixup's beta distribution; 0 turns it off.", tasks=_IMAGES)
    cutmix: float = option(0.0, "Parameter of CutMix' beta distribution; 0 turns it off.", tasks=_IMAGES)
    mixup_prob: float = option(1.0, "Share of steps that are mixed, where mixup or cutmix is on.", tasks=_IMAGES)
    mixup_switch_prob: float = option(0.5, "Share of mixed steps that use CutMix, where both are on.", tasks=_IMAGES)
    teacher: str | None = option(None, f"Network to learn from: {NETWORK_KINDS}.", tasks=_ONE_LABEL)
    distillation: Literal["soft", "hard", "token"] = option(
        "soft", "Learn the teacher's probabilities, its top label, or its top label on DeiT's token.", tasks=_ONE_LABEL
    )
    distillation_alpha: float = option(0.5, "Share of the teacher in the loss.", tasks=_ONE_LABEL)
    distillation_tau: float = option(2.0, "Temperature of soft labels.", tasks=_ONE_LABEL)
    hint_weight: float = option(
        0.0, "Weight of the distance between feature maps of student and teacher.", tasks=_ONE_LABEL
    )
    outlier_weight: float = option(
        0.0,
        "Weight of a loss on large activations, which quantization can't take (TWEO takes 0.01); 0: none.",
        tasks=_IMAGES,
    )
    channels: int = option(256, "Channels of the feature pyramid.", tasks=OBJECTS)
    anchor_scale: float = option(8.0, "Side of an anchor in strides of its level.", tasks=OBJECTS)
    head_width: int = option(1024, "Width of the box head's two layers.", tasks=OBJECTS)
    mask_width: int = option(256, "Channels of the mask head.", tasks=OBJECTS)
    mask_layers: int = option(4, "Convolutions of the mask head.", tasks=OBJECTS)
    proposals: int = option(1000, "Boxes that the second stage looks at.", tasks=OBJECTS)
    sampled: int = option(512, "Boxes a picture that the second stage learns from.", tasks=OBJECTS)
    detections: int = option(100, "Most objects that are returned for a picture.", tasks=OBJECTS)
    decoder: Literal["upernet", "fpn"] = option(
        "upernet", "Head: the papers' UPerNet or a light FPN.", tasks=("semantic",)
    )
    decoder_width: int = option(256, "Channels of the head.", tasks=("semantic", "pose"))
    dice: float = option(0.0, "Weight of the soft Dice loss beside cross entropy.", tasks=("semantic",))
    head: dict[str, Any] = option({}, "Options of the head of a task from outside leanvit, as keys of a --config file.")
    patience: int = option(0, "Stop after so many epochs without a better validation; 0: never.")
    val_interval: int = option(1, "Epochs from one validation to the next; the last epoch is always validated.")
    save_interval: int = option(0, "Steps between saves inside an epoch; 0: only after each epoch.")
    pretrained: bool = option(False, "Start the model or the backbone from weights that come with the architecture.")
    initial_checkpoint: str | None = option(
        None, f"Start the model or the backbone from the weights of this network: {NETWORK_KINDS}."
    )
    ema: bool = option(
        True, "Of a training checkpoint to start from, take the averaged weights (EMA) where it has them."
    )
    val_fraction: float = option(
        0.2, "Share held out where the data has no validation split of its own.", tasks=_IMAGES
    )
    train_fraction: float = option(1.0, "Share of the training images to use; of every class for classify.")
    images_per_class: int | None = option(None, "Training images of each class to use.", tasks=_ONE_LABEL)
    annotations: Literal["skip", "fail"] = option(
        "skip", "What a broken annotation does; all are named.", tasks=PICTURES
    )
    cache: Literal["auto", "memory", "none"] = option(
        "auto", "Keep prepared images in memory and crop those, or crop files anew; auto: up to 4 GiB in memory.",
        tasks=_IMAGES,
    )  # fmt: skip
    workers: int = option(0, "Processes that load images; 0: this one, with threads.")
    bad_images: BadImages = option("fail", BAD_IMAGES)
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
    ray_workers: int | None = option(
        None, "Processes that train on Ray; default: one a GPU, or one a machine with all its cores."
    )
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.img_size, tuple) and len(self.img_size) == 1:
            object.__setattr__(self, "img_size", self.img_size[0])
        if self.multi_label and self.task not in LABELLED:
            raise ConfigError(
                f"multi_label is of images with labels, not of task {self.task}. Leave --multi-label out."
            )
        if self.multi_label:
            object.__setattr__(self, "task", MULTILABEL)
        object.__setattr__(self, "multi_label", self.task == MULTILABEL)
        if self.task in DEFAULTS:
            self._leave_out_old_rotation()
            refuse_options(self, self.task)
            fill_in(self, DEFAULTS[self.task])
            fill_in(self, {"grad_accum_steps": max(1, -(-self.batch_size // PART_PICTURES))})
            if self.data is None:
                raise ConfigError(f"no --data given, expected one. Run: leanvit train --task {self.task} --help")
        self._check_numbers()
        self._check_pairs()
        if self.fsdp and self.model_ema_decay:
            raise ConfigError("fsdp and model_ema_decay are both given, expected one: the average needs whole weights")

    def _leave_out_old_rotation(self) -> None:
        """Take the files of runs of 0.1, which hold the rotation of pose for tasks that never rotated."""
        if self.task in PICTURES and self.task != "pose" and self.degrees == OLD_DEGREES:
            note(f"degrees {self.degrees:g} is left out, as 0.1 did: task {self.task} does not rotate pictures")
            object.__setattr__(self, "degrees", None)

    def _check_numbers(self) -> None:
        require_at_least(
            self, 1, "epochs", "batch_size", "val_interval", "grad_accum_steps", "images_per_class", "channels",
            "head_width", "mask_width", "mask_layers", "proposals", "sampled", "detections", "decoder_width",
        )  # fmt: skip
        require_at_least(
            self, 0, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "degrees", "seed", "mixup", "cutmix",
            "patience", "save_interval", "workers", "freeze_epochs", "hint_weight", "outlier_weight", "dice",
        )  # fmt: skip
        for name in ("lr", "distillation_tau", "anchor_scale", "backbone_lr_scale"):
            _require(self, name, lambda value: value > 0, "more than 0")
        for name in ("smoothing", "drop", "drop_path", "model_ema_decay", "color_jitter"):
            _require(self, name, lambda value: 0 <= value < 1, "0 up to 1")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha"):
            _require(self, name, lambda value: 0 <= value <= 1, "0 to 1")
        _require(self, "val_fraction", lambda value: 0 < value < 1, "between 0 and 1")
        _require(self, "train_fraction", lambda value: 0 < value <= 1, "a share above 0")
        _require(self, "keep_tokens", lambda value: 0 < value <= 1, "a share above 0")
        _require(self, "layer_decay", lambda value: 0 < value <= 1, "more than 0 and up to 1")

    def _check_pairs(self) -> None:
        for name in ("crop_scale", "crop_ratio", "scale"):
            _require(self, name, lambda pair: 0 < pair[0] <= pair[1], "two rising numbers above 0")
        if isinstance(self.img_size, int):
            require_at_least(self, 1, "img_size")
        elif self.img_size is not None and (len(self.img_size) != 2 or min(self.img_size) < 1):
            raise ConfigError(f"img_size is {self.img_size}, expected one side or height and width, at least 1 each")
        size = self.input_size
        if self.task not in LABELLED and size and any(side < STRIDE or side % STRIDE for side in size):
            raise ConfigError(f"img_size is {size}, expected two multiples of {STRIDE}")

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the input, where it is given."""
        if self.img_size is None or isinstance(self.img_size, int):
            return (self.img_size, self.img_size) if self.img_size else None
        return self.img_size[0], self.img_size[1]

    @property
    def mixes(self) -> bool:
        """Whether images of a step are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def _require(config: TrainConfig, name: str, holds: Any, expected: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ConfigError(f"{name} is {value}, expected {expected}")


def fill_in(config: TrainConfig, defaults: Mapping[str, Any]) -> None:
    """Set the options that were not given to the defaults of the task; the only place where that is done."""
    for item in fields(config):
        if item.metadata.get("by_task") and getattr(config, item.name) is None and item.name in defaults:
            object.__setattr__(config, item.name, defaults[item.name])


def refuse_options(config: TrainConfig, task: str, more: Collection[str] = ()) -> None:
    """Raise ConfigError where an option is given that a task does not take.

    more: options that it takes although it is not in their list.
    """
    if config.head and task in DEFAULTS:
        raise ConfigError(f"head is for tasks from outside leanvit, not for task {task}. Leave it out.")
    for item in fields(config):
        tasks = item.metadata.get("tasks")
        given = getattr(config, item.name) != item.default
        if tasks and task not in tasks and item.name not in more and given:
            raise ConfigError(
                f"{item.name} is for {', '.join(tasks)}, not for task {task}. "
                f"Leave --{item.name.replace('_', '-')} out."
            )
