"""Pixels of a page: arrays as PNG inside data URIs, values as colours."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

_VIRIDIS = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)], np.float64
)  # fmt: skip


def data_uri(encoded: bytes, kind: str) -> str:
    """An encoded image as an address that needs no file. kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (height, width, 3) uint8 RGB as a PNG inside a data URI."""
    from leanvit.imaging import encode_png  # here, so that a page without pictures needs no Pillow

    return data_uri(encode_png(pixels), "png")


def heat(values: NDArray[np.float64], top: float) -> NDArray[np.uint8]:
    """Values (height, width) as viridis colours (height, width, 3) uint8: 0 dark blue, `top` and above yellow."""
    at = np.nan_to_num(np.clip(values / top, 0.0, 1.0)) * (len(_VIRIDIS) - 1)
    steps = np.arange(len(_VIRIDIS))
    return np.stack([np.interp(at, steps, channel) for channel in _VIRIDIS.T], axis=-1).round().astype(np.uint8)
