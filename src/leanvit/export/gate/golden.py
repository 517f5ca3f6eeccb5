"""Golden images: few, but such that a mistake in decoding, resizing, normalising or lowering changes the outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.annotations import SceneSet
from leanvit.config import Preprocess, to_dict
from leanvit.data.sets import ImageSet

GOLDEN_IMAGES = 16
GOLDEN_PICTURES = 8
"""Of annotated pictures, whose maps and masks take a good part of golden.npz."""

CHARTS = 4
CHART_RECTANGLES = 1000
PREPARED_IMAGES = 4


def golden_images(data: ImageSet | SceneSet | None, preprocess: Preprocess, count: int) -> list[bytes]:
    """At most `count` encoded golden images: of `data` where given, else synthetic ones, with CHARTS charts among them.

    The first image is one of the data; charts and data alternate, because a server checks only the first two.
    """
    if data is None:
        return golden_set(count, preprocess.input_size, channels=preprocess.channels)
    if isinstance(data, ImageSet):
        return golden_set(count, preprocess.input_size, len(data), data.encoded, preprocess.channels)
    scenes = data.scenes
    return golden_set(count, preprocess.input_size, len(scenes), lambda i: scenes[i].path.read_bytes())


def golden_set(
    total: int,
    size: tuple[int, int],
    available: int = 0,
    read: Callable[[int], bytes] | None = None,
    channels: int = 3,
) -> list[bytes]:
    """At most `total` encoded images for an input of `size` (height, width), CHARTS charts among the first.

    read: returns image i of `available`; without any, synthetic ones take their place. channels: more than three
    are bands of the images; what is made for a grey network is in colour, as pictures that it is given may be.
    """
    count = total - CHARTS
    if read is None or not available:
        plain = [imaging.encode_png(pixels) for pixels in synthetic_images(count, size, channels=max(3, channels))]
    else:
        # Spread over the set, because image folders are sorted by class.
        picks = np.linspace(0, available - 1, min(count, available)).astype(int)
        plain = [read(int(i)) for i in dict.fromkeys(picks.tolist())]
    for i, chart in enumerate(charts(CHARTS, size, channels=max(3, channels))):
        plain.insert(2 * i + 1, imaging.encode_png(chart))
    return plain


def charts(count: int, size: tuple[int, int], seed: int = 0, channels: int = 3) -> list[imaging.Pixels]:
    """Confetti of coloured rectangles, larger than the input, wide and tall in turn; deterministic.

    Data may be grey, square and of the input's size, where BGR and a wrong resize change nothing: charts have
    colours, sharp edges, an aspect ratio and no symmetry. PNG packs them well.
    """
    generator = np.random.default_rng((seed, 1))
    found = []
    tall, wide = (2.0, 1.25), (1.25, 2.0)
    for i in range(count):
        height, width = (round(side * factor) for side, factor in zip(size, tall if i % 2 else wide, strict=True))
        pixels = np.empty((height, width, channels), np.uint8)
        pixels[:] = generator.integers(0, 256, channels)
        for _ in range(CHART_RECTANGLES):
            top, left = generator.integers(0, (height, width))
            down, across = np.exp(generator.uniform(0, np.log((height / 3, width / 3)))).astype(int)
            pixels[top : top + down, left : left + across] = generator.integers(0, 256, channels)
        found.append(pixels)
    return found


def synthetic_images(count: int, size: tuple[int, int], seed: int = 0, channels: int = 3) -> list[imaging.Pixels]:
    """Smooth random pictures (H, W, channels) uint8 for goldens where no data is at hand; deterministic."""
    generator = np.random.default_rng(seed)
    flat = ((0.0,) * channels, (1.0,) * channels)
    preprocess = Preprocess(size, *flat, interpolation="bicubic", crop_mode="squash")
    coarse = generator.integers(0, 256, (count, 5, 5, channels), dtype=np.uint8)
    return [imaging.resize(pixels, preprocess) for pixels in coarse]


def records(pixels: imaging.Pixels, labels: tuple[str, ...], preprocess: Preprocess) -> dict[str, NDArray[Any]]:
    """What golden.npz keeps beside images and logits: a second opinion on what bundle.json says.

    pixels: prepared golden images (N, H, W, 3); the first PREPARED_IMAGES are kept, because a resize must be
    exact and not only near in its effect on the logits.
    """
    return {
        "pixels": pixels[:PREPARED_IMAGES],
        "labels": np.array(labels),
        "preprocess": np.array(json.dumps(to_dict(preprocess))),
    }
