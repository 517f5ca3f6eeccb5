"""COCO files: toy sets built by hand, every broken kind named, round trips, results against pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from leanvit.annotations import Found, Instance, KeypointScheme, Scene, SceneSet
from leanvit.annotations.checks import picture_size
from leanvit.annotations.coco import read_coco, results_to_coco, write_coco
from leanvit.annotations.keypoints import COCO_NAMES, keypoint_scheme, swapped_by_name
from leanvit.errors import DataError
from toy_scenes import NOSE, annotation, document, picture

NAN = float("nan")


def written(folder: Path, content: Any) -> Path:
    picture(folder / "pictures" / "a.png")
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return path


def read(folder: Path, content: Any, **options: Any) -> SceneSet:
    return read_coco(written(folder, content), folder / "pictures", **options)


# --- COCO ---


def test_a_coco_file_is_read_as_it_stands(tmp_path: Path) -> None:
    crowd = {"size": [40, 60], "counts": [100, 50, 2250]}
    found = read(
        tmp_path,
        document(annotation(), annotation(2, category_id=3, iscrowd=1, segmentation=crowd, keypoints=None, area=50)),
    )
    assert found.problems == ()
    assert (found.classes, found.category_ids) == (("dog", "cat"), (3, 20))
    assert found.keypoints == KeypointScheme(tuple(NOSE), (0, 2, 1), (0.05,) * 3, ((0, 1), (0, 2)))
    (scene,) = found.scenes
    assert (scene.image_id, scene.size, scene.path) == (7, (40, 60), tmp_path / "pictures" / "a.png")
    cat, group = scene.instances
    assert (cat.label, cat.box, cat.area, cat.crowd) == (1, (10, 5, 30, 35), 600, False)
    np.testing.assert_array_equal(cat.keypoints, np.float32([[12, 8, 2], [0, 0, 0], [29, 30, 1]]))
    assert (group.label, group.crowd, group.segmentation, group.keypoints) == (0, True, crowd, None)


def test_an_area_that_is_not_stated_is_counted(tmp_path: Path) -> None:
    runs = {"size": [40, 60], "counts": [100, 50, 2250]}
    triangle = [[10, 5, 30, 5, 10, 35]]
    entries = [annotation(1, segmentation=runs), annotation(2, segmentation=triangle), annotation(3, segmentation=[])]
    for entry in entries:
        del entry["area"]
    found = read(tmp_path, document(*entries)).scenes[0].instances
    assert [instance.area for instance in found] == [50, 300, 600]
    assert found[2].segmentation is None


def test_the_person_of_coco_has_its_sigmas_and_mirrored_pairs() -> None:
    scheme = keypoint_scheme(COCO_NAMES)
    with contextlib.redirect_stdout(io.StringIO()):
        from pycocotools.cocoeval import Params
    np.testing.assert_allclose(scheme.sigmas, Params(iouType="keypoints").kpt_oks_sigmas)
    assert scheme.swapped == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert keypoint_scheme(COCO_NAMES[:5]).sigmas == (0.05,) * 5
    assert swapped_by_name(("Left_Paw", "right_paw", "tail", "left_ear", "sleeve left", "sleeve right")) == (
        1, 0, 2, 3, 5, 4)  # fmt: skip


BROKEN_ANNOTATIONS: list[tuple[str, Any, str]] = [
    ("wholly outside", annotation(2, bbox=[70, 5, 10, 10]), "(70, 5, 80, 15) lies wholly outside"),
    ("above", annotation(2, bbox=[5, -20, 10, 20]), "lies wholly outside the picture of 60 x 40 pixels"),
    ("no width", annotation(2, bbox=[10, 5, 0, 30]), "zero or negative area, expected x1 < x2"),
    ("negative height", annotation(2, bbox=[10, 5, 10, -3]), "zero or negative area"),
    ("area 0", annotation(2, area=0), "area is 0, expected more than 0"),
    ("area negative", annotation(2, area=-4), "area is -4"),
    ("nan", annotation(2, bbox=[10, NAN, 10, 3]), "bbox holds nan, expected finite numbers"),
    ("infinite", annotation(2, bbox=[10, 5, float("inf"), 3]), "bbox holds inf"),
    ("huge", annotation(2, bbox=[10, 5, 10**400, 3]), "bbox holds 1000"),
    ("text", annotation(2, bbox=[10, 5, "20", 3]), "bbox holds '20'"),
    ("three values", annotation(2, bbox=[10, 5, 20]), "bbox has 3 values, expected 4 numbers"),
    ("no box", annotation(2, bbox=None), "bbox is None, expected 4 numbers"),
    ("category", annotation(2, category_id=4), "category 4 is unknown, expected one of [3, 20]"),
    ("category list", annotation(2, category_id=[20]), "category [20] is unknown"),
    ("image", annotation(2, image_id=8), "image_id 8 is not among the images"),
    ("image text", annotation(2, image_id="7"), "image_id '7' is not among the images"),
    ("twice", annotation(1), "annotation 1 of a.png: this id was there before"),
    ("no id", annotation(None), "annotation None of a.png: found {"),
    ("no entry", "text", "found 'text', expected a dictionary"),
    ("RLE size", annotation(2, segmentation={"size": [60, 40], "counts": [2400]}), "RLE has size [60, 40], expected"),
    ("RLE short", annotation(2, segmentation={"size": [40, 60], "counts": [5, 9]}), "cover 14 pixels, expected all 24"),
    ("RLE empty", annotation(2, segmentation={"size": [40, 60], "counts": [2400]}), "area of 0 pixels"),
    ("two points", annotation(2, segmentation=[[1, 1, 5, 5]]), "polygon has 4 values, expected x and y of at least 3"),
    ("point nan", annotation(2, segmentation=[[1, 1, 5, 5, 1, NAN]]), "polygon holds nan"),
    ("keypoints short", annotation(2, keypoints=[1, 1, 2]), "keypoints have 3 values, expected 9"),
    ("keypoints long", annotation(2, keypoints=[1, 1, 2] * 4), "keypoints have 12 values, expected 9"),
    ("visibility", annotation(2, keypoints=[1, 1, 3, 0, 0, 0, 0, 0, 0]), "visibility 3.0, expected 0, 1 or 2"),
    ("keypoint outside", annotation(2, keypoints=[61, 1, 2, 0, 0, 0, 0, 0, 0]), "keypoint lies at (61, 1), expected"),
    ("keypoint nan", annotation(2, keypoints=[NAN, 1, 0, 0, 0, 0, 0, 0, 0]), "keypoints holds nan"),
]


@pytest.mark.parametrize(
    ("entry", "message"), [b[1:] for b in BROKEN_ANNOTATIONS], ids=[b[0] for b in BROKEN_ANNOTATIONS]
)
def test_every_broken_annotation_is_named_and_left_out(tmp_path: Path, entry: Any, message: str) -> None:
    content = document(annotation(), entry, annotation(99, category_id=3))
    found = read(tmp_path, content)
    assert [instance.label for instance in found.scenes[0].instances] == [1, 0]
    (problem,) = found.problems
    assert message in problem
    assert problem.startswith(f"{tmp_path / 'set.json'}: annotation ")
    assert problem.endswith("left out")
    with pytest.raises(DataError, match="1 such problems in all"):
        read(tmp_path, content, on_problem="fail")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=12,
)


@given(st.sampled_from(["images", "annotations"]), st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_stands_in_a_field_is_read_or_named(key: str, data: st.DataObject) -> None:
    content = document(annotation())
    field = data.draw(st.sampled_from(sorted(content[key][0])))
    content[key][0][field] = data.draw(JSON_VALUES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_text(json.dumps(content))
        found = read_coco(path, folder, check_files=False)
    assert found.problems or [len(scene.instances) for scene in found.scenes] == [1]


def test_a_box_partly_outside_is_clipped_and_named(tmp_path: Path) -> None:
    found = read(tmp_path, document(annotation(bbox=[-5, 5, 20, 50])))
    assert found.scenes[0].instances[0].box == (0, 5, 15, 40)
    assert "annotation 1 of a.png: box (-5, 5, 15, 55) lies partly outside" in found.problems[0]
    rounded = read(tmp_path, document(annotation(bbox=[50, 5, 10.01, 10])))
    assert rounded.scenes[0].instances[0].box == (50, 5, 60, 15)
    assert rounded.problems == ()


IMAGE = {"id": 8, "file_name": "b.png", "height": 40, "width": 60}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**IMAGE, "file_name": "missing.png"}, "image 8 (missing.png): no such image file"),
        ({**IMAGE, "height": 60, "width": 40}, "image 8 (b.png): the file has 60 x 40 pixels, expected 40 x 60"),
        ({**IMAGE, "file_name": "text.png"}, "image 8 (text.png): the image can't be read"),
        ({**IMAGE, "width": None}, "image 8 (b.png): height and width are (40, None), expected whole numbers"),
        ({**IMAGE, "height": 0}, "height and width are (0, 60)"),
        ({**IMAGE, "id": 7}, "image 7 (b.png): this id was there before"),
        ({**IMAGE, "id": "8"}, "image '8' (b.png): found {"),
        ({**IMAGE, "file_name": ""}, "expected a whole number as id and a file_name"),
        (5, "image None (no file name): found 5"),
    ],
)
def test_every_broken_picture_is_named_and_left_out(tmp_path: Path, entry: Any, message: str) -> None:
    picture(tmp_path / "pictures" / "b.png")
    (tmp_path / "pictures" / "text.png").write_text("no picture")
    content = document(annotation())
    content["images"].append(entry)
    found = read(tmp_path, content)
    assert [scene.image_id for scene in found.scenes] == [7]
    (problem,) = found.problems
    assert message in problem


def test_annotations_of_a_picture_left_out_are_not_named_again_and_files_need_not_be_looked_at(tmp_path: Path) -> None:
    content = document(annotation(), annotation(2, image_id=8))
    content["images"].append(IMAGE)
    found = read(tmp_path, content)
    assert len(found.scenes) == len(found.problems) == 1
    assert len(read(tmp_path, content, check_files=False).scenes) == 2


def test_all_problems_are_counted_where_they_are_fatal(tmp_path: Path) -> None:
    content = document(annotation(bbox=[70, 5, 10, 10]), annotation(2, area=0), annotation(3))
    assert len(read(tmp_path, content).problems) == 2
    with pytest.raises(DataError, match=r"annotation 1 of a\.png: box .* \(2 such problems in all\)"):
        read(tmp_path, content, on_problem="fail")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [,]}', "line 2: damaged JSON"),
        ('{"images": [],\n', "line 2: damaged JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        (json.dumps(document(categories=[])), "0 categories"),
        (json.dumps(document(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])), "2 categories with 1 ids"),
        (json.dumps(document(categories=[{"id": "1", "name": "a"}])), "expected a whole number as id and a name"),
    ],
)
def test_a_file_that_is_no_coco_file_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_coco(path, tmp_path)


def test_a_missing_file_and_bytes_that_are_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_coco(tmp_path / "none.json", tmp_path)
    (tmp_path / "set.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="no JSON in UTF-8"):
        read_coco(tmp_path / "set.json", tmp_path)


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"keypoints": "nose"}, "keypoints 'nose', expected a list of names"),
        ({"keypoints": NOSE, "skeleton": [[0, 1]]}, "expected pairs of numbers from 1 to 3"),
        ({"keypoints": NOSE, "swapped": [1, 2, 0]}, "expected 3 indices that exchange pairs"),
        ({"keypoints": NOSE, "sigmas": [0.1, 0.1, 0]}, "expected numbers above 0"),
        ({"keypoints": ["tail"]}, "expected those of the first category"),
    ],
)
def test_a_broken_scheme_of_keypoints_is_named_and_its_boxes_stay(
    tmp_path: Path, category: dict[str, Any], message: str
) -> None:
    good = {"id": 3, "name": "dog", "keypoints": NOSE}
    content = document(annotation(), categories=[good, {"id": 20, "name": "cat", **category}])
    found = read(tmp_path, content)
    assert message in found.problems[0]
    assert "category 20 (cat)" in found.problems[0]
    assert found.scenes[0].instances[0].keypoints is None


def test_a_picture_taken_with_a_turned_camera_has_the_size_that_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
        assert picture_size(tmp_path / name) == (60, 40)
    assert picture_size(picture(tmp_path / "b.png")) == (40, 60)


# --- writing and results ---


@st.composite
def scene_sets(draw: st.DrawFn) -> SceneSet:
    classes = draw(st.integers(1, 4))
    ids = tuple(sorted(draw(st.sets(st.integers(0, 99), min_size=classes, max_size=classes))))
    points = draw(st.integers(0, 3))
    scheme = keypoint_scheme(
        tuple(f"point {i}" for i in range(points)), swapped=tuple(reversed(range(points))), sigmas=(0.07,) * points
    )
    scenes = []
    for number in draw(st.lists(st.integers(0, 999), unique=True, max_size=3)):
        height, width = draw(st.tuples(st.integers(8, 90), st.integers(8, 90)))
        instances = tuple(draw(instance(classes, points, height, width)) for _ in range(draw(st.integers(0, 3))))
        scenes.append(Scene(Path("pictures/in") / f"{number}.png", number, (height, width), instances))
    return SceneSet("set", tuple(scenes), tuple(f"class {i}" for i in range(classes)), ids, scheme if points else None)


@st.composite
def instance(draw: st.DrawFn, classes: int, points: int, height: int, width: int) -> Instance:
    x1, y1 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    runs = coco_mask.encode(mask)
    runs = {"size": runs["size"], "counts": runs["counts"].decode()}
    segmentation = draw(st.sampled_from([None, runs, [[x1, y1, x2, y1, x2, y2]]]))
    keypoints = np.float32([[x1, y1, draw(st.integers(0, 2))] for _ in range(points)]).reshape(points, 3)
    return Instance(
        draw(st.integers(0, classes - 1)), (x1, y1, x2, y2), segmentation, keypoints if points else None,
        float(draw(st.integers(1, 99))), draw(st.booleans()),
    )  # fmt: skip


@given(scene_sets())
@settings(deadline=None, max_examples=50)
def test_what_is_written_is_read_again(scene_set: SceneSet) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        write_coco(scene_set, path, "pictures")
        found = read_coco(path, "pictures", check_files=False)
        entries = json.loads(path.read_text())["annotations"]
    assert found.problems == ()
    assert [entry["id"] for entry in entries] == list(range(1, len(entries) + 1))
    assert (found.classes, found.category_ids, found.keypoints) == (
        scene_set.classes, scene_set.category_ids, scene_set.keypoints)  # fmt: skip
    for before, after in zip(scene_set.scenes, found.scenes, strict=True):
        assert replace(before, instances=()) == replace(after, instances=())
        for one, other in zip(before.instances, after.instances, strict=True):
            assert replace(one, keypoints=None) == replace(other, keypoints=None)
            np.testing.assert_array_equal(one.keypoints, other.keypoints)


def test_a_picture_outside_the_folder_can_not_be_written(tmp_path: Path) -> None:
    scene_set = SceneSet("set", (Scene(Path("elsewhere/a.png"), 1, (5, 5)),), ("a",))
    with pytest.raises(DataError, match="not below"):
        write_coco(scene_set, tmp_path / "set.json", tmp_path)


def test_results_are_what_pycocotools_loads(tmp_path: Path) -> None:
    scene_set = read(tmp_path, document(annotation()))
    mask = np.zeros((40, 60), bool)
    mask[5:35, 10:30] = True
    points = np.float32([[1, 2, 0.5], [3, 4, 0.25], [5, 6, 1]])
    found = {7: [Found(1, 0.75, (10, 5, 30, 35), mask, points), Found(0, np.float32(0.5), (0, 0, 4, 8))]}
    results = json.loads(json.dumps(results_to_coco(scene_set, found)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "set.json")
        loaded = truth.loadRes(results)
    cat, dog = loaded.anns[1], loaded.anns[2]
    assert (cat["category_id"], cat["bbox"], cat["score"]) == (20, [10, 5, 20, 30], 0.75)
    assert cat["keypoints"] == [1, 2, 0.5, 3, 4, 0.25, 5, 6, 1]
    np.testing.assert_array_equal(loaded.annToMask(cat), mask)
    assert (dog["category_id"], dog["bbox"], dog["score"], dog["image_id"]) == (3, [0, 0, 4, 8], 0.5, 7)
    with pytest.raises(DataError, match="results for image 8"):
        results_to_coco(scene_set, {8: []})
    with pytest.raises(DataError, match="label 2 found, expected 0 to 1"):
        results_to_coco(scene_set, {7: [Found(2, 0.5, (0, 0, 4, 8))]})
