"""Random changes of a picture that its boxes, masks, class map and keypoints follow.

Built on torchvision's v2 functions, which move every kind of annotation with the pixels. All that is random is drawn
at once from (seed, epoch, index), so a sample depends neither on the samples before it nor on the process it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from leanvit.annotations import IGNORED
from leanvit.errors import ConfigError
from leanvit.imaging import GREY, Pixels
from leanvit.runtime.decode import Box, crop_region

MIN_SIDE = 2.0
MIN_SHARE = 0.1

_FILL = {"image": GREY, "class_map": IGNORED}

Layers = dict[str, Any]
"""A picture and its annotations as tv_tensors of one canvas: image (3, H, W) uint8, boxes (N, 4) float32 xyxy,
masks (N, H, W) uint8, class_map (1, H, W) uint8, keypoints (K, 2) float32; those that a task has."""


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in training.

    hflip: probability of a mirrored picture. color_jitter: largest change of brightness, contrast and saturation, as
    shares. scale: lowest and highest size of a picture, 1 where it just fits; larger ones are cropped, smaller ones
    put anywhere (detect, segment, semantic; large-scale jitter, Ghiasi et al., arXiv 2012.07177).
    rotation: largest angle in degrees either way; pose_scale: largest change of an object's region; shift: largest
    move of it, both as shares (pose). Raises ConfigError.
    """

    hflip: float = 0.5
    scale: tuple[float, float] = (0.5, 1.5)
    color_jitter: tuple[float, float, float] = (0.2, 0.2, 0.2)
    rotation: float = 30.0
    pose_scale: float = 0.25
    shift: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is {self.scale}, expected two numbers above 0, the lower first")
        shares = {"hflip": self.hflip, "pose_scale": self.pose_scale, "shift": self.shift}
        shares |= dict(zip(("brightness", "contrast", "saturation"), self.color_jitter, strict=True))
        for name, value in shares.items():
            if not 0 <= value <= 1 or (name == "pose_scale" and value == 1):
                raise ConfigError(f"{name} is {value}, expected 0 to 1")
        if not 0 <= self.rotation <= 180:
            raise ConfigError(f"rotation is {self.rotation}, expected 0 to 180 degrees")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one sample, uniform in [0, 1)."""

    flip: float
    size: float
    x: float
    y: float
    angle: float
    colours: tuple[float, float, float]


def draw(seed: int, epoch: int, index: int) -> Draws:
    """The numbers of a sample: a pure function of its arguments, none negative."""
    flip, size, x, y, angle, *colours = np.random.default_rng((seed, epoch, index)).random(8).tolist()
    return Draws(flip, size, x, y, angle, (colours[0], colours[1], colours[2]))


@dataclass(frozen=True)
class Span:
    """One axis of a picture in the network's input, in pixels.

    `length` pixels of the picture from `start` on become `placed` pixels of the input from `offset` on; `side` is
    the input's whole size.
    """

    start: int
    length: int
    offset: int
    placed: int
    side: int

    @property
    def scale(self) -> float:
        """Pixels of the input for a pixel of the picture."""
        return self.placed / self.length

    @property
    def after(self) -> int:
        """Padding after the picture."""
        return self.side - self.offset - self.placed


def whole(length: int, placed: int, side: int) -> Span:
    """An axis where all of the picture lies at the start of the input, as `letterbox` puts it."""
    return Span(0, length, 0, placed, side)


def random_spans(
    picture: tuple[int, int], size: tuple[int, int], augmentation: Augmentation, drawn: Draws
) -> tuple[Span, Span]:
    """(down, across) of a picture of random size at a random place. picture, size: (height, width) in pixels."""
    low, high = augmentation.scale
    scale = min(size[0] / picture[0], size[1] / picture[1]) * (low + (high - low) * drawn.size)
    return _span(picture[0], scale, size[0], drawn.y), _span(picture[1], scale, size[1], drawn.x)


def _span(length: int, scale: float, side: int, place: float) -> Span:
    if length * scale > side:
        seen = min(length, max(1, round(side / scale)))
        return Span(int(place * (length - seen + 1)), seen, 0, side, side)
    placed = max(1, round(length * scale))
    return Span(0, length, int(place * (side - placed + 1)), placed, side)


def lay(layers: Layers, down: Span, across: Span) -> Layers:
    """Crop, resize and pad all layers: grey around the picture, no class around the class map. Boxes are clipped."""
    window = (down.start, across.start, down.length, across.length)
    padding = [across.offset, down.offset, across.after, down.after]

    def put(name: str, value: Any) -> Any:
        placed = _resized_crop(value, window, [down.placed, across.placed])
        return F.pad(placed, padding, fill=_FILL.get(name, 0)) if any(padding) else placed

    return {name: put(name, value) for name, value in layers.items()}


def _resized_crop(value: Any, window: tuple[int, int, int, int], size: list[int]) -> Any:
    if isinstance(value, tv_tensors.BoundingBoxes):
        # Clipped before they are scaled, which can put them beyond the border again by one rounding.
        return F.clamp_bounding_boxes(F.resized_crop(value, *window, size))
    if not isinstance(value, tv_tensors.Mask):
        return F.resized_crop(value, *window, size, antialias=True)
    # torchvision's own choice for masks rounds towards the top left, by up to half a pixel.
    moved = F.resized_crop(value.as_subclass(Tensor), *window, size, InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(moved, like=value)


def flip(layers: Layers) -> Layers:
    """All layers mirrored; keypoints keep their order."""
    flipped = _each(layers, F.horizontal_flip)
    if "keypoints" in flipped:
        # torchvision mirrors points between the middles of the outer pixels, boxes between the picture's borders.
        flipped["keypoints"] = tv_tensors.wrap(flipped["keypoints"] + _RIGHT, like=flipped["keypoints"])
    return flipped


_RIGHT = torch.tensor([1.0, 0.0])


def _each(layers: Layers, function: Callable[[Any], Any]) -> Layers:
    return {name: function(value) for name, value in layers.items()}


def jitter_colours(image: Tensor, augmentation: Augmentation, drawn: Draws) -> Tensor:
    """Brightness, contrast and saturation changed, in this order. image: (3, H, W) uint8; a new tensor."""
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for change, largest, uniform in zip(changes, augmentation.color_jitter, drawn.colours, strict=True):
        if largest:
            image = change(image, 1 + largest * (2 * uniform - 1))
    return image


def jitter_scene(layers: Layers, down: Span, across: Span, augmentation: Augmentation, drawn: Draws) -> Layers:
    """A picture laid into the network's input, mirrored or not, its colours changed."""
    changed = lay(layers, down, across)
    if drawn.flip < augmentation.hflip:
        changed = flip(changed)
    return {**changed, "image": jitter_colours(changed["image"], augmentation, drawn)}


def random_region(region: Box, augmentation: Augmentation, drawn: Draws) -> Box:
    """A region of a picture made larger or smaller and moved. region: (x1, y1, x2, y2) in pixels."""
    x1, y1, x2, y2 = region
    grown = (1 + augmentation.pose_scale * (2 * drawn.size - 1)) / 2
    x = (x1 + x2) / 2 + (x2 - x1) * augmentation.shift * (2 * drawn.x - 1)
    y = (y1 + y2) / 2 + (y2 - y1) * augmentation.shift * (2 * drawn.y - 1)
    width, height = (x2 - x1) * grown, (y2 - y1) * grown
    return x - width, y - height, x + width, y + height


def crop_turned(pixels: Pixels, points: Tensor, region: Box, degrees: float, size: tuple[int, int]) -> Layers:
    """The image and keypoints of a region that is turned about its middle.

    pixels: (height, width, 3) uint8. points: (K, 2) float32 x, y in its pixels. region: (x1, y1, x2, y2), may exceed
    the picture. degrees: counter-clockwise. size: (height, width) of the result.
    """
    height, width = size
    x1, y1, x2, y2 = region
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    # What is cut out first is so much larger that no corner of the turned picture is empty.
    right = max(0, math.ceil((width * (cos - 1) + height * sin) / 2))
    below = max(0, math.ceil((height * (cos - 1) + width * sin) / 2))
    wide, tall = (x2 - x1) / width, (y2 - y1) / height
    larger = (x1 - right * wide, y1 - below * tall, x2 + right * wide, y2 + below * tall)
    canvas = (height + 2 * below, width + 2 * right)
    image = to_image(np.array(crop_region(pixels, larger, canvas)))
    moved = (points - torch.tensor(larger[:2])) / torch.tensor([wide, tall])
    layers: Layers = {"image": image, "keypoints": tv_tensors.KeyPoints(moved, canvas_size=canvas)}
    if not degrees:
        return layers
    turned = _each(layers, lambda value: F.rotate(value, degrees, InterpolationMode.BILINEAR, fill=GREY))
    return _each(turned, lambda value: F.center_crop(value, list(size)))


def swap_sides(keypoints: Tensor, swapped: Sequence[int]) -> Tensor:
    """Keypoints (K, ...) of a mirrored picture in their order: a left one is where a right one was."""
    return keypoints[list(swapped)]


def to_image(pixels: Pixels) -> tv_tensors.Image:
    """(height, width, 3) uint8, which must be writable, as an Image (3, height, width) of the same memory."""
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def areas(boxes: Tensor) -> Tensor:
    """(N,) of boxes (N, 4) xyxy."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def is_visible(boxes: Tensor, left: Tensor, full: Tensor) -> Tensor:
    """(N,) bool: 2 pixels a side and 10% of the object are left.

    boxes: (N, 4) xyxy, clipped. left, full: (N,) areas after and before clipping, in the same pixels.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides >= MIN_SIDE).all(1) & (left >= MIN_SHARE * full)


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes (N, 4) float32 xyxy around masks (N, H, W) uint8; of zero size where a mask is empty."""
    edges = []
    for seen in (masks.amax(1), masks.amax(2)):
        first = seen.argmax(1)
        last = seen.shape[1] - seen.flip(1).argmax(1)
        edges.append((first, torch.where(seen.amax(1) > 0, last, first)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], 1).float()
