"""Composed practice pictures: cut-outs, placing and files against values by hand, SciPy and pycocotools."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from scipy import ndimage

from leanvit.config import DataComposeConfig
from leanvit.data.compose.compose import Sprite, compose, keypoint_entry, run, transform
from leanvit.data.compose.garments import (
    KEYPOINTS,
    Cutout,
    cut_out,
    foreground,
    keypoints_of,
    load_cutouts,
    load_garments,
    read_cutout,
    split_of,
)
from leanvit.data.compose.photos import PHOTOS, columns_of, crop_background, load_photos
from leanvit.errors import ConfigError, DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
needs_garments = pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian package dataset-fashion-mnist is absent")
SPLITS = ("train", "val")


def shirt() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A T: a bar of rows 4 to 9 and columns 3 to 24, a body of rows 10 to 23 and columns 9 to 18."""
    grey = np.zeros((28, 28), np.uint8)
    grey[4:10, 3:25] = 200
    grey[10:24, 9:19] = 120
    return grey


# --- cut-outs ---


def test_dark_insides_are_garment_and_the_view_through_a_handle_is_not() -> None:
    grey = np.zeros((28, 28), np.uint8)
    grey[12:26, 4:24] = 150
    grey[15:20, 8:16] = 3  # a dark print
    grey[3:12, 6:22] = 150
    grey[5:11, 8:20] = 0  # below the handle
    grey[0, 0] = 90  # a speck
    expected = np.zeros((28, 28), bool)
    expected[3:26, 6:22] = expected[12:26, 4:24] = True
    expected[5:11, 8:20] = False
    assert np.array_equal(foreground(grey), expected)


def test_a_silhouette_that_touches_the_border_is_whole() -> None:
    grey = np.full((28, 28), 70, np.uint8)
    assert foreground(grey).all()
    grey[:, 14:] = 0
    assert np.array_equal(foreground(grey), grey > 0)


def test_keypoints_of_a_shirt_are_those_counted_by_hand() -> None:
    expected = {
        "top_left": (3.5, 4.5),
        "top_right": (24.5, 4.5),
        # y - x is 14 at (9, 23), 6 at (3, 9); x + y is 41 at (18, 23), 33 at (24, 9).
        "bottom_left": (9.5, 23.5),
        "bottom_right": (18.5, 23.5),
        # The middle of columns 3 to 24 is 13.5: columns 11 to 16 are within 2.5, their mean is 13.5.
        "top": (14.0, 4.5),
        "bottom": (14.0, 23.5),
    }
    assert dict(zip(KEYPOINTS.names, map(tuple, keypoints_of(foreground(shirt()))), strict=True)) == expected


def test_a_keypoint_is_the_mean_of_the_pixels_that_tie() -> None:
    diamond = np.abs(np.arange(11) - 5)[:, None] + np.abs(np.arange(11) - 5) <= 4
    points = dict(zip(KEYPOINTS.names, map(tuple, keypoints_of(diamond)), strict=True))
    assert points["top_left"] == (3.5, 3.5)  # the whole edge from (1, 5) to (5, 1) ties
    assert points["bottom_right"] == (7.5, 7.5)
    assert points["top"] == (5.5, 1.5)


@settings(max_examples=60, deadline=None)
@given(mask=arrays(np.bool_, (9, 12)).filter(lambda mask: mask.any()))
def test_a_mirrored_silhouette_has_the_swapped_keypoints(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    points = keypoints_of(mask)
    mirrored = keypoints_of(mask[:, ::-1])[list(KEYPOINTS.swapped)]
    assert np.allclose(np.column_stack([12 - mirrored[:, 0], mirrored[:, 1]]), points)


def test_colour_is_the_tint_times_the_lifted_grey_and_slivers_are_no_garments() -> None:
    cutout = cut_out(shirt(), 4, np.asarray([1.0, 0.5, 0.0]))
    assert cutout is not None
    assert cutout.pixels.shape == (32, 32, 4)
    assert cutout.pixels[2 + 5, 2 + 5].tolist() == [round(255 * (0.3 + 0.7 * 200 / 255)), 108, 0, 255]
    assert np.array_equal(cutout.pixels[2:-2, 2:-2, 3], np.where(shirt() > 0, 255, 0))
    assert cutout.pixels[:2].max() == cutout.pixels[:, :2].max() == 0
    sliver = np.where(np.arange(28) == 3, shirt(), 0).astype(np.uint8)
    assert cut_out(sliver, 4, np.ones(3)) is None


# --- one affine map ---


def a_shirt() -> Cutout:
    cutout = cut_out(shirt(), 2, np.asarray([0.9, 0.6, 0.8]))
    assert cutout is not None
    return cutout


def test_scale_one_without_rotation_copies_pixels_and_moves_keypoints() -> None:
    sprite = transform(a_shirt(), 1.0, 0.0, (50.0, 40.0))
    assert (sprite.left, sprite.top) == (34, 24)
    assert np.array_equal(sprite.pixels[:, :, 3], a_shirt().pixels[:, :, 3])
    assert np.array_equal(sprite.pixels[sprite.mask], a_shirt().pixels[sprite.mask])
    assert sprite.keypoints is not None
    # The 28 pixels start at (50 - 14, 40 - 14).
    assert np.allclose(sprite.keypoints, np.add(keypoints_of(foreground(shirt())), (36, 26)))


@pytest.mark.parametrize(("scale", "degrees"), [(1.0, 0.0), (2.5, 0.0), (1.7, 20.0), (1.3, -90.0), (2.0, 180.0)])
def test_the_map_is_scipy_s(scale: float, degrees: float) -> None:
    cutout = a_shirt()
    sprite = transform(cutout, scale, degrees, (60.3, 55.8))
    turn = np.deg2rad(degrees)
    back = np.asarray([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / scale
    y, x = np.mgrid[: sprite.pixels.shape[0], : sprite.pixels.shape[1]]
    places = np.stack([x + 0.5 + sprite.left - 60.3, y + 0.5 + sprite.top - 55.8])
    source = np.tensordot(back, places, 1) + 16
    alpha = cutout.pixels[:, :, 3].astype(float)
    expected = ndimage.map_coordinates(alpha, [source[1] - 0.5, source[0] - 0.5], order=1)
    assert np.abs(sprite.pixels[:, :, 3] - expected).max() <= 2
    sure = np.abs(expected - 127.5) > 3
    assert np.array_equal(sprite.mask[sure], (expected > 127.5)[sure])
    premultiplied = ndimage.map_coordinates(
        alpha / 255 * cutout.pixels[:, :, 0], [source[1] - 0.5, source[0] - 0.5], order=1
    )
    assert np.abs(sprite.pixels[:, :, 0] * (sprite.pixels[:, :, 3] / 255.0) - premultiplied).max() <= 3


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.8, 3), degrees=st.floats(-180, 180), x=st.floats(-5, 60), y=st.floats(-5, 60))
def test_area_grows_with_the_square_and_keypoints_stay_at_the_silhouette(
    scale: float, degrees: float, x: float, y: float
) -> None:
    sprite = transform(a_shirt(), scale, degrees, (x, y))
    # The outline is 84 pixels long, and is at most half a pixel off.
    assert abs(sprite.mask.sum() - scale**2 * (shirt() > 0).sum()) <= scale * 84 / 2 + 4
    away = ndimage.distance_transform_edt(np.pad(~sprite.mask, 3))
    assert sprite.keypoints is not None
    for point in sprite.keypoints:
        column, row = np.floor(point - (sprite.left, sprite.top)).astype(int) + 3
        assert away[row, column] <= 1.5


# --- pictures ---


def square(left: int, top: int, side: int, label: int, alpha: int = 255) -> Sprite:
    pixels = np.full((side, side, 4), (200, 100, 50, alpha), np.uint8)
    return Sprite(left, top, pixels, label, None)


def test_a_picture_is_blended_by_its_definition() -> None:
    background = np.full((40, 60, 3), 80, np.uint8)
    sprite = transform(a_shirt(), 1.0, 0.0, (30.25, 20.0))  # a quarter of a pixel off: edges are mixed
    composed = compose(background, [sprite])
    for y, x in np.ndindex(40, 60):
        row, column = y - sprite.top, x - sprite.left
        inside = 0 <= row < sprite.pixels.shape[0] and 0 <= column < sprite.pixels.shape[1]
        red, _, _, alpha = map(int, sprite.pixels[row, column]) if inside else (0, 0, 0, 0)
        assert composed.picture[y, x, 0] == pytest.approx(80 + alpha / 255 * (red - 80), abs=0.51)
        assert composed.class_map[y, x] == (3 if alpha > 127.5 else 0)


def test_later_objects_hide_earlier_ones_and_boxes_are_of_what_is_seen() -> None:
    composed = compose(
        np.zeros((20, 30, 3), np.uint8), [square(2, 3, 10, 0), square(8, 0, 10, 4), square(26, 15, 9, 9)]
    )
    first, second, third = composed.annotations()
    # Columns 2 to 11 and rows 3 to 12, without columns from 8 and rows to 9.
    assert (first["bbox"], first["area"], first["category_id"]) == ([2, 3, 10, 10], 100 - 4 * 7, 1)
    assert (second["bbox"], second["area"], second["category_id"]) == ([8, 0, 10, 10], 100, 5)
    assert (third["bbox"], third["area"], third["category_id"]) == ([26, 15, 4, 5], 20, 10)
    assert composed.class_map[12, 11] == 1
    assert composed.class_map[9, 11] == 5
    faint = compose(np.zeros((20, 30, 3), np.uint8), [square(2, 3, 10, 0, alpha=127)])
    assert faint.class_map.max() == 0


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((5.5, 5.5), (5.5, 5.5, 2)),
        ((7.5, 5.5), (7.5, 5.5, 2)),  # 2 pixels from the middle of the visible one
        ((7.6, 5.5), (7.6, 5.5, 1)),
        ((0.0, 0.0), (0.0, 0.0, 1)),
        ((20.0, 5.5), (0.0, 0.0, 0)),
        ((5.5, -0.1), (0.0, 0.0, 0)),
    ],
)
def test_visibility_of_a_keypoint(point: tuple[float, float], expected: tuple[float, float, int]) -> None:
    assert keypoint_entry(np.asarray(point), np.asarray([5]), np.asarray([5]), (12, 20)) == expected


# --- photographs ---


@pytest.mark.parametrize("shape", [(32, 32), (32, 80), (80, 32)])
def test_train_and_val_never_see_the_same_part_of_a_photograph(shape: tuple[int, int]) -> None:
    photo = np.zeros((60, 101, 3), np.uint8)
    photo[:, 61:65] = 255  # black is train or val; white is the gap between them
    for split, black in (("train", slice(0, 61)), ("val", slice(65, 101))):
        coloured = photo.copy()
        coloured[:, [column for column in range(101) if column not in range(101)[black]]] = 255
        rng = np.random.default_rng(0)
        crops = [crop_background(coloured, split, shape, rng) for _ in range(50)]
        assert {crop.shape for crop in crops} == {(*shape, 3)}
        assert max(crop.max() for crop in crops) == 0
    for width in range(60, 2000, 7):
        assert columns_of(width, "train")[1] < columns_of(width, "val")[0] < columns_of(width, "val")[1] <= width


def test_every_photograph_is_inside_an_installed_package() -> None:
    photos = load_photos()
    assert len(photos) == len(PHOTOS) >= 12
    for photo in photos:
        assert photo.dtype == np.uint8
        assert photo.ndim == 3
        assert min(photo.shape[:2]) >= 300


# --- written sets ---

SMALL = DataComposeConfig(output="x", train=12, val=6, size=(96,), seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "set"
    assert run(replace(SMALL, output=str(folder))) is not None
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@needs_garments
@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 6)])
def test_pycocotools_reads_masks_boxes_and_maps_that_agree(written: Path, split: str, count: int) -> None:
    coco = COCO(str(written / f"{split}.json"))
    assert len(coco.imgs) == count
    names = (written / "classes.txt").read_text().splitlines()
    assert names[0] == "background"
    assert [(one["id"], one["name"]) for one in coco.loadCats(coco.getCatIds())] == list(enumerate(names))[1:]
    for number, entry in coco.imgs.items():
        picture = Image.open(written / entry["file_name"])
        class_map = np.asarray(Image.open(written / entry["file_name"].replace("images/", "masks/")))
        assert picture.mode == "RGB"
        assert picture.size == (entry["width"], entry["height"]) == (96, 96)
        assert class_map.dtype == np.uint8
        union = np.zeros((96, 96), np.uint8)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert 2 <= len(annotations) <= 6
        for one in annotations:
            mask = coco.annToMask(one)
            assert not union[mask > 0].any()
            union[mask > 0] = one["category_id"]
            assert one["bbox"] == run_lengths.toBbox(one["segmentation"]).tolist()
            assert one["area"] == mask.sum() > 0
        assert np.array_equal(union, class_map)


@needs_garments
def test_keypoints_are_visible_where_their_object_is_seen(written: Path) -> None:
    coco = COCO(str(written / "train.json"))
    seen = set()
    for one in coco.anns.values():
        away = ndimage.distance_transform_edt(coco.annToMask(one) == 0)
        for x, y, visible in np.reshape(one["keypoints"], (6, 3)):
            seen.add(int(visible))
            if visible:
                # From the middle of the keypoint's pixel, so at most 0.71 off.
                assert (away[int(y), int(x)] <= 2.71) if visible == 2 else (away[int(y), int(x)] > 1.29)
        assert one["num_keypoints"] == sum(value > 0 for value in one["keypoints"][2::3])
    assert seen == {0, 1, 2}
    (skeleton,) = {json.dumps(one["skeleton"]) for one in coco.cats.values()}
    assert {index for pair in json.loads(skeleton) for index in pair} == set(range(1, 7))


@needs_garments
def test_the_number_of_processes_changes_nothing_and_the_seed_all(written: Path, tmp_path: Path) -> None:
    run(replace(SMALL, output=str(tmp_path / "two"), workers=2))
    expected = files_of(written)
    assert files_of(tmp_path / "two") == expected
    assert len(expected) == 2 * 18 + 4
    run(replace(SMALL, output=str(tmp_path / "seed"), seed=4))
    other = files_of(tmp_path / "seed")
    assert not any(other[name] == data for name, data in expected.items() if name.startswith("images"))
    assert not {p.name for p in tmp_path.iterdir()} - {"two", "seed"}


@needs_garments
def test_garments_of_train_and_val_are_those_of_the_two_official_files() -> None:
    sets = load_garments()
    for split, stem, total in (("train", "train", 60_000), ("val", "t10k", 10_000)):
        assert sum(map(len, sets[split].by_class)) == total
        data = gzip.decompress((FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for index in (0, 17, total - 1):
            grey = np.frombuffer(data, np.uint8, 784, 16 + 784 * index).reshape(28, 28)
            cutout = sets[split].read(index, np.random.default_rng(0))
            assert cutout is not None
            assert cutout.label == labels[index]
            solid = cutout.pixels[2:-2, 2:-2, 3] > 0
            assert solid[grey > 40].mean() > 0.95
            # Colour and grey are in the same order.
            assert np.corrcoef(cutout.pixels[2:-2, 2:-2, 0][solid], grey[solid])[0, 1] > 0.95


@needs_garments
def test_the_command_writes_once_and_refuses_what_is_not_its_own(
    leanvit: Callable[..., Any], written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wide"
    flags = ["--train", 2, "--val", 1, "--size", 40, 72, "--scale", 0.5, 1.0, "--occlusion", 0.2, "--rotation", 0]
    done = leanvit("data", "compose", folder, *flags)
    assert done.code == 0
    assert "2 train" in done.out
    assert Image.open(folder / "images/val/00000.png").size == (72, 40)
    before = files_of(folder)
    again = leanvit("data", "compose", folder, *flags, "--workers", 2)
    assert (again.code, "nothing to do" in again.out) == (0, True)
    assert leanvit("data", "compose", folder, *flags, "--seed", 1).code == 2
    assert files_of(folder) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    refused = leanvit("data", "compose", other)
    assert refused.code == 2
    assert str(other) in refused.error
    assert (other / "thesis.txt").read_text() == "precious"


def coloured_cutouts(folder: Path, names: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for kind, colour in (("apple", (200, 30, 30)), ("leaf", (30, 180, 40))):
        (folder / kind).mkdir(parents=True)
        for number in range(names):
            pixels = np.zeros((120, 90, 4), np.uint8)
            y, x = np.mgrid[:120, :90]
            inside = ((x - 45) / rng.uniform(20, 40)) ** 2 + ((y - 60) / rng.uniform(30, 55)) ** 2 < 1
            pixels[inside] = (*colour, 255)
            Image.fromarray(pixels).save(folder / kind / f"{kind}-{number}.png")
    return folder


def test_cut_outs_of_a_folder_keep_colours_and_stay_on_their_side(tmp_path: Path) -> None:
    source = coloured_cutouts(tmp_path / "cutouts")
    config = replace(SMALL, output=str(tmp_path / "set"), cutouts=str(source), train=4, val=3)
    run(config)
    coco = COCO(str(tmp_path / "set/val.json"))
    assert [one["name"] for one in coco.cats.values()] == ["apple", "leaf"]
    assert not any("keypoints" in one for one in [*coco.cats.values(), *coco.anns.values()])
    for one in coco.anns.values():
        picture = np.asarray(Image.open(tmp_path / "set" / coco.imgs[one["image_id"]]["file_name"]))
        inner = ndimage.binary_erosion(coco.annToMask(one), iterations=3)
        if inner.any():
            assert np.abs(picture[inner] - ((200, 30, 30) if one["category_id"] == 1 else (30, 180, 40))).max() <= 2
    sets = load_cutouts(source)
    drawn = {split: {int(i) for members in sets[split].by_class for i in members} for split in SPLITS}
    assert not drawn["train"] & drawn["val"]
    assert len(drawn["train"] | drawn["val"]) == 48
    assert "keypoints" not in (tmp_path / "set/train.json").read_text()


def test_a_fifth_of_the_names_validates() -> None:
    split = [split_of(f"object {number}.png") for number in range(2000)]
    assert 0.16 < split.count("val") / 2000 < 0.24


def test_broken_cut_outs_are_named(tmp_path: Path) -> None:
    source = coloured_cutouts(tmp_path / "cutouts")
    plain, clear, text = (source / "apple" / name for name in ("plain.png", "clear.png", "text.png"))
    Image.new("RGB", (20, 20)).save(plain)
    Image.new("RGBA", (20, 20)).save(clear)
    text.write_text("no picture")
    for path, found in ((plain, "no transparency"), (clear, "nothing opaque"), (text, "not a PNG")):
        with pytest.raises(DataError, match=found) as caught:
            read_cutout(path, 0)
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="no PNG files for"):
        load_cutouts(coloured_cutouts(tmp_path / "few", names=1))


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = coloured_cutouts(tmp_path / "cutouts")
    config = replace(SMALL, output=str(tmp_path / "set"), cutouts=str(source), size=(32,), scale=(6.0, 6.0))
    with pytest.raises(DataError, match="don't fit into 32 x 32 pixels"):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["cutouts"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": (16,)}, "size is"),
        ({"size": (64, 64, 64)}, "size is"),
        ({"max_objects": 1}, "max_objects is 1"),
        ({"scale": (2.0, 1.0)}, "scale is"),
        ({"rotation": 200.0}, "rotation is 200.0"),
        ({"occlusion": 1.0}, "occlusion is 1.0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataComposeConfig(output="x", **values)
