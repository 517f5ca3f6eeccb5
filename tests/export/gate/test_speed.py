"""Files that are meant to be fast are timed beside their float form when they are exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from leanvit import export
from leanvit.config import ExportOptions, MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.errors import NumericalError, VerificationError
from leanvit.export.gate import speed
from leanvit.export.gate.golden import synthetic_images
from leanvit.quant import QuantizedModel, quantize

onnx = pytest.importorskip("onnx")

SIDE = 64
PREPROCESS = Preprocess(input_size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 10}
    network = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    pixels = np.stack(synthetic_images(32, (SIDE, SIDE)))
    return quantize(network, to_input(torch.from_numpy(pixels), PREPROCESS), MPTQConfig())


def written(model: QuantizedModel, folder: Path, **options: Any) -> dict[str, Any]:
    bundle = export(
        model, folder / "bundle", ExportOptions(runtimes=("onnxruntime",), **options), preprocess=PREPROCESS
    )
    checks = json.loads((bundle / "verify.json").read_text())["checks"]
    return {check["name"]: check for check in checks}


def pretend(monkeypatch: pytest.MonkeyPatch, ratios: dict[int, float]) -> None:
    """Times of a machine where the file is `ratios` times as fast as float, by batch size; every network is large."""

    def timed(targets: list[Any], *, batch_sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
        rows = [{"batch_size": size, "ratio": 1.0, "path": str(targets[0].path)} for size in batch_sizes]
        rows += [{"batch_size": size, "ratio": ratios[size], "path": str(targets[1].path)} for size in batch_sizes]
        return {"threads": 2, "results": rows}

    monkeypatch.setattr(speed, "benchmark", timed)
    monkeypatch.setattr(speed, "FEWEST_MACS", 0)


def watched(monkeypatch: pytest.MonkeyPatch, times: Callable[..., dict[str, Any]]) -> dict[str, list[str]]:
    """The operations of the files that are timed, by name, filled while `times` gives the times."""
    seen: dict[str, list[str]] = {}

    def timed(targets: list[Any], **options: Any) -> dict[str, Any]:
        for target in targets:
            seen[target.path.stem] = [node.op_type for node in onnx.load(target.path).graph.node]
        return times(targets, **options)

    monkeypatch.setattr(speed, "benchmark", timed)
    monkeypatch.setattr(speed, "FEWEST_MACS", 0)
    return seen


def test_a_file_slower_than_float_is_rejected_by_name(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {1: 0.7, 8: 0.96})
    with pytest.raises(VerificationError, match=r"'speed' failed: 0\.70 times at batch 1, 0\.96 times at batch 8"):
        written(model, tmp_path)
    assert (tmp_path / "bundle.rejected").is_dir()
    assert not (tmp_path / "bundle").exists()


def test_one_batch_size_is_enough_and_the_least_is_the_users(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {1: 0.9, 8: 1.3})
    assert written(model, tmp_path / "a")["speed"]["passed"] is True
    assert written(model, tmp_path / "b", min_speedup=1.3)["speed"]["passed"] is True
    with pytest.raises(VerificationError, match=r"at least 1\.5 times the same network in float"):
        written(model, tmp_path / "c", min_speedup=1.5)


def test_it_is_measured_where_speed_is_promised(model: QuantizedModel, tmp_path: Path) -> None:
    small = written(model, tmp_path / "small")["speed"]
    assert small["passed"] is None
    assert "multiply-adds are too few" in small["found"]
    assert "speed" not in written(model, tmp_path / "off", min_speedup=0)
    assert "speed" not in written(model, tmp_path / "exact", profile="exact")


@pytest.mark.parametrize(
    "error", [NumericalError("no answer within 300 s"), AssertionError("daemonic processes are not allowed")]
)
def test_what_cannot_be_timed_is_not_verified_and_not_rejected(
    error: Exception, model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*targets: Any, **options: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(speed, "FEWEST_MACS", 0)
    monkeypatch.setattr(speed, "benchmark", fail)
    check = written(model, tmp_path)["speed"]
    assert check["passed"] is None
    assert str(error) in check["found"]
    assert "--min-speedup 0" in check["hint"]


def test_the_float_form_has_no_grid_and_the_times_are_of_these_files(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch, speed.benchmark)
    # The least that any machine reaches: what is tested is that both files ran and were compared.
    check = written(model, tmp_path, min_speedup=1e-6)["speed"]
    assert check["passed"] is True
    assert "times at batch 1" in check["found"]
    assert "QuantizeLinear" in seen["model"]
    assert "QuantizeLinear" not in seen["float"]


@pytest.mark.parametrize("opset", [21, 23])
def test_the_float_form_has_the_opset_of_the_file(
    opset: int, model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {1: 1.1, 8: 1.1})
    seen = watched(monkeypatch, speed.benchmark)
    written(model, tmp_path, opset=opset)
    assert {"Attention" in operations for operations in seen.values()} == {opset == 23}
    assert len(seen) == 2
