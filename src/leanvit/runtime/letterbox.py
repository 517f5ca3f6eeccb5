"""A picture of any size in a network's input of one size, and coordinates there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.config import Interpolation, Preprocess
from leanvit.imaging import Pixels, letterboxed_size, resize

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in a network's input: at the top left, padded to the right and below.

    scale: pixels of the input for a pixel of the picture, along (x, y). size: (height, width) of the picture in the
    input. network_size: (height, width) of the whole input. offset: pixels of the input, along (x, y), by which the
    picture was moved from the top left.
    """

    scale: tuple[float, float]
    size: tuple[int, int]
    network_size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the picture itself, in pixels."""
        return round(self.size[0] / self.scale[1]), round(self.size[1] / self.scale[0])


def place(picture_size: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Where `letterbox` puts a picture; both sizes are (height, width) in pixels."""
    height, width = picture_size
    # Rounding makes the two axes differ a little, so coordinates follow the size that the picture really got.
    tall, wide = letterboxed_size(picture_size, size)
    return Placement((wide / width, tall / height), (tall, wide), size)


def letterbox(
    pixels: Pixels, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> tuple[Pixels, Placement]:
    """Resize a picture into `size` with its aspect ratio kept, the rest grey.

    pixels: (height, width, 3) uint8. size: (height, width) of the result. interpolation: a filter of Pillow; it is
    widened where the picture shrinks. Returns (*size, 3) uint8 and where the picture lies in it.
    """
    preprocess = Preprocess(size, interpolation=interpolation, crop_mode="letterbox")
    return resize(pixels, preprocess), place(pixels.shape[:2], size)


def to_network(values: NDArray[Any], placement: Placement) -> Floats:
    """Points or boxes of a picture in the pixels of the network's input.

    values: (..., 2) x, y; (..., 3) x, y and a visibility or score that is kept; or (..., 4) x1, y1, x2, y2.
    Returns the same shape, float64.
    """
    scaled = np.asarray(values, np.float64) * _factors(values, placement.scale, rest=1.0)
    return scaled + _factors(values, placement.offset, rest=0.0)


def to_picture(values: NDArray[Any], placement: Placement, clip: bool = True) -> Floats:
    """Inverse of `to_network`: the same shapes, float64. clip: keep the coordinates inside the picture."""
    moved = np.asarray(values, np.float64) - _factors(values, placement.offset, rest=0.0)
    moved = moved / _factors(values, placement.scale, rest=1.0)
    if not clip:
        return moved
    height, width = placement.picture_size
    return np.clip(moved, _factors(values, (0.0, 0.0), -np.inf), _factors(values, (width, height), np.inf))


def _factors(values: NDArray[Any], pair: tuple[float, float], rest: float) -> Floats:
    """One number for each of the last axis of `values`: those of x and y, and `rest` for a visibility or score."""
    return np.array((*pair, rest) if values.shape[-1] == 3 else pair * (values.shape[-1] // 2))
