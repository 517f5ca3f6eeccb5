"""What an annotated picture is, whatever file it came from: one description for detection, segmentation and pose.

Pixels of boxes and keypoints are those of the picture as it is on disk: x to the right, y down, the corner of the
first pixel at (0, 0) and its middle at (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolMask = NDArray[np.bool_]
ClassMap = NDArray[np.uint8]
Outputs = dict[str, NDArray[Any]]
"""A network's raw outputs for B pictures by name. detect: boxes (B, D, 4), scores (B, D), labels (B, D) from 0, and
with task "segment" masks (B, D, 28, 28), score 0 where there is no more; semantic: logits (B, classes, h, w); pose:
heatmaps (B, keypoints, h, w)."""

IGNORED = 255
"""Value of a class map where no class is known; such pixels take no part in loss or metric."""


@dataclass(frozen=True)
class KeypointScheme:
    """What the keypoints of an object are.

    names: of the K keypoints. swapped: for each of them the index that takes its place in a mirrored picture.
    sigmas: COCO's tolerance of each, as a share of the square root of the object's area.
    skeleton: pairs of indices that are drawn as lines.
    """

    names: tuple[str, ...]
    swapped: tuple[int, ...]
    sigmas: tuple[float, ...]
    skeleton: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Instance:
    """One object of a picture.

    label: index into SceneSet.classes. box: (x1, y1, x2, y2), x1 < x2 and y1 < y2, inside the picture.
    segmentation: COCO polygons (lists of x, y, x, y, ...) or a COCO RLE dict; None where only the box is known.
    keypoints: (K, 3) float32 of x, y, visibility (0 not annotated, 1 hidden, 2 visible); None where there are none.
    area: pixels of the object, of the box where no segmentation is known. crowd: a group, left out of training.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: Any = None
    keypoints: NDArray[np.float32] | None = None
    area: float = 0.0
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """One picture with its annotations.

    path: image file. image_id: of the annotation file, kept for results. size: (height, width).
    class_map: PNG file with a class index a pixel; None where there is none.
    """

    path: Path
    image_id: int
    size: tuple[int, int]
    instances: tuple[Instance, ...] = ()
    class_map: Path | None = None


@dataclass(frozen=True)
class SceneSet:
    """One split of an annotated data set.

    classes: names in the order of the labels. category_ids: what the annotation file calls them, same order.
    map_values: {value in a class map file: label}; values that are absent are IGNORED.
    problems: what was wrong with the annotations and left out, one sentence each.
    """

    name: str
    scenes: tuple[Scene, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...] = ()
    keypoints: KeypointScheme | None = None
    map_values: dict[int, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def coco_ids(self) -> tuple[int, ...]:
        """Category ids for a COCO file, in the order of the classes; from 1 where the annotations had none."""
        return self.category_ids or tuple(range(1, len(self.classes) + 1))


@dataclass(frozen=True)
class Found:
    """One object that a network found in a picture.

    label: index into the classes. score: 0 to 1. box: (x1, y1, x2, y2) in pixels of the picture.
    mask: (height, width) bool of the picture; None where the network returns none.
    keypoints: (K, 3) float32 of x, y, score; None where the network returns none.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: BoolMask | None = None
    keypoints: NDArray[np.float32] | None = None
