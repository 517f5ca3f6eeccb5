"""Batches of normalised images for networks: the same at every call."""

from __future__ import annotations

import timm
import torch
from packaging.version import Version
from torch import Tensor, nn

OLDER_TIMM = Version(timm.__version__) < Version("1.0.31")
"""What timm itself does otherwise there is told where tests ask for this."""


def images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    """Noise: (batch, 3, height, width) float32 of mean 0 and deviation 1."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def smooth_images(count: int = 16, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth random pictures, whose neighbouring pixels are alike as in photographs: (count, 3, side, side)."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
