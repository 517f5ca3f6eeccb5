"""From the raw outputs of a network to objects, class maps and keypoints of a picture. NumPy and Pillow only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvit.annotations.types import ClassMap, Found
from leanvit.imaging import GREY, Pixels
from leanvit.runtime.letterbox import Placement, to_picture

Box = tuple[float, float, float, float]
Float32 = NDArray[np.float32]


def found_objects(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    labels: NDArray[Any],
    masks: NDArray[Any] | None,
    placement: Placement,
    picture_size: tuple[int, int],
    score_threshold: float,
    mask_threshold: float = 0.5,
) -> list[Found]:
    """Objects of a picture from the outputs of a detector that has done its own NMS, in its order.

    boxes: (D, 4) x1, y1, x2, y2 in pixels of the network's input. scores: (D,) 0 to 1. labels: (D,) indices into the
    classes. masks: (D, m, m) 0 to 1, each over its box; None where the network returns none. picture_size: (height,
    width). Objects below the score, and those of which no part is in the picture, are left out.
    """
    # A mask belongs to the whole box, also to the part of it that lies outside the picture.
    whole = to_picture(np.reshape(boxes, (-1, 4)), placement, clip=False)
    height, width = picture_size
    inside = np.clip(whole, 0.0, (width, height, width, height))
    kept = (np.ravel(scores) >= score_threshold) & (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    found = []
    for index in np.flatnonzero(kept):
        mask = None
        if masks is not None:
            mask = paste_mask(masks[index], whole[index], picture_size) > mask_threshold
        x1, y1, x2, y2 = inside[index].tolist()
        found.append(Found(int(labels[index]), float(scores[index]), (x1, y1, x2, y2), mask))
    return found


def paste_mask(mask: NDArray[Any], box: NDArray[Any], picture_size: tuple[int, int]) -> Float32:
    """One mask of a box laid into the picture, with the roundings of torchvision's paste_masks_in_image.

    mask: (m, m) 0 to 1. box: (4,) x1, y1, x2, y2 in pixels of the picture, may exceed it. picture_size: (height,
    width). Returns (height, width) float32, 0 outside of the box.
    Source: torchvision.models.detection.roi_heads, padding 1.
    """
    side = mask.shape[-1]
    padded = np.pad(mask.astype(np.float32), 1)
    x1, y1, x2, y2 = (int(value) for value in _expand(box.astype(np.float32), (side + 2) / side))
    across, down = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    height, width = picture_size
    left, right = max(x1, 0), min(x2 + 1, width)
    top, bottom = max(y1, 0), min(y2 + 1, height)
    pasted = np.zeros(picture_size, np.float32)
    if left < right and top < bottom:
        rows = _bilinear(side + 2, down)[top - y1 : bottom - y1]
        columns = _bilinear(side + 2, across)[left - x1 : right - x1]
        pasted[top:bottom, left:right] = rows @ padded @ columns.T
    return pasted


def _expand(box: Float32, scale: float) -> Float32:
    half, middle = (box[2:] - box[:2]) * np.float32(0.5), (box[2:] + box[:2]) * np.float32(0.5)
    half = half * np.float32(scale)
    return np.concatenate([middle - half, middle + half])


def class_map(logits: NDArray[Any], placement: Placement, picture_size: tuple[int, int]) -> ClassMap:
    """The class of every pixel of a picture from a segmenter's logits.

    logits: (K, h, w), any scale, over the network's whole input. They are resampled bilinearly to the size of the
    input, cut to the part where the picture lies, resampled to the picture, and the largest wins (the first of equal
    ones). picture_size: (height, width). Returns (height, width) uint8, below K.
    """
    (tall, wide), (height, width) = placement.size, picture_size
    # Both resamplings are linear along each axis, so they are one matrix an axis, and no array of K pictures is held.
    (high, broad), (right, down) = placement.network_size, placement.offset
    # What was moved out of the input is taken from its border.
    seen = (np.clip(np.arange(tall) + down, 0, high - 1), np.clip(np.arange(wide) + right, 0, broad - 1))
    rows = _bilinear(tall, height) @ _bilinear(logits.shape[1], high)[seen[0]]
    columns = (_bilinear(wide, width) @ _bilinear(logits.shape[2], broad)[seen[1]]).T
    best = np.full(picture_size, -np.inf, np.float32)
    chosen = np.zeros(picture_size, np.uint8)
    for label, plane in enumerate(logits):
        values = rows @ plane.astype(np.float32) @ columns
        larger = values > best
        best[larger] = values[larger]
        chosen[larger] = label
    return chosen


def _bilinear(found: int, wanted: int) -> Float32:
    """Matrix (wanted, found) that resamples an axis as torch does: bilinear, align_corners False, no antialiasing."""
    ratio = np.float32(found) / np.float32(wanted)
    source = ratio * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    source = np.maximum(source, np.float32(0))
    first = np.minimum(source.astype(np.int64), found - 1)
    second = np.minimum(first + 1, found - 1)
    share = np.clip(source - first.astype(np.float32), 0, 1).astype(np.float32)
    matrix = np.zeros((wanted, found), np.float32)
    row = np.arange(wanted)
    matrix[row, first] += 1 - share
    matrix[row, second] += share
    return matrix


def heatmap_keypoints(heatmaps: NDArray[Any], region: Box) -> Float32:
    """Keypoints of one object from its heatmaps: the middle of the largest cell, a quarter towards its larger side.

    heatmaps: (K, h, w), any scale. region: (x1, y1, x2, y2), the part of the picture that they cover; cell i of an
    axis covers [i, i + 1) cells, its middle is at i + 0.5. Along an axis where the largest cell is at the border it
    is not moved. Returns (K, 3) float32: x and y in pixels of the picture, and the largest value.
    Source: Xiao et al., Simple Baselines for Human Pose Estimation and Tracking, arXiv 1804.06208.
    """
    count, tall, wide = heatmaps.shape
    each = np.arange(count)
    row, column = np.divmod(heatmaps.reshape(count, -1).argmax(axis=1), wide)
    x = column + 0.5 + 0.25 * _larger_side(heatmaps[each, row], column)
    y = row + 0.5 + 0.25 * _larger_side(heatmaps[each, :, column], row)
    x1, y1, x2, y2 = region
    placed = (x1 + x * (x2 - x1) / wide, y1 + y * (y2 - y1) / tall, heatmaps[each, row, column])
    return np.stack(placed, axis=1).astype(np.float32)


def _larger_side(lines: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """For each line (K, n) -1, 0 or 1: on which side of `index` its neighbour is larger."""
    each, last = np.arange(len(lines)), lines.shape[1] - 1
    side = np.sign(lines[each, np.minimum(index + 1, last)] - lines[each, np.maximum(index - 1, 0)])
    return np.where((index > 0) & (index < last), side, 0)


POSE_PADDING = 1.25
"""By which both sides of an object's region grow, as in Simple Baselines (arXiv 1804.06208)."""


def pose_region(box: Box, aspect: float, padding: float = POSE_PADDING) -> Box:
    """The part of a picture that a pose network sees of an object: around its box, may exceed the picture.

    box: (x1, y1, x2, y2) in pixels. aspect: width over height of the network's input; the shorter side of the box
    grows to it. padding: then both sides grow by this factor. Returns (x1, y1, x2, y2) in pixels.
    """
    x1, y1, x2, y2 = box
    width, height = max(x2 - x1, (y2 - y1) * aspect) * padding, max(y2 - y1, (x2 - x1) / aspect) * padding
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def crop_region(pixels: Pixels, region: Box, size: tuple[int, int]) -> Pixels:
    """A part of a picture at a network's input size, bilinear (antialiased where it shrinks), grey where outside.

    pixels: (height, width, 3) uint8. region: (x1, y1, x2, y2) in pixels, need not be whole. size: (height, width).
    Returns (*size, 3) uint8.
    """
    x1, y1, x2, y2 = region
    # The filter of a pixel at the edge of the region reaches beyond it.
    margin = math.ceil(max((x2 - x1) / size[1], (y2 - y1) / size[0], 1.0))
    left, top = math.floor(x1) - margin, math.floor(y1) - margin
    right, bottom = math.ceil(x2) + margin, math.ceil(y2) + margin
    window = Image.new("RGB", (right - left, bottom - top), (GREY, GREY, GREY))
    window.paste(Image.fromarray(pixels), (-left, -top))
    box = (x1 - left, y1 - top, x2 - left, y2 - top)
    return np.ascontiguousarray(window.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def nms(boxes: NDArray[Any], scores: NDArray[Any], threshold: float) -> NDArray[np.int64]:
    """Indices, best first, of the boxes that overlap no better one by more than `threshold` of their union.

    boxes: (D, 4) x1, y1, x2, y2. scores: (D,). threshold: intersection over union, 0 to 1. Returns (kept,) int64.
    """
    left = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(boxes[best, 2:], boxes[left, 2:]) - np.maximum(boxes[best, :2], boxes[left, :2])
        shared = np.maximum(sides, 0).prod(axis=1)
        union = areas[best] + areas[left] - shared
        left = left[shared <= threshold * union]
    return np.array(kept, np.int64)
