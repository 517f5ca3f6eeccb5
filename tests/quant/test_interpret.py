"""The one interpreter: the module's own results, values forgotten after their last use, and starts in the middle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace

from leanvit.quant.interpret import Values, compute, observe_nodes, run, walk


class Network(nn.Module):
    """Constants, a module call, keywords, a list argument, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4), requires_grad=False)
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.linear(x, self.weight)
        z = self.act(y)
        both = torch.cat([z, torch.softmax(y, dim=-1)], dim=1)
        return both, y


def graph() -> GraphModule:
    return symbolic_trace(Network())


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_a_run_returns_what_the_module_returns() -> None:
    for found, expected in zip(run(graph(), X), Network()(X), strict=True):
        assert torch.equal(found, expected)


def test_every_named_value_is_seen_once_in_order() -> None:
    module = graph()
    names = [node.name for node in module.graph.nodes]
    seen: list[tuple[str, Any]] = []
    observe_nodes(module, {"act", "linear", "nowhere"}, X, lambda name, value: seen.append((name, value)))
    assert [name for name, _ in seen] == [name for name in names if name in ("linear", "act")]
    assert all(torch.equal(value, torch.nn.functional.linear(X, Network().weight)) for _, value in seen)


def test_what_a_step_returns_goes_on() -> None:
    def double(node: Node, value: Any) -> Any:
        return value * 2 if node.name == "linear" else value

    assert torch.equal(run(graph(), X, double)[1], 2 * Network()(X)[1])


def test_values_are_forgotten_after_their_last_use_in_every_network() -> None:
    module = graph()
    nodes = list(module.graph.nodes)
    first: Values = {}
    second: Values = {}
    for index, node in walk(module, first, second):
        # What is held is what this node or a later one still reads.
        needed = {source for later in nodes[index:] for source in later.all_input_nodes} & set(nodes[:index])
        assert set(first) == set(second) == needed
        first[node] = second[node] = compute(module, node, first, X)
    assert {node.op for node in first} == {"output"}


def test_a_walk_from_the_middle_comes_to_the_same_end() -> None:
    module = graph()
    nodes = list(module.graph.nodes)
    held: Values = {}
    at: dict[int, Values] = {}
    for index, node in walk(module, held):
        at[index] = dict(held)
        held[node] = expected = compute(module, node, held, X)
    for start in range(1, len(nodes)):
        values, found = dict(at[start]), None
        for _, node in walk(module, values, start=start):
            values[node] = found = compute(module, node, values, X)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
