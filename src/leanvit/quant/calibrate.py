"""Set every quantizer in one walk through the graph, float and quantized network side by side.

All calibration images go through node by node. Where a quantizer stands, its site's operands are at hand as
the float network returns them and as the quantized one, up to here, returns them; the parameters are set at once
and the walk goes on with what they make of the data. Each image is computed once in each network, whatever
the number of sites, and only live tensors are held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.progress import Bar
from leanvit.quant.attach import Forms
from leanvit.quant.convolution_outputs import fit_output, sites_with_outputs
from leanvit.quant.graph import OPERANDS, QuantGraph, Site, conv_options, get_tensor, node_argument, quantizer_of
from leanvit.quant.interpret import Values, compute, walk
from leanvit.quant.ops import ADD
from leanvit.quant.opt_m import choose_form, fit_activation, search_weight_scale
from leanvit.quant.quantizers import FORMS, ActivationQuantizer, Form, WeightQuantizer
from leanvit.quant.reconstruct import MAX_INPUTS, MAX_ROWS, conv_patches, correct
from leanvit.quant.samples import SiteSample, take_sample


@dataclass(frozen=True)
class Choices:
    """How quantizers are set.

    search: ranges by least output error; False: minimum and maximum. two_region: kinds of sources ("gelu",
    "softmax") whose quantizers below 8 bits have two regions. choose: also try the other forms, and take the
    best. per_head: parameters for each head. sequential: calibrate on what the quantized network returns.
    correct: closed-form correction, error-feedback rounding and bias correction of weights.
    """

    search: bool = True
    two_region: frozenset[str] = frozenset({"gelu", "softmax"})
    choose: bool = False
    per_head: bool = False
    sequential: bool = False
    correct: bool = False


@dataclass
class Calibrated:
    """What the walk found: the form of every quantizer, notes for the report by site, and quantizers of outputs."""

    forms: Forms = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, tuple[float, int]] = field(default_factory=dict)


def forms_of(sample: SiteSample, operand: int, bits: int, choices: Choices) -> list[Form]:
    """The forms to try for one operand: uniform at 8 bits, whose steps are as fine as any of the others'."""
    kind = sample.kinds[operand]
    if bits >= 8 or kind is None or kind not in choices.two_region or not choices.search:
        return ["uniform"]
    if not choices.choose:
        return ["two-region"]
    return [form for form, made in FORMS.items() if made.sources is None or kind in made.sources]


def fit(sample: SiteSample, operand: int, bits: int, choices: Choices) -> tuple[ActivationQuantizer, Tensor]:
    """The quantizer of one operand as `choices` say, and its squared output error."""
    if not choices.search:
        return fit_activation(sample, operand, bits, search=False)
    # 8-bit operands keep one scale for the tensor: what integer kernels take.
    per_head = choices.per_head and bits < 8
    return choose_form(sample, operand, bits, forms_of(sample, operand, bits, choices), per_head=per_head)


class _Walk:
    """The state of one walk: the values of live nodes in both networks."""

    def __init__(self, graph: QuantGraph, reference: GraphModule, images: Tensor, choices: Choices) -> None:
        self.graph, self.reference, self.choices = graph, reference, choices
        self.images = len(images)
        self.truth: Values = {}
        self.values: Values = {}
        self.samples: dict[str, SiteSample] = {}
        self.result = Calibrated()
        self.sites = {site.node: site for site in graph.sites.values()}
        self.inputs = images
        self.outputs = sites_with_outputs(graph)

    def step(self, node: Node) -> None:
        """Compute one node in both networks, setting the quantizer that it may be."""
        quantizer = quantizer_of(self.graph.module, node)
        if isinstance(quantizer, ActivationQuantizer):
            source = node_argument(node, 0)
            quantizer = self._set_activation(node, quantizer.bits)
            self.truth[node], self.values[node] = self.truth[source], quantizer(self.values[source])
        elif isinstance(quantizer, WeightQuantizer):
            site = self._site(node)
            self.truth[node] = get_tensor(self.reference, str(site.weight))
            self._set_weight(node, site, quantizer)
            self.values[node] = quantizer()
        else:
            self.truth[node] = compute(self.reference, node, self.truth, self.inputs)
            self.values[node] = compute(self.graph.module, node, self.values, self.inputs)
            if node.name in self.outputs:
                self.result.outputs[self.outputs[node.name]] = fit_output(self.values[node])

    def _site(self, node: Node) -> Site:
        return self.sites[next(user.name for user in node.users if user.name in self.sites)]

    def _set_activation(self, node: Node, bits: int) -> ActivationQuantizer:
        readers = [user for user in node.users if user.name in self.sites]
        site = self.sites[readers[0].name]
        operand = next(i for i in range(OPERANDS[site.kind]) if readers[0].args[i] is node)
        sample = self._sample(site, readers)
        fitted, error = fit(sample, operand, bits, self.choices)
        self.graph.module.set_submodule(str(node.target), fitted)
        self.result.forms[str(node.target)] = (fitted.form, fitted.heads)
        notes = self.result.notes.setdefault(site.name, {})
        notes[f"form_{operand}"] = fitted.form
        notes[f"error_{operand}"] = float(error.sum())
        return fitted

    def _sample(self, site: Site, readers: list[Node]) -> SiteSample:
        if site.name not in self.samples:
            env = self.values if self.choices.sequential else self.truth
            node = self.graph.node(site.node)
            operands = tuple(self._value(env, node_argument(node, i)) for i in range(OPERANDS[site.kind]))
            weights = [get_tensor(self.reference, str(self.sites[r.name].weight)) for r in readers
                       if self.sites[r.name].kind == "linear"]  # fmt: skip
            weight = torch.cat(weights) if weights and site.kind == "linear" else None
            self.samples[site.name] = take_sample(self.graph, site, operands, weight)
        return self.samples[site.name]

    def _value(self, env: dict[Node, Any], node: Node) -> Any:
        """What a quantizer reads, or what it returned where it is shared and its source is no longer held."""
        source = self._source(node)
        return env[source] if source in env else env[node]

    def _source(self, node: Node) -> Node:
        is_quantizer = isinstance(quantizer_of(self.graph.module, node), ActivationQuantizer)
        return node_argument(node, 0) if is_quantizer else node

    def _set_weight(self, node: Node, site: Site, quantizer: WeightQuantizer) -> None:
        weight = get_tensor(self.reference, str(site.weight))
        reader = self.graph.node(site.node)
        if self.choices.correct and self._correct(site, reader, weight, quantizer):
            return
        x = self.truth[node_argument(reader, 0)]
        importance = None
        if site.kind == "linear":
            importance = x.float().square().mean(dim=tuple(range(x.dim() - 1)))
        quantizer.set_weight(weight, search_weight_scale(weight, quantizer.bits, importance))

    def _correct(self, site: Site, reader: Node, weight: Tensor, quantizer: WeightQuantizer) -> bool:
        """Correct a linear or convolution with a bias of its own; False where it can't be."""
        bias = reader.args[2] if len(reader.args) > 2 else None
        if not isinstance(bias, Node) or bias.op != "get_attr" or len(bias.users) > 1 or weight[0].numel() > MAX_INPUTS:
            return False
        x, target = self.values[node_argument(reader, 0)], compute(self.reference, reader, self.truth, self.inputs)
        target = target + self._gathered_error(reader, target)
        groups = 1
        if site.kind == "conv2d":
            if isinstance(reader.args[4] if len(reader.args) > 4 else None, str):
                return False
            options = conv_options(reader)
            groups = options[3]
            rows, aims = conv_patches(x, weight, options), target.flatten(2).transpose(1, 2)
        else:
            rows, aims = x.reshape(1, -1, x.shape[-1]), target
        aims = aims.reshape(rows.shape[1], groups, -1).transpose(0, 1)
        rows, aims = _thin(rows, aims)
        grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
        done = correct(grouped, rows, aims, quantizer.bits, ridge=True, images=self.images)
        quantizer.set_integers(done.integers, done.scale.flatten())
        path = str(bias.target)
        get_tensor(self.graph.module, path).data.copy_(done.bias.flatten())
        self.values[bias] = get_tensor(self.graph.module, path)
        self.result.notes.setdefault(site.name, {})["ridge"] = done.correction
        return True

    def _gathered_error(self, reader: Node, target: Tensor) -> Tensor | float:
        """What the residual branch that the site is added to has gathered so far; the site may take it back."""
        users = list(reader.users)
        if len(users) != 1 or users[0].target not in ADD:
            return 0.0
        others = [a for a in users[0].args[:2] if isinstance(a, Node) and a is not reader]
        known = [self._source(other) for other in others if self._source(other) in self.values]
        if len(known) != 1 or not isinstance(self.values[known[0]], Tensor):
            return 0.0
        error: Tensor = self.truth[known[0]] - self.values[known[0]]
        return error if error.shape == target.shape else 0.0


def _thin(rows: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
    """Every so-many-th row where there are more than the correction needs; images stay together."""
    step = -(-rows.shape[1] // MAX_ROWS)
    # An odd step walks through all columns of a map, an even one would see every other.
    step += step % 2 == 0
    return (rows, aims) if step == 1 else (rows[:, ::step], aims[:, ::step])


@torch.no_grad()
def calibrate(graph: QuantGraph, reference: nn.Module, images: Tensor, choices: Choices) -> Calibrated:
    """Set all quantizers of `graph` (see the module) on calibration images.

    graph: with quantizers attached. reference: the float graph module, its nodes of the same names.
    images: (N, 3, H, W), normalised, on the graph's device.
    """
    state = _Walk(graph, reference, images, choices)  # type: ignore[arg-type]
    with Bar("quantizing", len(graph.module.graph.nodes)) as bar:
        for _, node in walk(graph.module, state.truth, state.values):
            state.step(node)
            bar.advance()
    return state.result
