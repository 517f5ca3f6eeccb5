"""val of detectors, segmenters and pose networks: parts of a set, bad pictures, corrupted and moved ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import jaccard_score

from common import Outcome
from leanvit import Predictor
from leanvit.annotations.maps import load_map
from leanvit.config import Preprocess
from leanvit.errors import DataError, ImageError
from leanvit.evaluation.corruptions import corrupt
from leanvit.evaluation.measure import translate
from leanvit.evaluation.scenes import SceneReader
from leanvit.runtime.decode import class_map, crop_region
from leanvit.runtime.inputs import Options, Place, letterboxed, moved
from leanvit.runtime.letterbox import place, to_network, to_picture
from leanvit.runtime.task import TASKS
from toy_tasks import ToyTasks

pytest_plugins = ("toy_tasks",)

Run = Callable[..., Outcome]
METRICS = {"detect": "box_AP50", "semantic": "miou", "pose": "pck@0.1"}


def val(leanvit: Run, *arguments: Any, code: int = 0) -> Any:
    found = leanvit("val", *arguments, "--json")
    assert found.code == code, found.err
    return json.loads(found.out)


@pytest.mark.parametrize("task", METRICS)
def test_batch_threads_and_runtime_change_no_metric(task: str, toys: ToyTasks, leanvit: Run) -> None:
    given = (toys.bundle(task, "fp32"), "--data", toys.scenes)
    name, whole = METRICS[task], val(leanvit, *given)
    for more in (("--batch-size", 1), ("--threads", 1), ("--runtime", "auto")):
        assert val(leanvit, *given, *more)[name] == pytest.approx(whole[name], abs=1e-6), more


def test_a_limit_draws_pictures_by_the_seed_and_measures_those_alone(toys: ToyTasks, leanvit: Run) -> None:
    bundle, scenes = toys.bundle("semantic", "fp32"), toys.split("semantic", "val")
    found = val(leanvit, bundle, "--data", toys.scenes, "--limit", 3, "--seed", 5)
    assert found["pictures"] == 3
    drawn = sorted(np.random.default_rng(5).permutation(8)[:3])
    predictor, truth, maps = Predictor(bundle), [], []
    for number in drawn:
        truth.append(load_map(scenes.scenes[number], scenes).ravel())
        maps.append(predictor.predict(scenes.scenes[number].path).ravel())
    expected = jaccard_score(np.concatenate(truth), np.concatenate(maps), average="macro")
    assert found["miou"] == pytest.approx(expected, abs=1e-6)


def test_bad_pictures_are_counted_and_named_and_take_no_part(toys: ToyTasks, tmp_path: Path, leanvit: Run) -> None:
    shutil.copytree(toys.scenes, tmp_path / "scenes")
    broken = tmp_path / "scenes" / "images" / "val" / "00002.png"
    broken.write_bytes(broken.read_bytes()[:80])
    bundle = toys.bundle("detect", "fp32")
    failed = leanvit("val", bundle, "--data", tmp_path / "scenes")
    assert failed.code == 3
    assert "00002.png" in failed.error
    assert "--bad-images skip" in failed.error
    output = tmp_path / "out"
    found = val(leanvit, bundle, "--data", tmp_path / "scenes", "--bad-images", "skip", "--output", output, code=6)
    assert (found["pictures"], found["left_out"]) == (7, [str(broken)])
    assert json.loads((output / "val.json").read_text())["left_out"] == [str(broken)]
    # The objects of the picture that is left out must not count as missed.
    lines = tmp_path / "lines.jsonl"
    others = [path for path in sorted(broken.parent.iterdir()) if path != broken]
    assert leanvit("predict", bundle, *others, "--score-threshold", 0, "--output", lines).code == 0
    truth = COCO(str(tmp_path / "scenes" / "val.json"))
    images = {Path(image["file_name"]).name: image["id"] for image in truth.dataset["images"]}
    categories = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    results = []
    for line in map(json.loads, lines.read_text().splitlines()):
        for one in line["objects"]:
            x1, y1, x2, y2 = one["box"]
            results.append({"image_id": images[Path(line["path"]).name], "category_id": categories[one["label"]],
                            "score": one["score"], "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.params.imgIds = [number for name, number in images.items() if name != broken.name]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert found["box_AP50"] == pytest.approx(evaluation.stats[1], abs=2e-3)


def test_corrupted_pictures_have_a_row_each_of_the_same_annotations(
    toys: ToyTasks, tmp_path: Path, leanvit: Run
) -> None:
    bundle, scenes = toys.bundle("semantic", "fp32"), toys.split("semantic", "val")
    given = ("--corruptions", "contrast", "gaussian_noise", "--severities", 5, "--seed", 3)
    found = val(leanvit, bundle, "--data", toys.scenes, *given, "--output", tmp_path, "--batch-size", 3)
    rows = found["corruptions"]["rows"]
    assert [(row["name"], row["severity"]) for row in rows] == [("gaussian_noise", 5), ("contrast", 5)]
    predictor = Predictor(bundle)
    pixels = np.stack([predictor.prepare(scene.path) for scene in scenes.scenes])
    truth = np.concatenate([load_map(scene, scenes).ravel() for scene in scenes.scenes])
    for row in rows:
        logits = predictor.outputs(corrupt(pixels, row["name"], 5, seed=3))["logits"]
        maps = [class_map(one, place((64, 64), (64, 64)), (64, 64)).ravel() for one in logits]
        assert row["value"] == pytest.approx(jaccard_score(truth, np.concatenate(maps), average="macro"), abs=1e-4)
        assert row["drop"] == pytest.approx(100 * (found["miou"] - row["value"]))
    assert found["corruptions"]["mean"] == pytest.approx(np.mean([row["value"] for row in rows]))
    assert json.loads((tmp_path / "val.json").read_text())["corruptions"] == found["corruptions"]


@pytest.mark.parametrize("task", METRICS)
def test_shifts_have_a_row_a_distance_and_no_shift_is_the_metric_itself(
    task: str, toys: ToyTasks, leanvit: Run
) -> None:
    found = val(leanvit, toys.bundle(task, "fp32"), "--data", toys.scenes, "--shifts", 1, "--limit", 4)
    still, step = found["shifts"]["rows"]
    assert (still["distance"], still["shifts"], step["distance"], step["shifts"]) == (0, 1, 1, 8)
    assert still["value"] == found[METRICS[task]]
    assert still["drop"] == 0
    assert step["worst"] <= step["value"]


def test_a_moved_input_s_place_takes_points_back_to_the_picture() -> None:
    where = moved(Place(placement=place((100, 200), (64, 64))), 3, -5, (64, 64))
    assert where.placement is not None
    points = np.array([[17.0, 23.0], [180.0, 90.0]])
    there = to_network(points, place((100, 200), (64, 64))) + np.array([-5, 3])
    np.testing.assert_allclose(to_network(points, where.placement), there)
    np.testing.assert_allclose(to_picture(there, where.placement), points)


def test_a_moved_crop_s_region_is_what_it_shows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    region = (20.0, 10.0, 52.0, 42.0)
    crop = crop_region(pixels, region, (32, 32))
    where = moved(Place(region=region), 4, 6, (32, 32))
    assert where.region is not None
    shown = crop_region(pixels, where.region, (32, 32))
    np.testing.assert_array_equal(translate(crop[None], 4, 6)[0, 4:, 6:], shown[4:, 6:])


def test_the_map_of_moved_logits_is_the_map_moved_back() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (32, 32))
    logits = np.stack([labels == k for k in range(3)]).astype(np.float32)
    moved_logits = np.roll(logits, (2, -3), axis=(1, 2))
    placement = replace(place((32, 32), (32, 32)), offset=(-3, 2))
    found = class_map(moved_logits, placement, (32, 32))
    # Three columns left the input on the left and two rows below.
    np.testing.assert_array_equal(found[:30, 3:], labels[:30, 3:])


def test_a_reader_holds_its_pictures_and_reads_them_in_their_order(toys: ToyTasks) -> None:
    scenes, preprocess = toys.split("pose", "val"), Preprocess((64, 64), crop_mode="letterbox")
    reader = SceneReader(scenes, TASKS["pose"], preprocess, 5)
    first = [(pixels.copy(), places) for pixels, places in reader]
    again = list(reader)
    assert len(reader) == len(first) == len(again)
    for (pixels, places), (other, others) in zip(first, again, strict=True):
        assert np.array_equal(pixels, other)
        assert places == others
    flat = [where for _, places in first for where in places]
    expected = [
        (number, index)
        for number, scene in enumerate(scenes.scenes)
        for index, one in enumerate(scene.instances)
        if not one.crowd and one.keypoints is not None and (one.keypoints[:, 2] > 0).any()
    ]
    assert [(where.index, where.instance) for where in flat] == expected


def test_a_set_without_a_readable_picture_is_refused(toys: ToyTasks, tmp_path: Path) -> None:
    scenes, preprocess = toys.split("detect", "val"), Preprocess((64, 64), crop_mode="letterbox")
    (tmp_path / "bad.png").write_bytes(b"no image")
    broken = replace(scenes, scenes=(replace(scenes.scenes[0], path=tmp_path / "bad.png"),))
    with pytest.raises(ImageError, match="--bad-images skip"):
        SceneReader(broken, TASKS["detect"], preprocess, 4)
    with pytest.raises(DataError, match="none of 1 pictures can be read"):
        SceneReader(broken, TASKS["detect"], preprocess, 4, skip=True)


def test_a_checkpoint_and_its_bundle_are_measured_alike(toys: ToyTasks, leanvit: Run) -> None:
    found = [val(leanvit, path, "--data", toys.scenes, "--limit", 5) for path in
             (toys.run("pose"), toys.bundle("pose", "fp32"))]  # fmt: skip
    assert found[0]["pck@0.1"] == pytest.approx(found[1]["pck@0.1"], abs=0.02)
    assert found[0]["objects"] == found[1]["objects"]


def test_letterboxed_inputs_know_their_picture() -> None:
    pixels = np.zeros((50, 100, 3), np.uint8)
    made = letterboxed(pixels, Preprocess((64, 64), crop_mode="letterbox"), Options())
    assert (made.size, made.images.shape) == ((50, 100), (1, 64, 64, 3))
    assert made.places[0].placement == place((50, 100), (64, 64))


def test_a_set_that_does_not_fit_memory_is_read_again_for_every_pass(
    toys: ToyTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, preprocess = toys.split("detect", "val"), Preprocess((64, 64), crop_mode="letterbox")
    held = SceneReader(scenes, TASKS["detect"], preprocess, 4, skip=True)
    monkeypatch.setattr("leanvit.evaluation.scenes.MEMORY_LIMIT_BYTES", 1)
    read = SceneReader(scenes, TASKS["detect"], preprocess, 4, skip=True)
    assert (held._kept is None, read._kept is None) == (False, True)
    for (pixels, places), (other, others) in zip(held, read, strict=True):
        assert np.array_equal(pixels, other)
        assert places == others
