"""SQ-b: move and scale the channels of a LayerNorm's output, and undo it exactly in the linears that read it.

MPTQ-ViT (arXiv 2401.14895), SmoothQuant with a bias term. For X the output of a layer_norm (gamma, beta)
that feeds only linears (W, c), per channel j:

    b_j = (max X_j + min X_j) / 2        s_j = max|X_j - b_j|^a / max_o |W_oj|^(1 - a)
    gamma' = gamma / s    beta' = (beta - b) / s    W' = W diag(s)    c' = c + W b

The float function is unchanged to rounding; what is quantized afterwards has even, centred channels. The
exponent a is the caller's, or searched for every norm by the quantization error of the linears (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from leanvit.quant.graph import (
    QuantGraph,
    Site,
    get_tensor,
    module_path,
    node_argument,
    set_tensor,
)
from leanvit.quant.losses import histograms_of
from leanvit.quant.observe import Statistics, observe
from leanvit.quant.ops import KEEPS_CHANNELS, LAYER_NORM, LINEAR, aten
from leanvit.quant.opt_m import fit_activation, search_weight_scale
from leanvit.quant.plan import Plan, make_plan, with_likely_bits
from leanvit.quant.quantizers import fake_quantize, integer_range
from leanvit.quant.samples import SiteSample, few_images
from leanvit.quant.work import Work

DEAD_RANGE = 1e-6
"""A channel whose range is smaller is constant and keeps s = 1: its shift alone takes it out."""

SCALE_LIMITS = (1e-3, 1e3)
"""Of s: a factor that a float32 weight takes without losing bits that 8-bit rounding would leave."""

EXPONENTS = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Exponents to try: around SmoothQuant's 0.5, and up to 1, where all channels of the activation have one range."""

_ANY_LINEAR = Site("linear", "linear", "", 0)


def smooth_norms(work: Work) -> None:
    """The pass: SQ-b, or SmoothQuant where the configuration says so, on every norm that can absorb it.

    Notes the norms that were left out and why, the exponent of each, and its histogram before and after.
    """
    graph, config = work.graph, work.config
    if config.smoothing == "none":
        return
    norms = {group.norm for group in find_groups(graph)[0]}
    statistics = observe(graph, norms, work.batches, "smoothing")
    exponents: dict[str, float | None] = dict.fromkeys(norms, config.smoothing_alpha)
    if config.smoothing_alpha is None:
        exponents = search_exponents(graph, statistics, config.smoothing, make_plan(graph, with_likely_bits(config)))
    before = {norm: _affine(graph, norm) for norm in norms}
    work.notes["smoothing_left_out"] = smooth(graph, statistics, config.smoothing, exponents)
    work.notes["smoothing_exponents"] = exponents
    work.notes["histograms"] = {
        norm: histograms_of(statistics[norm].rows, _moved(statistics[norm].rows, before[norm], _affine(graph, norm)))
        for norm in sorted(norms)
    }


def _affine(graph: QuantGraph, norm: str) -> tuple[Tensor, Tensor]:
    """Copies of gain and bias of a norm, (C,) each."""
    node = graph.node(norm)
    gain, bias = (graph.parameter(node_argument(node, place)).clone() for place in (2, 3))
    return gain, bias


def _moved(rows: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """What a norm returns with other gain and bias than those with which it returned these rows (N, C)."""
    (gain, bias), (new_gain, new_bias) = before, after
    return (rows - bias) * torch.where(gain == 0, 0.0, new_gain / gain) + new_bias


@dataclass(frozen=True)
class SmoothingGroup:
    """A layer_norm and the linears that read nothing else of it, by node name."""

    norm: str
    linears: tuple[str, ...]


def find_groups(graph: QuantGraph) -> tuple[list[SmoothingGroup], list[str]]:
    """Norms that can be smoothed, and one line for each that can't, with the reason."""
    groups, left_out = [], []
    for node in graph.module.graph.nodes:
        if node.target is not LAYER_NORM:
            continue
        linears: list[Node] = []
        reason = _collect_linears(node, linears) or _not_absorbable(node, linears)
        if reason:
            left_out.append(f"{module_path(node)}: {reason}")
        else:
            groups.append(SmoothingGroup(node.name, tuple(n.name for n in linears)))
    return groups, left_out


def _collect_linears(node: Node, found: list[Node]) -> str | None:
    """Gather the linears that follow, over operations that keep the channels last; a reason where others read too."""
    width = node.meta["val"].shape[-1]
    for user in node.users:
        if user.target is LINEAR and user.args[0] is node:
            found.append(user)
        elif user.target in KEEPS_CHANNELS and user.args[0] is node and _keeps_channels(user, width):
            reason = _collect_linears(user, found)
            if reason:
                return reason
        else:
            return f"its output is also read by {user.target}"
    return None


def _keeps_channels(node: Node, width: int) -> bool:
    """Whether the last dimension still indexes the same channels after a shape operation."""
    source = node.args[0]
    value = node.meta["val"]
    if not isinstance(source, Node) or value.dim() == 0 or value.shape[-1] != width:
        return False
    last = source.meta["val"].dim() - 1
    arguments = node.args[1:]
    if node.target is aten.permute.default:
        return arguments[0][-1] in (-1, last)  # type: ignore[index]
    if node.target is aten.transpose.int:
        return not {-1, last} & set(arguments[:2])
    if node.target is aten.roll.default:
        return not {-1, last} & set(arguments[1])  # type: ignore[arg-type]
    if node.target in (aten.slice.Tensor, aten.select.int, aten.squeeze.dim):
        return arguments[0] not in (-1, last)
    if node.target is aten.unsqueeze.default:
        return arguments[0] not in (-1, last + 1)
    return True


def _not_absorbable(norm: Node, linears: list[Node]) -> str | None:
    if not linears:
        return "no linear reads its output"
    affine = [*norm.args[2:4], None, None][:2]
    if not all(isinstance(a, Node) and a.op == "get_attr" for a in affine):
        return "it has no weight and bias of its own"
    owned = [*affine, *(linear.args[1] for linear in linears)]
    owned += [linear.args[2] for linear in linears if len(linear.args) > 2 and linear.args[2] is not None]
    for parameter in owned:
        if not isinstance(parameter, Node) or parameter.op != "get_attr" or len(parameter.users) > 1:
            return "a parameter is shared with another operation"
    return None


def smoothing_terms(
    statistics: Statistics, weights: list[Tensor], alpha: float, *, centre: bool
) -> tuple[Tensor, Tensor]:
    """Scale s and shift b of every channel (module docstring).

    statistics: of the norm's output. weights: (out, C) each; linears that share the norm share s.
    centre: False for plain SmoothQuant (b = 0). Returns (C,), (C,).
    """
    low, high = statistics.channel_minimum, statistics.channel_maximum
    shift = (high + low) / 2 if centre else torch.zeros_like(low)
    reach = torch.maximum((high - shift).abs(), (low - shift).abs())
    widest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=1e-8)
    scale = reach.clamp(min=1e-8).pow(alpha) / widest.pow(1 - alpha)
    scale = scale.clamp(*SCALE_LIMITS)
    dead = (high - low) < DEAD_RANGE
    return torch.where(dead, torch.ones_like(scale), scale), shift


def smooth(
    graph: QuantGraph,
    statistics: dict[str, Statistics],
    kind: Literal["sq", "sq-b"],
    alpha: float | dict[str, float | None] = 0.5,
) -> list[str]:
    """Apply SmoothQuant or SQ-b in place to every norm that can absorb it.

    statistics: of each norm's node. alpha: the exponent of all norms, or of each by node name; None there
    leaves the norm as it is. Returns one line for each norm that was left out, with the reason.
    """
    groups, left_out = find_groups(graph)
    nodes = graph.nodes()
    for group in groups:
        exponent = alpha.get(group.norm) if isinstance(alpha, dict) else alpha
        if exponent is None:
            continue
        linears = [nodes[name] for name in group.linears]
        weights = [graph.parameter(node_argument(linear, 1)) for linear in linears]
        scale, shift = smoothing_terms(statistics[group.norm], weights, exponent, centre=kind == "sq-b")
        _apply(graph, nodes[group.norm], linears, scale, shift)
    graph.module.recompile()
    return left_out


def search_exponents(
    graph: QuantGraph, statistics: dict[str, Statistics], kind: Literal["sq", "sq-b"], plan: Plan
) -> dict[str, float | None]:
    """The exponent of every norm with the least output error of its linears at the plan's bits (ours).

    statistics: of each norm's node, with rows. Returns {norm: exponent}, None where nothing beats the norm as it
    is: smoothing then never costs more, on the sample, than it gains.
    """
    nodes = graph.nodes()
    found: dict[str, float | None] = {}
    for group, bits in _groups_with_bits(graph, plan):
        if bits is None:
            found[group.norm] = None
            continue
        seen = statistics[group.norm]
        weights = [graph.parameter(node_argument(nodes[name], 1)) for name in group.linears]
        stacked, rows = torch.cat(weights), seen.rows
        errors: dict[float | None, float] = {None: _site_error(rows, stacked, bits)}
        for exponent in EXPONENTS:
            scale, shift = smoothing_terms(seen, weights, exponent, centre=kind == "sq-b")
            errors[exponent] = _site_error((rows - shift) / scale, stacked * scale, bits)
        found[group.norm] = min(errors, key=errors.__getitem__)
    return found


def _groups_with_bits(graph: QuantGraph, plan: Plan) -> list[tuple[SmoothingGroup, tuple[int, int] | None]]:
    """Norms that can be smoothed, each with the bits of its linears; None where none of them is in the plan."""
    by_node = {site.node: site.name for site in graph.sites.values()}
    return [
        (group, next((plan[by_node[n]] for n in group.linears if by_node.get(n) in plan), None))
        for group in find_groups(graph)[0]
    ]


def readers_noise(work: Work) -> float:
    """What quantization leaves in the linears that read norms, in decibels of their signal, mean over the norms.

    Both sides have the bits of the configuration, those that its budget is likely to end with; every linear alone.
    """
    graph, nodes = work.graph, work.graph.nodes()
    groups = _groups_with_bits(graph, make_plan(graph, with_likely_bits(work.config)))
    seen = observe(graph, {group.norm for group, _ in groups}, [few_images(work.images)], "comparing")
    shares = []
    for group, bits in groups:
        if bits is None:
            continue
        rows = seen[group.norm].rows
        weight = torch.cat([graph.parameter(node_argument(nodes[name], 1)) for name in group.linears])
        outputs = rows @ weight.t()
        signal = float((outputs - outputs.mean(0)).square().sum())
        noise = _site_error(rows, weight, bits)
        shares.append(10 * math.log10(max(noise, 1e-30) / max(signal, 1e-30)))
    return sum(shares) / len(shares) if shares else 0.0


def _site_error(rows: Tensor, weight: Tensor, bits: tuple[int, int]) -> float:
    """Squared output error of a linear with both sides quantized; a constant part is the bias's to mend."""
    sample = SiteSample(_ANY_LINEAR, (rows,), ((rows.min(), rows.max()),), None, weight, (None,))
    quantizer, _ = fit_activation(sample, 0, bits[1])
    scale = search_weight_scale(weight, bits[0], rows.square().mean(0))
    low, high = integer_range(bits[0], symmetric=True)
    held = fake_quantize(weight, scale[:, None], weight.new_zeros(()), low, high)
    error = quantizer(rows) @ held.t() - rows @ weight.t()
    return float((error - error.mean(0)).square().sum())


def _apply(graph: QuantGraph, norm: Node, linears: list[Node], scale: Tensor, shift: Tensor) -> None:
    module = graph.module
    gamma, beta = str(node_argument(norm, 2).target), str(node_argument(norm, 3).target)
    # Products in float64: the transform must be invisible in float32, also after 24 blocks.
    scale, shift = scale.double(), shift.double()
    set_tensor(module, gamma, get_tensor(module, gamma).double() / scale)
    set_tensor(module, beta, (get_tensor(module, beta).double() - shift) / scale)
    for linear in linears:
        path = str(node_argument(linear, 1).target)
        weight = get_tensor(module, path).double()
        added = weight @ shift
        set_tensor(module, path, weight * scale)
        if len(linear.args) > 2 and isinstance(linear.args[2], Node):
            bias = str(linear.args[2].target)
            set_tensor(module, bias, get_tensor(module, bias).double() + added)
        elif added.any():
            _add_bias(graph, linear, path, added)


def add_biases(work: Work) -> None:
    """Give every linear of the float graph a bias."""
    add_missing_biases(work.graph)


def add_missing_biases(graph: QuantGraph, names: set[str] | None = None) -> None:
    """Give linears without bias a zero one: all, or those that `names` (of stored tensors) says had one added."""
    for node in graph.module.graph.nodes:
        if node.target is LINEAR and (len(node.args) < 3 or node.args[2] is None):
            weight = str(node_argument(node, 1).target)
            if weight.endswith(".weight") and (names is None or f"{weight.removesuffix('.weight')}.bias" in names):
                out_features = get_tensor(graph.module, weight).shape[0]
                _add_bias(graph, node, weight, torch.zeros(out_features))
    graph.module.recompile()


def _add_bias(graph: QuantGraph, linear: Node, weight_path: str, value: Tensor) -> None:
    owner_path, _, _ = weight_path.rpartition(".")
    owner = graph.module.get_submodule(owner_path)
    weight = get_tensor(graph.module, weight_path)
    owner.register_parameter("bias", nn.Parameter(value.to(weight), requires_grad=False))
    with graph.module.graph.inserting_before(linear):
        bias = graph.module.graph.get_attr(f"{owner_path}.bias".lstrip("."))
    linear.args = (linear.args[0], linear.args[1], bias)
