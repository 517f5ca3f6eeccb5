"""Without torch.onnx's second tracing files are the same to the byte, and where they would not be it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

from leanvit.config import Preprocess
from leanvit.export.onnx import lower as lowering
from leanvit.export.onnx.decomposition import SAME_FILES, with_one_table, without_needless_decompositions
from leanvit.quant.graph import trace

SIDE = 8
PREPROCESS = Preprocess(input_size=(SIDE, SIDE))


class Network(nn.Module):
    """An embedding of patches, `middle` on (B, 4, 12), and a head."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.norm = nn.LayerNorm(12)
        self.middle = middle
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.middle(x).mean(1))


def attention(x: Tensor) -> Tensor:
    """Two heads, a gate that is turned around, and shapes as networks write them."""
    heads = x.reshape(x.shape[0], 4, 2, 6).permute(0, 2, 1, 3)
    scores = (heads @ heads.transpose(-2, -1) / 6**0.5).softmax(-1)
    mixed = (scores @ heads).transpose(1, 2).reshape(x.shape[0], 4, 12)
    return mixed * (1 - nn.functional.silu(x)) + nn.functional.gelu(x)


def batch_in_rows(x: Tensor) -> Tensor:
    """Windows: the batch is flattened as well."""
    return nn.functional.relu(x.flatten(0, 1)).reshape(x.shape)


def file_of(
    middle: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, *, leave_out: bool
) -> tuple[bytes, int]:
    """The exported file, and how often a program was decomposed for it."""
    count = 0
    usual = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *arguments: object, **keywords: object) -> ExportedProgram:
        nonlocal count
        count += 1
        return usual(program, *arguments, **keywords)  # type: ignore[arg-type]

    graph = trace(Network(middle).eval(), torch.zeros(2, 3, SIDE, SIDE))
    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", counted)
        if not leave_out:
            patch.setattr(lowering, "without_needless_decompositions", contextlib.nullcontext)
            patch.setattr(lowering, "with_one_table", contextlib.nullcontext)
        proto = lowering.lower(graph, PREPROCESS, "fp32")
    return proto.SerializeToString(), count


@pytest.mark.parametrize(("middle", "decomposed"), [(attention, False), (batch_in_rows, True)])
def test_a_file_is_the_same_with_and_without(
    middle: Callable[[Tensor], Tensor], decomposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, often = file_of(middle, monkeypatch, leave_out=False)
    found, seldom = file_of(middle, monkeypatch, leave_out=True)
    assert often >= 1
    assert (seldom >= 1) is (decomposed or not SAME_FILES)
    assert found == usual


def test_torch_is_as_it_was_afterwards() -> None:
    usual = ExportedProgram.run_decompositions
    with without_needless_decompositions():
        assert ExportedProgram.run_decompositions is not usual
    assert ExportedProgram.run_decompositions is usual


def test_the_table_of_translations_is_read_once_and_torch_reads_its_own_again_afterwards() -> None:
    usual = vars(ONNXRegistry)["from_torchlib"]
    with with_one_table():
        first, other = ONNXRegistry.from_torchlib(opset_version=23), ONNXRegistry.from_torchlib(opset_version=21)
    with with_one_table():
        assert ONNXRegistry.from_torchlib(opset_version=23) is first
    assert other.opset_version == 21
    assert vars(ONNXRegistry)["from_torchlib"] is usual
    assert ONNXRegistry.from_torchlib(opset_version=23).functions.keys() == first.functions.keys()
