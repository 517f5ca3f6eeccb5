"""Annotation files as programs write them: separators of Windows, ids as text, area 0, marks, masks of 0 and 255."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from leanvit.annotations.coco import read_coco
from leanvit.annotations.load import load_scenes, note_problems
from leanvit.annotations.maps import read_maps
from leanvit.annotations.yolo import read_yolo
from leanvit.errors import PartialError
from leanvit.passed_over import gathering
from toy_scenes import annotation, class_map, document, picture


def write(folder: Path, content: dict[str, object], mark: str = "") -> Path:
    path = folder / "train.json"
    path.write_text(mark + json.dumps(content))
    return path


def test_names_with_backslashes_are_found_and_a_mark_is_read_over(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "a.png")
    entry = {"id": 7, "file_name": "images\\train\\a.png", "height": 40, "width": 60}
    write(tmp_path, document(annotation(), images=[entry]), "\ufeff")
    found = load_scenes(tmp_path, "train")
    assert found.problems == ()
    assert found.scenes[0].path == tmp_path / "images" / "train" / "a.png"


def test_a_box_without_a_mask_may_have_area_0(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path, document(annotation(area=0, segmentation=[]), annotation(2, area=0.0, segmentation=None)))
    found = read_coco(path, tmp_path)
    assert [one.area for one in found.scenes[0].instances] == [600, 600]
    assert found.problems == ()


@pytest.mark.parametrize(("ids", "expected"), [(("12", "7"), (12, 7)), (("img_b", "img_a"), (1, 2))])
def test_ids_that_are_text_throughout_are_read(ids: tuple[str, str], expected: tuple[int, int], tmp_path: Path) -> None:
    names = ("a.png", "b.png")
    for name in names:
        picture(tmp_path / name)
    images = [{"id": one, "file_name": name, "height": 40, "width": 60} for one, name in zip(ids, names, strict=True)]
    boxes = [annotation(number, image_id=ids[1]) for number in ("x1", "x2")]
    found = read_coco(write(tmp_path, document(*boxes, annotation("x3", image_id="other"), images=images)), tmp_path)
    assert tuple(scene.image_id for scene in found.scenes) == expected
    assert [len(scene.instances) for scene in found.scenes] == [0, 2]
    (problem,) = found.problems
    assert "image_id 'other' is not among the images" in problem


def test_yolo_rows_of_windows_mix_boxes_and_polygons(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "IMG.JPG", 40, 80)
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    rows = "\ufeff0 0.5 0.5 0.25 0.5\r\n1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\r\n"
    (labels / "IMG.txt").write_text(rows, encoding="utf-8", newline="")
    (labels / "gone.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (labels / "classes.txt").write_text("cat\ndog\n")
    settings = {"path": ".", "train": "images\\train", "names": ["cat", "dog"]}
    (tmp_path / "data.yaml").write_text("\ufeff" + yaml.safe_dump(settings))
    found = read_yolo(tmp_path / "data.yaml", "train")
    assert [(one.label, one.box) for one in found.scenes[0].instances] == [(0, (30, 10, 50, 30)), (1, (20, 10, 60, 30))]
    (problem,) = found.problems
    assert problem.startswith(f"{labels / 'gone.txt'}: no picture of these labels")


def maps(root: Path, values: object) -> Path:
    picture(root / "images" / "train" / "a.png", 4, 4)
    class_map(root / "masks" / "train" / "a.png", values)
    (root / "classes.txt").write_text("background\ndefect\n")
    return root


def test_a_class_without_a_pixel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_maps(maps(tmp_path, np.diag([255] * 4)), "train")
    err = capsys.readouterr().err
    assert "1 of 2 classes have no pixel in the 1 class maps looked at: defect; 255 means that no class is known" in err
    read_maps(maps(tmp_path, np.diag([1] * 4)), "train")
    assert capsys.readouterr().err == ""


def test_pictures_of_linked_folders_have_their_maps(tmp_path: Path) -> None:
    root, store = maps(tmp_path / "set", np.diag([1] * 4)), maps(tmp_path / "store", np.eye(4))
    for part in ("images", "masks"):
        (root / part / "train" / "more").symlink_to(store / part / "train")
    assert len(read_maps(root, "train").scenes) == 2


def test_what_is_left_out_counts_and_a_box_that_is_clipped_does_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    clipped = annotation(bbox=[-5, 5, 20, 30])
    with gathering() as gathered:
        note_problems(read_coco(write(tmp_path, document(clipped)), tmp_path))
        gathered.require_none()
        note_problems(read_coco(write(tmp_path, document(clipped, annotation(2, category_id=99))), tmp_path))
    with pytest.raises(PartialError, match=r"1 was left out .*category 99 is unknown"):
        gathered.require_none()
