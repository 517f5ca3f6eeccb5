"""From a decoded image to the network's input: the description that every stage shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanvit.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the network's input: the one description that every stage shares.

    input_size: (height, width) in pixels of the network's input.
    mean, std: per channel, R, G, B of a network for colour pictures, in units where 255 is 1.0; applied inside an
        exported graph. Their number is that of the channels: 1 is grey, 4 is what files of four bands hold.
    interpolation: resampling filter of the resize.
    crop_pct: share of the resized image that a centre crop keeps, in (0, 1].
    crop_mode: "center" keeps the aspect ratio (resize the shorter side, crop the middle);
        "squash" resizes both sides and loses the aspect ratio; "letterbox" keeps all of the picture at the top
        left and fills the rest with grey.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash", "letterbox"] = "center"
    version: int = 1

    def __post_init__(self) -> None:
        if min(self.input_size) < 1:
            raise ConfigError(f"input_size is {self.input_size}, expected two positive numbers of pixels")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct}, expected a share in (0, 1]")
        if not self.mean:
            raise ConfigError(f"mean is {self.mean}, expected a number for each channel")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}, expected a positive number for each of {len(self.mean)} channels")

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return len(self.mean)

    @property
    def channel_order(self) -> str:
        """What the channels are, as bundle.json says it."""
        return {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} bands")
