"""The worked example: a task, a pass and a profile from outside the package, each one file and one row, used together.

Nothing of the package is patched: the three files are imported, and the command line does the rest.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counting
import numpy as np
import onnx
import pytest
import scipy.stats
import storage_profile

from leanvit.cli import main
from leanvit.files import read_json
from leanvit.runtime.bundle import read_manifest
from leanvit.tasks.build import load_network
from toy_tasks import SIZE, VAL, ToyTasks

pytest_plugins = ("toy_tasks",)


FLAGS = "--model mobilenetv3_small_050 --epochs 2 --batch-size 8 --lr 3e-3 --amp none --device cpu"


@pytest.fixture(scope="module")
def trained(toys: ToyTasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two epochs by the command line, in this process, which has imported the task."""
    folder = tmp_path_factory.mktemp("tally") / "run"
    words = ["train", "--task", "tally", "--data", toys.scenes, "--output", folder, "--img-size", *SIZE, *FLAGS.split()]
    handler = signal.getsignal(signal.SIGTERM)
    code = main([str(word) for word in words])
    signal.signal(signal.SIGTERM, handler)
    assert code == 0
    return folder


def test_the_task_trains_by_its_own_loss_and_metric(trained: Path) -> None:
    network, info = load_network(trained)
    assert isinstance(network, counting.Counter)
    assert info.task == "tally"
    summary = read_json(trained / "train.json")
    assert summary["metric"] == "mae"
    rows = summary["history"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["loss_count"] > 0 for row in rows)
    assert info.metrics["mae"] == min(row["metrics"]["mae"] for row in rows)


def test_task_pass_and_profile_from_outside_make_one_bundle(
    trained: Path, toys: ToyTasks, tmp_path: Path, leanvit: Callable[..., Any]
) -> None:
    quantized, bundle, data = tmp_path / "quantized", tmp_path / "bundle", ("--data", toys.scenes)
    profile = ("--profile", storage_profile.STORAGE.name)
    done = leanvit(
        "quantize", trained, *data, "--calibration-images", 32, "--passes", "weight_tails:TAILS", *profile,
        "--output", quantized,
    )  # fmt: skip
    assert done.code == 0, done.err
    report = read_json(quantized / "network" / "quantize.json")
    assert "weight_tails:TAILS" in report["passes"]
    weight = load_network(trained)[0].counts.weight.detach().double().numpy()
    assert report["weight_tails"]["counts"] == pytest.approx(scipy.stats.kurtosis(weight, axis=None, fisher=False))

    done = leanvit("export", quantized, *data, *profile, "--max-drop", 1, "--output", bundle)
    assert done.code == 0, done.err
    manifest = read_manifest(bundle)
    assert (manifest.task, manifest.profile) == ("tally", "int8-storage")
    graph = onnx.load(bundle / "model.onnx").graph
    assert {node.op_type for node in graph.node}.isdisjoint({"MatMulInteger", "MatMulIntegerToFloat", "QLinearConv"})
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in graph.initializer)

    pictures = sorted((toys.scenes / "images" / "val").iterdir())
    done = leanvit("predict", bundle, *pictures[:VAL], "--format", "jsonl")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == len(pictures[:VAL])
    counts = np.array([[line["counts"][label] for label in manifest.labels] for line in lines])
    assert (counts >= 0).all()
    assert np.ptp(counts, axis=0).max() > 0
    measured = leanvit("val", bundle, *data, "--json")
    assert json.loads(measured.out)["mae"] == pytest.approx(manifest.accuracy["value"], abs=1e-6)
