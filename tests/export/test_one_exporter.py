"""What a classifier's export has, every task's has: lifting, the speed check, runtimes, and verify --model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanvit.checkpoint import save_checkpoint
from leanvit.config import ExportOptions
from leanvit.errors import VerificationError
from leanvit.export import api
from leanvit.export.api import export
from leanvit.export.gate import speed
from leanvit.export.gate.verify import open_bundle
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.engines import available
from toy_tasks import ToyTasks

pytest_plugins = ("toy_tasks",)


@pytest.mark.slow
def test_a_detectors_worst_sites_run_in_float_until_none_is_left(toys: ToyTasks, tmp_path: Path) -> None:
    quantized, info = toys.load("detect", "w8a8")
    options = ExportOptions(max_drop=0.0, min_speedup=0)
    # No detector is better than all right: every step is taken, and the gate refuses what is left.
    with pytest.raises(VerificationError, match="'box_AP50 drop'"):
        export(quantized, tmp_path / "b", options, info=info, images=toys.split("detect", "val"), float_metric=2.0)
    lifted = read_manifest(tmp_path / "b.rejected").quantization["lifted"]
    sites = {f"{part}.{name}": site for part, one in quantized.parts.items() for name, site in one.graph.sites.items()}
    assert {name for name, site in sites.items() if site.kind == "linear"} <= set(lifted)
    assert "box.head.fc6" in lifted
    ratios = {
        f"{p}.{site['name']}": site["sqnr_db"] for p, one in quantized.parts.items() for site in one.report["sites"]
    }
    assert [ratios[name] for name in lifted] == sorted(ratios[name] for name in lifted)


@pytest.mark.slow
def test_a_detectors_file_slower_than_float_is_rejected(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def pretend(targets: list[Any], *, batch_sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
        timed.extend(target.path.name for target in targets)
        rows = [{"batch_size": size, "ratio": 0.5, "path": str(targets[1].path)} for size in batch_sizes]
        return {"threads": 2, "results": rows}

    monkeypatch.setattr(speed, "benchmark", pretend)
    monkeypatch.setattr(speed, "FEWEST_MACS", 0)
    quantized, info = toys.load("detect", "w8a8")
    with pytest.raises(VerificationError, match=r"'speed' failed: 0\.50 times at batch 1"):
        export(quantized, tmp_path / "b", info=info)
    assert timed == ["float.onnx", "model.onnx"]
    export(quantized, tmp_path / "c", ExportOptions(min_speedup=0), info=info)


@pytest.mark.skipif("openvino" not in available(), reason="needs openvino")
def test_installed_runtimes_are_tried_and_named_where_they_pass(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "available", lambda: ("onnxruntime", "openvino"))
    network, info = toys.load("pose", "fp32")
    bundle = export(network, tmp_path / "b", info=info)
    assert set(read_manifest(bundle).runtimes) == {"onnxruntime", "openvino"}
    names = {row["name"] for row in json.loads((bundle / "verify.json").read_text())["checks"]}
    assert {f"golden images at batch {size} in openvino" for size in (1, 3, 8)} <= names


def test_verify_compares_a_tasks_bundle_with_the_network_that_it_was_written_from(
    toys: ToyTasks, tmp_path: Path, leanvit: Callable[..., Any]
) -> None:
    bundle = toys.bundle("segment", "w8a8")
    same = leanvit("verify", bundle, "--model", toys.quantized("segment"), "--data", toys.scenes, "--json")
    assert same.code == 0, same.err
    checks = {row["name"]: row["passed"] for row in json.loads(same.out)["checks"]}
    assert checks["objectness"] is True
    assert checks["agreement"] is True
    network, info = toys.load("pose", "fp32")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    save_checkpoint(tmp_path / "other.safetensors", network, info)
    other = leanvit("verify", toys.bundle("pose", "fp32"), "--model", tmp_path / "other.safetensors")
    assert other.code == 5
    assert "'heatmaps'" in other.error
    wrong = leanvit("verify", bundle, "--model", toys.run("pose"))
    assert wrong.code == 2
    assert "is for task pose, the bundle for segment" in wrong.error


def test_export_measures_as_many_images_a_step_as_asked(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor_of_pictures: Any = type(open_bundle(toys.bundle("semantic", "fp32")))
    sizes: list[int] = []
    outputs = predictor_of_pictures.outputs

    def watched(predictor: Any, images: Any) -> Any:
        sizes.append(len(images))
        return outputs(predictor, images)

    monkeypatch.setattr(predictor_of_pictures, "outputs", watched)
    network, info = toys.load("semantic", "fp32")
    export(network, tmp_path / "b", info=info, images=toys.split("semantic", "val"), batch_size=5)
    assert sizes[:2] == [5, 3]
