"""`leanvit data inspect --task`: counts are those of toy sets made by hand, every planted defect is named."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from common import Outcome, save_image, smooth
from leanvit.annotations import Instance, Scene, SceneSet
from leanvit.cli import parse
from leanvit.inspection.annotated_page import draw_annotated
from pages import Page, rows_of
from toy_scenes import NOSE, class_map

Run = Callable[..., Outcome]


def box(number: int, image: int, label: int, x: int, y: int, w: int, h: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": label, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], **changes}  # fmt: skip


def write_split(root: Path, split: str, pictures: int, annotations: list[dict[str, Any]]) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    for i in range(pictures):
        save_image(folder / f"{i}.png", smooth(100, 200, seed=len(split) * 1000 + i))
    categories = [{"id": 20, "name": "cat", "keypoints": NOSE, "skeleton": [[1, 2], [1, 3]]}, {"id": 3, "name": "dog"}]
    images = [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 200} for i in range(pictures)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(document))


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """Four training and two validation pictures with objects, keypoints and one defect of each kind."""
    root = tmp_path / "toys"
    train = [
        box(1, 0, 20, 10, 10, 50, 50, keypoints=[12, 12, 2, 20, 20, 1, 0, 0, 0]),
        box(2, 0, 3, 100, 20, 20, 20),
        box(3, 0, 20, 60, 10, 4, 4, keypoints=[61, 11, 2, 62, 12, 2, 63, 13, 2]),
        box(4, 1, 20, 0, 0, 100, 100),
        box(5, 1, 3, 50, 50, 40, 40, iscrowd=1, segmentation={"size": [100, 200], "counts": [100, 900, 19000]}),
        box(6, 2, 20, 500, 10, 20, 20),  # outside
        box(7, 2, 77, 10, 10, 20, 20),  # no such class
    ]
    write_split(root, "train", 4, train)
    write_split(root, "val", 2, [box(1, 0, 3, 10, 10, 30, 30)])
    shutil.copy(root / "images" / "train" / "0.png", root / "images" / "val" / "1.png")
    whole = (root / "images" / "train" / "3.png").read_bytes()
    (root / "images" / "train" / "3.png").write_bytes(whole[: len(whole) // 2])
    return root


def inspect(leanvit: Run, root: Path, task: str, *options: object) -> tuple[Outcome, dict[str, Any], str]:
    out = root.parent / "out"
    done = leanvit("data", "inspect", root, "--task", task, "--output", out, *options)
    return done, json.loads((out / "inspect.json").read_text()), (out / "inspect.html").read_text()


def test_objects_boxes_and_pictures_are_counted(toys: Path, leanvit: Run) -> None:
    _, result, page = inspect(leanvit, toys, "detect")
    train, val = result["parts"]["train"], result["parts"]["val"]
    assert (result["task"], result["classes"], result["data"]) == ("detect", ["dog", "cat"], str(toys))
    assert (train["images"], train["objects"], train["crowds"]) == (4, 4, 1)
    assert (val["images"], val["objects"], val["crowds"]) == (2, 1, 0)
    assert (train["per_class"], val["per_class"]) == ({"cat": 3, "dog": 1}, {"cat": 0, "dog": 1})
    assert train["objects_per_picture"] == {"0": 2, "1": 1, "3": 1}
    assert train["width"] == {"min": 200, "median": 200.0, "max": 200}
    pixels, relative = train["boxes"]["pixels"], train["boxes"]["relative"]
    sides = [50, 20, 4, 100]
    for found, scale in ((pixels, 1.0), (relative, (100 * 200) ** -0.5)):
        truth, _ = np.histogram(np.array(sides) * scale, [*found["edges"], np.inf])
        assert found["counts"] == truth.tolist()
        assert sum(found["counts"]) == 4
        assert found["median"] == pytest.approx(35 * scale)
    assert [train["boxes"][size] for size in ("small", "medium", "large")] == [2, 1, 1]
    assert (train["keypoints"], train["pixels"]) == (None, None)
    rows = rows_of(page)
    assert ["cat", "3", "0"] in rows
    assert ["train", "35.0", "24.7", "2", "1", "1"] in rows


def test_every_problem_is_named_in_json_page_and_terminal(toys: Path, leanvit: Run) -> None:
    done, result, page = inspect(leanvit, toys, "detect")
    problems = result["parts"]["train"]["problems"]
    assert len(problems) == 2
    assert any("outside" in problem for problem in problems)
    assert any("77" in problem for problem in problems)
    for problem in problems:
        assert f"problem: {problem}" in done.out
        assert escape(problem) in page
    assert result["parts"]["val"]["problems"] == []


def test_a_picture_that_cant_be_decoded_and_one_in_both_parts_are_named(toys: Path, leanvit: Run) -> None:
    done, result, page = inspect(leanvit, toys, "detect")
    bad = str(toys / "images" / "train" / "3.png")
    assert done.code == 6
    assert f"1 of 6 images can't be read: {bad}; all others were looked at." in done.error
    assert [one["image"] for one in result["parts"]["train"]["corrupt"]] == [bad]
    assert (result["duplicates"]["extra"], result["duplicates"]["leaks"]) == (1, 1)
    (group,) = result["duplicates"]["groups"]
    assert [(one["part"], one["image"]) for one in group["images"]] == [
        ("train", str(toys / "images" / "train" / "0.png")), ("val", str(toys / "images" / "val" / "1.png")),
    ]  # fmt: skip
    assert "1 duplicates, in 1 groups: 1 are in both parts" in done.out
    assert "images/val/1.png (val)" in page


def test_at_most_fifty_problems_are_shown_and_all_are_kept(tmp_path: Path, leanvit: Run) -> None:
    root = tmp_path / "toys"
    write_split(
        root, "train", 2, [box(i, 0, 20, 500 + i, 10, 5, 5) for i in range(1, 71)] + [box(99, 1, 3, 1, 1, 9, 9)]
    )
    write_split(root, "val", 1, [box(1, 0, 3, 1, 1, 9, 9)])
    done, result, page = inspect(leanvit, root, "detect")
    assert done.code == 6, done.err
    assert len(result["parts"]["train"]["problems"]) == 70
    assert done.out.count("problem: ") == 50
    assert "20 more problems: inspect.json names them all" in done.out
    assert "The first 50 of 70" in page
    assert len([row for row in rows_of(page) if row[0] == "train" and "outside" in row[-1]]) == 50


def test_visibility_of_keypoints_is_counted(toys: Path, leanvit: Run) -> None:
    _, result, page = inspect(leanvit, toys, "pose")
    assert result["keypoints"] == NOSE
    found = result["parts"]["train"]["keypoints"]
    assert found["visibility"] == {
        "nose": {"absent": 0, "hidden": 0, "visible": 2},
        "left_eye": {"absent": 0, "hidden": 1, "visible": 1},
        "right_eye": {"absent": 1, "hidden": 0, "visible": 1},
    }
    assert found["objects_without"] == 2
    assert ["right_eye", "1", "0", "1", "0", "0", "0"] in rows_of(page)


def test_objects_without_a_mask_are_named(toys: Path, leanvit: Run) -> None:
    values = json.loads((toys / "train.json").read_text())
    del values["annotations"][1]["segmentation"]
    (toys / "train.json").write_text(json.dumps(values))
    _, result, _ = inspect(leanvit, toys, "segment")
    assert any("without a mask" in problem for problem in result["parts"]["train"]["problems"])
    assert result["parts"]["train"]["objects"] == 3


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Class maps of which a quarter is dog, an eighth unknown and the rest cat."""
    root = tmp_path / "maps"
    for split, count in (("train", 3), ("val", 1)):
        (root / "images" / split).mkdir(parents=True)
        for i in range(count):
            save_image(root / "images" / split / f"{i}.png", smooth(40, 80, seed=len(split) * 10 + i))
            values = np.zeros((40, 80), np.uint8)
            values[:10], values[10:15] = 1, 255
            class_map(root / "masks" / split / f"{i}.png", values)
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    return root


def test_shares_of_pixels_are_those_of_the_maps(maps: Path, leanvit: Run) -> None:
    class_map(maps / "masks" / "train" / "2.png", np.full((40, 80), 9))  # 9 is no class
    done, result, page = inspect(leanvit, maps, "semantic")
    train, val = result["parts"]["train"], result["parts"]["val"]
    assert val["pixels"] == {"maps": 1, "shares": {"cat": 0.625, "dog": 0.25, "eel": 0.0}, "ignored": 0.125}
    assert train["pixels"]["maps"] == 3
    assert train["pixels"]["shares"]["dog"] == pytest.approx(0.25 * 2 / 3)
    assert train["pixels"]["ignored"] == pytest.approx((0.125 * 2 + 1) / 3)
    assert any("9 in the map" in problem for problem in train["problems"])
    assert train["boxes"] is None
    assert ["dog", "16.67", "25.00"] in rows_of(page)
    assert "share of pixels" in done.out
    assert "25.00%" in done.out


def test_the_sheet_shows_the_annotations_of_readable_pictures(toys: Path, leanvit: Run) -> None:
    _, _, text = inspect(leanvit, toys, "detect", "--images-per-class", 3)
    page = Page(text)
    shown = {image["alt"]: image["src"] for image in page.all("img")}
    assert set(shown) == {
        "train, 0.png: 3 objects", "train, 1.png: 1 object", "train, 2.png: 0 objects",
        "val, 0.png: 1 object", "val, 1.png: 0 objects",
    }  # fmt: skip

    def pixels(name: str) -> np.ndarray:
        data = base64.b64decode(shown[name].removeprefix("data:image/jpeg;base64,"))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    plain = Image.open(toys / "images" / "train" / "2.png").convert("RGB").resize((512, 256), Image.Resampling.BICUBIC)
    assert np.abs(pixels("train, 2.png: 0 objects") - np.asarray(plain)).mean() < 4
    drawn = pixels("train, 1.png: 1 object")
    plain = Image.open(toys / "images" / "train" / "1.png").convert("RGB").resize((512, 256), Image.Resampling.BICUBIC)
    apart = np.abs(drawn - np.asarray(plain)).sum(axis=2) > 90
    assert apart[:, 252:257].mean() > 0.3  # the right side of the box, at x = 100 of 200
    assert apart[:, 300:].mean() < 0.01


def test_the_sheet_can_be_left_out_and_depends_on_the_seed_only(toys: Path, leanvit: Run) -> None:
    def page(*options: object) -> str:
        return inspect(leanvit, toys, "detect", "--images-per-class", 1, *options)[2]

    assert page() == page()
    assert any(page() != page("--seed", seed) for seed in (1, 2, 3))
    assert "<img" not in page("--images-per-class", 0)


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "semantic"])
def test_annotations_are_drawn_as_the_task_uses_them(tmp_path: Path, task: str) -> None:
    path = save_image(tmp_path / "a.png", np.full((500, 500, 3), 128, np.uint8))
    labels = class_map(tmp_path / "map.png", np.pad(np.ones((100, 100)), ((0, 400), (0, 400))))
    points = np.array([[300, 300, 2], [0, 0, 0]], np.float32)
    one = Instance(0, (100.0, 100.0, 200.0, 200.0), [[110, 110, 190, 110, 190, 190, 110, 190]], points, 6400.0)
    group = Instance(0, (400.0, 400.0, 480.0, 480.0), crowd=True)
    scene = Scene(path, 1, (500, 500), (one, group), labels)
    scenes = SceneSet("set", (scene,), ("cat", "dog"), map_values={0: 0, 1: 1})
    drawn, _ = draw_annotated(scene, scenes, task)
    changed = (drawn[:500] != 128).any(axis=2)
    assert changed[150, 100]
    assert changed[150, 150] == (task in ("segment", "semantic"))
    assert changed[300, 300] == (task in ("pose", "semantic"))
    assert changed[440, 400] == (task == "semantic")  # crowds are not drawn
    assert drawn.shape[0] == 500 or task == "semantic"


def test_json_is_printed_and_nothing_else(toys: Path, leanvit: Run) -> None:
    done, result, _ = inspect(leanvit, toys, "detect", "--json")
    assert json.loads(done.out) == result


def test_other_classes_in_the_other_part_are_named(toys: Path, leanvit: Run) -> None:
    values = json.loads((toys / "val.json").read_text())
    values["categories"] = [{"id": 3, "name": "dog"}]
    (toys / "val.json").write_text(json.dumps(values))
    done, result, page = inspect(leanvit, toys, "detect")
    assert "has classes dog... (1), expected those of" in result["parts"]["val"]["problems"][0]
    assert ["cat", "3", "–"] in rows_of(page)
    assert "has classes dog" in done.out


@pytest.mark.parametrize(
    ("task", "damage", "code", "words"),
    [
        ("detect", "gone", 3, "no such file"),
        ("detect", "broken", 3, "train.json"),
        ("semantic", "none", 3, "no pictures with class maps found"),
        ("boxes", "none", 2, "task"),
    ],
)
def test_data_that_cant_be_read_is_one_line(
    toys: Path, leanvit: Run, task: str, damage: str, code: int, words: str
) -> None:
    if damage == "gone":
        (toys / "val.json").unlink()
    if damage == "broken":
        (toys / "train.json").write_text("{")
    done = leanvit("data", "inspect", toys, "--task", task, "--output", toys.parent / "out")
    assert done.code == code, done.err
    assert words in done.error
    assert not (toys.parent / "out" / "inspect.json").exists()


def test_without_a_task_the_data_is_that_of_a_classifier() -> None:
    assert parse("data inspect", ["digits"]).task == "classify"
    assert parse("data inspect", ["digits", "--task", "pose"]).task == "pose"
