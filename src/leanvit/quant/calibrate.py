"""Set every quantizer in one walk through the graph, float and quantized network side by side.

All calibration images go through node by node. Where a quantizer stands, its site's operands are at hand as
the float network returns them and as the quantized one, up to here, returns them; the parameters are set at once
and the walk goes on with what they make of the data. Each image is computed once in each network, whatever
the number of sites, and only live tensors are held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from leanvit.progress import Bar
from leanvit.quant.attach import Forms
from leanvit.quant.convolution_outputs import fit_output, sites_with_outputs
from leanvit.quant.graph import OPERANDS, QuantGraph, Site, conv_options, get_tensor, node_argument, quantizer_of
from leanvit.quant.interpret import Values, compute, walk
from leanvit.quant.losses import divergence, outputs_from
from leanvit.quant.ops import ADD, CHOICES
from leanvit.quant.opt_m import choose_form, fit_activation, search_weight_scale
from leanvit.quant.quantizers import FORMS, ActivationQuantizer, Form, WeightQuantizer
from leanvit.quant.reconstruct import MAX_INPUTS, MAX_ROWS, compensate, conv_patches, correct
from leanvit.quant.samples import SiteSample, take_sample


@dataclass(frozen=True)
class Choices:
    """How quantizers are set.

    search: ranges by least output error; False: minimum and maximum. two_region: kinds of sources ("gelu",
    "softmax") whose quantizers below 8 bits have two regions. choose: also try the other forms, and take the
    best. per_head: parameters for each head. sequential: calibrate on what the quantized network returns.
    correct: closed-form correction, error-feedback rounding and bias correction of weights. affine: a line fitted to
    each output channel.
    """

    search: bool = True
    two_region: frozenset[str] = frozenset({"gelu", "softmax"})
    choose: bool = False
    per_head: bool = False
    sequential: bool = False
    correct: bool = False
    affine: bool = False


@dataclass
class Calibrated:
    """What the walk found: the form of every quantizer, notes for the report by site, quantizers of outputs, and the
    divergence of the network's outputs on these images."""

    forms: Forms = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    loss: float = math.nan


def forms_of(sample: SiteSample, operand: int, bits: int, choices: Choices) -> list[Form]:
    """The forms to try for one operand: uniform at 8 bits, whose steps are as fine as any of the others'."""
    kind = sample.kinds[operand]
    if bits >= 8 or kind is None or kind not in choices.two_region or not choices.search:
        return ["uniform"]
    if not choices.choose:
        return ["two-region"]
    return [form for form, made in FORMS.items() if made.has_kernel and (made.sources is None or kind in made.sources)]


def fit(sample: SiteSample, operand: int, bits: int, choices: Choices) -> tuple[ActivationQuantizer, Tensor]:
    """The quantizer of one operand as `choices` say, and its squared output error."""
    if not choices.search:
        return fit_activation(sample, operand, bits, search=False)
    # 8-bit operands keep one scale for the tensor: what integer kernels take.
    per_head = choices.per_head and bits < 8
    return choose_form(sample, operand, bits, forms_of(sample, operand, bits, choices), per_head=per_head)


@dataclass(frozen=True)
class _State:
    """What one walk holds: of both networks the values of live nodes, samples of sites, and what was found so far.

    truth: values of the float network; values: of the quantized one. sites: by the name of their node.
    outputs: {node: convolution} whose output gets a quantizer.
    """

    graph: QuantGraph
    reference: GraphModule
    images: Tensor
    choices: Choices
    sites: dict[str, Site]
    outputs: dict[str, str]
    truth: Values = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    samples: dict[str, SiteSample] = field(default_factory=dict)
    result: Calibrated = field(default_factory=Calibrated)


def _step(state: _State, node: Node) -> None:
    """Compute one node in both networks, setting the quantizer that it may be."""
    quantizer = quantizer_of(state.graph.module, node)
    if isinstance(quantizer, ActivationQuantizer):
        source = node_argument(node, 0)
        quantizer = _set_activation(state, node, quantizer.bits)
        state.truth[node], state.values[node] = state.truth[source], quantizer(state.values[source])
    elif isinstance(quantizer, WeightQuantizer):
        site = _site(state, node)
        state.truth[node] = get_tensor(state.reference, str(site.weight))
        _set_weight(state, node, site, quantizer)
        state.values[node] = quantizer()
    else:
        state.truth[node] = compute(state.reference, node, state.truth, state.images)
        # Where tokens are chosen the quantized network follows the float one: else they stand for other patches.
        follows = node.target in CHOICES
        state.values[node] = (
            state.truth[node] if follows else compute(state.graph.module, node, state.values, state.images)
        )
        if node.op == "output":
            state.result.loss = divergence(
                outputs_from(state.truth[node]), outputs_from(state.values[node]), state.graph.measure
            )
        if node.name in state.outputs:
            state.result.outputs[state.outputs[node.name]] = fit_output(state.values[node])


def _site(state: _State, node: Node) -> Site:
    return state.sites[next(user.name for user in node.users if user.name in state.sites)]


def _set_activation(state: _State, node: Node, bits: int) -> ActivationQuantizer:
    readers = [user for user in node.users if user.name in state.sites]
    site = state.sites[readers[0].name]
    operand = next(i for i in range(OPERANDS[site.kind]) if readers[0].args[i] is node)
    sample = _sample(state, site, readers)
    fitted, error = fit(sample, operand, bits, state.choices)
    state.graph.module.set_submodule(str(node.target), fitted)
    state.result.forms[str(node.target)] = (fitted.form, fitted.heads)
    notes = state.result.notes.setdefault(site.name, {})
    notes[f"form_{operand}"] = fitted.form
    notes[f"error_{operand}"] = float(error.sum())
    if all(f"error_{i}" in notes for i in range(OPERANDS[site.kind])):
        state.samples.pop(site.name)  # of a map it may be a whole image
    return fitted


def _sample(state: _State, site: Site, readers: list[Node]) -> SiteSample:
    if site.name not in state.samples:
        env = state.values if state.choices.sequential else state.truth
        node = state.graph.node(site.node)
        operands = tuple(_value(state, env, node_argument(node, i)) for i in range(OPERANDS[site.kind]))
        weights = [get_tensor(state.reference, str(state.sites[r.name].weight)) for r in readers
                   if state.sites[r.name].kind == "linear"]  # fmt: skip
        weight = torch.cat(weights) if weights and site.kind == "linear" else None
        state.samples[site.name] = take_sample(state.graph, site, operands, weight)
    return state.samples[site.name]


def _value(state: _State, env: dict[Node, Any], node: Node) -> Any:
    """What a quantizer reads, or what it returned where it is shared and its source is no longer held."""
    source = _source(state, node)
    return env[source] if source in env else env[node]


def _source(state: _State, node: Node) -> Node:
    is_quantizer = isinstance(quantizer_of(state.graph.module, node), ActivationQuantizer)
    return node_argument(node, 0) if is_quantizer else node


def _set_weight(state: _State, node: Node, site: Site, quantizer: WeightQuantizer) -> None:
    weight = get_tensor(state.reference, str(site.weight))
    reader = state.graph.node(site.node)
    corrects = state.choices.correct and weight[0].numel() <= MAX_INPUTS
    found = _examples(state, site, reader, weight) if corrects or state.choices.affine else None
    if found is not None and corrects:
        _correct(state, site, weight, quantizer, found)
    else:
        x = state.truth[node_argument(reader, 0)]
        importance = None
        if site.kind == "linear":
            importance = x.float().square().mean(dim=tuple(range(x.dim() - 1)))
        quantizer.set_weight(weight, search_weight_scale(weight, quantizer.bits, importance))
    if found is not None and state.choices.affine:
        _compensate(state, quantizer, found)


@dataclass(frozen=True)
class _Examples:
    """What a linear or convolution reads in the quantized network, (g, rows, in), and what it should return, (g, rows,
    out), with the node of its bias."""

    rows: Tensor
    aims: Tensor
    bias: Node


def _examples(state: _State, site: Site, reader: Node, weight: Tensor) -> _Examples | None:
    """Examples for a site with a bias of its own; None where it has none, or pads by a name."""
    bias = reader.args[2] if len(reader.args) > 2 else None
    if not isinstance(bias, Node) or bias.op != "get_attr" or len(bias.users) > 1:
        return None
    x, target = state.values[node_argument(reader, 0)], compute(state.reference, reader, state.truth, state.images)
    target = target + _gathered_error(state, reader, target)
    groups = 1
    if site.kind == "conv2d":
        if isinstance(reader.args[4] if len(reader.args) > 4 else None, str):
            return None
        options = conv_options(reader)
        groups = options[3]
        rows, aims = conv_patches(x, weight, options), target.flatten(2).transpose(1, 2)
    else:
        rows, aims = x.reshape(1, -1, x.shape[-1]), target
    aims = aims.reshape(rows.shape[1], groups, -1).transpose(0, 1)
    return _Examples(*_thin(rows, aims), bias)


def _correct(state: _State, site: Site, weight: Tensor, quantizer: WeightQuantizer, found: _Examples) -> None:
    """Correct the weight and the bias of a site in closed form."""
    grouped = _grouped(weight, found)
    done = correct(grouped, found.rows, found.aims, quantizer.bits, ridge=True, images=len(state.images))
    quantizer.set_integers(done.integers, done.scale.flatten())
    _set_bias(state, found.bias, done.bias)
    state.result.notes.setdefault(site.name, {})["ridge"] = done.correction


def _compensate(state: _State, quantizer: WeightQuantizer, found: _Examples) -> None:
    """Fit a line to every output channel of a site, and put it into the scale of the weight and the bias."""
    bias = get_tensor(state.graph.module, str(found.bias.target)).view(len(found.aims), -1)
    weight = _grouped(quantizer(), found)
    factor, shift = compensate(weight, bias, found.rows, found.aims, len(state.images))
    quantizer.scale.mul_(factor.flatten())
    _set_bias(state, found.bias, shift)


def _grouped(weight: Tensor, found: _Examples) -> Tensor:
    groups = len(found.aims)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _set_bias(state: _State, bias: Node, value: Tensor) -> None:
    path = str(bias.target)
    get_tensor(state.graph.module, path).data.copy_(value.flatten())
    state.values[bias] = get_tensor(state.graph.module, path)


def _gathered_error(state: _State, reader: Node, target: Tensor) -> Tensor | float:
    """What the residual branch that the site is added to has gathered so far; the site may take it back."""
    users = list(reader.users)
    if len(users) != 1 or users[0].target not in ADD:
        return 0.0
    others = [a for a in users[0].args[:2] if isinstance(a, Node) and a is not reader]
    known = [_source(state, other) for other in others if _source(state, other) in state.values]
    if len(known) != 1 or not isinstance(state.values[known[0]], Tensor):
        return 0.0
    error: Tensor = state.truth[known[0]] - state.values[known[0]]
    return error if error.shape == target.shape else 0.0


def _thin(rows: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
    """Every so-many-th row where there are more than the correction needs; images stay together."""
    step = -(-rows.shape[1] // MAX_ROWS)
    # An odd step walks through all columns of a map, an even one would see every other.
    step += step % 2 == 0
    return (rows, aims) if step == 1 else (rows[:, ::step], aims[:, ::step])


@torch.no_grad()
def calibrate(graph: QuantGraph, reference: GraphModule, images: Tensor, choices: Choices) -> Calibrated:
    """Set all quantizers of `graph` (see the module) on calibration images.

    graph: with quantizers attached. reference: the float graph module, its nodes of the same names.
    images: (N, 3, H, W), normalised, on the graph's device.
    """
    sites = {site.node: site for site in graph.sites.values()}
    state = _State(graph, reference, images, choices, sites, sites_with_outputs(graph))
    with Bar("quantizing", len(graph.module.graph.nodes)) as bar:
        for _, node in walk(graph.module, state.truth, state.values):
            _step(state, node)
            bar.advance()
    return state.result
