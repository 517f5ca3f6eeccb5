"""Simplified graphs compute what the module does, and nothing that was recorded changes afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanvit.errors import ExportError
from leanvit.quant.graph import trace
from leanvit.quant.interpret import observe_nodes


class Regions(nn.Module):
    """Parts without gradients and without autocast, one inside of another, as in EfficientViT's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        with torch.no_grad():
            x = x * 2
        with torch.autocast("cpu", enabled=False):
            q = self.tokens(x.float())
            scores = q @ q.transpose(-1, -2)
            with torch.autocast("cpu", enabled=False):
                q = scores.relu() @ self.tokens(x)
        return self.head(q)


class Autocast(nn.Module):
    """A part that asks for another precision than the network has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x.mean((1, 2)))


def test_parts_without_autocast_are_in_the_graph_with_their_sites() -> None:
    torch.manual_seed(0)
    model = Regions().eval()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    assert [site.kind for site in graph.sites.values()] == ["linear", "matmul", "linear", "matmul", "linear"]
    assert {node.op for node in graph.module.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(x), model(x))


def test_a_forward_that_turns_autocast_on_is_refused_by_its_name() -> None:
    with pytest.raises(ExportError, match=r"turns autocast on inside of its forward .*bfloat16"):
        trace(Autocast(), torch.randn(2, 3, 4, 4))


class Convolutions(nn.Module):
    """BatchNorm behind a convolution with and without bias, behind a shared one, and behind something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.second = nn.Conv2d(8, 8, 3, groups=4)
        self.shared = nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=i != 1) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norms[0](self.first(x)))
        x = self.norms[1](self.second(x))
        x = self.norms[2](self.shared(x)) + self.norms[3](self.shared(x).neg())
        y = x.mul(2.0)
        y.add_(1.0)  # the result is read under the old name
        return self.norms[4](y) + y


def network() -> nn.Module:
    torch.manual_seed(0)
    module = Convolutions()
    for norm in module.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3.0)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module.eval()


def test_a_folded_network_computes_the_same_and_the_module_stays_as_it_is() -> None:
    module, x = network(), torch.randn(3, 3, 9, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module.double()(x.double())
    module.float()
    graph = trace(module, x)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_only_norms_behind_a_convolution_of_their_own_are_folded() -> None:
    graph = trace(network(), torch.randn(2, 3, 9, 8))
    targets = [str(node.target) for node in graph.module.graph.nodes]
    assert sum("batch_norm" in target for target in targets) == 3
    assert list(graph.sites) == ["first", "second", "shared", "shared#2"]


def test_a_recorded_value_does_not_change_afterwards() -> None:
    graph = trace(network(), torch.randn(2, 3, 9, 8))
    x = torch.randn(2, 3, 9, 8)
    seen: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> None:
        seen[name] = value
        copies[name] = value.clone()

    wanted = {site.node for site in graph.sites.values()}
    observe_nodes(graph.module, wanted, x, record)
    assert all(torch.equal(seen[name], copies[name]) for name in wanted)
    assert not any("relu_" in str(node.target) or "add_" in str(node.target) for node in graph.module.graph.nodes)
