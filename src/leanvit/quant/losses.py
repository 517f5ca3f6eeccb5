"""How far a quantized network is from the float one: at its logits, and at every site."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from leanvit.quant.graph import Measure, Outputs, QuantGraph
from leanvit.quant.interpret import values_of
from leanvit.quant.ops import CHOICES
from leanvit.quant.plan import Plan

BATCH = 64
"""Images that run at once where outputs are compared."""

MEASURED_VALUES = 1 << 21
"""Values of the images on which sites are measured."""


def outputs_from(output: Any) -> Outputs:
    """A network's output as a tuple; several classifiers of the same classes (DeiT) count as their mean."""
    values = tuple(output) if isinstance(output, tuple | list) else (output,)
    if len(values) > 1 and all(value.dim() == 2 and value.shape == values[0].shape for value in values):
        return (torch.stack(values).mean(0),)
    return values


@torch.no_grad()
def outputs_of(module: nn.Module, images: Tensor) -> Outputs:
    """Outputs for all images, computed in batches."""
    return joined(outputs_from(module(batch)) for batch in torch.split(images, BATCH))


def joined(parts: Iterable[Outputs]) -> Outputs:
    """Outputs of all images from those of their parts, in order."""
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def divergence(truth: Outputs, found: Outputs, measure: Measure | None = None) -> float:
    """How far outputs are from the float ones; infinite where they are not finite.

    measure: a network's own (QuantGraph.measure). Else, of logits (N, classes): mean KL divergence in nats of their
    softmax. Anything else, which is no distribution: the mean over the tensors of the squared error as a share of the
    squared signal.
    """
    if measure is not None:
        value = measure(truth, found)
        return value if math.isfinite(value) else math.inf
    if len(truth) == 1 and truth[0].dim() == 2:
        return kl_from_logits(truth[0], found[0])
    shares = [
        float((value.double() - own.double()).square().sum() / own.double().square().sum().clamp(min=1e-12))
        for own, value in zip(truth, found, strict=True)
    ]
    value = sum(shares) / len(shares)
    return value if math.isfinite(value) else math.inf


def kl_from_logits(truth: Tensor, logits: Tensor) -> float:
    """Mean KL divergence in nats of softmax(logits) from softmax(truth), both (N, classes)."""
    found, expected = F.log_softmax(logits.double(), 1), F.log_softmax(truth.double(), 1)
    value = float(F.kl_div(found, expected, reduction="batchmean", log_target=True))
    return value if math.isfinite(value) else math.inf


def network_divergence(reference: GraphModule, graph: QuantGraph, images: Tensor) -> float:
    """Divergence of the quantized network's outputs from the float one's: KL in nats for a classifier."""
    return divergence(outputs_of(reference, images), outputs_of(graph.module, images), graph.measure)


@torch.no_grad()
def measure_sites(
    graph: QuantGraph, reference: GraphModule, plan: Plan, images: Tensor, notes: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry a site: bits, MACs, notes, and the SQNR in dB of its output as the quantized network runs."""
    images = images[: max(4, min(BATCH, MEASURED_VALUES // images[0].numel()))]
    wanted = {graph.sites[name].node for name in plan}
    # Where tokens are chosen the quantized network follows the float one: else rows are not of the same patches.
    choices = {node.name for node in reference.graph.nodes if node.target in CHOICES}
    chosen: dict[str, Any] = {}
    noise = {}
    # Side by side: the outputs of all sites at once are most of what a detector's pictures take.
    quantized = values_of(graph.module, wanted | choices, images, chosen)
    for name, truth in values_of(reference, wanted | choices, images):
        if name in choices:
            chosen[name] = truth
        _, value = next(quantized)
        if name in wanted:
            noise[name] = sqnr_db(truth, value)
    return [
        {
            "name": name,
            "kind": graph.sites[name].kind,
            "weight_bits": bits[0],
            "activation_bits": bits[1],
            "macs": graph.sites[name].macs,
            "sqnr_db": noise[graph.sites[name].node],
            **notes.get(name, {}),
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


def histograms_of(before: Tensor, after: Tensor, bins: int = 48) -> dict[str, dict[str, list[float]]]:
    """Counts of the values of a norm's output before and after smoothing, over their own ranges, for the report."""
    found = {}
    for name, rows in (("before", before), ("after", after)):
        values = rows.flatten().float()
        low, high = float(values.min()), float(values.max())
        counts = torch.histc(values, bins, low, high if high > low else low + 1.0)
        found[name] = {"range": [low, high], "counts": counts.int().tolist()}
    return found
