"""Semantic segmentation: segmentation-models-pytorch's UPerNet or its light FPN decoder on any backbone.

UPerNet: Xiao et al., arXiv 1807.10221, the head of ViTAEv2's results on ADE20K. FPN: Kirillov et al., arXiv 1901.02446.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.annotations import IGNORED
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import TrainConfig, from_dict, to_dict
from leanvit.config.tasks import PICTURES_DEFAULTS
from leanvit.data.scene_kinds import CLASS_MAPS
from leanvit.errors import ConfigError, require
from leanvit.tasks.features import BackboneConfig, Features
from leanvit.tasks.task import Targets, TrainingTask, register, single_output


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

    def losses(self, x: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Cross entropy of each image, a mean over all its pixels, and Dice: (B,) float32 by name.

        targets: class_map (H, W) int64 of each image. A pixel without a class adds 0 and is counted (mmsegmentation's
        avg_non_ignore=False), so that every pixel weighs the same in whatever parts a step is computed. Dice is that of
        the image: over a batch it would depend on the parts.
        """
        truth = torch.stack([target["class_map"] for target in targets])
        logits = F.interpolate(self(x).float(), truth.shape[-2:], mode="bilinear", align_corners=False)
        pixels = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none")
        losses = {"loss_semantic": pixels.mean((1, 2))}
        if self.config.dice:
            dice = [self.dice(logits[i : i + 1], truth[i : i + 1]) for i in range(len(x))]
            losses["loss_dice"] = self.config.dice * torch.stack(dice)
        return losses


def _decoder(widths: list[int], config: SegmenterConfig) -> tuple[nn.Module, int]:
    """A decoder of segmentation-models-pytorch and its number of output channels; both return maps at stride 4."""
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


def _build(info: CheckpointInfo) -> nn.Module:
    backbone = BackboneConfig(info.architecture, info.preprocess.input_size, kwargs=info.kwargs)
    return Segmenter(backbone, len(info.labels), from_dict(SegmenterConfig, info.head, "head"))


def _head(config: TrainConfig) -> dict[str, Any]:
    return to_dict(SegmenterConfig(config.decoder, config.decoder_width, dice=config.dice))


def _losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    return cast(Segmenter, network).losses(x, targets)


SEMANTIC = register(
    TrainingTask(
        name="semantic",
        build=_build,
        output_names=("logits",),
        outputs=single_output("logits"),
        losses=_losses,
        samples=CLASS_MAPS,
        annotations="semantic",
        features=lambda network: network.features,
        head=_head,
        defaults=PICTURES_DEFAULTS,
    )
)
