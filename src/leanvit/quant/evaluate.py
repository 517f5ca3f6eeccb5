"""The loss of one plan after another on the same network, running only what a change can reach.

`make_network` takes what all plans share from one float run. `loss_of` returns the loss of a plan and the values that
it leaves on the way; given the values of any other plan, it begins where the two plans first differ. Nothing depends on
the order of calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from leanvit.quant.attach import ROLES, attach, quantizer_name
from leanvit.quant.calibrate import Choices, fit
from leanvit.quant.graph import Outputs, QuantGraph, Site, get_tensor, site_inputs
from leanvit.quant.interpret import Values, compute, last_uses, run, walk
from leanvit.quant.losses import divergence, outputs_from
from leanvit.quant.memory import give_back
from leanvit.quant.opt_m import search_weight_scale
from leanvit.quant.plan import FLOAT_BITS, Plan, parts_of
from leanvit.quant.quantizers import WeightQuantizer
from leanvit.quant.samples import SiteSample, take_sample

CHECKPOINTS = 12
"""Places at which the values of a plan are kept: a run begins 4% of the network too early on average, in exchange for
12 times what is alive at once; two plans are held at a time."""


Made = dict[tuple[str, int, int], tuple[nn.Module, float]]
"""Quantizers and their squared output errors by site, part and bits."""


class FloatWeight(nn.Module):
    """A weight that stays as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        """The weight."""
        weight: Tensor = self.get_buffer("weight")
        return weight


@dataclass(frozen=True)
class Seen:
    """What the float run leaves of one site: a sample, its weight, and the mean squared input of each channel."""

    sample: SiteSample
    weight: Tensor | None
    importance: Tensor | None


@dataclass(frozen=True)
class Network:
    """A network whose sites can be set to any bits; FLOAT_BITS leave a tensor as it is.

    graph: with a quantizer for every part of every site, which `loss_of` sets to a plan. truth: float outputs.
    first: index of the first node that a site's quantizers change. alive: nodes whose values are kept at an index.
    made: quantizers, made when first needed.
    """

    graph: QuantGraph
    images: Tensor
    choices: Choices
    truth: Outputs
    seen: dict[str, Seen]
    first: dict[str, int]
    alive: dict[int, list[Node]]
    made: Made = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Values of a plan at some indices of the graph, from which a run of another plan may begin."""

    plan: Plan
    values: dict[int, Values]


@torch.no_grad()
def make_network(graph: QuantGraph, images: Tensor, plan: Plan, choices: Choices) -> Network:
    """Make a float graph ready for plans of the sites of `plan`; the graph is the network's from now on.

    images: (N, 3, H, W) calibration images. choices: how quantizers are set.
    """
    seen = _see_sites(graph, images, plan)
    truth = outputs_from(graph.module(images))
    give_back()
    attach(graph, {name: (8 if bits[0] else 0, 8) for name, bits in plan.items()}, share=False)
    nodes = list(graph.module.graph.nodes)
    return Network(graph, images, choices, truth, seen, _first_positions(graph, nodes, plan), _checkpoints(nodes))


@torch.no_grad()
def loss_of(network: Network, plan: Plan, kept: Kept | None = None) -> tuple[float, Kept]:
    """Divergence of a plan's outputs from the float ones (KL in nats for logits), and the values it leaves.

    kept: what a run of another plan left; nodes before the first site that differs are not run again.
    """
    _set_quantizers(network, plan)
    start, values = 0, dict[int, Values]()
    if kept is not None:
        first = first_difference(network, plan, kept)
        values = {index: held for index, held in kept.values.items() if index <= first}
        start = max(values, default=0)
    outputs, found = _run(network, start, values.get(start, {}))
    give_back()
    return divergence(network.truth, outputs, network.graph.measure), Kept(plan, values | found)


def first_difference(network: Network, plan: Plan, kept: Kept) -> int:
    """Index of the first node that a plan computes otherwise than the one whose values were kept."""
    changed = [network.first[name] for name, bits in plan.items() if kept.plan.get(name) != bits]
    return min(changed, default=len(network.graph.module.graph.nodes))


def local_error(network: Network, site: str, part: int, bits: int) -> float:
    """Squared output error of one site, on its sample, with one part (2: all) at some bits."""
    parts = parts_of(network.graph.sites[site]) if part == 2 else (part,)
    return sum(_quantizer(network, site, p, bits)[1] for p in parts)


def _run(network: Network, start: int, held: Values) -> tuple[Outputs, dict[int, Values]]:
    """Outputs from node `start` on, and the values at the places that are kept."""
    module, nodes = network.graph.module, list(network.graph.module.graph.nodes)
    last_use = last_uses(nodes)
    values: Values = dict(held)
    for node in nodes[:start]:
        if _is_constant(node) and last_use.get(node, -1) >= start:
            values[node] = get_tensor(module, str(node.target))
    kept: dict[int, Values] = {}
    result: Any = None
    for index, node in walk(module, values, start=start):
        if index in network.alive and index != start:
            kept[index] = {n: values[n] for n in network.alive[index]}
        values[node] = result = compute(module, node, values, network.images)
    return outputs_from(result), kept


def _see_sites(graph: QuantGraph, images: Tensor, plan: Plan) -> dict[str, Seen]:
    """Run the float network once and sample all sites."""
    by_node = {graph.sites[name].node: graph.sites[name] for name in plan}
    sources = {name: site_inputs(graph, site) for name, site in by_node.items()}
    needed = {source.name for nodes in sources.values() for source in nodes}
    order = {node: index for index, node in enumerate(graph.module.graph.nodes)}
    held: dict[str, Tensor] = {}
    seen: dict[str, Seen] = {}

    def step(node: Node, value: Any) -> Any:
        if node.name in needed:
            held[node.name] = value
        if node.name in by_node:
            site = by_node[node.name]
            seen[site.name] = _see(graph, site, tuple(held[source.name] for source in sources[node.name]))
            for source in sources[node.name]:
                if all(order[user] <= order[node] for user in source.users):
                    held.pop(source.name, None)
        return value

    run(graph.module, images, step)
    return seen


def _see(graph: QuantGraph, site: Site, operands: tuple[Tensor, ...]) -> Seen:
    weight = get_tensor(graph.module, site.weight) if site.weight else None
    importance = None
    if site.kind == "linear":
        x = operands[0].float()
        importance = x.square().mean(dim=tuple(range(x.dim() - 1)))
    return Seen(take_sample(graph, site, operands, weight), weight, importance)


def _first_positions(graph: QuantGraph, nodes: list[Node], plan: Plan) -> dict[str, int]:
    """Index of the first node that each site's quantizers change."""
    sites = {graph.sites[name].node: name for name in plan}
    index = {node: i for i, node in enumerate(nodes)}
    return {
        sites[node.name]: min(index[a] for a in node.args if isinstance(a, Node) and a.op == "call_module")
        for node in nodes
        if node.name in sites
    }


def _checkpoints(nodes: list[Node]) -> dict[int, list[Node]]:
    """Where values are kept, and which: in each stretch of the graph where the fewest are alive."""
    last_use = last_uses(nodes)
    alive: list[list[Node]] = []
    live: set[Node] = set()
    for index, node in enumerate(nodes):
        alive.append([n for n in live if not _is_constant(n)])
        live.add(node)
        live = {n for n in live if last_use.get(n, -1) > index}
    stretch = max(1, len(nodes) // CHECKPOINTS)
    windows = [range(start, min(start + stretch, len(nodes))) for start in range(stretch, len(nodes), stretch)]
    places = [min(window, key=lambda i: len(alive[i])) for window in windows]
    return {place: alive[place] for place in places}


def _set_quantizers(network: Network, plan: Plan) -> None:
    """Set the modules of the graph to a plan."""
    for name, bits in plan.items():
        site = network.graph.sites[name]
        for part in parts_of(site):
            role = "weight" if part == 0 and site.weight else ROLES[0 if part == 1 else 1]
            setattr(network.graph.module, quantizer_name(name, role), _quantizer(network, name, part, bits[part])[0])


def _quantizer(network: Network, name: str, part: int, bits: int) -> tuple[nn.Module, float]:
    """The module for one part of a site at some bits, and its squared output error on the sample."""
    key = (name, part, bits)
    if key not in network.made:
        network.made[key] = _make_quantizer(network, name, part, bits)
    return network.made[key]


@torch.no_grad()
def _make_quantizer(network: Network, name: str, part: int, bits: int) -> tuple[nn.Module, float]:
    site, seen = network.graph.sites[name], network.seen[name]
    if part == 0 and seen.weight is not None:
        return _make_weight(site, seen, seen.weight, bits)
    if bits == FLOAT_BITS:
        return nn.Identity(), 0.0
    fitted, error = fit(seen.sample, 0 if part == 1 else 1, bits, network.choices)
    return fitted, float(error.sum())


def _make_weight(site: Site, seen: Seen, weight: Tensor, bits: int) -> tuple[nn.Module, float]:
    if bits == FLOAT_BITS:
        return FloatWeight(weight), 0.0
    quantizer = WeightQuantizer(site.weight_shape, bits).to(weight.device)
    quantizer.set_weight(weight, search_weight_scale(weight, bits, seen.importance))
    delta = quantizer() - weight
    if site.kind == "linear":
        return quantizer, float((seen.sample.inputs[0] @ delta.t()).square().sum())
    return quantizer, float(delta.square().sum())


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr"
