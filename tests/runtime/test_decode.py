"""Letterbox, decoding and drawing: against torch and torchvision, scipy, and values computed by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import nms as torchvision_nms

from common import smooth
from leanvit.annotations import IGNORED, Found, KeypointScheme
from leanvit.runtime.decode import (
    class_map,
    crop_region,
    found_objects,
    heatmap_keypoints,
    nms,
    paste_mask,
    pose_region,
)
from leanvit.runtime.draw import colour, draw_found, draw_map
from leanvit.runtime.letterbox import Placement, letterbox, place, to_network, to_picture

SIDES = st.tuples(st.integers(2, 700), st.integers(2, 700))


# --- letterbox ---


def test_a_wide_picture_is_scaled_and_padded_below() -> None:
    picture = np.full((50, 100, 3), 200, np.uint8)
    pixels, placement = letterbox(picture, (64, 64))
    assert placement == Placement((0.64, 0.64), (32, 64), (64, 64))
    assert placement.picture_size == (50, 100)
    assert (pixels[:32] == 200).all()
    assert (pixels[32:] == 114).all()


@given(SIDES, SIDES)
def test_picture_fits_and_coordinates_come_back(picture: tuple[int, int], size: tuple[int, int]) -> None:
    placement = place(picture, size)
    assert placement.picture_size == picture
    assert 1 <= placement.size[0] <= size[0]
    assert 1 <= placement.size[1] <= size[1]
    assert placement.size[0] == size[0] or placement.size[1] == size[1]
    height, width = picture
    corners = np.array([[0, 0, width, height], [width / 3, height / 7, width / 2, height / 2]])
    moved = to_network(corners, placement)
    np.testing.assert_allclose(moved[0], [0, 0, placement.size[1], placement.size[0]], rtol=1e-12)
    np.testing.assert_allclose(to_picture(moved, placement), corners, rtol=1e-12)
    points = np.array([[width / 3, height / 7, 2]])
    np.testing.assert_allclose(to_network(points, placement)[0], [*moved[1, :2], 2], rtol=1e-12)
    np.testing.assert_allclose(to_picture(to_network(points[:, :2], placement), placement), points[:, :2])


def test_what_lies_in_the_padding_is_clipped() -> None:
    placement = place((50, 100), (64, 64))
    box = np.array([-3.0, 16.0, 70.0, 60.0])
    np.testing.assert_allclose(to_picture(box, placement), [0, 25, 100, 50])
    np.testing.assert_allclose(to_picture(box, placement, clip=False), [-3 / 0.64, 25, 70 / 0.64, 60 / 0.64])
    np.testing.assert_allclose(to_picture(np.array([[90.0, 90.0, 500.0]]), placement), [[100, 50, 500]])


# --- objects ---


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([14, 28, 5]))
def test_masks_as_torchvision_pastes_them(seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 65, (4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 90, (4, 2))], axis=1).astype(np.float32)
    masks = rng.random((4, side, side), dtype=np.float32)
    boxes = boxes[(boxes[:, 2] > 2) & (boxes[:, 3] > 2)]  # torchvision can't paste what lies wholly outside
    masks = masks[: len(boxes)]
    expected = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), (70, 95))[:, 0].numpy()
    for mask, box, whole in zip(masks, boxes, expected, strict=True):
        found = paste_mask(mask, box, (70, 95))
        np.testing.assert_allclose(found, whole, atol=2e-5)
        assert ((found > 0.5) == (whole > 0.5))[np.abs(whole - 0.5) > 2e-5].all()


def test_a_mask_beside_the_picture_is_empty() -> None:
    assert not paste_mask(np.ones((14, 14)), np.array([200.0, 5.0, 240.0, 20.0]), (70, 95)).any()


def test_objects_are_scaled_back_and_the_empty_and_weak_left_out() -> None:
    placement = place((100, 200), (64, 64))  # scale 0.32, the picture fills the upper 32 rows
    boxes = np.array([[16, 16, 32, 32], [8, 40, 20, 60], [16, 16, 32, 32], [-8, -8, 72, 48], [4, 4, np.nan, 9]])
    scores = np.array([0.9, 0.8, 0.2, 0.5, 0.7], np.float32)
    masks = np.zeros((5, 28, 28), np.float32)
    masks[[0, 3]] = 1
    labels = np.array([3, 1, 1, 0, 2])
    found = found_objects(boxes, scores, labels, masks, placement, (100, 200), score_threshold=0.5)
    assert [(one.label, round(one.score, 3)) for one in found] == [(3, 0.9), (0, 0.5)]
    assert found[0].box == pytest.approx((50, 50, 100, 100))
    assert found[1].box == (0, 0, 200, 100)
    assert found[0].mask is not None
    assert found[0].mask.dtype == bool
    assert found[0].mask.shape == (100, 200)
    assert found[0].mask[52:98, 52:98].all()
    assert found[0].mask.sum() == pytest.approx(2500, rel=0.1)
    assert found[1].mask is not None
    assert found[1].mask.all()
    bare = found_objects(boxes, scores, labels, None, placement, (100, 200), 0.1)
    assert [one.mask for one in bare] == [None] * 3
    assert found_objects(boxes[:0], scores[:0], labels[:0], masks[:0], placement, (100, 200), 0.1) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.integers(0, 40))
def test_nms_as_torchvision(seed: int, threshold: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 50, (count, 2))], axis=1).astype(np.float32)
    scores = rng.permutation(count).astype(np.float32) / 50
    expected = torchvision_nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).numpy()
    np.testing.assert_array_equal(nms(boxes, scores, threshold), expected)


# --- class maps ---


@pytest.mark.parametrize("picture", [(120, 200), (300, 90), (33, 47), (64, 96)])
@pytest.mark.parametrize("shape", [(5, 16, 24), (3, 64, 96), (150, 8, 12)])
def test_class_map_as_two_interpolations_of_torch(picture: tuple[int, int], shape: tuple[int, int, int]) -> None:
    logits = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    placement = place(picture, (64, 96))
    options = {"mode": "bilinear", "align_corners": False}
    whole = functional.interpolate(torch.from_numpy(logits)[None], (64, 96), **options)
    part = whole[:, :, : placement.size[0], : placement.size[1]]
    values = functional.interpolate(part, picture, **options)[0].numpy()
    found = class_map(logits, placement, picture)
    assert found.dtype == np.uint8
    assert found.shape == picture
    # A pixel may differ only where the two best are equal but for rounding.
    chosen = np.take_along_axis(values, found[None].astype(np.int64), axis=0)[0]
    assert (values.max(axis=0) - chosen).max() < 1e-4
    assert (found == values.argmax(axis=0)).mean() > 0.999


def test_of_equal_classes_the_first_is_taken() -> None:
    assert (class_map(np.zeros((4, 2, 2)), place((8, 8), (8, 8)), (8, 8)) == 0).all()


# --- keypoints ---


def test_heatmap_maxima_by_hand() -> None:
    heatmaps = np.zeros((4, 6, 8), np.float32)
    heatmaps[0, 2, 3], heatmaps[0, 2, 4], heatmaps[0, 1, 3] = 0.9, 0.5, 0.4  # right and up
    heatmaps[1, 0, 7] = 0.7  # corner: stays
    heatmaps[2, 5, 2], heatmaps[2, 5, 1] = 0.6, 0.1  # lower border: only to the left
    heatmaps[3, 3, 3] = 0.3  # equal neighbours
    found = heatmap_keypoints(heatmaps, (100.0, 50.0, 132.0, 74.0))  # cells of 4 pixels
    expected = [[115, 59, 0.9], [130, 52, 0.7], [109, 72, 0.6], [114, 64, 0.3]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.floats(2, 14), st.floats(2, 10))
def test_a_peak_is_found_within_a_quarter_of_a_cell(x: float, y: float) -> None:
    rows, columns = np.mgrid[:12, :16] + 0.5
    heatmap = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 1.5**2))[None]
    found = heatmap_keypoints(heatmap, (10.0, 20.0, 10.0 + 16 * 3, 20.0 + 12 * 5))[0]
    assert abs((found[0] - 10) / 3 - x) <= 0.2501
    assert abs((found[1] - 20) / 5 - y) <= 0.2501


def test_pose_region_by_hand() -> None:
    assert pose_region((10, 10, 20, 50), aspect=0.75) == pytest.approx((15 - 18.75, 30 - 25, 15 + 18.75, 30 + 25))
    assert pose_region((0, 0, 60, 20), aspect=0.75, padding=1) == pytest.approx((0, -30, 60, 50))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_enlarged_crop_is_bilinear_with_grey_around(seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    x1, y1 = rng.uniform(-15, 20, 2)
    x2, y2 = x1 + rng.uniform(4, 24), y1 + rng.uniform(4, 32)
    found = crop_region(picture, (x1, y1, x2, y2), (32, 24))
    rows, columns = np.mgrid[:32, :24] + 0.5
    places = [y1 + rows * (y2 - y1) / 32 - 0.5, x1 + columns * (x2 - x1) / 24 - 0.5]
    for channel in range(3):
        plane = np.pad(picture[:, :, channel].astype(float), 60, constant_values=114)
        expected = map_coordinates(plane, np.array(places) + 60, order=1)
        assert np.abs(found[:, :, channel] - expected).max() <= 1.5


def test_crop_of_the_whole_picture_and_beside_it() -> None:
    picture = smooth(40, 60, seed=2)
    np.testing.assert_array_equal(crop_region(picture, (0, 0, 60, 40), (40, 60)), picture)
    assert (crop_region(picture, (100, 100, 130, 140), (40, 30)) == 114).all()
    half = crop_region(picture, (0, 0, 60, 40), (20, 30)).astype(float)
    blocks = picture.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - blocks)[2:-2, 2:-2].mean() < 4  # antialiased: no pixel is skipped


def test_a_keypoint_comes_back_through_crop_and_heatmap() -> None:
    picture = np.full((120, 160, 3), 114, np.uint8)
    picture[70:74, 90:94] = 255  # middle at (92, 72)
    region = pose_region((60, 40, 110, 100), aspect=0.75)
    crop = crop_region(picture, region, (128, 96))
    heatmap = crop[:, :, 0].reshape(32, 4, 24, 4).mean(axis=(1, 3))[None] - 114
    x, y, _ = heatmap_keypoints(heatmap, region)[0]
    assert abs(x - 92) < (region[2] - region[0]) / 24 / 2
    assert abs(y - 72) < (region[3] - region[1]) / 32 / 2


# --- drawing ---


def test_every_class_has_a_colour_of_its_own() -> None:
    assert len({colour(label) for label in range(255)}) == 255
    assert colour(0) == (230, 159, 0)


def test_objects_are_drawn_where_they_are() -> None:
    picture = np.zeros((200, 500, 3), np.uint8)
    mask = np.zeros((200, 500), bool)
    mask[100:150, 300:400] = True
    points = np.array([[50, 150, 1], [150, 150, 1], [250, 180, 0]], np.float32)
    scheme = KeypointScheme(("a", "b", "c"), (0, 1, 2), (0.1,) * 3, ((0, 1), (1, 2)))
    found = [
        Found(0, 0.9, (300.0, 100.0, 400.0, 150.0), mask),
        Found(1, 0.5, (20.0, 120.0, 280.0, 190.0), None, points),
    ]
    drawn = draw_found(picture, found, ("shirt", "bag"), scheme)
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    np.testing.assert_allclose(drawn[125, 350], np.array(colour(0)) * 0.45, atol=1)
    assert tuple(drawn[101, 350]) == colour(0)
    assert tuple(drawn[150, 100]) == colour(1)  # the bone between two keypoints
    assert not drawn[165, 200].any()  # none to the keypoint of score 0
    assert drawn[75:99, 300:380].any()  # the label, above its box
    assert not drawn[:70].any()
    assert not picture.any()


def test_small_pictures_are_enlarged_and_labels_stay_inside() -> None:
    picture = smooth(64, 64, seed=1)
    mask = np.zeros((64, 64), bool)
    mask[:10, 50:] = True
    found = [Found(0, 1.0, (50.0, 0.0, 64.0, 10.0), mask)]
    drawn = draw_found(picture, found, ("a garment with a long name",))
    assert drawn.shape == (512, 512, 3)
    changed = np.abs(drawn.astype(int) - draw_found(picture, [], ())).sum(axis=2) > 60
    assert changed[:80, :390].any()  # the text starts further left than the box to stay inside
    assert not changed[100:].any()
    assert draw_found(smooth(4000, 20, seed=1), [], ()).shape == (4000, 20, 3)


def test_map_is_tinted_with_a_legend_of_what_occurs() -> None:
    picture = np.zeros((60, 100, 3), np.uint8)
    values = np.full((60, 100), IGNORED, np.uint8)
    values[:30, :50], values[30:, 50:] = 2, 9
    drawn = draw_map(picture, values, [f"class {k}" for k in range(12)])
    assert drawn.shape[1] == 500
    assert drawn.shape[0] > 300
    np.testing.assert_allclose(drawn[75, 125], np.array(colour(2)) * 0.45, atol=1)
    np.testing.assert_allclose(drawn[225, 375], np.array(colour(9)) * 0.45, atol=1)
    assert not drawn[75, 375].any()
    shown = tones(drawn[300:])
    assert {colour(2), colour(9)} <= shown
    assert colour(0) not in shown
    many = np.arange(240, dtype=np.uint8).reshape(12, 20)
    crowded = draw_map(np.zeros((12, 20, 3), np.uint8), many, [f"a class named {k}" for k in range(240)])
    assert {colour(label) for label in range(240)} <= tones(crowded[288:])


def tones(pixels: np.ndarray) -> set[tuple[int, ...]]:
    packed = np.unique(pixels.astype(np.int64) @ [65536, 256, 1])
    return {(value >> 16, value >> 8 & 255, value & 255) for value in packed.tolist()}


def test_the_better_object_is_on_top() -> None:
    mask = np.ones((50, 500), bool)
    found = [Found(label, score, (0.0, 0.0, 500.0, 50.0), mask) for label, score in ((0, 0.9), (1, 0.3))]
    drawn = draw_found(np.zeros((50, 500, 3), np.uint8), found, ("", ""))
    assert tuple(drawn[49, 490]) == colour(0)


def test_none_of_it_imports_torch() -> None:
    code = (
        "import sys, leanvit.annotations.metrics; from leanvit.runtime import decode, draw, letterbox;"
        "assert not {'torch', 'torchvision', 'sklearn', 'faster_coco_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
