"""Configuration of analyze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import DATA_KINDS
from leanvit.config.load import NETWORK_KINDS, LoadOptions
from leanvit.errors import ConfigError

Part = Literal["attention", "rollout", "distance", "diversity", "norms", "alpha", "shortcut", "field", "cost"]


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(LoadOptions):
    """Look into one model, or into two side by side: attention, tokens, receptive field, cost."""

    models: list[str] = option([], f"One or two networks, each {NETWORK_KINDS}.", positional=True)
    data: str = option("digits", f"Images, of which the validation split is used: {DATA_KINDS}.")
    images: int = option(8, "Images to look at, drawn by the seed.")
    output: str = option("runs/analyze", "Folder for analysis.json, analysis.npz and the page.")
    parts: list[Part] = option(
        [], "What to look at: attention rollout distance diversity norms alpha shortcut field cost; default: what fits."
    )
    resolutions: list[int] = option([], "Sides in pixels to count the cost at; default: 1, 1.5, 2 and 3 times its own.")
    measure: bool = option(False, "Time each resolution as well; only an idle machine gives numbers to believe.")
    accuracy_images: int = option(1000, "Images that the ablation of the shortcut is measured on; 0: all.")
    batch_size: int = option(8, "Images a step.")
    device: str = option("auto", "cpu, cuda, ...")
    seed: int = option(0, "Seed of the choice of images and of the signs that the receptive field is measured with.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "images", "batch_size")
        require_at_least(self, 0, "accuracy_images", "seed")
        if len(self.models) > 2:
            raise ConfigError(f"models has {len(self.models)} entries, expected one, or two to stand side by side")
        if self.resolutions and min(self.resolutions) < 1:
            raise ConfigError(f"resolutions is {self.resolutions}, expected sides of at least 1 pixel")
