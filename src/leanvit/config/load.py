"""What a verb that takes a network is told of it: the part of its options that leanvit.load obeys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from leanvit.config.base import option, require_at_least
from leanvit.config.image import Interpolation
from leanvit.errors import ConfigError

NETWORK_KINDS = (
    "a leanvit checkpoint or run folder, NAME.TAG of timm, a file of weights (.safetensors .bin .pth .pt .tar .ckpt), "
    "hf-hub:ORG/NAME, local-dir:FOLDER, transformers:FOLDER_OR_ID, torchvision:NAME[.WEIGHTS], python:FILE.py:FUNCTION"
)
"""The specs of leanvit.load, as help texts name them."""


def require_keep_tokens(value: float | tuple[int, ...]) -> None:
    """Raise ConfigError for what is no share of the tokens, and no numbers of tokens to merge."""
    if not isinstance(value, tuple):
        if not 0 < value <= 1:
            raise ConfigError(f"keep_tokens is {value}, expected a share of the tokens in (0, 1]")
    elif not value or min(value) < 0:
        raise ConfigError(f"keep_tokens is {list(value)}, expected a number from 0 up for each block")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a network's file does not say of it, and what is to be otherwise than it says."""

    model_name: str | None = option(
        None, "Architecture (timm's name) of a file of weights that does not say it.", flag="--model"
    )
    ema: bool = option(True, "Take the averaged weights (EMA) of a training checkpoint that has them.")
    labels: str | None = option(None, "File with the class names, a line each, in the order of the outputs.")
    multi_label: bool = option(
        False, "Every output is a label of its own (sigmoid): an image may have several, or none."
    )
    mean: tuple[float, ...] | None = option(
        None, "Mean of each channel, where 255 is 1; default: the network's own, else ImageNet's."
    )
    std: tuple[float, ...] | None = option(None, "Standard deviation of each channel, likewise.")
    interpolation: Interpolation | None = option(None, "Filter of the resize; default: the network's own.")
    crop_pct: float | None = option(None, "Share of the resized image that the centre crop keeps; default: its own.")
    img_size: int | tuple[int, ...] | None = option(
        None, "Input side in pixels, or height and width; embeddings of positions are resampled. Default: its own."
    )
    keep_tokens: float = option(
        1.0, "Share of the tokens of a ViT, DeiT or DINO that its last block still has: alike ones are merged before."
    )

    def __post_init__(self) -> None:
        require_keep_tokens(self.keep_tokens)
        if isinstance(self.img_size, tuple) and len(self.img_size) == 1:
            object.__setattr__(self, "img_size", self.img_size[0])
        if isinstance(self.img_size, int):
            require_at_least(self, 1, "img_size")
        elif self.img_size is not None and (len(self.img_size) != 2 or min(self.img_size) < 1):
            raise ConfigError(f"img_size is {self.img_size}, expected one side or height and width, at least 1 each")
        if self.std is not None and (not self.std or min(self.std) <= 0):
            raise ConfigError(f"std is {self.std}, expected a positive number for each channel")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct}, expected a share in (0, 1]")

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the input, where it is given."""
        if self.img_size is None:
            return None
        return (
            (self.img_size, self.img_size) if isinstance(self.img_size, int) else (self.img_size[0], self.img_size[1])
        )

    def load_options(self) -> LoadOptions:
        """The part that the API's load() takes."""
        return LoadOptions(**{f.name: getattr(self, f.name) for f in fields(LoadOptions)})

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(LoadOptions) if getattr(self, f.name) != f.default}
