"""Every task over HTTP: what comes back is a line of `leanvit predict`, and pictures are those of `--draw`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leanvit import Predictor
from serving import Running, serving
from toy_tasks import ToyTasks

pytest_plugins = ("toy_tasks",)

KINDS = ("detect", "semantic", "pose")
QUERY = {"detect": "?score_threshold=0.02", "semantic": "", "pose": "?boxes=4,4,40,40&boxes=0,0,64,64"}
OPTIONS: dict[str, dict[str, Any]] = {
    "detect": {"score_threshold": 0.02},
    "semantic": {},
    "pose": {"boxes": [(4.0, 4.0, 40.0, 40.0), (0.0, 0.0, 64.0, 64.0)]},
}


@pytest.fixture(scope="module")
def server(toys: ToyTasks) -> Iterator[Running]:
    with serving(*(f"{task}={toys.bundle(task, 'fp32')}" for task in KINDS), "--threads", 1) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(toys: ToyTasks) -> list[Path]:
    return sorted((toys.scenes / "images" / "val").iterdir())[:3]


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("task", KINDS)
def test_json_and_drawn_pictures_are_the_predictor_s(
    task: str, server: Running, toys: ToyTasks, pictures: list[Path]
) -> None:
    predictor = Predictor(toys.bundle(task, "fp32"), threads=1)
    draw = predictor.task.draw
    assert draw is not None
    for path in pictures:
        data = path.read_bytes()
        found = predictor.predict(data, **OPTIONS[task])
        reply = server.predict(task, data, QUERY[task])
        line = json.loads(json.dumps(predictor.task.line(found, predictor.manifest)))
        assert {key: reply.json[key] for key in line} == line
        assert reply.json["image"] == {"height": 64, "width": 64}
        drawn = server.predict(task, data, QUERY[task], Accept="image/png")
        assert drawn.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(opened(drawn.body), draw(opened(data), found, predictor.manifest)["drawn"])


def test_a_class_map_comes_with_its_shares(server: Running, toys: ToyTasks, pictures: list[Path]) -> None:
    predictor = Predictor(toys.bundle("semantic", "fp32"), threads=1)
    reply = server.predict("semantic", pictures[0].read_bytes(), "?map=true").json
    np.testing.assert_array_equal(opened(base64.b64decode(reply["map"])), predictor.predict(pictures[0].read_bytes()))
    assert "map" not in server.predict("semantic", pictures[0].read_bytes()).json


@pytest.mark.parametrize("boxes", ["0,0,65,10", "5,5,5,9", "-1,0,4,4", "1,2,3", "a,b,c,d", "0,0,1e1,4", "nan,0,1,1"])
def test_boxes_that_are_not_in_the_picture_are_refused(boxes: str, server: Running, pictures: list[Path]) -> None:
    assert server.predict("pose", pictures[0].read_bytes(), f"?boxes={boxes}").code == 400


def test_a_strip_whose_crop_would_fill_the_memory_is_refused(server: Running) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (60_000, 2)).save(buffer, "PNG")
    assert server.predict("pose", buffer.getvalue()).code == 413
    assert server.predict("detect", buffer.getvalue()).code == 200


def test_facts_say_what_a_task_takes_and_draws(server: Running) -> None:
    facts = {task: server.get(f"/v1/models/{task}").json for task in KINDS}
    assert {task: one["options"] for task, one in facts.items()} == {
        "detect": ["score_threshold"], "semantic": [], "pose": ["boxes"],
    }  # fmt: skip
    assert facts["semantic"]["drawn"] == ["drawn", "map"]
    assert facts["pose"]["keypoints"]["names"]
    assert facts["detect"]["keypoints"] is None
