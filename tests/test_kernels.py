"""leanvit benchmark --by-operation: multiply-adds counted by hand, integers told from floats, in both runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from leanvit import kernels
from leanvit.bench import describe, images_of, model_file
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions, MPTQConfig
from leanvit.data.loader import to_input
from leanvit.export.api import export
from leanvit.export.gate.golden import synthetic_images
from leanvit.quant import quantize

pytest.importorskip("openvino")
BATCH = 2


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return timm.create_model("vit_micro", pretrained=True).eval()


@pytest.fixture(scope="module")
def bundles(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two files of one network, float and 8 bits."""
    preprocess = preprocess_for(network)
    images = to_input(torch.from_numpy(np.stack(synthetic_images(32, preprocess.input_size))), preprocess)
    quantized = quantize(network, images, MPTQConfig(range_search=False, ratio_search=False))
    folder = tmp_path_factory.mktemp("bundles")
    options = ExportOptions(profile="w8a8")
    return {"fp32": export(network, folder / "fp32"), "w8a8": export(quantized, folder / "w8a8", options)}


def counted(network: nn.Module) -> tuple[int, int]:
    """Multiply-adds of one image in layers with weights, and in products of attention, by hooks on every module."""
    weighted = attention = 0

    def add(module: nn.Module, given: tuple[torch.Tensor, ...], found: torch.Tensor) -> None:
        nonlocal weighted, attention
        if isinstance(module, nn.Linear):
            weighted += found.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            weighted += found.numel() * module.weight[0].numel()
        elif hasattr(module, "num_heads") and hasattr(module, "qkv"):
            _, tokens, width = given[0].shape
            attention += 2 * tokens * tokens * width

    hooks = [module.register_forward_hook(add) for module in network.modules()]
    with torch.no_grad():
        network(torch.zeros(1, 3, 28, 28))
    for hook in hooks:
        hook.remove()
    return weighted, attention


@pytest.mark.parametrize("kind", ["fp32", "w8a8"])
def test_multiply_adds_are_those_of_the_modules(kind: str, network: nn.Module, bundles: dict[str, Path]) -> None:
    target = describe(bundles[kind])
    found = kernels.profile(model_file(target), "onnxruntime", images_of(target)[:BATCH], 1)
    weighted, attention = counted(network)
    assert sum(found.multiply_adds.values()) == BATCH * (weighted + attention)
    integer = weighted / (weighted + attention) if kind == "w8a8" else 0.0
    assert found.share(found.multiply_adds) == pytest.approx(integer)
    assert (found.rate() is None) is (kind == "fp32")
    rate = found.rate()
    if rate is not None:
        spent = sum(ms for key, ms in found.milliseconds.items() if key[1])
        assert rate * spent * 1e6 == pytest.approx(BATCH * weighted)


@pytest.mark.parametrize("kind", ["fp32", "w8a8"])
def test_openvino_tells_integers_from_floats(kind: str, bundles: dict[str, Path]) -> None:
    target = describe(bundles[kind], "openvino")
    found = kernels.profile(model_file(target), "openvino", images_of(target)[:BATCH], 1)
    share = found.share(found.milliseconds)
    assert share is not None
    assert 0 < share < 1 if kind == "w8a8" else share == 0
    assert found.multiply_adds == {}
    assert found.rate() is None


def event(operation: str, start: int, duration: int, **shapes: list[list[int]]) -> dict[str, Any]:
    """As ONNX Runtime writes the time of a kernel."""
    typed = {f"{name}_type_shape": [{"float": shape} for shape in shapes.get(name, [])] for name in ("input", "output")}
    args = {"op_name": operation, **typed}
    return {"cat": "Node", "name": f"{operation}_1_kernel_time", "ts": start, "dur": duration, "args": args}


def test_warm_runs_and_loops_are_not_counted_and_runs_are_medians() -> None:
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5}]
    for number, spent in enumerate([900, 900, 900, 10, 30, 20]):
        start = 1000 * (number + 1)
        events += [
            {"cat": "Session", "name": "model_run", "ts": start, "dur": 990},
            event("Loop", start + 1, spent, output=[[2, 3]]),
            event("MatMul", start + 2, spent, input=[[2, 3, 4], [2, 4, 5]], output=[[2, 3, 5]]),
        ]
    found = kernels._summed(kernels._runs(events), {})
    assert found.milliseconds == {("MatMul", False): 0.02}
    assert found.multiply_adds == {("MatMul", False): 2 * 3 * 4 * 5}


def test_the_command_tells_it_and_writes_it(bundles: dict[str, Path], tmp_path: Path, leanvit: Any) -> None:
    arguments = ["--batch-sizes", 1, "--rounds", 3, "--threads", 1, "--by-operation", "--output", tmp_path / "b.json"]
    done = leanvit("benchmark", bundles["fp32"], bundles["w8a8"], *arguments)
    assert done.code == 0
    rows = json.loads((tmp_path / "b.json").read_text())["by_operation"]
    assert [row["int8_share_of_multiply_adds"] == 0 for row in rows] == [True, False]
    assert f"{rows[1]['int8_share_of_time']:.0%} of the time is on int8 kernels" in " ".join(done.out.split())
    for row in rows:
        spent = sum(entry["milliseconds"] for entry in row["operations"])
        assert row["milliseconds"] == pytest.approx(spent)
        assert row["operations"][0]["milliseconds"] == max(entry["milliseconds"] for entry in row["operations"])
    assert rows[0]["machine_rate"] is None
    assert np.isfinite(rows[1]["machine_rate"])
