"""quantize(): MPTQ-ViT's passes in order, and the quantized model that they give."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from leanvit.checkpoint import preprocess_for
from leanvit.config import MPTQConfig, Preprocess, to_dict
from leanvit.errors import ConfigError
from leanvit.quant.allocate import allocate
from leanvit.quant.attach import Forms, attach
from leanvit.quant.calibrate import Calibrated, Choices, calibrate
from leanvit.quant.calibration_images import check_calibration, check_weights, collect_batches, make_probe
from leanvit.quant.graph import QuantGraph, trace
from leanvit.quant.heads import balance_heads
from leanvit.quant.losses import histograms_of, measure_sites, network_divergence
from leanvit.quant.observe import observe
from leanvit.quant.plan import Plan, checked_plan, make_plan, sizes
from leanvit.quant.smooth import add_missing_biases, find_groups, search_exponents, smooth

WALK_BYTES = 2 << 30
"""Memory that calibration may hold at a time; with larger networks fewer images take part."""

LIVE_TENSORS = 8


@dataclass
class QuantizedModel:
    """A quantized network.

    module: simulated quantized forward, (B, 3, H, W) float32 -> logits (B, classes), or what else the network gives.
    plan: {site: (weight_bits, activation_bits)}; for two activations the first number is that of the second
        operand, 0 where there is none.
    report: JSON values: config, sites (SQNR, bits, MACs), sizes, calibration facts, what was left out.
    graph: the traced graph behind `module`. example: one image (1, 3, H, W) that shapes were traced with.
    preprocess: of the model's pretrained_cfg where it has one, else None. forms: of quantizers not uniform.
    """

    graph: QuantGraph
    plan: Plan
    report: dict[str, Any]
    config: MPTQConfig
    example: Tensor
    preprocess: Preprocess | None = None
    forms: Forms = field(default_factory=dict)

    @property
    def module(self) -> GraphModule:
        """The simulated quantized network."""
        return self.graph.module


def quantize(
    model: nn.Module,
    calibration_images: Tensor | Iterable[Any],
    config: MPTQConfig | None = None,
    *,
    plan: dict[str, Iterable[int]] | None = None,
    journal: str | Path | None = None,
) -> QuantizedModel:
    """Quantize `model` after training (MPTQ-ViT, arXiv 2401.14895); the model itself is not changed.

    calibration_images: (N, 3, H, W) float32 normalised as the model expects, or an iterable of such
        batches or of (images, labels).
    plan: bits of every site, instead of uniform ones or a search. journal: file that keeps what a search of
        bits has evaluated, so that a killed one goes on where it was.
    Raises CalibrationError for images that are not finite or not normalised, NumericalError for weights that are
    not finite, ExportError where the model can't be traced, ConfigError for an ignored_scope or a plan that
    names unknown sites.
    """
    config = config or MPTQConfig()
    if plan is not None and config.budget is not None:
        raise ConfigError("a plan and a budget are both given, expected one: the plan fixes the bits")
    started = time.monotonic()
    check_weights(model)
    batches = collect_batches(calibration_images)
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    calibration = check_calibration(batches)
    traced = trace(model, batches[0], config.scope)
    prepared = prepare(traced, batches, config)
    search: dict[str, Any] | None = None
    if config.budget is not None:
        chosen, search = allocate(prepared.graph, prepared.images, config, choices_of(config), journal)
    else:
        chosen = make_plan(prepared.graph, config) if plan is None else checked_plan(prepared.graph, plan)
    quantized, found = finish(prepared, chosen, config)
    loss = network_divergence(prepared.graph.module, quantized.module, prepared.images)
    against_paper = None
    if config.active_passes:
        paper = replace(config, mode="paper", passes=(), budget=None)
        other = prepare(traced, batches, paper)
        fallback, other_found = finish(other, chosen, paper)
        paper_loss = network_divergence(other.graph.module, fallback.module, other.images)
        against_paper = {"best": loss, "paper": paper_loss}
        if paper_loss < loss:
            prepared, quantized, found, loss = other, fallback, other_found, paper_loss
    report = {
        "config": to_dict(config),
        "calibration": {**calibration, "walked": len(prepared.images), "kl_divergence": loss},
        "probe": make_probe(prepared.graph.module, quantized.module, tuple(batches[0].shape[1:])),
        "sites": measure_sites(quantized, prepared.graph.module, chosen, prepared.images, found.notes),
        "smoothing_left_out": prepared.left_out,
        "smoothing_exponents": prepared.exponents,
        "histograms": prepared.histograms,
        "balanced_heads": prepared.balanced,
        "kl_divergence": against_paper,
        "search": search,
        "unquantized": prepared.graph.unquantized,
        **sizes(quantized, chosen, prepared.float_bytes),
        "seconds": time.monotonic() - started,
    }
    preprocess = preprocess_for(model) if hasattr(model, "pretrained_cfg") else None
    return QuantizedModel(quantized, chosen, report, config, batches[0][:1].cpu(), preprocess, found.forms)


@dataclass
class Prepared:
    """A float graph made ready: heads balanced, norms smoothed.

    images: those that take part in the walk. left_out: norms that were not smoothed, and why.
    """

    graph: QuantGraph
    images: Tensor
    float_bytes: int
    left_out: list[str]
    exponents: dict[str, float | None]
    balanced: dict[str, int]
    histograms: dict[str, Any]


def prepare(traced: QuantGraph, batches: list[Tensor], config: MPTQConfig) -> Prepared:
    """A copy of a traced graph after the passes that leave the float function unchanged."""
    graph = copy.deepcopy(traced)
    float_bytes = 4 * sum(p.numel() for p in graph.module.parameters())
    images = walk_images(graph, batches)
    balanced: dict[str, int] = {}
    if config.active_passes & {"balance", "correct"}:
        add_missing_biases(graph)
    if "balance" in config.active_passes:
        balanced = balance_heads(graph, images, config.seed)
    left_out, exponents, histograms = smooth_graph(graph, batches, config)
    return Prepared(graph, images, float_bytes, left_out, exponents, balanced, histograms)


def walk_images(graph: QuantGraph, batches: list[Tensor]) -> Tensor:
    """The calibration images, or the first of them where all would need too much memory at once."""
    images = torch.cat(batches)
    largest = max(max(site.elements) for site in graph.sites.values())
    count = max(1, WALK_BYTES // (4 * LIVE_TENSORS * largest))
    return images[:count]


def smooth_graph(
    graph: QuantGraph, batches: list[Tensor], config: MPTQConfig
) -> tuple[list[str], dict[str, float | None], dict[str, Any]]:
    """SQ-b or SmoothQuant where the config asks for it.

    Returns the norms that were left out and why, the exponent of each, and its histogram before and after.
    """
    if config.smoothing == "none":
        return [], {}, {}
    groups, _ = find_groups(graph)
    norms = {group.norm for group in groups}
    statistics = observe(graph, norms, batches, "smoothing")
    exponents: dict[str, float | None] = dict.fromkeys(norms, config.smoothing_alpha)
    if config.smoothing_alpha is None:
        # The plan of a search is not known yet: its average stands for it.
        bits = round(config.budget.average_bits or 6) if config.budget else None
        expected = replace(config, weight_bits=bits, activation_bits=bits, budget=None) if bits else config
        exponents = search_exponents(graph, statistics, config.smoothing, make_plan(graph, expected))
    left_out = smooth(graph, statistics, config.smoothing, exponents)
    after = observe(graph, norms, batches[:1], "smoothing, again")
    return left_out, exponents, {n: histograms_of(statistics[n].rows, after[n].rows) for n in sorted(norms)}


def choices_of(config: MPTQConfig) -> Choices:
    """How quantizers are set, from the configuration."""
    passes = config.active_passes
    return Choices(
        search=config.range_search,
        two_region=frozenset(config.two_region) if config.ratio_search else frozenset(),
        choose="forms" in passes,
        per_head="per-head" in passes,
        sequential="sequential" in passes,
        correct="correct" in passes,
    )


def finish(prepared: Prepared, plan: Plan, config: MPTQConfig) -> tuple[QuantGraph, Calibrated]:
    """A quantized copy of a prepared graph: quantizers attached and set by one walk."""
    graph = copy.deepcopy(prepared.graph)
    attach(graph, plan)
    found = calibrate(graph, prepared.graph.module, prepared.images, choices_of(config))
    graph.outputs = found.outputs
    return graph, found
