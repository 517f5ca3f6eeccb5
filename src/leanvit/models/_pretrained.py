"""Weights that come with the package: where they are and what timm is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanvit.config import FASHION_MNIST_CLASSES

WEIGHTS = Path(__file__).parent / "weights"


def weights_file(name: str, tag: str = "fmnist") -> Path:
    """Where the package keeps the weights of an architecture; the file need not exist."""
    return WEIGHTS / f"{name}.{tag}.safetensors"


def fashion_mnist_cfg(name: str) -> dict[str, Any]:
    """The entries of a pretrained_cfg that are due to weights trained on Fashion-MNIST.

    timm loads `file` without a network. The whole image is seen: at 32 px a crop of the border costs seams and soles.
    """
    return {
        "file": str(weights_file(name)),
        "num_classes": len(FASHION_MNIST_CLASSES),
        "label_names": FASHION_MNIST_CLASSES,
        "crop_pct": 1.0,
        "license": "apache-2.0",
    }
