"""An einsum that is one matrix product is written as one; any other stays what it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanvit.quant.graph import trace

SIZES = {"b": 2, "h": 3, "w": 4, "c": 5, "k": 6, "y": 7, "d": 3}


class Einsum(nn.Module):
    """One einsum of the input and a parameter."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.other = nn.Parameter(torch.randn([SIZES[c] for c in equation.split(",")[1].split("->")[0]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x * 1.5, self.other)


# The first two are those of MViTv2 and SAM.
PRODUCTS = [
    "byhwc,hkc->byhwk", "byhwc,wkc->byhwk", "bhwc,hkc->bhwk", "bhwc,wkc->bhwk", "bhc,kc->bhk", "bhc,ck->bkh",
    "bhc,c->bh", "bch,ck->bhk", "bhc,hc->bh", "bc,hwc->bhw", "bchw,hkc->wbkh", "bhc,hwkc->bhwk",
]  # fmt: skip
OTHERS = ["bhyc,hwkc->bhywk", "bhc,hkc->bk", "bhcd,kcd->bhk", "bhc,hc->bhc", "bhc,kw->bhckw", "bhc,kc->bh"]


@pytest.mark.parametrize("equation", PRODUCTS)
def test_matrix_products_are_sites_and_return_what_einsum_does(equation: str) -> None:
    torch.manual_seed(0)
    letters = equation.split(",")[0]
    model = Einsum(equation).double()
    graph = trace(model, torch.randn([SIZES[c] for c in letters], dtype=torch.float64))
    assert [site.kind for site in graph.sites.values()] == ["matmul"]
    assert graph.unquantized == []
    x = torch.randn(3, *(SIZES[c] for c in letters[1:]), dtype=torch.float64)
    torch.testing.assert_close(graph.module(x), model(x))
    # Every product of two letters' values is one multiply-add, whatever the order.
    used = set(equation) - set(",->b")
    assert next(iter(graph.sites.values())).macs == torch.tensor([SIZES[c] for c in used]).prod()


@pytest.mark.parametrize("equation", OTHERS)
def test_other_einsums_stay_and_are_named(equation: str) -> None:
    torch.manual_seed(0)
    model = Einsum(equation)
    x = torch.randn([SIZES[c] for c in equation.split(",")[0]])
    graph = trace(model, x)
    (named,) = graph.unquantized
    assert "einsum" in named
    torch.testing.assert_close(graph.module(x), model(x))
