"""Calibration images: collected, and judged before they are trusted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leanvit.errors import CalibrationError


def collect_batches(images: Tensor | Iterable[Any]) -> list[Tensor]:
    """Calibration images as a list of (B, 3, H, W) batches of at most 64."""
    if isinstance(images, Tensor):
        return list(torch.split(images, 64))
    batches = [item[0] if isinstance(item, tuple | list) else item for item in images]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(f"a calibration batch is {found}, expected a tensor (B, 3, H, W).")
    return batches


def check_calibration(batches: list[Tensor]) -> dict[str, Any]:
    """Facts about the calibration images that a gate can judge.

    Raises CalibrationError for no images, values that are not finite, or a range that was not normalised.
    """
    if not batches or not len(batches[0]):
        raise CalibrationError("no calibration images, expected at least 32. Give more --data.")
    images = torch.cat([batch.flatten(1)[:, ::7] for batch in batches]).float()
    if not images.isfinite().all():
        raise CalibrationError("calibration images hold NaN or infinity, expected finite values. Check the loader.")
    mean, std = float(images.mean()), float(images.std())
    if abs(mean) > 10 or std > 20:
        raise CalibrationError(
            f"calibration images have mean {mean:.1f} and standard deviation {std:.1f}; a network expects input "
            "normalised to about 0 and 1. Normalise them with leanvit.data.to_input(images, preprocess_for(model))."
        )
    sample = batches[0].float()
    return {
        "images": len(images),
        "mean": mean,
        "std": std,
        "neighbour_correlation": _correlation(sample[..., :-1], sample[..., 1:]),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of neighbouring pixels: near 1 for images, near 0 for noise."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))
