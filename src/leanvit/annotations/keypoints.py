"""Keypoints of objects: COCO's person, schemes of other categories, and the check of one list of keypoints."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations.checks import ROUNDING, BrokenAnnotation, check_numbers, shorten
from leanvit.annotations.types import KeypointScheme

COCO_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
COCO_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
)  # fmt: skip
"""Of COCO_NAMES. Source: pycocotools, cocoeval.py, kpt_oks_sigmas."""
OTHER_SIGMA = 0.05
_SIDES = {"left": "right", "right": "left"}


def keypoint_scheme(
    names: tuple[str, ...],
    skeleton: tuple[tuple[int, int], ...] = (),
    swapped: tuple[int, ...] | None = None,
    sigmas: tuple[float, ...] | None = None,
) -> KeypointScheme:
    """The scheme of K named keypoints; what is None is told from the names.

    skeleton: pairs of indices from 0. swapped: left_x and right_x change places. sigmas: COCO's where the names are
    those of COCO's person, else 0.05 each.
    """
    known = COCO_SIGMAS if names == COCO_NAMES else (OTHER_SIGMA,) * len(names)
    return KeypointScheme(names, swapped or swapped_by_name(names), sigmas or known, skeleton)


def swapped_by_name(names: tuple[str, ...]) -> tuple[int, ...]:
    """For each keypoint the index of the one with 'left' and 'right' exchanged in its name, else its own."""
    index = {name.lower(): place for place, name in enumerate(names)}
    return tuple(index.get(_other_side(name.lower()), place) for place, name in enumerate(names))


def _other_side(name: str) -> str:
    return "".join(_SIDES.get(word, word) for word in re.split(r"([^a-z]+)", name))


def is_mirror(swapped: Any, count: int) -> bool:
    """Whether `swapped` is a list of `count` indices that gives the same order again when it is applied twice."""
    if not isinstance(swapped, list | tuple) or len(swapped) != count:
        return False
    indices = set(range(count))
    return all(type(i) is int and i in indices for i in swapped) and all(swapped[j] == i for i, j in enumerate(swapped))


def check_keypoints(values: Any, count: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """A flat list of x, y, visibility as (count, 3) float32, x and y in pixels of a picture of `size` (height, width).

    Raises BrokenAnnotation for another length, a visibility that is not 0, 1 or 2, and an annotated keypoint outside.
    """
    if isinstance(values, list | tuple) and len(values) != 3 * count:
        raise BrokenAnnotation(f"keypoints have {len(values)} values, expected {3 * count} (3 for each of {count})")
    numbers = check_numbers(values, "keypoints", 3 * count)
    for x, y, visible in zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True):
        if visible not in (0, 1, 2):
            raise BrokenAnnotation(f"a keypoint has visibility {shorten(visible)}, expected 0, 1 or 2")
        if visible and not (-ROUNDING <= x <= size[1] + ROUNDING and -ROUNDING <= y <= size[0] + ROUNDING):
            raise BrokenAnnotation(
                f"a keypoint lies at ({x:g}, {y:g}), expected it inside the picture of {size[1]} x {size[0]} pixels"
            )
    return np.asarray(numbers, np.float32).reshape(count, 3)
