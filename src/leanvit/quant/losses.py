"""How far a quantized network is from the float one: at its logits, and at every site."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from leanvit.quant.graph import QuantGraph, Recorder
from leanvit.quant.plan import Plan

BATCH = 64
MEASURED_VALUES = 1 << 21
"""Values of the images on which sites are measured."""


@torch.no_grad()
def logits_of(module: GraphModule, images: Tensor) -> Tensor:
    """Logits (N, classes) in batches; the mean over heads where a network has several (DeiT)."""
    parts = [module(batch) for batch in torch.split(images, BATCH)]
    return torch.cat([torch.stack(p).mean(0) if isinstance(p, tuple | list) else p for p in parts])


def kl_from_logits(truth: Tensor, logits: Tensor) -> float:
    """Mean KL divergence in nats of softmax(logits) from softmax(truth), both (N, classes)."""
    found, expected = F.log_softmax(logits.double(), 1), F.log_softmax(truth.double(), 1)
    value = float(F.kl_div(found, expected, reduction="batchmean", log_target=True))
    return value if math.isfinite(value) else math.inf


def kl_divergence(reference: GraphModule, module: GraphModule, images: Tensor) -> float:
    """Mean KL divergence in nats of the quantized network's answers from the float one's."""
    return kl_from_logits(logits_of(reference, images), logits_of(module, images))


@torch.no_grad()
def measure_sites(
    graph: QuantGraph, reference: GraphModule, plan: Plan, images: Tensor, notes: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry a site: bits, MACs, notes, and the SQNR in dB of its output as the quantized network runs."""
    images = images[: max(4, min(BATCH, MEASURED_VALUES // images[0].numel()))]
    wanted = {graph.sites[name].node for name in plan}
    truth: dict[str, Tensor] = {}
    Recorder(reference, wanted, truth.__setitem__).run(images)
    noise: dict[str, float] = {}

    def compare(name: str, value: Tensor) -> None:
        noise[name] = sqnr_db(truth.pop(name), value)

    Recorder(graph.module, wanted, compare).run(images)
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
