"""quantize(): MPTQ-ViT's passes in order, and the quantized model that they give."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.config import MPTQConfig, Preprocess
from leanvit.data import preprocess_for
from leanvit.errors import CalibrationError, ConfigError
from leanvit.quant.graph import QuantGraph, Recorder, Site, node_argument, quantizer_of, site_inputs, trace
from leanvit.quant.observe import Statistics, observe
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer
from leanvit.quant.search import search_range, search_weight_scale
from leanvit.quant.smooth import find_groups, smooth

Plan = dict[str, tuple[int, int]]


@dataclass
class QuantizedModel:
    """A quantized network.

    module: simulated quantized forward, (B, 3, H, W) float32 -> logits (B, classes).
    plan: {site: (weight_bits, activation_bits)}; for a product of two activations the first number
        is that of the second operand.
    report: JSON values: config, sites (SQNR, bits, MACs), sizes, calibration facts, what was left out.
    graph: the traced graph behind `module`. example: one image (1, 3, H, W) that shapes were traced with.
    preprocess: of the model's pretrained_cfg where it has one, else None.
    """

    graph: QuantGraph
    plan: Plan
    report: dict[str, Any]
    config: MPTQConfig
    example: Tensor
    preprocess: Preprocess | None = None

    @property
    def module(self) -> GraphModule:
        """The simulated quantized network."""
        return self.graph.module


def quantize(
    model: nn.Module, calibration_images: Tensor | Iterable[Any], config: MPTQConfig | None = None
) -> QuantizedModel:
    """Quantize `model` after training (MPTQ-ViT, arXiv 2401.14895); the model itself is not changed.

    calibration_images: (N, 3, H, W) float32 normalised as the model expects, or an iterable of such
        batches or of (images, labels).
    Raises CalibrationError for images that are not finite or not normalised, ExportError where the
    model can't be traced, ConfigError for an ignored_scope that matches nothing.
    """
    config = config or MPTQConfig()
    batches = collect_batches(calibration_images)
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    calibration = check_calibration(batches)
    graph = trace(model, batches[0])
    plan = make_plan(graph, config)
    left_out = smooth_graph(graph, batches, config)
    reference = copy.deepcopy(graph.module)
    statistics = observe(graph, _observed_nodes(graph, plan), batches, "calibrating")
    attach(graph, plan)
    set_parameters(graph, reference, plan, statistics)
    report = {
        "config": asdict(config),
        "calibration": calibration,
        "sites": measure_sites(graph, reference, plan, batches[0]),
        "smoothing_left_out": left_out,
        "unquantized": graph.unquantized,
        **sizes(graph, plan),
    }
    preprocess = preprocess_for(model) if hasattr(model, "pretrained_cfg") else None
    return QuantizedModel(graph, plan, report, config, batches[0][:1].cpu(), preprocess)


def collect_batches(images: Tensor | Iterable[Any]) -> list[Tensor]:
    """Calibration images as a list of (B, 3, H, W) batches of at most 64."""
    if isinstance(images, Tensor):
        return list(torch.split(images, 64))
    batches = [item[0] if isinstance(item, tuple | list) else item for item in images]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(f"a calibration batch is {found}, expected a tensor (B, 3, H, W).")
    return batches


def check_calibration(batches: list[Tensor]) -> dict[str, Any]:
    """Facts about the calibration images that a gate can judge.

    Raises CalibrationError for no images, values that are not finite, or a range that was not normalised.
    """
    if not batches or not len(batches[0]):
        raise CalibrationError("no calibration images, expected at least 32. Give more --data.")
    images = torch.cat([batch.flatten(1)[:, ::7] for batch in batches]).float()
    if not images.isfinite().all():
        raise CalibrationError("calibration images hold NaN or infinity, expected finite values. Check the loader.")
    mean, std = float(images.mean()), float(images.std())
    if abs(mean) > 10 or std > 20:
        raise CalibrationError(
            f"calibration images have mean {mean:.1f} and standard deviation {std:.1f}; a network expects input "
            "normalised to about 0 and 1. Normalise them with leanvit.data.to_input(images, preprocess_for(model))."
        )
    sample = batches[0].float()
    return {
        "images": len(images),
        "mean": mean,
        "std": std,
        "neighbour_correlation": _correlation(sample[..., :-1], sample[..., 1:]),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of neighbouring pixels: near 1 for images, near 0 for noise."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))


def make_plan(graph: QuantGraph, config: MPTQConfig) -> Plan:
    """Bits of every site: uniform, the first and the last at `first_last_bits`, ignored ones absent."""
    for pattern in config.ignored_scope:
        if not fnmatch.filter(graph.sites, pattern):
            known = ", ".join(list(graph.sites)[:4])
            raise ConfigError(f"ignored_scope '{pattern}' matches no site; sites are {known}, ...")
    names = list(graph.sites)
    ends = {names[0], names[-1]}
    plan: Plan = {}
    for name, site in graph.sites.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.ignored_scope):
            continue
        if name in ends and site.kind != "matmul":
            plan[name] = (config.first_last_bits, config.first_last_bits)
        elif site.kind == "matmul":
            plan[name] = (config.activation_bits, config.activation_bits)
        else:
            plan[name] = (config.weight_bits, config.activation_bits)
    return plan


def smooth_graph(graph: QuantGraph, batches: list[Tensor], config: MPTQConfig) -> list[str]:
    """SQ-b or SmoothQuant where the config asks for it; returns the norms that were left out and why."""
    if config.smoothing == "none":
        return []
    groups, _ = find_groups(graph)
    statistics = observe(graph, {group.norm for group in groups}, batches, "smoothing")
    return smooth(graph, statistics, config.smoothing, config.smoothing_alpha)


def _observed_nodes(graph: QuantGraph, plan: Plan) -> set[str]:
    return {node.name for name in plan for node in site_inputs(graph, graph.sites[name])}


def quantizer_name(site: str, role: str) -> str:
    """Name of the submodule that holds a site's quantizer; role is input, other or weight."""
    return f"quantizer_{site}_{role}".replace(".", "_").replace("#", "_")


def attach(graph: QuantGraph, plan: Plan) -> None:
    """Put quantizers with the plan's bits in front of every site; their parameters are set later.

    Sites that read one tensor with the same bits share one quantizer.
    """
    nodes = graph.nodes()
    shared: dict[tuple[str, int], Node] = {}
    for name, (weight_bits, activation_bits) in plan.items():
        site = graph.sites[name]
        node = nodes[site.node]
        arguments = list(node.args)
        operand_bits = [activation_bits, weight_bits] if site.kind == "matmul" else [activation_bits]
        for index, bits in enumerate(operand_bits):
            source = node_argument(node, index)
            key = (source.name, bits)
            if key not in shared:
                role = ("input", "other")[index]
                shared[key] = _insert(graph, node, quantizer_name(name, role), ActivationQuantizer(bits), source)
            arguments[index] = shared[key]
        if site.weight:
            quantizer = WeightQuantizer(site.weight_shape, weight_bits)
            arguments[1] = _insert(graph, node, quantizer_name(name, "weight"), quantizer)
        node.args = tuple(arguments)
    graph.module.graph.eliminate_dead_code()
    graph.module.delete_all_unused_submodules()
    _drop_unused_parameters(graph.module)
    graph.module.recompile()


def _insert(graph: QuantGraph, before: Node, name: str, quantizer: nn.Module, *inputs: Node) -> Node:
    graph.module.add_submodule(name, quantizer)
    with graph.module.graph.inserting_before(inputs[0].next if inputs else before):
        node = graph.module.graph.call_module(name, tuple(inputs))
    if inputs:
        node.meta = {"val": inputs[0].meta["val"]}
    return node


def _drop_unused_parameters(module: GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_parameters()):
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)


def set_parameters(graph: QuantGraph, reference: GraphModule, plan: Plan, statistics: dict[str, Statistics]) -> None:
    """Ranges of activations and scales of weights, each with the least squared error on its data."""
    for node in graph.module.graph.nodes:
        quantizer = quantizer_of(graph.module, node)
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.set_range(*search_range(statistics[node_argument(node, 0).name], quantizer.bits))
    nodes = graph.nodes()
    for name in plan:
        site = graph.sites[name]
        activation = node_argument(nodes[site.node], 0)
        quantizer = quantizer_of(graph.module, node_argument(nodes[site.node], 1))
        if site.weight and isinstance(quantizer, WeightQuantizer):
            weight = reference.get_parameter(site.weight)
            importance = _importance(site, statistics[node_argument(activation, 0).name], weight)
            quantizer.set_weight(weight, search_weight_scale(weight, quantizer.bits, importance))


def _importance(site: Site, statistics: Statistics, weight: Tensor) -> Tensor | None:
    """Mean squared input of every input channel of a linear; convolutions read channels elsewhere than last."""
    moment = statistics.second_moment
    return moment if site.kind == "linear" and moment.numel() == weight.shape[1] else None


@torch.no_grad()
def measure_sites(graph: QuantGraph, reference: GraphModule, plan: Plan, batch: Tensor) -> list[dict[str, Any]]:
    """SQNR in dB of every site's output as the quantized network runs, against the float network."""
    wanted = {graph.sites[name].node for name in plan}
    truth: dict[str, Tensor] = {}
    Recorder(reference, wanted, truth.__setitem__).run(batch)
    noise: dict[str, float] = {}

    def compare(name: str, value: Tensor) -> None:
        noise[name] = sqnr_db(truth.pop(name), value)

    Recorder(graph.module, wanted, compare).run(batch)
    return [
        {
            "name": name,
            "kind": graph.sites[name].kind,
            "weight_bits": bits[0],
            "activation_bits": bits[1],
            "macs": graph.sites[name].macs,
            "sqnr_db": noise[graph.sites[name].node],
        }
        for name, bits in plan.items()
    ]


def sqnr_db(truth: Tensor, value: Tensor) -> float:
    """Signal to quantization noise: 10 log10(sum truth^2 / sum (value - truth)^2), at most 200 dB."""
    truth, value = truth.detach().double(), value.detach().double()
    signal = float(truth.square().sum())
    noise = float((value - truth).square().sum())
    if signal == 0.0:
        return 200.0 if noise == 0.0 else -200.0
    return min(200.0, 10 * math.log10(signal / noise)) if noise else 200.0


def sizes(graph: QuantGraph, plan: Plan) -> dict[str, Any]:
    """Bytes of the weights in float32 and by the plan, BitOps of the sites, and average bits."""
    kept = sum(p.numel() for p in graph.module.parameters())
    total = {n: math.prod(graph.sites[n].weight_shape) for n in plan if graph.sites[n].weight}
    elements = sum(total.values())
    packed_bits = sum(count * plan[n][0] for n, count in total.items())
    scales = sum(graph.sites[n].weight_shape[0] for n in total)
    bit_operations = sum(graph.sites[n].macs * w * a for n, (w, a) in plan.items())
    bit_operations += sum(32 * 32 * s.macs for n, s in graph.sites.items() if n not in plan)
    return {
        "float_bytes": 4 * (kept + elements),
        "quantized_bytes": 4 * (kept + scales) + math.ceil(packed_bits / 8),
        "average_weight_bits": packed_bits / elements if elements else 32.0,
        "bitops": bit_operations,
    }
