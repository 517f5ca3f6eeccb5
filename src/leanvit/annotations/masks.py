"""Masks of objects: COCO polygons and run lengths to pixels and back, through pycocotools."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from leanvit.annotations.checks import Box, BrokenAnnotation, check_numbers, shorten
from leanvit.annotations.types import BoolMask
from leanvit.errors import require


def decode_mask(segmentation: Any, size: tuple[int, int]) -> BoolMask:
    """Pixels of a COCO segmentation: a list of polygons, or run lengths, compressed (str, bytes) or not (list).

    size: (height, width) of the picture. Returns (height, width) bool; several polygons are joined.
    Raises DataError for a polygon of fewer than three points or with points far outside, and for run lengths that
    are damaged or of another size; MissingDependencyError without pycocotools.
    """
    check_segmentation(segmentation, size)
    coco = _pycocotools()
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        return np.asarray(coco.decode(segmentation), np.bool_)
    runs = coco.frPyObjects(segmentation, *size)
    return np.asarray(coco.decode(runs if isinstance(segmentation, dict) else coco.merge(runs)), np.bool_)


def encode_mask(mask: BoolMask) -> dict[str, Any]:
    """Compressed run lengths of a (height, width) bool mask, ready for JSON: {"size": [h, w], "counts": str}.

    Raises MissingDependencyError without pycocotools.
    """
    runs = _pycocotools().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def mask_box(mask: BoolMask) -> Box | None:
    """(x1, y1, x2, y2) in pixels around a (height, width) bool mask, outer edges; None where no pixel is set."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> float:
    """Area in pixels of a COCO segmentation of a picture of `size` (height, width).

    Raises BrokenAnnotation where it is damaged, of another size, empty, or far outside the picture.
    """
    area = _runs_area(segmentation, size) if isinstance(segmentation, dict) else _polygons_area(segmentation, size)
    if area <= 0:
        raise BrokenAnnotation(f"segmentation has an area of {area:g} pixels, expected more than 0")
    return area


def _pycocotools() -> ModuleType:
    require("pycocotools")
    return require("pycocotools.mask")


def _polygons_area(polygons: Any, size: tuple[int, int]) -> float:
    if not isinstance(polygons, list | tuple) or not polygons:
        raise BrokenAnnotation(f"segmentation is {shorten(polygons)}, expected polygons or run lengths")
    return math.fsum(_polygon_area(polygon, size) for polygon in polygons)


def _polygon_area(polygon: Any, size: tuple[int, int]) -> float:
    values = check_numbers(polygon, "polygon")
    if len(values) < 6 or len(values) % 2:
        raise BrokenAnnotation(f"polygon has {len(values)} values, expected x and y of at least 3 points")
    for points, side in ((values[0::2], size[1]), (values[1::2], size[0])):
        # Rasterizing takes memory for every pixel on the way to a point, so that one stray number could take it all.
        if min(points) < -side or max(points) > 2 * side:
            far = min(points) if min(points) < -side else max(points)
            raise BrokenAnnotation(f"polygon has a point at {far:g}, expected it inside 0 to {side} or near it")
    return polygon_area(values)


def polygon_area(values: list[float]) -> float:
    """Area in pixels of one polygon x, y, x, y, ... by the shoelace formula; never negative."""
    xs, ys = values[0::2], values[1::2]
    turned = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(math.fsum(x * next_y - next_x * y for x, y, next_x, next_y in turned)) / 2


def _runs_area(runs: dict[str, Any], size: tuple[int, int]) -> float:
    if runs.get("size") not in (list(size), tuple(size)):
        raise BrokenAnnotation(
            f"RLE has size {shorten(runs.get('size'))}, expected that of the picture: {list(size)} (height, width)"
        )
    counts = runs.get("counts")
    lengths = _unpack(counts) if isinstance(counts, str | bytes) else counts
    if not isinstance(lengths, list) or not all(type(run) is int and run >= 0 for run in lengths):
        raise BrokenAnnotation(f"RLE counts are {shorten(counts)}, expected runs of pixels, none below 0")
    if sum(lengths) != size[0] * size[1]:
        raise BrokenAnnotation(
            f"RLE counts cover {sum(lengths)} pixels, expected all {size[0] * size[1]} of the picture"
        )
    return float(sum(lengths[1::2]))


def _unpack(text: str | bytes) -> list[int] | None:
    """Run lengths of COCO's compressed form; None where it is damaged.

    Groups of five bits in characters from '0' on, lowest first, a sixth for 'more'; from the fourth run on the
    difference to the run before the last. pycocotools reads damaged text without a word, beyond its end.
    Source: rleFrString of cocoapi, common/maskApi.c.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    lengths: list[int] = []
    value = shift = 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64 or shift > 30:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths if shift == 0 else None
