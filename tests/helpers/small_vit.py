"""A vision transformer of one block, pictures that it can be run on, and a clock that says what a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from common import save_image, smooth
from leanvit.bench import Target
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Preprocess
from leanvit.optimize.timing import Timer

CLASSES = ("cat", "dog", "owl")
SIZE = (32, 32)
OPTIONS: dict[str, Any] = {
    "img_size": SIZE[0], "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": len(CLASSES),
}  # fmt: skip


def small_vit(seed: int = 0, **changes: Any) -> nn.Module:
    """vit_tiny at 32 pixels with one block of 32 channels and random weights, its classes far from equal."""
    torch.manual_seed(seed)
    network = timm.create_model("vit_tiny_patch16_224", **{**OPTIONS, **changes}).eval()
    with torch.no_grad():
        network.head.weight.mul_(20.0)
    return network


def small_info() -> CheckpointInfo:
    """Pictures of 32 x 32 pixels are taken as they are."""
    half = (0.5, 0.5, 0.5)
    kwargs = {name: value for name, value in OPTIONS.items() if name != "num_classes"}
    return CheckpointInfo("vit_tiny_patch16_224", CLASSES, Preprocess(SIZE, half, half, crop_pct=1.0), kwargs)


def pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of `count` smooth pictures."""
    folder.mkdir(parents=True)
    for number in range(count):
        save_image(folder / f"{number}.png", smooth(*SIZE, seed=1000 * seed + number))
    return folder


def classes(folder: Path, count: int) -> Path:
    """A folder with `count` pictures of each class."""
    for index, name in enumerate(CLASSES):
        pictures(folder / name, count, seed=index)
    return folder


def clock(**milliseconds: float) -> Timer:
    """Times by profile, so that no test depends on the speed of a machine."""

    def timer(targets: list[Target], batch_size: int, threads: int) -> dict[str, Any]:
        return {"results": [{"median_ms": milliseconds[target.precision]} for target in targets]}

    return timer
