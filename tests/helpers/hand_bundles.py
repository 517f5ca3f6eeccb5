"""Bundles of every task from graphs made by hand: no training, no torch, outputs that depend on the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.runtime.bundle import Manifest, versions, write_bundle
from leanvit.runtime.golden_objects import golden_records
from leanvit.runtime.task import TASKS, kept_values

SIZE = (48, 64)
LABELS = ("sky", "sea", "sand", "tree")
DETECTIONS = 6
KEYPOINTS = {
    "names": ["head", "middle", "foot"], "swapped": [0, 1, 2], "sigmas": [0.1, 0.1, 0.1], "skeleton": [[0, 1], [1, 2]],
}  # fmt: skip


def hand_bundle(folder: Path, task: str, images: list[bytes], **changes: Any) -> Path:
    """A bundle that has its golden outputs from ONNX Runtime. images: encoded golden images."""
    form = Preprocess(SIZE, interpolation="bilinear", crop_mode="squash" if task == "pose" else "letterbox")
    model = graph(task)
    pixels = np.stack([imaging.load(image, form) for image in images])
    session = onnxruntime.InferenceSession(model)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": pixels}), strict=True))
    row = TASKS[task]
    records = golden_records(outputs) if row.matched else {}
    answers = {"keypoints": KEYPOINTS} if task == "pose" else {}
    manifest = Manifest(
        f"hand_{task}", "fp32", LABELS, form, 35.0, task=task, answers=answers, versions=versions(), **changes
    )
    write_bundle(folder, model, images, kept_values(row, outputs), manifest, pixels=pixels[:4], **records)
    return folder


def graph(task: str) -> bytes:
    """The ONNX file of a network (N, H, W, 3) uint8 -> outputs of the task."""
    nodes, constants, outputs = {
        "detect": lambda: _detector(masks=False),
        "segment": lambda: _detector(masks=True),
        "semantic": lambda: _maps("logits", len(LABELS)),
        "pose": lambda: _maps("heatmaps", len(KEYPOINTS["names"])),
    }[task]()
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *SIZE, 3])
    start = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "white"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["x"], perm=[0, 3, 1, 2]),
    ]
    constants["white"] = np.float32(255)
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    found = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    made = helper.make_graph([*start, *nodes], task, [images], found, initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def _maps(name: str, channels: int) -> Any:
    """One convolution with stride 8: maps of 6 x 8 cells."""
    weights = np.random.default_rng(1).normal(0, 0.3, (channels, 3, 8, 8)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "weights"], [name], strides=[8, 8])
    return [node], {"weights": weights}, {name: TensorProto.FLOAT}


def _detector(masks: bool) -> Any:
    """Boxes that stand still, with scores and masks that follow the mean colours of the picture."""
    rng = np.random.default_rng(2)
    corners = rng.uniform(0, 1, (DETECTIONS, 2, 2)) * (SIZE[1] / 2, SIZE[0] / 2)
    boxes = np.concatenate([corners[:, 0], corners[:, 0] + 12 + corners[:, 1]], axis=1).astype(np.float32)
    constants: dict[str, Any] = {
        "axes": np.array([2, 3]), "to_scores": rng.normal(0, 4, (3, DETECTIONS)).astype(np.float32),
        "bias": np.linspace(1.5, -1.5, DETECTIONS, dtype=np.float32), "box": boxes[None],
        "label": (np.arange(DETECTIONS) % len(LABELS))[None], "flat": np.array([1, 1]),
        "second": np.array([1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "to_scores"], ["turned"]),
        helper.make_node("Add", ["turned", "bias"], ["objectness"]),
        helper.make_node("Sigmoid", ["objectness"], ["scores"]),
        helper.make_node("Shape", ["means"], ["count"], start=0, end=1),
        helper.make_node("Concat", ["count", "flat"], ["three"], axis=0),
        helper.make_node("Concat", ["count", "second"], ["two"], axis=0),
        helper.make_node("Expand", ["box", "three"], ["boxes"]),
        helper.make_node("Expand", ["label", "two"], ["labels"]),
    ]
    outputs = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "labels": TensorProto.INT64,
               "objectness": TensorProto.FLOAT}  # fmt: skip
    if masks:
        constants["to_masks"] = rng.normal(0, 0.7, (3, DETECTIONS * 28 * 28)).astype(np.float32)
        y, x = (np.mgrid[:28, :28] - 13.5) / 13.5
        constants["ellipses"] = np.tile(6 * (0.8 - x**2 - y**2), (DETECTIONS, 1, 1)).reshape(1, -1).astype(np.float32)
        constants["shape"] = np.array([-1, DETECTIONS, 28, 28])
        nodes += [
            helper.make_node("MatMul", ["means", "to_masks"], ["rows"]),
            helper.make_node("Add", ["rows", "ellipses"], ["shifted"]),
            helper.make_node("Reshape", ["shifted", "shape"], ["cells"]),
            helper.make_node("Sigmoid", ["cells"], ["masks"]),
        ]
        outputs["masks"] = TensorProto.FLOAT
    return nodes, constants, outputs
