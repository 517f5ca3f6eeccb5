"""Preprocessing as transformers' preprocessor_config.json says it."""

from __future__ import annotations

import math
from typing import Any

from leanvit.checkpoint import for_channels
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess
from leanvit.progress import note

FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filters by number."""

SQUASHED_FROM = 384
"""Side from which ConvNeXt's processor resizes without a crop (transformers, image_processing_convnext.py)."""


def read_processor(place: str, size: tuple[int, int] | None, channels: int, local: bool) -> tuple[Preprocess, bool]:
    """The preprocessing of a folder or repository, and whether it turns pictures to BGR.

    size: of the network, where its configuration tells; the crop's else. What can't be said in a Preprocess is noted.
    """
    from transformers import AutoImageProcessor

    try:
        told = AutoImageProcessor.from_pretrained(place, local_files_only=local, trust_remote_code=False).to_dict()
    except (OSError, ValueError, ImportError, KeyError):
        note(f"{place}: no preprocessor_config.json that can be read, so ImageNet's mean and std are taken")
        mean, std = (for_channels(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return Preprocess(size or (224, 224), mean, std), False
    return preprocess_of(told, size, channels, place), bool(told.get("do_flip_channel_order"))


def preprocess_of(told: dict[str, Any], size: tuple[int, int] | None, channels: int, name: str) -> Preprocess:
    """A Preprocess from the values of an image processor."""
    resized, shortest = _sides(told.get("size"))
    cropped, _ = _sides(told.get("crop_size")) if told.get("do_center_crop") else (None, None)
    mean, std = _normalisation(told, channels)
    height, width = size or cropped or resized or (shortest or 224, shortest or 224)
    mode, share = _crop(told, (height, width), resized, shortest, cropped, name)
    return Preprocess(
        (height, width), mean, std, FILTERS.get(told.get("resample", 3), "bicubic"), share,
        "squash" if mode == "squash" else "center",
    )  # fmt: skip


def _sides(value: Any) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width), or the shorter side, of what a processor calls a size."""
    if value is None:
        return None, None
    if isinstance(value, int):
        return (value, value), None
    value = dict(value)
    if value.get("height") and value.get("width"):
        return (int(value["height"]), int(value["width"])), None
    return None, int(value["shortest_edge"]) if value.get("shortest_edge") else None


def _crop(
    told: dict[str, Any],
    size: tuple[int, int],
    resized: tuple[int, int] | None,
    shortest: int | None,
    cropped: tuple[int, int] | None,
    name: str,
) -> tuple[str, float]:
    """Mode and share of the crop."""
    if told.get("crop_pct") and shortest:
        return ("center", float(told["crop_pct"])) if shortest < SQUASHED_FROM else ("squash", 1.0)
    if cropped and resized and resized != cropped:
        note(f"{name}: pictures are resized to {resized} whatever their shape, then cropped; here their shape is kept")
        return "center", _share(cropped[0], resized[0])
    if cropped and shortest:
        return "center", _share(min(cropped), shortest)
    return ("center", 1.0) if shortest and not resized else ("squash", 1.0)


def _share(crop: int, side: int) -> float:
    """The share with which a resize to `side` is floor(crop / share) to the pixel."""
    share = min(1.0, crop / side)
    return share if math.floor(crop / share) == side or crop >= side else math.nextafter(share, 0.0)


def _normalisation(told: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation where 255 is 1: of (factor * pixel - mean) / std."""
    normalised = told.get("do_normalize", True) is not False
    mean = for_channels(told.get("image_mean") or IMAGENET_MEAN, channels) if normalised else (0.0,) * channels
    std = for_channels(told.get("image_std") or IMAGENET_STD, channels) if normalised else (1.0,) * channels
    factor = (
        255.0 * float(told.get("rescale_factor") or 1 / 255) if told.get("do_rescale", True) is not False else 255.0
    )
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        return mean, std
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)
