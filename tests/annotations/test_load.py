"""Annotated pictures in folders: YOLO, ADE20K, Cityscapes, plain and composed toy sets, every broken kind named."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leanvit.annotations import IGNORED, KeypointScheme
from leanvit.annotations.keypoints import COCO_NAMES, COCO_SIGMAS
from leanvit.annotations.load import load_scenes
from leanvit.annotations.maps import load_map, read_maps
from leanvit.annotations.yolo import label_path, read_yolo
from leanvit.errors import DataError
from toy_scenes import annotation, class_map, document, picture

# --- YOLO ---


def yolo(folder: Path, rows: str | None, **settings: Any) -> Path:
    picture(folder / "images" / "train" / "a.png", 40, 80)
    labels = folder / "labels" / "train" / "a.txt"
    labels.parent.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        labels.write_text(rows)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"train": "images/train", "names": {0: "cat", 1: "dog"}, **settings}))
    return path


def test_yolo_boxes_and_polygons_are_in_pixels(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "empty.png")
    found = read_yolo(yolo(tmp_path, "0 0.5 0.5 0.25 0.5\n\n1 0.25 0.25 0.75 0.25 0.25 0.75\n"), "train")
    assert (found.classes, found.category_ids, found.problems) == (("cat", "dog"), (0, 1), ())
    first, second = found.scenes
    assert (first.image_id, first.size, second.instances) == (1, (40, 80), ())
    box, outline = first.instances
    assert (box.label, box.box, box.area, box.segmentation) == (0, (30, 10, 50, 30), 400, None)
    assert (outline.label, outline.box, outline.area) == (1, (20, 10, 60, 30), 400)
    assert outline.segmentation == [[20, 10, 60, 10, 20, 30]]


def test_yolo_keypoints_have_their_mirrored_pairs(tmp_path: Path) -> None:
    path = yolo(tmp_path, "0 0.5 0.5 0.5 0.5 0.25 0.5 2 0 0 0", kpt_shape=[2, 3], flip_idx=[1, 0])
    found = read_yolo(path, "train")
    assert found.keypoints == KeypointScheme(("keypoint_1", "keypoint_2"), (1, 0), (0.05, 0.05))
    np.testing.assert_array_equal(found.scenes[0].instances[0].keypoints, np.float32([[20, 20, 2], [0, 0, 0]]))
    path = yolo(tmp_path, "0 0.5 0.5 0.5 0.5 0.25 0.5 0 0", kpt_shape=[2, 2], kpt_names={0: ["left_ear", "right_ear"]})
    found = read_yolo(path, "train")
    assert found.keypoints == KeypointScheme(("left_ear", "right_ear"), (1, 0), (0.05, 0.05))
    np.testing.assert_array_equal(found.scenes[0].instances[0].keypoints, np.float32([[20, 20, 2], [0, 0, 0]]))
    person = {"kpt_shape": [17, 3], "flip_idx": [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]}
    found = read_yolo(yolo(tmp_path, "", **person), "train")
    assert found.keypoints
    assert (found.keypoints.names, found.keypoints.sigmas) == (COCO_NAMES, COCO_SIGMAS)


@given(st.text(alphabet="01259.-e n\n\t", max_size=60), st.sampled_from([{}, {"kpt_shape": [1, 3]}]))
@settings(deadline=None, max_examples=100)
def test_whatever_stands_in_a_row_is_read_or_named(rows: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = read_yolo(yolo(Path(folder), rows, **options), "train")
    filled = sum(bool(row.strip()) for row in rows.splitlines())
    assert len(found.scenes[0].instances) <= filled <= len(found.scenes[0].instances) + len(found.problems)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 1.5 0.5 0.25 0.5", "lies wholly outside"),
        ("0 40 20 10 10", "lies wholly outside"),
        ("0 0.5 0.5 0 0.5", "zero or negative area"),
        ("0 0.5 nan 0.1 0.5", "nan found, expected finite numbers"),
        ("0 0.5 x 0.1 0.5", "'x' found, expected numbers"),
        ("0 0.5 0.5 0.1", "4 values, expected class cx cy w h"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 values"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.4 0.3", "8 values"),
        ("0 0.1 0.1 0.5 0.5 0.9 0.9", "area"),
        ("2 0.5 0.5 0.25 0.5", "class 2 is unknown, expected 0 to 1"),
        ("-1 0.5 0.5 0.25 0.5", "class -1 is unknown"),
        ("0.5 0.5 0.5 0.25 0.5", "class 0.5 is unknown"),
        ("1 0.5 0.5 0.5 0.5", "the same row was there before"),
    ],
)
def test_every_broken_row_is_named_and_left_out(tmp_path: Path, row: str, message: str) -> None:
    path = yolo(tmp_path, f"1 0.5 0.5 0.5 0.5\n{row}\n")
    found = read_yolo(path, "train")
    assert len(found.scenes[0].instances) == 1
    (problem,) = found.problems
    assert message in problem
    assert problem.startswith(f"{tmp_path / 'labels' / 'train' / 'a.txt'}, labels of a.png, line 2: ")
    with pytest.raises(DataError, match="1 such problems"):
        read_yolo(path, "train", on_problem="fail")


def test_broken_yolo_keypoints_clipped_boxes_and_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "b.png").write_text("no picture")
    rows = "0 0.5 0.5 0.5 0.5 0.25 0.5 2\n0 0.5 0.5 0.5 0.5 0.25 0.5 5 0 0 0\n0 0 0.5 0.5 0.5 0 0 0 0 0 0"
    found = read_yolo(yolo(tmp_path, rows, kpt_shape=[2, 3]), "train")
    assert [one.box for one in found.scenes[0].instances] == [(0, 10, 20, 30)]
    for problem, message in zip(
        found.problems,
        ("8 values, expected 11", "visibility 5.0", "partly outside", "b.png: the image can't be read"),
        strict=True,
    ):
        assert message in problem


def test_yolo_lists_and_paths_are_found(tmp_path: Path) -> None:
    yolo(tmp_path / "a" / "set", "0 0.5 0.5 0.25 0.5")
    (tmp_path / "a" / "set" / "list.txt").write_text("./images/train/a.png\n")
    named: list[dict[str, Any]] = [
        {"path": "set", "train": "list.txt"},
        {"path": str(tmp_path / "a" / "set"), "train": ["images/train"]},
        {"train": "../set/images/train"},
        {"path": "../gone", "train": "set/images"},
    ]
    for number, entries in enumerate(named):
        data = tmp_path / "a" / f"{number}.yaml"
        data.write_text(yaml.safe_dump({**entries, "names": ["cat"]}))
        assert [len(scene.instances) for scene in read_yolo(data, "train").scenes] == [1], entries
    assert label_path(Path("images/x/images/y/a.jpg")) == Path("images/x/labels/y/a.txt")
    assert label_path(Path("x/a.jpg")) == Path("x/a.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": None}, "train is None, expected a folder"),
        ({"train": "gone"}, "gone is not there"),
        ({"train": "labels"}, "no pictures found"),
        ({"names": None}, "names is None, expected a list"),
        ({"names": {1: "a"}}, "a dictionary from 0 on"),
        ({"kpt_shape": [3]}, r"expected \[keypoints, 2 or 3\]"),
        ({"kpt_shape": [3, 3], "flip_idx": [0, 1]}, "expected 3 indices"),
        ({"kpt_shape": [3, 3], "kpt_names": ["a"]}, "expected 3 names"),
    ],
)
def test_a_data_yaml_that_can_not_be_used_is_one_error(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_yolo(yolo(tmp_path, "", **settings), "train")


def test_yolo_without_any_label_file_or_yaml_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label files for 'train'"):
        read_yolo(yolo(tmp_path, None), "train")
    with pytest.raises(DataError, match="No such file"):
        read_yolo(tmp_path / "none.yaml", "train")
    for text in ("a: [", "text"):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(DataError, match=r"no YAML|expected YOLO"):
            read_yolo(tmp_path / "data.yaml", "train")


# --- class maps ---

OBJECT_INFO = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    "1\t0.1\t5\t5\t1\twall\n2\t0.1\t5\t5\t1\tbuilding, edifice\n3\t0.1\t5\t5\t1\tsky\n"
)
VALUES = np.tile(np.arange(4, dtype=np.uint8), (40, 15))


def plain(root: Path, values: Any = VALUES, split: str = "train") -> Path:
    picture(root / "images" / split / "a.jpg")
    class_map(root / "masks" / split / "a.png", values)
    (root / "classes.txt").write_text("background\nshirt\nbag\nboot\n")
    return root


def test_the_plain_layout(tmp_path: Path) -> None:
    found = read_maps(plain(tmp_path, np.where(VALUES == 3, 255, VALUES)), "train")
    assert (found.classes, found.problems) == (("background", "shirt", "bag", "boot"), ())
    (scene,) = found.scenes
    assert (scene.image_id, scene.size, scene.instances) == (1, (40, 60), ())
    labels = load_map(scene, found)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.where(VALUES == 3, IGNORED, VALUES))


def ade(root: Path, names: str | None, file: str = "objectInfo150.txt") -> Path:
    for folder in ("training", "validation"):
        picture(root / "images" / folder / "a.jpg")
        class_map(root / "annotations" / folder / "a.png", VALUES if folder == "training" else VALUES // 2)
    if names is not None:
        (root / file).write_text(names)
    return root


@pytest.mark.parametrize(
    ("names", "file", "classes"),
    [
        (OBJECT_INFO, "objectInfo150.txt", ("wall", "building, edifice", "sky")),
        ("wall\nbuilding\nsky\n\n", "classes.txt", ("wall", "building", "sky")),
        (None, "", ("class_1", "class_2", "class_3")),
    ],
)
def test_the_layout_of_ade20k(tmp_path: Path, names: str | None, file: str, classes: tuple[str, ...]) -> None:
    root = ade(tmp_path, names, file)
    train, val = read_maps(root, "train"), read_maps(root, "val")
    assert train.classes == val.classes == classes
    assert train.problems == val.problems == ()
    np.testing.assert_array_equal(load_map(train.scenes[0], train), (VALUES.astype(int) - 1) % 256)
    np.testing.assert_array_equal(load_map(val.scenes[0], val), (VALUES.astype(int) // 2 - 1) % 256)


def test_the_layout_of_cityscapes(tmp_path: Path) -> None:
    stem = "ulm/ulm_000000_000019"
    picture(tmp_path / "leftImg8bit" / "train" / f"{stem}_leftImg8bit.png")
    ids = np.tile(np.uint8([7, 0, 26, 33]), (40, 15))
    class_map(tmp_path / "gtFine" / "train" / f"{stem}_gtFine_labelTrainIds.png", np.tile([0, 255, 13, 18], (40, 15)))
    by_train_id = read_maps(tmp_path, "train")
    class_map(tmp_path / "gtFine" / "train" / f"{stem}_gtFine_labelIds.png", ids)
    class_map(tmp_path / "gtFine" / "train" / f"{stem}_gtFine_color.png", ids, "RGB")
    by_id = read_maps(tmp_path, "train")
    assert by_id.scenes[0].class_map != by_train_id.scenes[0].class_map
    for found in (by_train_id, by_id):
        assert found.problems == ()
        assert (len(found.classes), found.classes[0], found.classes[13], found.classes[18]) == (
            19, "road", "car", "bicycle")  # fmt: skip
        np.testing.assert_array_equal(load_map(found.scenes[0], found)[0, :4], [0, 255, 13, 18])


def _no_map(root: Path) -> None:
    picture(root / "images" / "train" / "b.jpg")


def _no_picture(root: Path) -> None:
    class_map(root / "masks" / "train" / "b.png", VALUES)


def _other_size(root: Path) -> None:
    _no_map(root)
    class_map(root / "masks" / "train" / "b.png", VALUES.T)


def _three_channels(root: Path) -> None:
    _no_map(root)
    class_map(root / "masks" / "train" / "b.png", VALUES, "RGB")


def _damaged_map(root: Path) -> None:
    _other_size(root)
    path = class_map(root / "masks" / "train" / "b.png", np.random.default_rng(0).integers(0, 4, (40, 60)))
    path.write_bytes(path.read_bytes()[:-200])


def _damaged_picture(root: Path) -> None:
    _no_picture(root)
    (root / "images" / "train" / "b.jpg").write_text("no picture")


def _same_stem(root: Path) -> None:
    picture(root / "images" / "train" / "a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_map, r"b\.jpg: no class map .*masks/train/b\.png; left out"),
        (_no_picture, r"b\.png: no picture .*images/train/b\.\*; left out"),
        (_other_size, r"b\.png: the class map has 40 x 60 pixels, expected 60 x 40 as b\.jpg has; left out"),
        (_three_channels, r"b\.png: the class map has mode RGB, expected one channel"),
        (_damaged_map, r"b\.png: the class map can't be read"),
        (_damaged_picture, r"b\.jpg: the image can't be read .* left out with its class map"),
        (_same_stem, r"a\.png: same stem as a\.jpg|a\.jpg: same stem as a\.png"),
    ],
)
def test_every_broken_pair_is_named_and_left_out(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(plain(tmp_path))
    found = read_maps(tmp_path, "train")
    assert [scene.path.stem for scene in found.scenes] == ["a"]
    with pytest.raises(DataError, match=message):
        read_maps(tmp_path, "train", on_problem="fail")
    assert len(found.problems) == 1


def test_values_that_are_no_class_are_named_and_ignored(tmp_path: Path) -> None:
    found = read_maps(plain(tmp_path, np.where(VALUES == 3, 9, VALUES)), "train")
    assert "a.png: 9 in the map of a.jpg is no class, expected values of 4 classes or 255" in found.problems[0]
    np.testing.assert_array_equal(load_map(found.scenes[0], found), np.where(VALUES == 3, IGNORED, VALUES))
    assert read_maps(tmp_path, "train", values_checked=0).problems == ()
    Image.fromarray(np.where(VALUES == 3, 258, VALUES.astype(np.uint16))).save(tmp_path / "masks" / "train" / "a.png")
    found = read_maps(tmp_path, "train")
    assert ": 258 in the map" in found.problems[0]
    np.testing.assert_array_equal(load_map(found.scenes[0], found), np.where(VALUES == 3, IGNORED, VALUES))


def test_maps_with_a_palette_and_of_one_bit_hold_their_indices(tmp_path: Path) -> None:
    path = tmp_path / "masks" / "train" / "a.png"
    plain(tmp_path)
    image = Image.fromarray(VALUES).convert("P")
    image.putdata(VALUES.ravel().tolist())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    image.save(path)
    found = read_maps(tmp_path, "train")
    np.testing.assert_array_equal(load_map(found.scenes[0], found), VALUES)
    Image.fromarray(VALUES > 1).save(path)
    found = read_maps(tmp_path, "train")
    np.testing.assert_array_equal(load_map(found.scenes[0], found), VALUES > 1)


def test_a_map_that_changed_since_or_is_not_there_is_an_error(tmp_path: Path) -> None:
    found = read_maps(plain(tmp_path), "train")
    class_map(tmp_path / "masks" / "train" / "a.png", VALUES.T)
    with pytest.raises(DataError, match="40 x 60 pixels, expected 60 x 40"):
        load_map(found.scenes[0], found)
    with pytest.raises(DataError, match="no class map"):
        load_map(replace(found.scenes[0], class_map=None), found)


def test_missing_folders_and_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures with class maps found"):
        read_maps(tmp_path, "train")
    with pytest.raises(DataError, match="no such folder"):
        read_maps(plain(tmp_path), "val")
    for names, message in (("a\n\nb\n", "line 2 is empty"), ("\n", "0 names"), ("a\n" * 256, "256 names")):
        (tmp_path / "classes.txt").write_text(names)
        with pytest.raises(DataError, match=message):
            read_maps(tmp_path, "train")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: No such file"):
        read_maps(tmp_path, "train")
    with pytest.raises(DataError, match="not ADE20K's table"):
        read_maps(ade(tmp_path / "ade", "Idx\tName\nwall\n"), "train")
    class_map(plain(tmp_path / "b") / "masks" / "train" / "a.png", VALUES.T)
    with pytest.raises(DataError, match=r"no picture with a class map.*First problem.*40 x 60"):
        read_maps(tmp_path / "b", "train")


# --- what a user gives ---


def composed(root: Path) -> Path:
    for split in ("train", "val"):
        plain(root, split=split)
        (root / f"{split}.json").write_text(
            json.dumps(document(annotation(), annotation(2, segmentation=None),
                                images=[{"id": 7, "file_name": "a.jpg", "height": 40, "width": 60}]))
        )  # fmt: skip
    return root


def test_a_composed_folder_serves_every_task(tmp_path: Path) -> None:
    root = composed(tmp_path)
    for task in ("detect", "pose"):
        found = load_scenes(str(root), "val", task=task)
        (scene,) = found.scenes
        assert scene.path == root / "images" / "val" / "a.jpg"
        assert (found.classes, found.problems, len(scene.instances)) == (("dog", "cat"), (), 2)
        assert found.map_values == {0: 0, 1: 1, 2: 2, 3: 3}
        np.testing.assert_array_equal(load_map(scene, found), VALUES)
    masked = load_scenes(str(root), "train", task="segment")
    assert len(masked.scenes[0].instances) == 1
    assert "1 objects of a.jpg without a mask; left out" in masked.problems[0]
    semantic = load_scenes(str(root), "train", task="semantic")
    assert (semantic.classes[0], semantic.scenes[0].instances) == ("background", ())


def test_pictures_of_a_json_may_stand_in_a_folder_of_the_split(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    (tmp_path / "train.json").write_text(json.dumps(document(annotation())))
    found = load_scenes(tmp_path, "train")
    assert (found.scenes[0].path, found.scenes[0].class_map) == (tmp_path / "train" / "a.png", None)


def test_the_layouts_of_coco_and_yolo_are_found(tmp_path: Path) -> None:
    picture(tmp_path / "coco" / "val2017" / "a.png")
    (tmp_path / "coco" / "annotations").mkdir()
    for kind, entries in (("instances", [annotation()]), ("person_keypoints", [annotation(), annotation(2)])):
        path = tmp_path / "coco" / "annotations" / f"{kind}_val2017.json"
        path.write_text(json.dumps(document(*entries)))
    assert len(load_scenes(tmp_path / "coco", "val").scenes[0].instances) == 1
    assert len(load_scenes(tmp_path / "coco", "val", task="pose").scenes[0].instances) == 2
    data = yolo(tmp_path / "yolo", "0 0.5 0.5 0.25 0.5")
    for spec in (data, data.parent):
        assert len(load_scenes(spec, "train").scenes[0].instances) == 1
    assert load_scenes(ade(tmp_path / "ade", None), "val", task="semantic").classes == ("class_1", "class_2", "class_3")


def test_what_is_missing_is_named_with_how_to_make_it(tmp_path: Path) -> None:
    def fails(spec: Path, message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            load_scenes(spec, options.pop("split", "train"), **options)

    fails(tmp_path / "gone", "no such file or folder.*leanvit data compose")
    fails(tmp_path, r"no annotations found, expected train\.json, .*leanvit data compose")
    root = composed(tmp_path / "composed")
    (root / "val.json").unlink()
    fails(root, r"val\.json: no such file", split="val")
    fails(root / "train.json", "expected a folder, or a data.yaml")
    (root / "images" / "train" / "a.jpg").unlink()
    fails(root, "its pictures are not there, expected e.g. 'a.jpg'")
    data = yolo(tmp_path / "yolo", "0 0.5 0.5 0.25 0.5")
    fails(data, "no category has keypoints", task="pose")
    fails(data, "no object has a mask", task="segment")
    fails(data, "a file, expected a folder with class maps", task="semantic")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text("{}")
    fails(tmp_path / "coco", r"none of instances_train\*\.json found")
