"""Configuration of val."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.commands import RuntimeChoice
from leanvit.config.datasets import BAD_IMAGES, DATA_KINDS, OR_ANNOTATED, BadImages
from leanvit.config.load import NETWORK_KINDS, LoadOptions
from leanvit.errors import ConfigError

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur",
    "brightness", "contrast", "saturate", "pixelate", "jpeg_compression", "all",
]  # fmt: skip

Padding = Literal["edge", "reflect", "zero"]


@dataclass(frozen=True, kw_only=True)
class ValConfig(LoadOptions):
    """Measure a checkpoint, a quantized model or a bundle of any task; on request everything of docs/evaluate.md."""

    model: str = option(MISSING, f"Bundle, quantized model, or the network: {NETWORK_KINDS}.", positional=True)
    data: str = option("digits", f"Labelled images: {DATA_KINDS}; {OR_ANNOTATED}.")
    split: Literal["val", "train", "test"] = option("val", "Which part of the data.")
    limit: int | None = option(None, "Only so many images, drawn by the seed.")
    batch_size: int | None = option(None, "Images a step; default: 128 (classify), 8 (other tasks).")
    device: str = option("auto", "cpu, cuda, ...; not for bundles.")
    runtime: RuntimeChoice | None = option(None, "What runs a bundle; default: onnxruntime.")
    profile: str = option(
        "auto", "What a quantized model is simulated as; auto: as quantize measured it, which a bundle of it runs."
    )
    threads: int = option(0, "Threads of the prediction on a CPU; 0: all cores.")
    bad_images: BadImages = option("fail", BAD_IMAGES)
    score_threshold: float | None = option(
        None, "Least probability of a label, where f1 is measured; default: the model's own, else 0.5 (multilabel)."
    )
    detailed: bool = option(False, "Throughput as well; of a classifier each class, confusion and calibration too.")
    corruptions: list[Corruption] = option([], "The metric on corrupted images: 'all', or names as in ImageNet-C.")
    severities: list[int] = option([1, 2, 3, 4, 5], "Severities of the corruptions, of 1 to 5.")
    shifts: int = option(0, "The metric where images are shifted by up to so many pixels (classify: and consistency).")
    shift_padding: Padding = option("edge", "What comes in at the border of a shifted image.")
    seed: int = option(0, "Seed of the limit and of the noise in corruptions.")
    output: str | None = option(None, "Folder for val.json and predictions.csv; leanvit report draws it.")
    json: bool = option(False, "Print JSON instead of a line.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_size", "limit")
        require_at_least(self, 0, "threads", "shifts", "seed")
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise ConfigError(f"score_threshold is {self.score_threshold}, expected 0 to 1")
        if not self.severities or not set(self.severities) <= {1, 2, 3, 4, 5}:
            raise ConfigError(f"severities is {self.severities}, expected some of 1 2 3 4 5")

    @property
    def is_detailed(self) -> bool:
        """Whether more is asked for than top-1 and top-5."""
        return bool(self.detailed or self.corruptions or self.shifts or self.output)
