"""Pictures with what was found in them: boxes, masks, keypoints and class maps. Pillow only."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from leanvit.annotations.types import BoolMask, ClassMap, Found, KeypointScheme
from leanvit.imaging import Pixels

MIN_WIDTH = 480
MAX_ENLARGED = 4096
OPACITY = 0.45

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Point = tuple[float, float]

# Okabe and Ito, Color Universal Design, 2008: told apart with every common colour blindness. Strong ones first.
_PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66),
)  # fmt: skip


def colour(label: int) -> Colour:
    """The fixed colour of a class: seven that the colour-blind can tell apart, then ever new hues in three tones."""
    if label < len(_PALETTE):
        return _PALETTE[label]
    golden = (math.sqrt(5) - 1) / 2
    red, green, blue = colorsys.hls_to_rgb(label * golden % 1.0, (0.35, 0.55, 0.75)[label % 3], 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_found(
    pixels: Pixels, found: Sequence[Found], classes: Sequence[str], scheme: KeypointScheme | None = None
) -> Pixels:
    """A picture with its objects: mask with outline, box with class and score, keypoints with skeleton.

    pixels: (height, width, 3) uint8. classes: names of the labels. scheme: of the keypoints, for the skeleton.
    Pictures narrower than 480 pixels are enlarged by a whole factor. Returns (H, W, 3) uint8; better scores on top.
    """
    factor = _factor(pixels)
    ordered = sorted(found, key=lambda one: one.score)
    canvas = np.array(_enlarged(pixels, factor))
    line = max(2, round(max(canvas.shape[:2]) / 320))
    for one in ordered:
        if one.mask is not None:
            _tint(canvas, one.mask.repeat(factor, axis=0).repeat(factor, axis=1), colour(one.label), line)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for one in ordered:
        x1, y1, x2, y2 = (side * factor for side in one.box)
        # A box ends at the far edge of its last pixel, Pillow's rectangle includes the last one.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour(one.label), width=line)
        if one.keypoints is not None:
            _draw_keypoints(
                draw, one.keypoints * np.array((factor, factor, 1), np.float32), colour(one.label), scheme, line
            )
    # Labels last, so that no box crosses a text.
    for one in ordered:
        corner = (one.box[0] * factor, one.box[1] * factor)
        _draw_label(draw, f"{classes[one.label]} {one.score:.2f}", corner, colour(one.label), image.size)
    return np.asarray(image)


def draw_map(pixels: Pixels, class_map: ClassMap, classes: Sequence[str]) -> Pixels:
    """A picture tinted by class, and below it a legend of the classes that occur.

    pixels: (height, width, 3) uint8. class_map: (height, width) uint8; values that are no class stay untinted.
    Pictures narrower than 480 pixels are enlarged by a whole factor. Returns (H, W, 3) uint8, higher by the legend.
    """
    factor = _factor(pixels)
    canvas = np.array(_enlarged(pixels, factor))
    large = class_map.repeat(factor, axis=0).repeat(factor, axis=1)
    present = [int(label) for label in np.unique(class_map) if label < len(classes)]
    tones = np.array([colour(label) for label in range(len(classes))])
    known = large < len(classes)
    canvas[known] = _mixed(canvas[known], tones[large[known]])
    return np.concatenate([canvas, _legend(canvas.shape[1], [(colour(k), classes[k]) for k in present])])


def fitted(pixels: Pixels, longest: int) -> Pixels:
    """A picture (height, width, 3) uint8, made smaller where a side is longer than `longest` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _factor(pixels: Pixels) -> int:
    height, width = pixels.shape[:2]
    # A high thin strip would grow without end.
    return max(1, min(math.ceil(MIN_WIDTH / width), MAX_ENLARGED // height))


def _enlarged(pixels: Pixels, factor: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _tint(canvas: Pixels, mask: BoolMask, tone: Colour, line: int) -> None:
    """Mix a colour into the masked pixels of `canvas`, in place; the outermost `line` pixels get all of it."""
    canvas[mask] = _mixed(canvas[mask], np.array(tone))
    canvas[mask & ~ndimage.binary_erosion(mask, iterations=line)] = tone


def _mixed(values: Pixels, tones: NDArray[Any]) -> Pixels:
    return np.rint(values * (1 - OPACITY) + tones * OPACITY).astype(np.uint8)


def _draw_keypoints(
    draw: ImageDraw.ImageDraw, points: NDArray[np.float32], tone: Colour, scheme: KeypointScheme | None, line: int
) -> None:
    """Lines of the skeleton between keypoints whose score is above 0, then the keypoints."""
    shown: dict[int, Point] = {k: (float(x), float(y)) for k, (x, y, score) in enumerate(points) if score > 0}
    for first, second in scheme.skeleton if scheme else ():
        if first in shown and second in shown:
            draw.line([shown[first], shown[second]], fill=tone, width=line)
    for point in shown.values():
        draw.circle(point, 1.5 * line, fill=tone, outline=(255, 255, 255))


def _draw_label(draw: ImageDraw.ImageDraw, text: str, corner: Point, tone: Colour, size: tuple[int, int]) -> None:
    """Text on a plate of the object's colour: above the box where there is room, always inside the picture."""
    font = _font(max(12, round(max(size) / 45)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    across, down = right - left + 6, bottom - top + 6
    x = max(0.0, min(corner[0], size[0] - across))
    y = corner[1] - down if corner[1] >= down else corner[1]
    y = max(0.0, min(y, size[1] - down))
    draw.rectangle((x, y, x + across, y + down), fill=tone)
    draw.text((x + 3 - left, y + 3 - top), text, fill=_readable_on(tone), font=font)


def _legend(width: int, entries: Sequence[tuple[Colour, str]]) -> Pixels:
    """White strip (rows, width, 3) uint8 with a square and a name an entry, in as many lines as they need."""
    font = _font(14)
    row, square, gap = 22, 14, 12
    places: list[tuple[int, int]] = []
    x, y = gap, 4
    for _, name in entries:
        across = square + 5 + math.ceil(font.getlength(name))
        if x > gap and x + across > width:
            x, y = gap, y + row
        places.append((x, y))
        x += across + gap
    strip = Image.new("RGB", (width, y + row), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    for (tone, name), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + square, top + square), fill=tone)
        draw.text((left + square + 5, top - 1), name, fill=(0, 0, 0), font=font)
    return np.asarray(strip)


def _readable_on(tone: Colour) -> Colour:
    """Black or white, whichever stands out more."""
    red, green, blue = tone
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)


@lru_cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
