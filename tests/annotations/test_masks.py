"""Masks of objects against pycocotools' own decoder and against pixels counted by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from leanvit.annotations.masks import check_segmentation, decode_mask, encode_mask, mask_box, polygon_area
from leanvit.errors import DataError

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts, column by column, beginning with zeros; by the definition."""
    flat = mask.ravel(order="F").tolist()
    counts, value = [0], False
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@given(MASKS)
@settings(deadline=None)
def test_encoded_masks_are_decoded_by_pycocotools_and_the_other_way_round(mask: np.ndarray) -> None:
    ours = json.loads(json.dumps(encode_mask(mask)))
    np.testing.assert_array_equal(coco_mask.decode(ours), mask)
    theirs = coco_mask.encode(np.asfortranarray(mask, np.uint8))  # counts are bytes
    for runs in (ours, theirs, {"size": list(mask.shape), "counts": runs_of(mask)}):
        decoded = decode_mask(runs, mask.shape) if mask.any() else mask
        assert decoded.dtype == np.bool_
        np.testing.assert_array_equal(decoded, mask)


@given(MASKS)
@settings(deadline=None)
def test_areas_and_boxes_are_those_of_the_pixels(mask: np.ndarray) -> None:
    runs = encode_mask(mask)
    if not mask.any():
        assert mask_box(mask) is None
        with pytest.raises(DataError, match="area of 0"):
            check_segmentation(runs, mask.shape)
        return
    assert check_segmentation(runs, mask.shape) == coco_mask.area(runs) == mask.sum()
    x, y, width, height = coco_mask.toBbox(runs).tolist()
    assert mask_box(mask) == (x, y, x + width, y + height)


@given(arrays.arrays(np.bool_, (300, 200), elements=st.just(False)), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_long_runs_survive(mask: np.ndarray, seed: int) -> None:
    """Runs of more than 15 and 511 pixels take two and three characters; differences may be negative."""
    rng = np.random.default_rng(seed)
    flat = mask.reshape(-1, order="F").copy()
    for start, end in np.sort(rng.integers(0, flat.size, (4, 2)), axis=1):
        flat[start : end + 1] ^= True
    flat[0] = True
    mask = flat.reshape(mask.shape, order="F")
    assert check_segmentation(encode_mask(mask), (300, 200)) == mask.sum()
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), (300, 200)), mask)


@st.composite
def polygons(draw: st.DrawFn) -> list[float]:
    points = draw(st.integers(3, 8))
    return draw(st.lists(st.floats(-20, 60, width=32), min_size=2 * points, max_size=2 * points))


@given(st.lists(polygons(), min_size=1, max_size=3))
@settings(deadline=None)
def test_polygons_are_rasterized_as_pycocotools_does(several: list[list[float]]) -> None:
    size = (30, 40)
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(several, *size)))
    if sum(polygon_area(polygon) for polygon in several) <= 0:
        with pytest.raises(DataError, match="area"):
            decode_mask(several, size)
        return
    np.testing.assert_array_equal(decode_mask(several, size), expected.astype(bool))


def test_a_rectangle_has_the_pixels_and_the_area_counted_by_hand() -> None:
    rectangle = [[2, 1, 6, 1, 6, 4, 2, 4]]
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(decode_mask(rectangle, (6, 8)), expected)
    assert check_segmentation(rectangle, (6, 8)) == 12
    assert mask_box(expected) == (2, 1, 6, 4)
    assert polygon_area([0, 0, 0, 4, 3, 0]) == 6


GOOD = encode_mask(np.eye(5, dtype=bool))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 3, 3]], "4 values, expected x and y of at least 3 points"),
        ([[1, 1, 3, 3, 2]], "5 values"),
        ([[1, 1, 3, 3, 2, 4, 1]], "7 values"),
        ([[1, 1, 3, 3, 2, float("nan")]], "nan, expected finite"),
        ([[1, 1, 3, 3, 2, "4"]], "'4', expected finite"),
        ([[1, 1, 3, 1, 4, 1]], "area of 0"),
        ([[1, 1, 3, 1, 4, 1e8]], r"point at 1e\+08"),
        ([], "expected polygons or run lengths"),
        ([5], "polygon is 5"),
        ("abc", "expected polygons or run lengths"),
        ({**GOOD, "size": [5, 6]}, r"size \[5, 6\], expected that of the picture: \[5, 5\]"),
        ({"counts": GOOD["counts"]}, "size None"),
        ({"size": [5, 5]}, "counts are None"),
        ({"size": [5, 5], "counts": [10, 5]}, "cover 15 pixels, expected all 25"),
        ({"size": [5, 5], "counts": [30, -5]}, "none below 0"),
        ({"size": [5, 5], "counts": [10.0, 15.0]}, "expected runs"),
        ({"size": [5, 5], "counts": [25]}, "area of 0"),
        ({"size": [5, 5], "counts": GOOD["counts"][:-2]}, "cover"),
        ({"size": [5, 5], "counts": "\x01" + GOOD["counts"]}, "expected runs"),
        ({"size": [5, 5], "counts": "oooooooooooooo"}, "expected runs"),
        ({"size": [5, 5], "counts": GOOD["counts"] + "P"}, "expected runs"),
    ],
)
def test_damaged_segmentations_are_refused_with_what_is_wrong(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_mask(segmentation, (5, 5))
