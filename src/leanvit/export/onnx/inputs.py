"""What a graph reads: uint8 images, which it normalises, or cells of another part's maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanvit.config import Preprocess


class ImageInput(nn.Module):
    """A network after its normalisation: uint8 images (B, H, W, 3) in, its own outputs out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess, *, channels_last: bool = False) -> None:
        """Put `preprocess` in front of `network`.

        channels_last: normalise before channels come first, for a network that puts them last again.
        """
        super().__init__()
        self.network = network
        self.channels_last = channels_last
        # A whole row of pixels at a time: ONNX Runtime is slow where a constant of three values is repeated.
        shape = (-1,) if channels_last else (1, -1, 1, 1)
        times = preprocess.input_size[1] if channels_last else 1
        self.register_buffer("mean", torch.tensor(preprocess.mean).repeat(times).view(shape))
        self.register_buffer("std", torch.tensor(preprocess.std).repeat(times).view(shape))

    def forward(self, images: Tensor) -> Any:
        """images: (B, H, W, 3) uint8. Returns logits (B, classes) float32, or what else the network returns."""
        x = images.flatten(2) if self.channels_last else images.permute(0, 3, 1, 2)
        x = (x.float() / 255.0 - self.mean) / self.std
        return self.network(x.view(images.shape).permute(0, 3, 1, 2) if self.channels_last else x)


class PartInput(nn.Module):
    """A part of a network that reads no image.

    torch.onnx notes no modules (leanvit.export.onnx.names) inside of a graph that it is given itself.
    """

    def __init__(self, network: nn.Module) -> None:
        """Put nothing in front of `network`."""
        super().__init__()
        self.network = network

    def forward(self, cells: Tensor) -> Any:
        """What the network returns for cells (B, ...) float32."""
        return self.network(cells)
