"""Variants of calibration images, for what is learned from few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvit.quant.calibration_images import MOST_CHANNELS

VARIANTS = 3
LEAST_SIDE = 0.8
"""So many variants of every image are learned from, too: cut-outs of at least this share of each side, mirrored or not.
The float network says what is right for any picture; a hundred alone are soon learned by heart."""


def with_variants(images: Tensor, held_out: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), and behind them VARIANTS of each but of every `held_out`-th: cut out, moved and mirrored.

    What is no image (cells of a detector's maps) has none.
    """
    if images.shape[1] > MOST_CHANNELS:
        return images
    numbers = torch.arange(len(images))
    trained = images[numbers[numbers % held_out != 0]]
    return torch.cat([images, *(_variant(trained, generator) for _ in range(VARIANTS))])


def variants_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """One variant of each image (N, C, H, W), which nothing was fitted to; what is no image stays as it is."""
    return images if images.shape[1] > MOST_CHANNELS else _variant(images, generator)


def _variant(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    share = 1 - (1 - LEAST_SIDE) * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - share)[:, None]
    mirror = 1 - 2 * torch.randint(0, 2, (count,), generator=generator)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = share * mirror, share, shift
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
