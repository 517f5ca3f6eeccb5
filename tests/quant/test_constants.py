"""What is computed of parameters alone is computed once, and what reads it is a site like others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.quant.graph import QuantGraph, trace
from odd_networks import PackedAttention


class StandardizedTwice(nn.Module):
    """A kernel scaled to zero mean in every forward, of two convolutions that share it, and plainly read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            kernel = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
            x = F.conv2d(x, kernel, self.conv.bias * 2, padding=1)
        return F.conv2d(x, self.conv.weight)


class Positions(nn.Module):
    """Biases of positions out of a small network, as Swin V2 makes them, and a table that is only picked from."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("places", torch.rand(5, 2))
        self.register_buffer("index", torch.randint(5, (36,)))
        self.table = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)[..., :4] + torch.sigmoid(self.net(self.places)[self.index]) + self.table[self.index].neg()
        return self.head(x)


class Counter(nn.Module):
    """A buffer that every forward overwrites is no constant, and noise is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.scale.clone()
        bias[:4].mul_(x.flatten()[0])
        return F.linear(x.mean((1, 2)), self.head.weight, bias)


def _traced(model: nn.Module, x: Tensor) -> QuantGraph:
    """The graph, which returns what the module does, also for another batch."""
    graph = trace(model.eval(), x)
    other = torch.cat([x.flip(-1), x[:1]])
    with torch.no_grad():
        torch.testing.assert_close(graph.module(other), model(other))
    return graph


def test_bias_put_together_in_forward_is_a_parameter_of_its_linear() -> None:
    torch.manual_seed(0)
    model = PackedAttention()
    graph = _traced(model, torch.randn(2, 3, 8, 8))
    assert set(graph.sites) == {"patches", "qkv", "qk", "av", "proj"}
    bias = dict(graph.module.named_parameters())["qkv.bias"]
    assert torch.equal(bias, torch.cat((model.q_bias, torch.zeros(12), model.v_bias)))
    assert not {"q_bias", "v_bias"} & set(graph.module.state_dict())
    assert not any(str(node.target) == "aten.cat.default" for node in graph.module.graph.nodes)


def test_computed_kernels_are_weights_and_the_kernel_that_others_read_stays() -> None:
    torch.manual_seed(0)
    model = StandardizedTwice()
    graph = _traced(model, torch.randn(2, 3, 8, 8))
    assert graph.unquantized == []
    weights = [dict(graph.module.named_parameters())[site.weight] for site in graph.sites.values()]
    expected = model.conv.weight - model.conv.weight.mean((1, 2, 3), keepdim=True)
    for weight in weights[:2]:
        torch.testing.assert_close(weight, expected)
    assert torch.equal(weights[2], model.conv.weight)


def test_products_of_parameters_are_no_sites_and_tables_stay_small() -> None:
    torch.manual_seed(0)
    graph = _traced(Positions(), torch.randn(2, 3, 36, 36))
    assert set(graph.sites) == {"head"}
    tensors = graph.module.state_dict()
    assert tensors["table"].shape == (5, 4)  # and not the 36 rows that are picked of it
    assert {name for name, value in tensors.items() if value.shape == (5, 4)} == {"table", "net.2.product"}


def test_what_a_forward_overwrites_is_not_folded() -> None:
    torch.manual_seed(0)
    graph = _traced(Counter(), torch.randn(2, 3, 4, 8))
    assert any("linear" in str(node.target) for node in graph.module.graph.nodes)
