"""One predictor and one loop for every task: batches, threads, runtimes, formats; tasks from outside the package."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common import Outcome
from leanvit import Predictor
from leanvit.errors import BundleError, ConfigError
from leanvit.runtime.bundle import read_manifest, sign
from leanvit.runtime.engines import available
from leanvit.runtime.task import TASKS, Task, letterboxed, register, task_named
from toy_tasks import ToyTasks, json_lines

pytest_plugins = ("toy_tasks",)

Run = Callable[..., Outcome]

KINDS = ("detect", "semantic", "pose")


@pytest.fixture
def pictures(toys: ToyTasks) -> Path:
    return toys.scenes / "images" / "val"


def flags(task: str, toys: ToyTasks) -> tuple[Any, ...]:
    given = {"detect": ("--score-threshold", 0.02), "pose": ("--boxes", toys.scenes / "val.json")}
    return given.get(task, ())


@pytest.mark.parametrize("task", KINDS)
def test_the_batch_size_and_the_threads_change_no_line(task: str, toys: ToyTasks, pictures: Path, leanvit: Run) -> None:
    given = ("predict", toys.bundle(task, "fp32"), pictures, *flags(task, toys))
    found = [json_lines(leanvit(*given, *more).out) for more in ((), ("--batch-size", 1), ("--threads", 1))]
    assert [len(lines) for lines in found] == [8, 8, 8]
    assert any(line.get("objects") or line.get("shares") for line in found[0])
    for other in found[1:]:
        assert numbers(other) == pytest.approx(numbers(found[0]), abs=0.02)
        assert words(other) == words(found[0])


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def numbers(lines: Any) -> list[float]:
    return [one for one in leaves(lines) if not isinstance(one, str)]


def words(lines: Any) -> list[str]:
    return [one for one in leaves(lines) if isinstance(one, str)]


@pytest.mark.parametrize("task", KINDS)
def test_many_threads_may_ask_one_predictor(task: str, toys: ToyTasks, pictures: Path) -> None:
    images = [np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())] * 3
    for runtime in (one for one in available() if one in ("onnxruntime", "openvino")):
        predictor = Predictor(toys.bundle(task, "fp32"), runtime=runtime, check=False)
        prepared = [predictor.inputs(image).images for image in images]
        alone = [predictor.outputs(one) for one in prepared]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(predictor.outputs, prepared))
        name = TASKS[task].continuous
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_allclose(other[name], one[name], atol=1e-4)


@pytest.mark.parametrize("task", KINDS)
def test_auto_takes_a_runtime_that_the_gate_has_proved(
    task: str, toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = toys.bundle(task, "fp32")
    assert Predictor(bundle, runtime="auto").runtime in read_manifest(bundle).runtimes
    assert read_manifest(bundle).sha256 in (tmp_path / "leanvit" / "runtimes.json").read_text()


def test_text_is_a_line_a_picture_and_csv_a_row_an_object(toys: ToyTasks, pictures: Path, leanvit: Run) -> None:
    given = ("predict", toys.bundle("detect", "fp32"), pictures, "--score-threshold", 0.02)
    lines = json_lines(leanvit(*given).out)
    objects = [(line["path"], one) for line in lines for one in line["objects"]]
    rows = list(csv.DictReader(io.StringIO(leanvit(*given, "--format", "csv").out)))
    assert [(row["path"], row["label"]) for row in rows] == [(path, one["label"]) for path, one in objects]
    for row, (_, one) in zip(rows, objects, strict=True):
        assert [float(row[side]) for side in ("x1", "y1", "x2", "y2")] == one["box"]
        assert float(row["score"]) == one["score"]
    text = leanvit(*given, "--format", "text").out.splitlines()
    assert len(text) == len(lines)
    for written, line in zip(text, lines, strict=True):
        path, _, said = written.partition(": ")
        counted = sum(int(part.split()[0]) for part in said.split(", ")) if said != "nothing" else 0
        assert (path, counted) == (line["path"], len(line["objects"]))


def test_csv_of_class_maps_and_of_keypoints(toys: ToyTasks, pictures: Path, leanvit: Run) -> None:
    found = {task: leanvit("predict", toys.bundle(task, "fp32"), pictures / "00000.png", "--format", "csv").out
             for task in ("semantic", "pose")}  # fmt: skip
    shares = list(csv.DictReader(io.StringIO(found["semantic"])))
    assert sum(float(row["share"]) for row in shares) == pytest.approx(1, abs=1e-4)
    scheme = toys.split("pose", "val").keypoints
    assert scheme is not None
    points = list(csv.DictReader(io.StringIO(found["pose"])))
    assert [row["keypoint"] for row in points] == list(scheme.names)
    line = json_lines(leanvit("predict", toys.bundle("pose", "fp32"), pictures / "00000.png").out)[0]
    assert [[float(row["x"]), float(row["y"])] for row in points] == [p[:2] for p in line["objects"][0]["keypoints"]]


# --- a task from outside the package ---


def brightness(name: str) -> Task:
    """A task that says how many logits of a picture are above 0."""
    return Task(
        name=name, metric="error", points=1.0, higher_is_better=False, outputs=("logits",), continuous="logits",
        values_kept=None, each_picture=False, data="scenes", inputs=letterboxed,
        decode=lambda outputs, inputs, manifest, options: int((outputs["logits"][0] > 0).sum()),
        line=lambda found, manifest: {"count": found}, text=lambda found, manifest: f"{found} above 0",
        measure=lambda data, batches: {"error": 0.0},
    )  # fmt: skip


@pytest.fixture
def outside(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a task that the package does not have."""
    sign(bundle, replace(read_manifest(bundle), task="brightness"))
    monkeypatch.setitem(TASKS, "brightness", brightness("brightness"))
    return bundle


def test_a_task_from_outside_predicts(outside: Path, photo: Path, leanvit: Run) -> None:
    predictor = Predictor(outside)
    pixels = np.asarray(Image.open(photo).convert("RGB"))
    logits = predictor.outputs(predictor.inputs(pixels).images)["logits"]
    expected = int((logits > 0).sum())
    assert predictor.predict(photo) == predictor.predict(pixels) == expected
    assert json.loads(leanvit("predict", outside, photo).out) == {"path": str(photo), "count": expected}
    assert leanvit("predict", outside, photo, "--format", "text").out == f"{photo}: {expected} above 0\n"
    for name, value in (("format", "csv"), ("top-k", 3), ("score-threshold", 0.5), ("draw", outside / "drawn")):
        refused = leanvit("predict", outside, photo, f"--{name}", value)
        assert refused.code == 2
        assert f"{name.replace('-', '_')}" in refused.error
        assert "does not fit task brightness" in refused.error


def test_a_bundle_of_a_task_that_nobody_registered_names_the_known_ones(bundle: Path) -> None:
    sign(bundle, replace(read_manifest(bundle), task="depth"))
    with pytest.raises(BundleError, match=r"task 'depth' is unknown, expected one of classify, .* registers it"):
        Predictor(bundle)
    with pytest.raises(BundleError, match="Did you mean 'detect'"):
        task_named("detekt")


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = brightness("once")
    monkeypatch.setitem(TASKS, "once", one)
    assert register(one) is one
    with pytest.raises(ConfigError, match="task 'once' is there already"):
        register(brightness("once"))


def test_a_drop_counts_points_in_the_direction_of_the_metric() -> None:
    assert TASKS["classify"].drop(80.0, 79.5) == pytest.approx(0.5)
    assert TASKS["semantic"].drop(0.8, 0.79) == pytest.approx(1.0)
    worse = brightness("b")
    assert worse.drop(2.0, 2.5) == pytest.approx(0.5)
    assert worse.better(1.0, 2.0)
    assert TASKS["pose"].better(0.9, 0.8)
    assert not TASKS["pose"].better(0.8, 0.8)


def test_a_corrupt_picture_beside_boxes_keeps_the_boxes_of_the_others(
    toys: ToyTasks, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    for number in range(4):
        shutil.copy(pictures / f"{number:05}.png", tmp_path)
    whole = json_lines(leanvit("predict", toys.bundle("pose", "fp32"), tmp_path, *flags("pose", toys)).out)
    (tmp_path / "00001.png").write_bytes(b"no image")
    found = leanvit("predict", toys.bundle("pose", "fp32"), tmp_path, *flags("pose", toys), "--batch-size", 3)
    assert found.code == 6
    left = [line for line in whole if not line["path"].endswith("00001.png")]
    assert numbers(json_lines(found.out)) == pytest.approx(numbers(left), abs=0.02)
