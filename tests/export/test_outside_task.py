"""A task from outside the package, one row in each half, is quantized, exported, verified and compared like ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo, save_checkpoint
from leanvit.config import Preprocess
from leanvit.data.scene_kinds import BOXES
from leanvit.files import read_json
from leanvit.runtime import task as served
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.predictor import Predictor
from leanvit.tasks import TASKS, TrainingTask, register
from leanvit.tasks.task import single_output
from toy_tasks import SIZE, ToyTasks

pytest_plugins = ("toy_tasks",)

NAME = "count"


class Counter(nn.Module):
    """How many objects of every class are in a picture."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(self.backbone(x))


def error(data: Any, batches: Any) -> dict[str, Any]:
    """Mean absolute error of the counts."""
    errors = []
    for outputs, places in batches:
        for counts, place in zip(outputs["counts"], places, strict=True):
            true = np.bincount([one.label for one in data.scenes[place.index].instances], minlength=len(counts))
            errors.append(np.abs(counts - true).mean())
    return {"mae": float(np.mean(errors)), "pictures": len(errors)}


@pytest.fixture(scope="module", autouse=True)
def count_task() -> Iterator[None]:
    register(
        TrainingTask(
            name=NAME, build=lambda info: Counter(len(info.labels)), output_names=("counts",),
            outputs=single_output("counts"), losses=lambda *given: {}, samples=BOXES,
        )
    )  # fmt: skip
    served.register(
        served.Task(
            name=NAME, metric="mae", points=1.0, higher_is_better=False, outputs=("counts",), continuous="counts",
            data="scenes", inputs=served.letterboxed, decode=lambda outputs, *given: outputs["counts"][0],
            line=lambda found, manifest: {"counts": found.tolist()}, text=lambda found, manifest: str(found),
            measure=error,
        )
    )  # fmt: skip
    yield
    del TASKS[NAME], served.TASKS[NAME]


@pytest.fixture(scope="module")
def checkpoint(toys: ToyTasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    labels = toys.split("detect", "train").classes
    folder = tmp_path_factory.mktemp("count")
    info = CheckpointInfo("counter", labels, Preprocess(input_size=SIZE, crop_mode="letterbox"), task=NAME)
    save_checkpoint(folder / "model.safetensors", Counter(len(labels)), info)
    return folder


def test_it_goes_the_whole_way_from_the_command_line(
    checkpoint: Path, toys: ToyTasks, tmp_path: Path, leanvit: Callable[..., Any]
) -> None:
    quantized, bundle, given = tmp_path / "quantized", tmp_path / "bundle", ("--data", toys.scenes)
    done = leanvit("quantize", checkpoint, *given, "--output", quantized, "--calibration-images", 32)
    assert done.code == 0, done.err
    report = read_json(quantized / "quantize.json")
    assert (report["task"], report["metric"], report["profile"]) == (NAME, "mae", "w8a8")
    done = leanvit("export", quantized, *given, "--output", bundle, "--max-drop", 1, "--min-speedup", 0)
    assert done.code == 0, done.err
    manifest = read_manifest(bundle)
    assert (manifest.task, manifest.profile) == (NAME, "w8a8")
    assert manifest.accuracy is not None
    assert manifest.accuracy["value"] == pytest.approx(report["metrics"]["mae"], abs=1e-2)
    verified = leanvit("verify", bundle, *given, "--model", quantized, "--json")
    assert verified.code == 0, verified.err
    checks = {row["name"]: row["passed"] for row in json.loads(verified.out)["checks"]}
    assert {"mae", "mae drop", "counts", "golden images at batch 3", "label order"} <= set(checks)
    assert all(passed is True for passed in checks.values())
    assert Predictor(bundle).outputs(np.zeros((2, *SIZE, 3), np.uint8))["counts"].shape == (2, len(manifest.labels))


def test_more_error_is_a_drop_and_lifts_sites(checkpoint: Path, toys: ToyTasks, tmp_path: Path) -> None:
    """A metric of which less is better: no error at all before makes any error a drop."""
    from leanvit import MPTQConfig, export
    from leanvit.config import ExportOptions
    from leanvit.errors import VerificationError
    from leanvit.export.data import calibration_inputs
    from leanvit.quant.parts import quantize_network
    from leanvit.tasks.build import load_network

    network, info = load_network(checkpoint)
    x = calibration_inputs(info, toys.split("detect", "train"), 32, 0)
    quantized = quantize_network(network, info, x, MPTQConfig())
    options = ExportOptions(max_drop=0.0, min_speedup=0)
    with pytest.raises(VerificationError, match="'mae drop'"):
        export(quantized, tmp_path / "b", options, info=info, images=toys.split("detect", "val"), float_metric=-1.0)
    lifted = read_manifest(tmp_path / "b.rejected").quantization["lifted"]
    graph = quantized.parts["network"].graph
    linears = [f"network.{name}" for name, site in graph.sites.items() if site.kind == "linear"]
    assert sorted(lifted) == sorted(linears)
    ratios = {f"network.{site['name']}": site["sqnr_db"] for site in quantized.parts["network"].report["sites"]}
    assert [ratios[name] for name in lifted] == sorted(ratios[name] for name in linears)
