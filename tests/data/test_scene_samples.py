"""Samples of the tasks: rectangles and bright spots drawn into pictures tell where annotations must be."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from scipy.ndimage import center_of_mass
from torchvision import tv_tensors

from leanvit.annotations import Instance, KeypointScheme, Scene, SceneSet
from leanvit.data import scene_loader as loader_module
from leanvit.data.scene_augment import (
    Augmentation,
    draw,
    flip,
    is_visible,
    jitter_colours,
    lay,
    mask_boxes,
    random_spans,
    to_image,
)
from leanvit.data.scene_kinds import BOXES, CLASS_MAPS, KEYPOINTS, MASKS
from leanvit.data.scene_loader import SceneDataset, SceneLoader, memory_needed
from leanvit.data.scene_samples import Pictures, Sample, SampleKind, pose_objects, read_sample
from leanvit.errors import ConfigError, DataError, ImageError

SIZE = (96, 128)
STILL = Augmentation(hflip=0, scale=(1, 1), color_jitter=(0, 0, 0), rotation=0, pose_scale=0, shift=0)
MOVING = Augmentation(color_jitter=(0, 0, 0))
SCHEME = KeypointScheme(("left", "right", "middle"), (1, 0, 2), (0.1, 0.1, 0.1))
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def rectangle(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def runs(mask: np.ndarray) -> dict[str, Any]:
    return coco.encode(np.asfortranarray(mask))


def polygon(box: tuple[int, int, int, int]) -> list[list[float]]:
    x1, y1, x2, y2 = box
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def rectangles(folder: Path, size: tuple[int, int], boxes: list[tuple[int, int, int, int]], number: int) -> Scene:
    """A black picture whose objects are rectangles, object i of colour i; its class map has their labels."""
    pixels = np.zeros((*size, 3), np.uint8)
    values = np.full(size, 7, np.uint8)
    for label, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2] = COLOURS[label]
        values[y1:y2, x1:x2] = 10 + label
    path, map_path = folder / f"{number}.png", folder / f"{number}_map.png"
    Image.fromarray(pixels).save(path)
    Image.fromarray(values).save(map_path)
    instances = tuple(
        Instance(
            label,
            tuple(float(side) for side in box),
            polygon(box) if label == 1 else runs(rectangle(box, size)),
            area=float((box[2] - box[0]) * (box[3] - box[1])),
        )
        for label, box in enumerate(boxes)
    )
    return Scene(path, 100 + number, size, instances, map_path)


RECTANGLES = [(10, 8, 40, 30), (60, 20, 90, 70), (20, 50, 50, 75)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    """Seven pictures of different sizes with three rectangles each."""
    folder = tmp_path_factory.mktemp("toys")
    sizes = [(80, 100), (120, 100), (80, 160), (96, 128), (200, 180), (77, 91), (150, 101)]
    scenes = tuple(rectangles(folder, size, RECTANGLES, number) for number, size in enumerate(sizes))
    return SceneSet("toys", scenes, ("red", "green", "blue"), map_values={10: 0, 11: 1, 12: 2})


def colour_of(image: torch.Tensor, label: int) -> np.ndarray:
    """How much an image (3, H, W) is of one colour, 0 to 255, whatever grey is added."""
    planes = image.numpy().astype(int)
    others = [planes[i] for i in range(3) if i != label]
    return np.maximum(planes[label] - np.maximum(*others), 0)


def bounds(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


# --- boxes, masks and class maps ---


@pytest.mark.parametrize("augmentation", [None, STILL, MOVING, replace(MOVING, scale=(2.5, 3.0), hflip=1)])
@pytest.mark.parametrize("epoch", range(4))
def test_boxes_and_masks_lie_on_the_rectangles_of_the_image(
    toys: SceneSet, augmentation: Augmentation | None, epoch: int
) -> None:
    for index in range(len(toys.scenes)):
        sample = read_sample(toys, index, MASKS, SIZE, augmentation, 3, epoch=epoch)
        assert sample.image.shape == (3, *SIZE)
        assert sample.image.dtype == sample.target["masks"].dtype == torch.uint8
        assert sample.target["masks"].shape == (len(sample.target["labels"]), *SIZE)
        assert sample.target["image_id"] == sample.image_id == 100 + index
        for box, label, mask in zip(*(sample.target[n] for n in ("boxes", "labels", "masks")), strict=True):
            drawn = colour_of(sample.image, int(label) - 1) > 127
            assert np.abs(bounds(drawn) - box.numpy()).max() <= 1
            assert np.abs(bounds(mask.numpy()) - box.numpy()).max() <= 1
            assert (drawn != mask.numpy()).mean() < 0.01


@pytest.mark.parametrize("augmentation", [None, MOVING])
def test_class_maps_lie_on_the_rectangles_and_are_ignored_elsewhere(
    toys: SceneSet, augmentation: Augmentation | None
) -> None:
    for index in range(len(toys.scenes)):
        sample = read_sample(toys, index, CLASS_MAPS, SIZE, augmentation, 5)
        class_map = sample.target["class_map"]
        assert class_map.shape == SIZE
        assert class_map.dtype == torch.int64
        assert set(class_map.unique().tolist()) <= {0, 1, 2, 255}
        for label in range(3):
            assert ((colour_of(sample.image, label) > 127) != (class_map == label).numpy()).mean() < 0.01


def test_detect_gives_the_boxes_of_segment_where_nothing_is_cut(toys: SceneSet) -> None:
    for index in range(len(toys.scenes)):
        detect = read_sample(toys, index, BOXES, SIZE)
        segment = read_sample(toys, index, MASKS, SIZE)
        torch.testing.assert_close(detect.target["boxes"], segment.target["boxes"])
        assert detect.target["labels"].tolist() == [1, 2, 3]
        assert "masks" not in detect.target


def test_letterboxed_boxes_by_hand(toys: SceneSet) -> None:
    # 80 x 160 in 96 x 128: scale 0.8, at the top left.
    sample = read_sample(toys, 2, BOXES, SIZE)
    expected = torch.tensor(RECTANGLES) * 0.8
    torch.testing.assert_close(sample.target["boxes"], expected)
    assert (sample.image[:, 64:] == 114).all()
    assert sample.placement is not None
    assert sample.placement.size == (64, 128)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.tuples(st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0.25, 0.3), st.floats(0.25, 0.3)),
)
def test_the_box_of_a_moved_mask_is_the_moved_box(
    seed: int, picture: tuple[int, int], shares: tuple[float, float, float, float]
) -> None:
    x, y, width, height = shares
    box = (
        int(x * picture[1]),
        int(y * picture[0]),
        int((x + width) * picture[1]),
        int((y + height) * picture[0]),
    )
    mask = rectangle(box, picture)
    layers = {
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([box]).float(), format="XYXY", canvas_size=picture),
        "masks": tv_tensors.Mask(torch.from_numpy(mask)[None]),
        "class_map": tv_tensors.Mask(torch.from_numpy(mask)[None]),
    }
    drawn = draw(seed, 0, 0)
    down, across = random_spans(picture, SIZE, Augmentation(), drawn)
    moved = flip(lay(layers, down, across))
    found = moved["boxes"][0].numpy()
    assert moved["masks"].shape == moved["class_map"].shape == (1, *SIZE)
    assert (found >= 0).all()
    assert (found <= [SIZE[1], SIZE[0], SIZE[1], SIZE[0]]).all()
    inside = moved["masks"][0].numpy().astype(bool)
    if inside.any():
        assert np.abs(bounds(inside) - found).max() <= 1
        np.testing.assert_array_equal(mask_boxes(moved["masks"])[0].numpy(), bounds(inside))
    else:
        assert min(found[2] - found[0], found[3] - found[1]) <= 1
    if down.placed < SIZE[0]:
        assert (moved["class_map"] == 255).any()


def test_scales_cover_their_range_and_places_their_room() -> None:
    draws = [draw(0, 0, index) for index in range(300)]
    spans = [random_spans((50, 50), (100, 100), Augmentation(), drawn)[0] for drawn in draws]
    visible = [span.placed / 100 if span.placed < 100 else 50 / span.length for span in spans]
    assert min(visible) < 0.55
    assert max(visible) > 1.4
    assert max(span.scale for span in spans) == pytest.approx(3.0, rel=0.03)
    padded = [span for span in spans if span.placed < 90]
    places = [span.offset / (span.side - span.placed) for span in padded]
    assert min(places) < 0.05
    assert max(places) > 0.95
    assert all(span.offset + span.placed + span.after == 100 for span in spans)


# --- objects that are left out ---


def test_small_and_cut_objects_are_left_out() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1.9, 50], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5]])
    left, full = torch.tensor([4.0, 95, 100, 100, 0]), torch.tensor([4.0, 95, 1000, 1001, 25])
    assert is_visible(boxes, left, full).tolist() == [True, False, True, False, False]


def test_a_crop_has_only_the_objects_that_are_in_it(toys: SceneSet) -> None:
    augmentation = replace(STILL, scale=(3, 3))
    counts = set()
    for epoch in range(30):
        sample = read_sample(toys, 3, MASKS, SIZE, augmentation, epoch=epoch)
        present = [label for label in range(3) if (colour_of(sample.image, label) > 127).sum() > 0]
        labels = [int(label) - 1 for label in sample.target["labels"]]
        assert set(labels) <= set(present)
        full = torch.tensor(
            [(RECTANGLES[i][2] - RECTANGLES[i][0]) * (RECTANGLES[i][3] - RECTANGLES[i][1]) * 9.0 for i in range(3)]
        )
        for label in range(3):
            share = (colour_of(sample.image, label) > 127).sum() / full[label]
            assert (label in labels) == bool(share >= 0.1) or 0.07 < share < 0.13
        counts.add(len(labels))
    assert counts == {1, 2, 3}


def test_a_mask_of_another_shape_makes_its_cut_box_tight(tmp_path: Path) -> None:
    # An L: of its upper right quarter, which a crop may show alone, nothing belongs to it.
    size = (60, 60)
    mask = rectangle((0, 0, 10, 60), size) | rectangle((0, 50, 60, 60), size)
    scene = rectangles(tmp_path, size, [(0, 0, 60, 60)], 0)
    scene = replace(scene, instances=(replace(scene.instances[0], segmentation=runs(mask)),))
    scenes = SceneSet("l", (scene,), ("l",))
    cut = 0
    for epoch in range(40):
        sample = read_sample(scenes, 0, MASKS, (60, 60), replace(STILL, scale=(2, 2)), epoch=epoch)
        for box, found in zip(sample.target["boxes"], sample.target["masks"], strict=True):
            np.testing.assert_allclose(box.numpy(), bounds(found.numpy()), atol=1e-4)
            cut += box.tolist() != [0, 0, 60, 60]
    assert cut


def test_crowds_and_objects_without_masks_are_no_targets(toys: SceneSet) -> None:
    first, second, third = toys.scenes[0].instances
    instances = (replace(first, crowd=True), replace(second, segmentation=None), third)
    changed = replace(toys, scenes=(replace(toys.scenes[0], instances=instances),))
    assert read_sample(changed, 0, BOXES, SIZE).target["labels"].tolist() == [2, 3]
    assert read_sample(changed, 0, MASKS, SIZE).target["labels"].tolist() == [3]


def test_a_picture_without_objects_has_empty_targets(toys: SceneSet) -> None:
    empty = replace(toys, scenes=(replace(toys.scenes[0], instances=()),))
    for augmentation in (None, MOVING):
        target = read_sample(empty, 0, MASKS, SIZE, augmentation).target
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert target["masks"].shape == (0, *SIZE)


# --- keypoints ---


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    """Pictures with two objects; the keypoints of the first are bright spots in three colours."""
    folder = tmp_path_factory.mktemp("people")
    scenes = []
    for number, (height, width) in enumerate([(120, 160), (90, 70)]):
        pixels = np.full((height, width, 3), 20, np.uint8)
        points = np.array([[20, 30, 2], [44, 35, 1], [30, 60, 2]], np.float32)
        for (x, y, _), colour in zip(points, COLOURS, strict=True):
            pixels[int(y) - 2 : int(y) + 2, int(x) - 2 : int(x) + 2] = colour
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        unknown = Instance(0, (1.0, 1, 9, 9), keypoints=np.zeros((3, 3), np.float32))
        known = Instance(0, (12.0, 20, 54, 68), keypoints=points)
        scenes.append(Scene(path, number, (height, width), (unknown, known, replace(known, crowd=True))))
    return SceneSet("people", tuple(scenes), ("person",), keypoints=SCHEME)


def test_pose_objects_are_those_with_keypoints(people: SceneSet) -> None:
    assert pose_objects(people) == ((0, 1), (1, 1))


def spots(image: torch.Tensor) -> list[tuple[float, float] | None]:
    """Middle (x, y) of the spot of each colour, None where it is not wholly visible."""
    found: list[tuple[float, float] | None] = []
    for label in range(3):
        colour = colour_of(image, label)
        y, x = center_of_mass(colour) if colour.sum() else (0.0, 0.0)
        seen = colour.sum() and min(x, y, image.shape[2] - x, image.shape[1] - y) > 8
        found.append((x + 0.5, y + 0.5) if seen else None)
    return found


@pytest.mark.parametrize(
    "augmentation",
    [None, STILL, replace(STILL, rotation=90), replace(STILL, hflip=1), replace(STILL, shift=0.2), MOVING],
)
@pytest.mark.parametrize("size", [(96, 96), (128, 96)])
def test_keypoints_stay_on_their_spots(
    people: SceneSet, augmentation: Augmentation | None, size: tuple[int, int]
) -> None:
    compared = 0
    for index, epoch in [(index, epoch) for index in range(2) for epoch in range(6)]:
        sample = read_sample(people, index, KEYPOINTS, size, augmentation, 1, epoch=epoch)
        mirrored = augmentation is not None and draw(1, epoch, index).flip < augmentation.hflip
        order = SCHEME.swapped if mirrored else (0, 1, 2)
        for keypoint, visibility, name in zip(order, (2, 1, 2), range(3), strict=True):
            middle = spots(sample.image)[name]
            x, y, found = sample.target["keypoints"][keypoint].tolist()
            if middle is not None:
                assert np.hypot(x - middle[0], y - middle[1]) < 0.7
                assert found == visibility
                compared += 1
    assert compared > 18


def test_the_left_keypoint_of_a_mirrored_object_is_at_the_left_one_of_its_mirror(people: SceneSet) -> None:
    plain = read_sample(people, 0, KEYPOINTS, (96, 96), STILL).target["keypoints"]
    mirrored = read_sample(people, 0, KEYPOINTS, (96, 96), replace(STILL, hflip=1)).target["keypoints"]
    expected = plain[[1, 0, 2]] * torch.tensor([-1.0, 1, 1]) + torch.tensor([96.0, 0, 0])
    torch.testing.assert_close(mirrored, expected)


def test_the_region_without_augmentation_by_hand(people: SceneSet) -> None:
    # Box 42 x 48 about (33, 44): a square of 60 pixels from (3, 14) on.
    sample = read_sample(people, 0, KEYPOINTS, (120, 120))
    assert sample.region == pytest.approx((3, 14, 63, 74))
    expected = torch.tensor([[34.0, 32, 2], [82, 42, 1], [54, 92, 2]])
    torch.testing.assert_close(sample.target["keypoints"], expected)


def test_turned_regions_have_no_empty_corners(people: SceneSet) -> None:
    scene = people.scenes[0]
    white = replace(scene.instances[1], box=(70.0, 50, 90, 70))
    inside = replace(people, scenes=(replace(scene, instances=(white,)),))
    for epoch in range(5):
        image = read_sample(inside, 0, KEYPOINTS, (64, 48), replace(STILL, rotation=45), epoch=epoch).image
        assert (image.amax(0) < 114).all()


def test_keypoints_outside_of_the_image_are_not_learned(people: SceneSet) -> None:
    scene = people.scenes[0]
    small = replace(scene.instances[1], box=(18.0, 28, 24, 34))
    changed = replace(people, scenes=(replace(scene, instances=(small,)),))
    keypoints = read_sample(changed, 0, KEYPOINTS, (64, 64), STILL).target["keypoints"]
    assert keypoints[:, 2].tolist() == [2, 0, 0]


def test_a_mirrored_object_needs_a_scheme(people: SceneSet) -> None:
    with pytest.raises(DataError, match="3 keypoints but no scheme"):
        read_sample(replace(people, keypoints=None), 0, KEYPOINTS, (64, 64), replace(STILL, hflip=1))


# --- flips, colours ---


def test_mirroring_twice_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    size = (20, 31)
    layers = {
        "image": tv_tensors.Image(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)),
        "masks": tv_tensors.Mask(torch.randint(0, 2, (4, *size), generator=generator, dtype=torch.uint8)),
        "class_map": tv_tensors.Mask(torch.randint(0, 2, (1, *size), generator=generator, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[1.0, 2, 5, 6.5]]), format="XYXY", canvas_size=size),
        "keypoints": tv_tensors.KeyPoints(torch.tensor([[1.0, 2], [30.5, 6.5]]), canvas_size=size),
    }
    once = flip(layers)
    assert once["boxes"].tolist() == [[26.0, 2, 30, 6.5]]
    assert once["keypoints"].tolist() == [[30.0, 2], [0.5, 6.5]]
    twice = flip(once)
    for name, value in layers.items():
        torch.testing.assert_close(twice[name], value)


def test_colours_change_within_their_range_and_not_where_they_are_off(toys: SceneSet) -> None:
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    bright = Augmentation(color_jitter=(0.2, 0, 0))
    levels = [int(jitter_colours(image, bright, draw(0, 0, i)).max()) for i in range(200)]
    assert 80 <= min(levels) < 84
    assert 116 < max(levels) <= 120
    assert torch.equal(jitter_colours(image, STILL, draw(0, 0, 0)), image)


@pytest.mark.parametrize(
    "options",
    [{"hflip": 1.5}, {"scale": (0, 1)}, {"scale": (2, 1)}, {"color_jitter": (0, -1, 0)}, {"rotation": 181},
     {"pose_scale": 1.0}, {"shift": -0.1}],
)  # fmt: skip
def test_augmentation_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Augmentation(**options)


# --- pictures ---


def test_kept_masks_and_pictures_are_those_of_the_files(toys: SceneSet) -> None:
    pictures = Pictures(toys, keep=True)
    for _ in range(2):
        for index, scene in enumerate(toys.scenes):
            expected = np.stack([rectangle(box, scene.size) for box in RECTANGLES])
            np.testing.assert_array_equal(pictures.masks(index), expected)
            np.testing.assert_array_equal(pictures.pixels(index), np.asarray(Image.open(scene.path)))
            labels = np.asarray(Image.open(str(scene.class_map))).astype(int)
            np.testing.assert_array_equal(pictures.class_map(index), np.where(labels == 7, 255, labels - 10))


def test_augmentation_leaves_kept_pictures_alone(toys: SceneSet) -> None:
    pictures = Pictures(toys, keep=True)
    before = [pictures.pixels(index).copy() for index in range(len(toys.scenes))]
    for index in range(len(toys.scenes)):
        read_sample(toys, index, MASKS, SIZE, Augmentation(scale=(1, 1)), pictures=pictures)
    for index, pixels in enumerate(before):
        np.testing.assert_array_equal(pictures.pixels(index), pixels)


def test_a_picture_of_another_size_is_named(toys: SceneSet) -> None:
    wrong = replace(toys, scenes=(replace(toys.scenes[0], size=(81, 100)),))
    with pytest.raises(ImageError, match=re.escape("0.png: 100 x 80 pixels, expected 100 x 81")):
        read_sample(wrong, 0, BOXES, SIZE)


def test_a_broken_mask_is_named_with_its_picture(toys: SceneSet) -> None:
    first, *others = toys.scenes[0].instances
    broken = replace(first, segmentation=runs(np.ones((5, 5), np.uint8)))
    scenes = replace(toys, scenes=(replace(toys.scenes[0], instances=(*others, broken)),))
    with pytest.raises(DataError, match=r"0\.png, object 2: .*size"):
        read_sample(scenes, 0, MASKS, SIZE)


# --- the loader ---


def contents(loader: SceneLoader) -> list[tuple[torch.Tensor, list[dict[str, torch.Tensor]]]]:
    return [(images.clone(), targets) for images, targets in loader]


def same(first: list[Any], second: list[Any]) -> bool:
    if len(first) != len(second):
        return False
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        if not torch.equal(images, other_images) or len(targets) != len(other_targets):
            return False
        for target, other in zip(targets, other_targets, strict=True):
            if target.keys() != other.keys() or not all(torch.equal(target[n], other[n]) for n in target):
                return False
    return True


def make(scenes: SceneSet, kind: SampleKind = MASKS, batch_size: int = 3, **options: Any) -> SceneLoader:
    options = {"train": True, "augmentation": Augmentation(), "seed": 4, **options}
    return SceneLoader(scenes, kind, SIZE, batch_size, **options)


def test_batches_do_not_depend_on_workers_memory_or_history(toys: SceneSet, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = make(toys), make(toys, workers=2)
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT_BYTES", 0)
    from_files = make(toys)
    assert here.dataset.pictures.keep
    assert not from_files.dataset.pictures.keep
    epochs = []
    for epoch in (0, 1):
        for loader in (here, there, from_files):
            loader.set_epoch(epoch)
        epochs.append(contents(here))
        assert same(epochs[-1], contents(there))
        assert same(epochs[-1], contents(from_files))
    assert not same(epochs[0], epochs[1])
    here.set_epoch(0)
    assert same(epochs[0], contents(here))
    assert same(epochs[0][1:], list(here.batches(first=1)))
    there.set_epoch(0)
    assert same(epochs[0][1:], list(there.batches(first=1)))


def test_another_seed_gives_another_order(toys: SceneSet) -> None:
    orders = {
        tuple(int(target["index"]) for _, targets in make(toys, seed=seed, batch_size=7) for target in targets)
        for seed in range(4)
    }
    assert len(orders) > 1
    assert all(sorted(order) == list(range(7)) for order in orders)


def test_training_leaves_out_the_last_part_validation_has_all_in_order(toys: SceneSet) -> None:
    train, validate = make(toys), make(toys, train=False)
    assert [len(images) for images, _ in train] == [3, 3]
    assert len(train) == 2
    found = contents(validate)
    assert len(validate) == len(found) == 3
    assert [int(target["index"]) for _, targets in found for target in targets] == list(range(7))
    expected = [read_sample(toys, index, MASKS, SIZE) for index in range(7)]
    assert torch.equal(torch.cat([images for images, _ in found]), torch.stack([s.image for s in expected]))
    assert len(make(toys, batch_size=50)) == len(contents(make(toys, batch_size=50))) == 1


def test_pose_batches(people: SceneSet) -> None:
    ((images, targets),) = contents(make(people, KEYPOINTS, 2, train=False, augmentation=None))
    assert images.shape == (2, 3, *SIZE)
    assert [target["keypoints"].shape for target in targets] == [(3, 3), (3, 3)]
    assert [int(target["image_id"]) for target in targets] == [0, 1]


def test_a_dataset_gives_samples_by_epoch_and_index(toys: SceneSet) -> None:
    dataset = SceneDataset(toys, CLASS_MAPS, SIZE, MOVING, 3)
    assert len(dataset) == 7
    sample = dataset[(2, 1)]
    assert isinstance(sample, Sample)
    assert torch.equal(sample.image, read_sample(toys, 1, CLASS_MAPS, SIZE, MOVING, 3, epoch=2).image)


def with_bad(toys: SceneSet, folder: Path) -> SceneSet:
    path = folder / "bad.png"
    path.write_bytes(toys.scenes[0].path.read_bytes()[:60])
    return replace(toys, scenes=(*toys.scenes[:3], replace(toys.scenes[0], path=path), *toys.scenes[3:]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_bad_pictures_fail_or_are_named_and_left_out(
    toys: SceneSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    limit: int,
    workers: int,
) -> None:
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT_BYTES", limit)
    scenes = with_bad(toys, tmp_path)
    with pytest.raises(ImageError, match=r"bad\.png: .*--bad-images skip") as caught:
        list(make(scenes, train=False, workers=workers))
    assert "\n" not in str(caught.value)
    loader = make(scenes, train=False, workers=workers, on_bad="skip")
    for _ in range(2):
        found = contents(loader)
        assert [int(target["index"]) for _, targets in found for target in targets] == [0, 1, 2, 4, 5, 6, 7]
    assert loader.bad == [str(tmp_path / "bad.png")]
    assert capfd.readouterr().err.count("bad.png") == 1


def test_only_bad_pictures_are_an_error(toys: SceneSet, tmp_path: Path) -> None:
    scenes = replace(with_bad(toys, tmp_path), scenes=with_bad(toys, tmp_path).scenes[3:4])
    with pytest.raises(DataError, match="none of 1 pictures can be read"):
        make(scenes, on_bad="skip")


def test_a_broken_mask_stops_the_loader_in_one_line(toys: SceneSet) -> None:
    broken = replace(toys.scenes[0].instances[0], segmentation=runs(np.ones((5, 5), np.uint8)))
    scenes = replace(toys, scenes=(replace(toys.scenes[0], instances=(broken,)),))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"0\.png, object 0") as caught:
            list(make(scenes, workers=workers))
        assert "\n" not in str(caught.value)


def test_scenes_without_what_a_task_needs_are_refused(
    toys: SceneSet, people: SceneSet, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="no pictures"):
        make(replace(toys, scenes=()))
    with pytest.raises(DataError, match="no object with keypoints"):
        make(toys, KEYPOINTS)
    with pytest.raises(DataError, match="2 of 2 pictures have no class map"):
        make(people, CLASS_MAPS)
    with pytest.raises(DataError, match="no object with a mask"):
        make(people, MASKS)
    with pytest.raises(ConfigError, match="batch_size 0"):
        make(toys, batch_size=0)
    first, *others = toys.scenes[0].instances
    part = replace(toys.scenes[0], instances=(replace(first, segmentation=None), *others))
    make(replace(toys, scenes=(part,)), batch_size=1)
    assert "1 of 3 objects have no mask" in capfd.readouterr().err


def test_memory_by_hand(toys: SceneSet) -> None:
    one = replace(toys, scenes=toys.scenes[:1])
    assert memory_needed(one, BOXES) == 80 * 100 * 3
    assert memory_needed(one, CLASS_MAPS) == 80 * 100 * 4
    assert memory_needed(one, MASKS) == 80 * 100 * 3 + 3 * 80 * 100 // 8


def test_images_share_the_memory_of_their_pixels() -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[1, 2] = (1, 2, 3)
    assert to_image(pixels)[:, 1, 2].tolist() == [1, 2, 3]
