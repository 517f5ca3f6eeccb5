"""The loss of one plan after another on the same network, running only what a change can reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from leanvit.quant.attach import ROLES, attach, quantizer_name
from leanvit.quant.calibrate import Choices, fit
from leanvit.quant.graph import QuantGraph, get_tensor, site_inputs
from leanvit.quant.interpret import compute, last_uses, run, walk
from leanvit.quant.losses import Answers, answers_from, divergence
from leanvit.quant.memory import give_back
from leanvit.quant.plan import FLOAT_BITS, Plan, parts_of
from leanvit.quant.quantizers import WeightQuantizer
from leanvit.quant.samples import SiteSample, take_sample
from leanvit.quant.search import search_weight_scale

CHECKPOINTS = 12
"""Places at which the values of the current plan are kept; of a run that may be accepted they are held twice."""


class FloatWeight(nn.Module):
    """A weight that stays as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        """The weight."""
        weight: Tensor = self.get_buffer("weight")
        return weight


class Evaluator:
    """A network whose sites can be set to any bits, and the KL divergence of each such plan.

    Quantizers of every site and level are made when first needed, from samples that one float run leaves.
    Bits of FLOAT_BITS leave a tensor as it is.
    """

    def __init__(self, graph: QuantGraph, images: Tensor, plan: Plan, choices: Choices) -> None:
        """graph: float, owned by the evaluator from now on. images: (N, 3, H, W). plan: the start."""
        self.choices = choices
        self.images = images
        self.weights = {n: get_tensor(graph.module, str(s.weight)) for n, s in graph.sites.items() if s.weight}
        self.samples: dict[str, SiteSample] = {}
        self.importance: dict[str, Tensor] = {}
        self._collect(graph, plan)
        give_back()
        attach(graph, {name: (8 if bits[0] else 0, 8) for name, bits in plan.items()}, share=False)
        self.graph = graph
        self.nodes = list(graph.module.graph.nodes)
        self.position = {graph.sites[name].node: name for name in plan}
        self.first = self._first_positions()
        self.made: dict[tuple[str, int, int], tuple[nn.Module, float]] = {}
        self.kept: dict[int, dict[Node, Any]] = {}
        self.current: Plan = {}
        self.pending: tuple[Plan, dict[int, dict[Node, Any]]] | None = None
        self._plan_checkpoints()
        self._apply(plan)

    @torch.no_grad()
    def _collect(self, graph: QuantGraph, plan: Plan) -> None:
        """Run the float network once: samples of all sites, and its logits."""
        by_node = {graph.sites[name].node: graph.sites[name] for name in plan}
        needed = {source.name for site in by_node.values() for source in site_inputs(graph, site)}
        values: dict[str, Tensor] = {}

        def step(node: Node, value: Any) -> Any:
            if node.name in needed:
                values[node.name] = value
            site = by_node.get(node.name)
            if site is not None:
                operands = tuple(values[source.name] for source in site_inputs(graph, site))
                self.samples[site.name] = take_sample(graph, site, operands, self.weights.get(site.name))
                if site.kind == "linear":
                    x = operands[0].float()
                    self.importance[site.name] = x.square().mean(dim=tuple(range(x.dim() - 1)))
                for source in site_inputs(graph, site):
                    if all(order[user] <= order[node] for user in source.users):
                        values.pop(source.name, None)
            return value

        order = {node: index for index, node in enumerate(graph.module.graph.nodes)}
        run(graph.module, self.images, step)
        self.truth = answers_from(graph.module(self.images))

    def _first_positions(self) -> dict[str, int]:
        """Index of the first node that a site's quantizers change."""
        first: dict[str, int] = {}
        index = {node: i for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            if node.name in self.position:
                name = self.position[node.name]
                quantizers = [a for a in node.args if isinstance(a, Node) and a.op == "call_module"]
                first[name] = min(index[q] for q in quantizers)
        return first

    def _plan_checkpoints(self) -> None:
        """Choose where values are kept: in each stretch of the graph where the fewest are alive."""
        last_use = last_uses(self.nodes)
        alive: list[list[Node]] = []
        live: set[Node] = set()
        for index, node in enumerate(self.nodes):
            alive.append([n for n in live if not _is_constant(n)])
            live.add(node)
            live = {n for n in live if last_use.get(n, -1) > index}
        stretch = max(1, len(self.nodes) // CHECKPOINTS)
        self.alive: dict[int, list[Node]] = {}
        for start in range(stretch, len(self.nodes), stretch):
            window = range(start, min(start + stretch, len(self.nodes)))
            best = min(window, key=lambda i: len(alive[i]))
            self.alive[best] = alive[best]
        self.last_use = last_use

    def _quantizer(self, name: str, part: int, bits: int) -> tuple[nn.Module, float]:
        """The module for one part of a site at some bits, and its squared output error on the sample."""
        key = (name, part, bits)
        if key not in self.made:
            self.made[key] = self._make(name, part, bits)
        return self.made[key]

    @torch.no_grad()
    def _make(self, name: str, part: int, bits: int) -> tuple[nn.Module, float]:
        site, sample = self.graph.sites[name], self.samples[name]
        if part == 0 and site.weight:
            weight = self.weights[name]
            if bits == FLOAT_BITS:
                return FloatWeight(weight), 0.0
            quantizer = WeightQuantizer(site.weight_shape, bits).to(weight.device)
            quantizer.set_weight(weight, search_weight_scale(weight, bits, self.importance.get(name)))
            delta = quantizer() - weight
            if site.kind == "linear":
                return quantizer, float((sample.inputs[0] @ delta.t()).square().sum())
            return quantizer, float(delta.square().sum())
        if bits == FLOAT_BITS:
            return nn.Identity(), 0.0
        fitted, error = fit(sample, 0 if part == 1 else 1, bits, self.choices)
        return fitted, float(error.sum())

    def local_error(self, candidate: tuple[str, int], bits: int) -> float:
        """Squared output error of one site, on its sample, with one part (2: all) at some bits."""
        name, part = candidate
        parts = parts_of(self.graph.sites[name]) if part == 2 else (part,)
        return sum(self._quantizer(name, p, bits)[1] for p in parts)

    def _apply(self, plan: Plan) -> None:
        """Set the modules to a plan."""
        for name, bits in plan.items():
            if self.current.get(name) == bits:
                continue
            site = self.graph.sites[name]
            for part in parts_of(site):
                role = "weight" if part == 0 and site.weight else ROLES[0 if part == 1 else 1]
                target = quantizer_name(name, role)
                setattr(self.graph.module, target, self._quantizer(name, part, bits[part])[0])
        self.current = dict(plan)

    @torch.no_grad()
    def loss(self, plan: Plan, *changed: str) -> float:
        """KL divergence in nats of a plan that differs from the accepted one at the sites `changed` only.

        None given runs the whole network and keeps its values as those of the accepted plan.
        """
        before = dict(self.current)
        self._apply(plan)
        first = min((self.first[name] for name in changed), default=-1)
        start = max((i for i in self.kept if i <= first), default=0)
        answers, kept = self._run(start)
        give_back()
        if not changed:
            self.kept = kept
            self.pending = None
        else:
            self.pending = (dict(plan), kept)
            self._apply(before)
        return divergence(self.truth, answers)

    def accept(self, plan: Plan, *changed: str) -> None:
        """Make a plan the current one; values behind the changed sites are taken from its run, or forgotten."""
        self._apply(plan)
        first = min(self.first[name] for name in changed)
        self.kept = {index: values for index, values in self.kept.items() if index <= first}
        if self.pending is not None and self.pending[0] == plan:
            self.kept |= self.pending[1]
        self.pending = None

    def _run(self, start: int) -> tuple[Answers, dict[int, dict[Node, Any]]]:
        env: dict[Node, Any] = dict(self.kept[start]) if start else {}
        kept: dict[int, dict[Node, Any]] = {}
        result: Any = None
        for node in self.nodes[:start]:
            if node.op == "get_attr" and self.last_use.get(node, -1) >= start:
                env[node] = get_tensor(self.graph.module, str(node.target))
        for index, node in walk(self.graph.module, env, start=start):
            if index in self.alive and index != start:
                kept[index] = {n: env[n] for n in self.alive[index]}
            env[node] = result = compute(self.graph.module, node, env, self.images)
        return answers_from(result), kept


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr"
