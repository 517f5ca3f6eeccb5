"""Semantic segmentation: segmentation-models-pytorch's UPerNet or its light FPN decoder on any backbone.

UPerNet: Xiao et al., arXiv 1807.10221, the head of ViTAEv2's results on ADE20K. FPN: Kirillov et al., arXiv 1901.02446.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.annotations import IGNORED
from leanvit.errors import ConfigError, require
from leanvit.tasks.features import BackboneConfig, Features


@dataclass(frozen=True)
class SegmenterConfig:
    """What stands on the backbone.

    head: "upernet" (the papers'), "fpn" (light). width: channels of the head, for "fpn" a multiple of 64, as its
    normalisation has 32 groups of half the channels. dropout: before the classifier.
    """

    head: Literal["upernet", "fpn"] = "upernet"
    width: int = 256
    dropout: float = 0.1
    dice: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 4:
            raise ConfigError(f"width is {self.width}, expected a multiple of 4, at least 8")
        if self.head == "fpn" and self.width % 64:
            raise ConfigError(f"width is {self.width}, expected a multiple of 64 for the head fpn")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected 0 up to 1")
        if self.dice < 0:
            raise ConfigError(f"dice is {self.dice}, expected 0 or more")


class Segmenter(nn.Module):
    """Normalised images (B, 3, H, W) -> class logits (B, classes, H / 4, W / 4)."""

    def __init__(self, backbone: BackboneConfig, num_classes: int, config: SegmenterConfig) -> None:
        """Raises UnknownModelError, ConfigError, MissingDependencyError without the tasks extra."""
        super().__init__()
        self.config = config
        self.features = Features(backbone)
        self.decoder, width = _decoder(self.features.widths, config)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        smp = require("segmentation_models_pytorch")
        self.dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) float32. Returns logits (B, classes, H / 4, W / 4)."""
        maps = self.features(x)
        # The decoders count from the image on and use the strides from 4 on.
        logits: Tensor = self.classifier(self.dropout(self.decoder([x, x, *maps])))
        return logits

    def losses(self, x: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Mean cross entropy over the pixels that have a class, and Dice; targets: class_map (H, W) int64 an image."""
        truth = torch.stack([target["class_map"] for target in targets])
        logits = F.interpolate(self(x).float(), truth.shape[-2:], mode="bilinear", align_corners=False)
        count = (truth != IGNORED).sum().clamp(min=1)
        total = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        losses = {"loss_semantic": total / count}
        if self.config.dice:
            losses["loss_dice"] = self.config.dice * self.dice(logits, truth)
        return losses


def _decoder(widths: list[int], config: SegmenterConfig) -> tuple[nn.Module, int]:
    """A decoder of segmentation-models-pytorch and its number of output channels; both give stride 4."""
    channels = [3, 3, *widths]
    if config.head == "upernet":
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        return UPerNetDecoder(channels, encoder_depth=5, decoder_channels=config.width), config.width
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    width = config.width // 2
    decoder = FPNDecoder(
        channels, encoder_depth=5, pyramid_channels=config.width, segmentation_channels=width, dropout=0.0
    )
    return decoder, width
