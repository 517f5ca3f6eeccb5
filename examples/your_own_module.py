"""A module of your own as a proven int8 bundle, and how often both say the same of your images.

    python examples/your_own_module.py FOLDER OUTPUT

FOLDER: images. OUTPUT: folder for the bundle. The command line takes the same file as it stands:

    leanvit optimize python:examples/your_own_module.py:network --data FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import leanvit
from leanvit import imaging
from leanvit.data.loader import to_input
from leanvit.image_paths import images_below


class Mine(nn.Module):
    """Patches of 8 x 8 pixels, two layers of PyTorch's own transformer, the mean of their tokens."""

    def __init__(self) -> None:
        """Start with random weights."""
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.places = nn.Parameter(torch.randn(1, 16, 64))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, 3, 32, 32). Returns a dictionary, of which the logits (B, 2) are taken."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return {"logits": self.head(tokens.mean(1)), "tokens": tokens}


def network() -> tuple[nn.Module, dict[str, Any]]:
    """Build the module, load your weights, and say what is known beside it."""
    torch.manual_seed(0)
    mine = Mine()  # and mine.load_state_dict(torch.load("mine.pth")), where you have trained it
    half = (0.5, 0.5, 0.5)
    return mine, {"labels": ["day", "night"], "input_size": (32, 32), "mean": half, "std": half}


def main(folder: str, output: str) -> None:
    """From the module to the bundle, to the share of images of which both say the same."""
    mine, info = leanvit.load(f"python:{__file__}:network")
    paths = sorted(images_below(Path(folder)))
    pixels = np.stack([imaging.load(path, info.preprocess) for path in paths])
    images = to_input(torch.from_numpy(pixels), info.preprocess)

    bundle = leanvit.export(leanvit.quantize(mine, images[:128]), output, info=info)
    with torch.no_grad():
        own = mine(images).argmax(1)
    predictor = leanvit.Predictor(bundle)
    same = sum(predictor.predict(path)[0][0] == info.labels[i] for path, i in zip(paths, own, strict=True))
    print(f"{bundle}: says what your module says of {same} of {len(paths)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
