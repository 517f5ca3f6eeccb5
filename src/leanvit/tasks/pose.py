"""Top-down pose: heatmaps from a deconvolution head on any backbone (Simple Baselines, Xiao et al., arXiv 1804.06208).

The setup of ViTAEv2's results on AP-10K: deconvolutions from the deepest map up to stride 4, one heatmap a keypoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import TrainConfig, from_dict, to_dict
from leanvit.config.tasks import DEFAULTS
from leanvit.data.scene_kinds import KEYPOINTS
from leanvit.errors import CheckpointError, ConfigError
from leanvit.tasks.features import STRIDES, BackboneConfig, Features
from leanvit.tasks.task import Targets, TrainingTask, register, single_output


@dataclass(frozen=True)
class PoseConfig:
    """What stands on the backbone.

    width: channels of the deconvolutions. sigma: of the target's Gaussian in cells of the heatmap; None: 2 for a
    heatmap of 64 cells, in proportion for others and at least 1.
    """

    width: int = 256
    sigma: float | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width is {self.width}, expected at least 1")
        if self.sigma is not None and not self.sigma > 0:
            raise ConfigError(f"sigma is {self.sigma}, expected more than 0")


class PoseNetwork(nn.Module):
    """Normalised crops of one object (B, 3, H, W) -> heatmaps (B, keypoints, H / 4, W / 4)."""

    def __init__(self, backbone: BackboneConfig, num_keypoints: int, config: PoseConfig) -> None:
        """Raises UnknownModelError, ConfigError."""
        super().__init__()
        self.config = config
        self.features = Features(backbone)
        stride, width = self.features.deepest
        layers: list[nn.Module] = []
        for _ in range(max(1, round(math.log2(stride / STRIDES[0])))):
            layers += [
                _Up(width, config.width) if stride > STRIDES[0] else nn.Conv2d(width, config.width, 3, padding=1),
                nn.BatchNorm2d(config.width),
                nn.ReLU(),
            ]
            width = config.width
        self.head = nn.Sequential(*layers, nn.Conv2d(width, num_keypoints, 1))
        height = backbone.size[0] / STRIDES[0]
        self.sigma = config.sigma or max(1.0, 2.0 * height / 64)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) float32. Returns heatmaps (B, keypoints, H / 4, W / 4), about 0 to 1."""
        heatmaps: Tensor = self.head(self.features.own(x)[-1])
        return heatmaps

    def losses(self, x: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Squared error over the heatmaps of each image's annotated keypoints: (B,) float32.

        targets: keypoints (K, 3) in pixels of x. One that is not annotated adds 0 and is counted, as in Simple
        Baselines, so that every keypoint weighs the same in whatever parts a step is computed.
        """
        heatmaps = self(x).float()
        keypoints = torch.stack([target["keypoints"] for target in targets]).to(heatmaps.device)
        truth, weights = gaussian_heatmaps(keypoints, heatmaps.shape[-2:], STRIDES[0], self.sigma)
        errors = (heatmaps - truth).square().mean((2, 3)) * weights
        # The target is nearly empty: in units of a peak's own energy the loss does not depend on the size.
        energy = math.pi * self.sigma**2 / (heatmaps.shape[-2] * heatmaps.shape[-1])
        return {"loss_heatmap": errors.mean(1) / energy}


class _Up(nn.ConvTranspose2d):
    """Twice the size (kernel 4, stride 2, no bias), as in Simple Baselines."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, 4, stride=2, padding=1, bias=False)


def gaussian_heatmaps(keypoints: Tensor, size: tuple[int, int], stride: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Targets: (B, K, h, w) with a peak of 1 at each keypoint, and weights (B, K).

    keypoints: (B, K, 3) of x, y in pixels and visibility. size: (h, w) cells of `stride` pixels, the first cell's
    middle is at stride / 2. sigma: in cells. A keypoint that is not annotated, or lies outside, has weight 0.
    """
    height, width = size
    cells = keypoints[..., :2] / stride - 0.5
    rows = torch.arange(height, device=keypoints.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=keypoints.device).view(1, 1, 1, -1)
    squares = (columns - cells[..., 0, None, None]).square() + (rows - cells[..., 1, None, None]).square()
    inside = (cells > -0.5).all(-1) & (cells[..., 0] < width - 0.5) & (cells[..., 1] < height - 0.5)
    weights = ((keypoints[..., 2] > 0) & inside).float()
    return torch.exp(-squares / (2 * sigma**2)), weights


def _build(info: CheckpointInfo) -> nn.Module:
    if not info.keypoints:
        raise CheckpointError("the checkpoint is for task 'pose' without names of keypoints. Train it again.")
    backbone = BackboneConfig(info.architecture, info.preprocess.input_size, kwargs=info.kwargs)
    return PoseNetwork(backbone, len(info.keypoints["names"]), from_dict(PoseConfig, info.head, "head"))


def _head(config: TrainConfig) -> dict[str, Any]:
    return to_dict(PoseConfig(config.decoder_width))


def _losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    return cast(PoseNetwork, network).losses(x, targets)


POSE = register(
    TrainingTask(
        name="pose",
        build=_build,
        output_names=("heatmaps",),
        outputs=single_output("heatmaps"),
        losses=_losses,
        samples=KEYPOINTS,
        annotations="pose",
        crop_mode="squash",
        features=lambda network: network.features,
        head=_head,
        defaults=DEFAULTS["pose"],
        keypoints=True,
    )
)
