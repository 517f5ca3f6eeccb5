"""Products whose operands have other leading dimensions than each other are quantized like those of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.quant import quantize

# Of the parameter that tokens (B, 16, 12) are multiplied with: a matrix (SwiftFormer), one for all images, one a head.
SHAPES = [(12, 1), (12, 5), (1, 12, 5), (3, 12, 5)]


class Weighted(nn.Module):
    """Tokens times a parameter that is no linear's weight."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.other = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.patches(x).flatten(2).transpose(1, 2).unsqueeze(1) @ self.other).flatten(1)


class Tokens(Weighted):
    """The same without a dimension of heads."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.patches(x).flatten(2).transpose(1, 2) @ self.other).flatten(1)


@pytest.mark.parametrize(("kind", "shape"), [(Weighted, shape) for shape in SHAPES] + [(Tokens, s) for s in SHAPES[:3]])
def test_a_product_with_a_parameter_is_quantized(kind: type[Weighted], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = kind(shape).eval()
    x = torch.rand(40, 3, 16, 16).cumsum(-1) / 8 - 1
    quantized = quantize(model, x, MPTQConfig(passes=("sequential",)))
    assert {site.kind for site in quantized.graph.sites.values()} == {"conv2d", "matmul"}
    with torch.no_grad():
        truth, found = model(x), quantized.module(x)
    # Two operands of 8 bits and a weight: 256 steps over the range leave about 40 dB of such sums.
    assert float(((found - truth).square().sum() / truth.square().sum()).log10()) < -3
