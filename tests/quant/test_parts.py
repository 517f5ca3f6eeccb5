"""Networks in parts: what a budget means for each, and which folders hold quantized parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Budget, MPTQConfig, Preprocess
from leanvit.errors import ConfigError
from leanvit.quant import QuantizedModel
from leanvit.quant import parts as room
from leanvit.quant.graph import QuantGraph
from leanvit.quant.parts import is_quantized_network, quantize_network


class InTwo(nn.Module):
    """A network of 100 and 300 parameters whose parts run one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10, bias=False)
        self.second = nn.Linear(10, 30, bias=False)

    def parts(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second}

    def part_outputs(self) -> dict[str, tuple[str, ...]]:
        return {"first": ("a",), "second": ("b",)}

    def part_example(self, part: str, size: tuple[int, int]) -> Tensor:
        return torch.zeros(2, 10)

    def part_inputs(self, x: Tensor, seed: int) -> dict[str, Tensor]:
        return {"first": x, "second": self.first(x)}

    def part_measures(self, size: tuple[int, int]) -> dict[str, Any]:
        return {}

    def replace_parts(self, parts: dict[str, nn.Module]) -> None:
        self.first, self.second = parts["first"], parts["second"]


def budgets_of(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> list[Budget | None]:
    """What each part was asked to keep to."""
    asked: list[Budget | None] = []

    def watched(part: nn.Module, x: Tensor, config: MPTQConfig, **more: Any) -> QuantizedModel:
        asked.append(config.budget)
        report = {"quantized_bytes": 0, "float_bytes": 0}
        return QuantizedModel(QuantGraph(GraphModule(part, Graph()), {}), {}, report, config, x)

    monkeypatch.setattr(room, "quantize_part", watched)
    info = CheckpointInfo("two", ("a",), Preprocess(input_size=(8, 8)))
    quantize_network(InTwo(), info, torch.zeros(4, 10), MPTQConfig(budget=budget))
    return asked


def test_bytes_are_shared_by_parameters_and_average_bits_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [b.model_bytes for b in budgets_of(Budget(model_bytes=400), monkeypatch) if b] == [100, 300]
    assert [b.average_bits for b in budgets_of(Budget(average_bits=5), monkeypatch) if b] == [5, 5]


def test_a_limit_that_depends_on_the_number_of_objects_is_refused() -> None:
    info = CheckpointInfo("two", ("a",), Preprocess(input_size=(8, 8)))
    with pytest.raises(ConfigError, match="first, second, which run as often as there are objects"):
        quantize_network(InTwo(), info, torch.zeros(4, 10), MPTQConfig(budget=Budget(bitops=10**6)))


def test_a_run_that_holds_quantized_classifiers_is_no_network_in_parts(tmp_path: Path) -> None:
    (tmp_path / "quantize-w8a8").mkdir()
    (tmp_path / "quantize-w8a8" / "quantized.safetensors").touch()
    assert not is_quantized_network(tmp_path)
    (tmp_path / "quantize.json").write_text("{}")
    assert is_quantized_network(tmp_path)
