"""Latency tables: one row for every shape of product, measured, read back, and obeyed by a search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.cli import main
from leanvit.config import Budget
from leanvit.export.onnx.latency import measure_table, site_model
from leanvit.quant.costs import TABLE_VERSION, read_latency_table, site_key
from leanvit.quant.graph import QuantGraph, trace
from sessions import open_model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()


@pytest.fixture(scope="module")
def graph(network: nn.Module) -> QuantGraph:
    return trace(network, torch.zeros(1, 3, 32, 32))


def test_every_product_has_one_measured_row(network: nn.Module, graph: QuantGraph, tmp_path: Path) -> None:
    table = measure_table(network, torch.zeros(1, 3, 32, 32), threads=1, rounds=3)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    rows = read_latency_table(str(path))
    assert set(rows) == {site_key(site) for site in graph.sites.values()}
    # Two blocks of the same shapes: patch embedding, qkv, q k, attention v, proj, fc1, fc2, head.
    assert len(rows) == 8
    assert all(value > 0 for row in rows.values() for value in (row["float_ms"], row["int8_ms"]))
    assert table["threads"] == 1
    # fc1 has four times the products of proj, so the slowest row is not one of the smallest.
    slowest = max(rows, key=lambda key: rows[key]["float_ms"])
    assert slowest.startswith(("linear 768x192", "linear 192x768", "linear 576x192", "conv2d"))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "matmul"])
def test_the_timed_files_compute_the_site(graph: QuantGraph, kind: str) -> None:
    site = next(s for s in graph.sites.values() if s.kind == kind)
    shapes = {
        "linear": [(1, 5, site.weight_shape[1] if kind == "linear" else 1)],
        "conv2d": [(1, 3, 32, 32)],
        "matmul": [(1, 3, 5, 64), (1, 3, 64, 5)],
    }[kind]
    generator = np.random.default_rng(1)
    # Multiples of the input's step of 0.02, so that 8 bits lose nothing.
    feed = {n: (0.02 * generator.integers(-100, 100, s)).astype(np.float32) for n, s in zip("xy", shapes, strict=False)}
    inputs = [torch.from_numpy(v) for v in feed.values()]
    for quantized in (False, True):
        model = site_model(graph, site, shapes, quantized=quantized)
        onnx.checker.check_model(model, full_check=True)
        assert any(node.op_type == "QuantizeLinear" for node in model.graph.node) == quantized
        # What is timed is what a file of profile w8a8 runs.
        fused = any(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node)
        assert fused == (quantized and kind == "linear")
        session = open_model(model)
        (found,) = session.run(None, feed)
        constants = {c.name: torch.from_numpy(numpy_helper.to_array(c).copy()) for c in model.graph.initializer}
        weight = (
            constants["weight_integers"].float() * 0.01 if "weight_integers" in constants else constants.get("weight")
        )
        if kind == "matmul":
            expected = inputs[0] @ inputs[1]
        elif kind == "linear":
            assert weight is not None
            expected = inputs[0] @ weight
        else:
            assert weight is not None
            expected = nn.functional.conv2d(inputs[0], weight, stride=16)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-3)


def test_a_table_is_made_on_the_command_line_and_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert main(["benchmark", "vit_micro.fmnist", "--table", str(path), "--rounds", "3"]) == 0
    assert "--latency-table" in capsys.readouterr().out
    rows = read_latency_table(str(path))
    for row in rows.values():
        # By decree: what is obeyed is the file, not this machine's mood.
        row |= {"float_ms": 1.0, "int8_ms": 0.5}
    path.write_text(json.dumps({"version": TABLE_VERSION, "sites": rows}))
    model = timm.create_model("vit_micro.fmnist", pretrained=True).eval()
    images = torch.randn(16, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    sites = len(trace(model, images[:1]).sites)
    config = MPTQConfig(budget=Budget(latency_ms=sites - 8.0, latency_table=str(path)), range_search=False)
    quantized = quantize(model, images, config)
    # Half a millisecond is saved by each site at 8 bits; more than sixteen are where that lowers the loss.
    assert len(quantized.plan) >= 16
    assert quantized.report["search"]["cost"] == pytest.approx(sites - 0.5 * len(quantized.plan))


def test_a_table_is_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "a", "b", "--table", "t.json"]) == 2
    assert "expected one" in capsys.readouterr().err
