"""The loss of one plan after another on the same network, running only what a change can reach.

`make_network` takes what all plans share from one float run. `outputs_of_plan` returns what a plan computes and the
values that it leaves on the way; given the values of any other plan, it begins where the two plans first differ.
`PlanLosses` keeps the values of the last plans. Nothing depends on the order of calls, nor on who computes which part
of the images: they run in the same parts everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from leanvit.quant.attach import ROLES, attach, quantizer_name
from leanvit.quant.calibrate import Choices, fit
from leanvit.quant.costs import Candidate
from leanvit.quant.graph import Outputs, QuantGraph, Site, get_tensor, site_inputs
from leanvit.quant.interpret import Values, compute, last_uses, run, walk
from leanvit.quant.losses import divergence, joined, outputs_from
from leanvit.quant.memory import give_back
from leanvit.quant.opt_m import search_weight_scale
from leanvit.quant.plan import FLOAT_BITS, Plan, parts_of
from leanvit.quant.quantizers import WeightQuantizer
from leanvit.quant.samples import SiteSample, take_sample

CHECKPOINTS = 12
"""Places at which the values of a plan are kept: a run begins 4% of the network too early on average, in exchange for
12 times what is alive at once."""

PLANS_HELD = 2
"""Plans whose values are kept: what a search goes on from is the last that it took or the last that it tried."""

PART_MACS = 3_200_000_000
"""Multiply-adds of the images that run at once: 128 of vit_micro, of which 64 took 15% longer, as Python's own time
shows, and 512 no less; and PART_IMAGES of a ViT-S."""

PART_IMAGES = 4
"""Images that run at once at least."""


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

    graph: with a quantizer for every part of every site, which is set to one plan after another. parts: the images,
    (B, 3, H, W) each, in the parts in which they run. truth: float outputs of all.
    first: index of the first node that a site's quantizers change. alive: nodes whose values are kept at an index.
    made: quantizers, made when first needed.
    """

    graph: QuantGraph
    parts: tuple[Tensor, ...]
    choices: Choices
    truth: Outputs
    seen: dict[str, Seen]
    first: dict[str, int]
    alive: dict[int, list[Node]]
    made: Made = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Values of a plan at some indices of the graph, by part of the images; a run of another plan may begin there."""

    plan: Plan
    values: dict[int, dict[int, Values]]


@torch.no_grad()
def make_network(graph: QuantGraph, images: Tensor, plan: Plan, choices: Choices) -> Network:
    """Make a float graph ready for plans of the sites of `plan`; the graph is the network's from now on.

    images: (N, 3, H, W) calibration images. choices: how quantizers are set.
    """
    seen = _see_sites(graph, images, plan)
    parts = torch.tensor_split(images, parts_of_images(graph, len(images)))
    truth = joined(outputs_from(graph.module(part)) for part in parts)
    give_back()
    attach(graph, {name: (8 if bits[0] else 0, 8) for name, bits in plan.items()}, share=False)
    nodes = list(graph.module.graph.nodes)
    return Network(graph, parts, choices, truth, seen, _first_positions(graph, nodes, plan), _checkpoints(nodes))


def parts_of_images(graph: QuantGraph, count: int) -> int:
    """In how many parts images run: a power of two, so that two, four or eight processes have the same to do; two at
    least."""
    macs = sum(site.macs for site in graph.sites.values())
    at_once = max(PART_IMAGES, PART_MACS // max(1, macs))
    parts = min(2, count)
    while count > parts * at_once:
        parts *= 2
    return parts


class PlanLosses:
    """The losses of one plan after another, or outputs for parts of the images.

    Values of the last plans are kept: a run begins where its plan first differs from the nearest of them.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._held: list[Kept] = []

    def loss(self, plan: Plan) -> float:
        """Divergence of a plan's outputs from the float ones (KL in nats for logits)."""
        outputs = joined(self.outputs(plan, range(len(self.network.parts))))
        return divergence(self.network.truth, outputs, self.network.graph.measure)

    def losses(self, plans: Sequence[Plan]) -> Iterator[float]:
        """The same of several plans, in their order."""
        return map(self.loss, plans)

    def outputs(self, plan: Plan, parts: Iterable[int]) -> list[Outputs]:
        """What the network returns with the quantizers of a plan for some parts of the images, the same each time."""
        nearest = max(self._held, key=lambda kept: _nearness(self.network, plan, kept), default=None)
        outputs, latest = outputs_of_plan(self.network, plan, parts, nearest)
        others = [kept for kept in self._held if kept is not nearest and kept.plan != plan]
        used = [] if nearest is None or nearest.plan == plan else [nearest]
        self._held = [*others, *used, latest][-PLANS_HELD:]
        return outputs

    def local_error(self, candidate: Candidate, bits: int) -> float:
        """Squared output error of a part of a site on its sample."""
        return local_error(self.network, *candidate, bits)


def _nearness(network: Network, plan: Plan, kept: Kept) -> tuple[int, int]:
    """How far a run of a plan is spared by the values of another; of as many, those of the plan that differs less."""
    same = sum(kept.plan.get(name) == bits for name, bits in plan.items())
    return first_difference(network, plan, kept), same


@torch.no_grad()
def outputs_of_plan(
    network: Network, plan: Plan, parts: Iterable[int], kept: Kept | None = None
) -> tuple[list[Outputs], Kept]:
    """Outputs for parts of the images with the quantizers of a plan, and the values that it leaves.

    kept: what a run of another plan left; nodes before the first site that differs are not run again.
    """
    _set_quantizers(network, plan)
    first = 0 if kept is None else first_difference(network, plan, kept)
    outputs, values = [], dict[int, dict[int, Values]]()
    for part in parts:
        known = {} if kept is None else kept.values.get(part, {})
        held = {index: value for index, value in known.items() if index <= first}
        start = max(held, default=0)
        found, new = _run(network, network.parts[part], start, held.get(start, {}))
        outputs.append(found)
        values[part] = held | new
    give_back()
    return outputs, Kept(plan, values)


def first_difference(network: Network, plan: Plan, kept: Kept) -> int:
    """Index of the first node that a plan computes otherwise than the one whose values were kept."""
    changed = [network.first[name] for name, bits in plan.items() if kept.plan.get(name) != bits]
    return min(changed, default=len(network.graph.module.graph.nodes))


def local_error(network: Network, site: str, part: int, bits: int) -> float:
    """Squared output error of one site, on its sample, with one part (2: all) at some bits."""
    return sum(_quantizer(network, site, own, bits)[1] for own in _own_parts(network, site, part))


def made_for(network: Network, candidate: Candidate, levels: Iterable[int]) -> Made:
    """The quantizers of a part of a site at some levels, as far as they were made."""
    site, part = candidate
    keys = itertools.product((site,), _own_parts(network, site, part), levels)
    return {key: network.made[key] for key in keys if key in network.made}


def _own_parts(network: Network, site: str, part: int) -> tuple[int, ...]:
    """The parts that a candidate stands for; 2: all of the site."""
    return parts_of(network.graph.sites[site]) if part == 2 else (part,)


def _run(network: Network, images: Tensor, start: int, held: Values) -> tuple[Outputs, dict[int, Values]]:
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
        values[node] = result = compute(module, node, values, images)
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
