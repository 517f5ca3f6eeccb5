"""Configuration of the verb `optimize`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import BAD_IMAGES, DATA_KINDS, OR_ANNOTATED, BadImages
from leanvit.config.load import NETWORK_KINDS, LoadOptions
from leanvit.errors import ConfigError

RuntimeWanted = Literal["onnxruntime", "openvino", "any"]

Aim = Literal["latency", "throughput", "size"]


@dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """What the API and the command line share of `optimize`."""

    max_drop: float = option(
        0.5, "Largest drop against the float network, in points; without labels: of agreement with it."
    )
    runtime: RuntimeWanted = option(
        "onnxruntime", "What will run the file; any: the fastest of those that are installed.", flag="--for"
    )
    by: Aim = option("latency", "What the best file has least of: time of one image, time of a batch, or bytes.")
    minutes: float | None = option(None, "Time to spend; what is left out then is named. Default: all that could win.")
    batch_size: int | None = option(
        None, "Images a step when files are timed; default: 1, by throughput 32 (classify) or 8 (other tasks)."
    )
    calibration_images: int = option(128, "How many training images calibrate the ranges.")
    val_images: int = option(500, "How many validation images, at most, every file is measured on; 0: all.")
    bad_images: BadImages = option("fail", BAD_IMAGES)
    threads: int = option(0, "Threads when files are timed; 0: all cores.")
    seed: int = option(0, "Seed of the choice of images.")

    def __post_init__(self) -> None:
        require_at_least(self, 0, "max_drop", "val_images", "threads", "seed")
        require_at_least(self, 1, "batch_size", "calibration_images")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes is {self.minutes:g}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig(OptimizeOptions, LoadOptions):
    """From a network and images to the fastest (or smallest) file that holds the accuracy, in one command."""

    model: str = option(MISSING, f"The network: {NETWORK_KINDS}.", positional=True)
    data: str = option(
        MISSING,
        f"Images to calibrate on and to measure on: {DATA_KINDS}; a folder of photographs without classes; "
        f"{OR_ANNOTATED}.",
    )
    output: str = option("runs/optimize", "Folder for the bundle, the report, and what was tried.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        OptimizeOptions.__post_init__(self)
        LoadOptions.__post_init__(self)

    def options(self) -> OptimizeOptions:
        """The part that the API's optimize() takes."""
        return OptimizeOptions(**{f.name: getattr(self, f.name) for f in fields(OptimizeOptions)})
