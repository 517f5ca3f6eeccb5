"""The command line with every task: train, val, quantize, export, verify, predict; what is refused, and how."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from leanvit.cli import parse
from leanvit.config import TrainConfig
from leanvit.runtime.task_of import task_of
from toy_tasks import HEADS, ToyTasks, json_lines

pytest_plugins = ("toy_tasks",)

Run = Callable[..., Any]


def drawn(path: str) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.fixture
def pictures(toys: ToyTasks) -> Path:
    return toys.scenes / "images" / "val"


# --- the whole path ---


@pytest.mark.slow
def test_a_detector_from_training_to_a_bundle_that_predicts(toys: ToyTasks, tmp_path: Path, leanvit: Run) -> None:
    run, quantized, bundle = (tmp_path / name for name in ("run", "quantized", "bundle"))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in HEADS["detect"].items()]
    given = ("--data", toys.scenes)
    trained = leanvit(
        "train", "--task", "detect", "--model", "mobilenetv3_small_050", *given, "--output", run, "--epochs", 2,
        "--batch-size", 8, "--img-size", 64, 64, "--lr", "3e-3", "--amp", "none", *flags,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert f"leanvit quantize {run} --data {toys.scenes}" in trained.out
    assert leanvit("quantize", run, *given, "--output", quantized, "--calibration-images", 32).code == 0
    exported = leanvit("export", quantized, *given, "--output", bundle, "--max-drop", 100)
    assert exported.code == 0, exported.err
    assert [task_of(path) for path in (run, quantized, bundle)] == ["detect"] * 3
    report = json.loads((quantized / "quantize.json").read_text())
    assert report["metric"] == "box_AP50"
    assert (bundle.with_name("bundle.config.yaml")).is_file()
    verified = leanvit("verify", bundle, *given, "--json")
    assert verified.code == 0
    assert json.loads(verified.out)["passed"] is True
    assert {"box_AP50", "box_AP50 drop"} <= {check["name"] for check in json.loads(verified.out)["checks"]}
    measured = {path: json.loads(leanvit("val", path, *given, "--json").out) for path in (run, quantized, bundle)}
    assert measured[run]["box_AP50"] == pytest.approx(report["float_metrics"]["box_AP50"], abs=1e-6)
    assert measured[quantized]["box_AP50"] == pytest.approx(report["metrics"]["box_AP50"], abs=1e-6)
    accuracy = json.loads((bundle / "bundle.json").read_text())["accuracy"]
    assert measured[bundle]["box_AP50"] == pytest.approx(accuracy["value"], abs=1e-6)


def test_the_configuration_of_a_run_gives_the_same_run_again(toys: ToyTasks, tmp_path: Path, leanvit: Run) -> None:
    file = toys.run("semantic") / "config.yaml"
    config = parse("train", ["--config", str(file)])
    assert isinstance(config, TrainConfig)
    assert config == toys.config("semantic", toys.run("semantic"), epochs=config.epochs)
    assert parse("train", ["--config", str(file), "--epochs", "7"]).epochs == 7
    assert leanvit("train", "--config", file, "--output", tmp_path, "--epochs", 1).code == 0
    again = yaml.safe_load((tmp_path / "config.yaml").read_text())
    before = yaml.safe_load(file.read_text())
    assert {key for key in before if before[key] != again[key]} == {"output", "epochs"}


# --- val ---


def test_val_gives_json_and_a_file(toys: ToyTasks, tmp_path: Path, leanvit: Run) -> None:
    bundle = toys.bundle("pose", "fp32")
    found = leanvit("val", bundle, "--data", toys.scenes, "--json", "--output", tmp_path)
    assert found.code == 0
    metrics = json.loads(found.out)
    assert 0 <= metrics["pck@0.1"] <= 1
    written = json.loads((tmp_path / "val.json").read_text())
    assert (written["task"], written["metric"], written["metrics"]) == ("pose", "pck@0.1", metrics)
    table = leanvit("val", toys.run("pose"), "--data", toys.scenes)
    assert table.code == 0
    assert f"{metrics['pck@0.1']:.4f}" in table.out


@pytest.mark.parametrize("flags", [("--shifts", 64), ("--corruptions", "fog"), ("--split", "test"), ("--limit", 0)])
def test_val_refuses_what_can_not_be_measured(flags: tuple[Any, ...], toys: ToyTasks, leanvit: Run) -> None:
    found = leanvit("val", toys.run("pose"), "--data", toys.scenes, *flags)
    assert found.code == 2
    assert str(flags[0]).lstrip("-").replace("-", "_") in found.error


def test_val_refuses_data_with_other_classes(toys: ToyTasks, tmp_path: Path, leanvit: Run) -> None:
    document = json.loads((toys.scenes / "val.json").read_text())
    document["categories"][0]["name"] = "hat"
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "images").symlink_to(toys.scenes / "images")
    for path in (toys.run("detect"), toys.bundle("segment", "fp32")):
        found = leanvit("val", path, "--data", tmp_path)
        assert found.code == 3
        assert "expected the same in the same order" in found.error


# --- predict ---


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_predict_finds_objects_inside_the_picture_and_draws_them(
    precision: str, toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    bundle = toys.bundle("segment", precision)
    found = leanvit("predict", bundle, pictures, "--draw", tmp_path / "drawn", "--score-threshold", 0.02)
    assert found.code == 0
    lines = json_lines(found.out)
    assert [Path(line["path"]).name for line in lines] == [f"{i:05}.png" for i in range(8)]
    assert any(line["objects"] for line in lines)
    labels = set(toys.split("segment", "val").classes)
    for line in lines:
        scores = [one["score"] for one in line["objects"]]
        assert scores == sorted(scores, reverse=True)
        for one in line["objects"]:
            x1, y1, x2, y2 = one["box"]
            assert 0 <= x1 < x2 <= 64
            assert 0 <= y1 < y2 <= 64
            assert one["label"] in labels
            assert 0.02 <= one["score"] <= 1
            mask = coco_mask.decode(one["segmentation"])
            assert mask.shape == (64, 64)
            rows, columns = np.nonzero(mask)
            # torchvision widens a box by a cell of its mask on every side, and rounds outwards.
            assert not rows.size or x1 - 3 <= columns.min() <= columns.max() + 1 <= x2 + 3
            assert not rows.size or y1 - 3 <= rows.min() <= rows.max() + 1 <= y2 + 3
        assert drawn(line["drawn"]).ndim == 3
    assert len(list((tmp_path / "drawn").iterdir())) == 8


def test_lines_of_predict_score_as_val_says(toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run) -> None:
    bundle = toys.bundle("segment", "w8a8")
    output = tmp_path / "found.jsonl"
    assert leanvit("predict", bundle, pictures, "--score-threshold", 0, "--output", output).code == 0
    truth = COCO(str(toys.scenes / "val.json"))
    images = {Path(image["file_name"]).name: image["id"] for image in truth.dataset["images"]}
    categories = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    answers = [
        {
            "image_id": images[Path(line["path"]).name], "category_id": categories[one["label"]],
            "score": one["score"], "segmentation": one["segmentation"],
        }
        for line in json_lines(output.read_text())
        for one in line["objects"]
    ]  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(answers), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = json.loads(leanvit("val", bundle, "--data", toys.scenes, "--json").out)
    assert metrics["mask_AP50"] == pytest.approx(evaluation.stats[1], abs=1e-3)
    assert metrics["mask_AR100"] == pytest.approx(evaluation.stats[8], abs=1e-3)


def test_predict_writes_class_maps(toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run) -> None:
    scenes = toys.split("semantic", "val")
    found = leanvit("predict", toys.bundle("semantic", "fp32"), pictures, "--draw", tmp_path)
    assert found.code == 0
    for line in json_lines(found.out):
        values = drawn(line["map"])
        assert values.shape == (64, 64)
        for label, name in enumerate(scenes.classes):
            assert line["shares"].get(name, 0.0) == pytest.approx((values == label).mean(), abs=1e-5)
        assert sum(line["shares"].values()) == pytest.approx(1, abs=1e-4)
        assert drawn(line["drawn"]).shape[2] == 3


def test_keypoints_of_given_boxes_from_coco_or_from_a_detectors_lines(
    toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    bundle = toys.bundle("pose", "w8a8")
    document = json.loads((toys.scenes / "val.json").read_text())
    names = {image["id"]: str(toys.scenes / image["file_name"]) for image in document["images"]}
    lines: dict[str, Any] = {name: {"path": name, "objects": []} for name in names.values()}
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        box = {"label": "bag", "score": 1.0, "box": [x, y, x + width, y + height]}
        lines[names[entry["image_id"]]]["objects"].append(box)
    (tmp_path / "detector.jsonl").write_text("\n".join(json.dumps(line) for line in lines.values()))
    document["annotations"].append({**document["annotations"][0], "id": 10**6, "iscrowd": 1})
    (tmp_path / "coco.json").write_text(json.dumps(document))
    answers = []
    for boxes in ("coco.json", "detector.jsonl"):
        found = leanvit("predict", bundle, pictures, "--boxes", tmp_path / boxes, "--draw", tmp_path / "drawn")
        assert found.code == 0
        answers.append(json_lines(found.out))
    assert answers[0] == answers[1]
    scheme = toys.split("pose", "val").keypoints
    assert scheme is not None
    for line in answers[0]:
        assert [one["box"] for one in line["objects"]] == [one["box"] for one in lines[line["path"]]["objects"]]
        assert all(np.shape(one["keypoints"]) == (len(scheme.names), 3) for one in line["objects"])
        assert drawn(line["drawn"]).ndim == 3
    whole = json_lines(leanvit("predict", bundle, pictures / "00000.png").out)
    assert [one["box"] for one in whole[0]["objects"]] == [[0, 0, 64, 64]]


def test_a_picture_without_boxes_has_no_objects(toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run) -> None:
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text(json.dumps({"path": "other.png", "objects": [{"box": [1, 2, 3, 4]}]}))
    found = leanvit("predict", toys.bundle("pose", "fp32"), pictures / "00001.png", "--boxes", boxes)
    assert found.code == 0
    assert json_lines(found.out)[0]["objects"] == []
    assert "not among the pictures of --boxes" in found.err


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"path": "a.png"}', '{"path": "a.png", "objects": [{"label": 3}]}',
     '{"path": "a.png", "objects": [{"box": [1, 2, 3]}]}', '{"path": "a.png", "objects": [{"box": [5, 5, 5, 9]}]}',
     '{"path": "a.png", "objects": [{"box": [0, 0, NaN, 9]}]}', '{"annotations": 3}',
     '{"annotations": [{"image_id": 7, "bbox": [0, 0, 2, 2]}], "images": []}'],
)  # fmt: skip
def test_files_that_hold_no_boxes_are_refused(
    text: str, toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    boxes = tmp_path / "boxes.json"
    boxes.write_text(text)
    found = leanvit("predict", toys.bundle("pose", "fp32"), pictures / "00001.png", "--boxes", boxes)
    assert found.code == (2 if text else 0)
    if text:
        assert f"boxes {boxes}: not readable" in found.error


def test_namesakes_of_two_folders_keep_their_own_pictures_and_boxes(
    toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    for folder, number in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures / f"{number:05}.png", tmp_path / folder / "same.png")
    rows = [{"path": str(tmp_path / f / "same.png"), "objects": [{"box": [n, 0, 9, 9]}]} for n, f in enumerate("ab")]
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text("\n".join(map(json.dumps, rows)))
    given = ("predict", toys.bundle("pose", "fp32"), tmp_path / "a", tmp_path / "b", "--boxes", boxes)
    found = leanvit(*given, "--draw", tmp_path / "drawn")
    assert found.code == 0
    first, second = json_lines(found.out)
    assert [first["objects"][0]["box"], second["objects"][0]["box"]] == [[0, 0, 9, 9], [1, 0, 9, 9]]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["same-2.png", "same.png"]
    assert not np.array_equal(drawn(first["drawn"]), drawn(second["drawn"]))
    rows = [row | {"path": f"{name}/same.png"} for row, name in zip(rows, "cd", strict=True)]
    boxes.write_text("\n".join(map(json.dumps, rows)))
    assert leanvit(*given).code == 2


@pytest.mark.parametrize("task", ["semantic", "segment", "pose"])
def test_a_corrupt_picture_is_left_out_and_the_others_are_answered(
    task: str, toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        shutil.copy(pictures / f"{number:05}.png", tmp_path / "in")
    broken = tmp_path / "in" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    output = tmp_path / "out" / "found.jsonl"
    found = leanvit("predict", toys.bundle(task, "fp32"), tmp_path / "in", "--output", output)
    assert found.code == 6
    assert "1 of 3 images could not be read" in found.error
    assert [Path(line["path"]).stem for line in json_lines(output.read_text())] == ["00000", "00002"]
    assert [path.name for path in output.parent.iterdir()] == ["found.jsonl"]
    assert leanvit("predict", toys.bundle(task, "fp32"), broken).code == 3


KILLED = """
import os, signal, sys
from leanvit.cli import main
from leanvit.runtime import result_files as results
from leanvit.runtime.result_lines import Drawings

def killing(*arguments, write=Drawings.write, calls=iter(range(int(sys.argv[1])))):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)

results.SAVE_SECONDS = 0.0
Drawings.write = killing
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_to_the_lines_and_drawings_of_a_whole_one(
    toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    for folder in "abc":
        (tmp_path / folder).mkdir()
        for number in range(3):
            shutil.copy(pictures / f"{number:05}.png", tmp_path / folder)
    broken = tmp_path / "a" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    sources, drawings = [tmp_path / folder for folder in "abc"], tmp_path / "drawn"
    given = ["predict", toys.bundle("semantic", "fp32"), *sources, "--draw", drawings, "--batch-size", 2]
    assert leanvit(*given, "--output", tmp_path / "whole.jsonl").code == 6
    expected = {path.name: path.read_bytes() for path in drawings.iterdir()}
    shutil.rmtree(drawings)
    output = tmp_path / "killed.jsonl"
    given += ["--output", output, "--resume"]
    # Killed in the third batch, whose first picture is the fourth that is drawn, and in the third batch after that.
    for drawn_whole in (3, 2):
        command = [sys.executable, "-c", KILLED, drawn_whole, *given]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
    drawn_before = set(drawings.iterdir())
    for path in drawn_before:
        path.unlink()
    found = leanvit(*given)
    assert found.code == 6
    assert "going on after 6 images" in found.err
    assert "1 of 9 images could not be read" in found.error
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = {path.name: path.read_bytes() for path in drawings.iterdir()}
    # What was drawn before the kill is not drawn again.
    assert again == {name: data for name, data in expected.items() if drawings / name not in drawn_before}
    assert len(again) == 6
    assert leanvit(*given).code == 0
    assert leanvit(*given[:-3], "--resume").code == 2


# --- what is refused ---


def test_flags_of_other_tasks_are_refused(
    toys: ToyTasks, bundle: Path, photo: Path, tmp_path: Path, leanvit: Run
) -> None:
    assert leanvit("predict", bundle, photo, "--draw", tmp_path / "drawn").code == 2
    assert not (tmp_path / "drawn").exists()
    boxes = toys.scenes / "val.json"
    assert leanvit("predict", bundle, photo, "--boxes", boxes).code == 2
    segment = toys.bundle("segment", "fp32")
    for flags in (("--boxes", boxes), ("--top-k", 3), ("--resume",), ("--score-threshold", 2)):
        found = leanvit("predict", segment, photo, *flags)
        assert found.code == 2, flags
        assert flags[0].strip("-").replace("-", "_") in found.error
    assert leanvit("predict", segment).code == 2


def test_an_unknown_task_is_answered_with_the_choices(toys: ToyTasks, leanvit: Run) -> None:
    for flags in (("--task", "nonsense"), ("--task=nonsense",)):
        found = leanvit("train", *flags, "--data", toys.scenes)
        assert found.code == 2
        assert all(task in found.error for task in ("detect", "segment", "semantic", "pose"))


def test_a_required_flag_that_is_absent_is_named(tmp_path: Path, leanvit: Run) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: pose\nepochs: 1\n")
    for flags in (("--task", "pose"), ("--config", path)):
        found = leanvit("train", *flags)
        hint = "Run: leanvit train --task pose --help"
        assert (found.code, found.error) == (2, f"leanvit: no --data given, expected one. {hint}")
    path.write_text("task: pose\ndata: from_file\n")
    assert parse("train", ["--config", str(path)]).data == "from_file"


def test_damage_is_an_exit_code_of_its_own(toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run) -> None:
    folder = Path(shutil.copytree(toys.bundle("semantic", "fp32"), tmp_path / "bundle"))
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0\0")
    for command in (("predict", folder, pictures), ("verify", folder), ("val", folder, "--data", toys.scenes)):
        found = leanvit(*command)
        assert found.code == 5, command
        assert "model.onnx" in found.error
    run = tmp_path / "run"
    run.mkdir()
    data = bytearray((toys.run("semantic") / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (run / "model.safetensors").write_bytes(data)
    for verb in ("val", "quantize", "export"):
        found = leanvit(verb, run, "--data", toys.scenes, "--output", tmp_path / "out")
        assert found.code == 3
        assert "SHA-256" in found.error
