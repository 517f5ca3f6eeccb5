"""An operation without an ONNX form is named in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanvit.config import Preprocess
from leanvit.errors import ExportError
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.refusal import refusal
from leanvit.quant.graph import trace


class Bessel(nn.Module):
    """A network that uses an operation which ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.special.bessel_j0(x.mean((2, 3))))


def test_an_operation_without_onnx_form_is_named() -> None:
    graph = trace(Bessel(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError, match=r"operation prims\.bessel_j0") as caught:
        lower(graph, Preprocess(input_size=(8, 8)), "fp32")
    assert "\n" not in str(caught.value)


def test_of_another_failure_the_last_cause_is_told() -> None:
    error = RuntimeError("step 3 of 3 failed\nand much more")
    error.__cause__ = ValueError("axis 7 of 4\nsecond line")
    assert "axis 7 of 4. Report" in str(refusal(error))
