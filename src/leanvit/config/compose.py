"""Configuration of `leanvit data compose`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.errors import ConfigError

MIN_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class DataComposeConfig:
    """Compose practice pictures for detection, segmentation and pose: garments on photographs, COCO and class maps."""

    output: str = option(MISSING, "Folder to write; it must not exist yet.", positional=True)
    train: int = option(2000, "Training pictures.")
    val: int = option(400, "Validation pictures: other garments, on other parts of the photographs.")
    size: tuple[int, ...] = option((128,), "Pixels of the square pictures, or height and width.")
    min_objects: int = option(2, "Fewest objects in a picture.")
    max_objects: int = option(6, "Most objects in a picture.")
    scale: tuple[float, float] = option((0.8, 2.5), "Smallest and largest factor on the 28 pixels of an object.")
    rotation: float = option(20.0, "Largest rotation to either side, in degrees.")
    occlusion: float = option(0.6, "Largest share of an object that others and the border may hide.")
    classes: Literal["all", "groups"] = option(
        "all", "Fashion-MNIST's ten classes, or five groups: top, trouser, dress, shoe, bag."
    )
    cutouts: str | None = option(
        None, "Folder of RGBA PNG cut-outs to use for the garments, one sub-folder a class; no keypoints then."
    )
    seed: int = option(0, "Seed of all that is drawn.")
    workers: int = option(1, "Processes; the pictures are the same whatever their number.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "train", "val", "min_objects", "workers")
        require_at_least(self, 0, "seed")
        if len(self.size) not in (1, 2) or min(self.size) < MIN_SIZE:
            raise ConfigError(f"size is {self.size}, expected one number or height and width, at least {MIN_SIZE}")
        if not self.min_objects <= self.max_objects:
            raise ConfigError(
                f"max_objects is {self.max_objects}, expected at least min_objects, which is {self.min_objects}"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is {self.scale}, expected two positive numbers, the smaller first")
        if not 0 <= self.rotation <= 180:
            raise ConfigError(f"rotation is {self.rotation}, expected 0 to 180 degrees")
        if not 0 <= self.occlusion < 1:
            raise ConfigError(f"occlusion is {self.occlusion}, expected a share from 0 to below 1")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the pictures in pixels."""
        return self.size[0], self.size[-1]
