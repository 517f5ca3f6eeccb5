"""quantize(): MPTQ-ViT, and the quantized model that it returns (Tai and Wu, arXiv 2401.14895).

The paper has three parts, and so has this file:

    SQ-b         channels that follow a LayerNorm are centred and evened out; the float function stays    sq_b.py
    OPT-m        every quantizer's step and ratio from data, by the least output error of its site        opt_m.py
    Greedy MP    bits for every site within a budget, by the least loss for the cost saved                greedy_mp.py

`passes.TABLE` holds these and what goes beyond the paper, in the order in which they run: first what rewrites the float
graph or says how quantizers are set, then what chooses bits; then quantizers are put in and set in one walk
(`calibrate`), and passes that want to see them run last.
"""

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

from leanvit.checkpoint import for_channels, preprocess_for
from leanvit.config import MPTQConfig, Preprocess, to_dict
from leanvit.errors import ConfigError
from leanvit.load.labels import task_for
from leanvit.load.modules import as_network
from leanvit.progress import note
from leanvit.quant.attach import Forms, attach
from leanvit.quant.calibrate import Calibrated, Choices, calibrate
from leanvit.quant.calibration_images import check_calibration, check_weights, collect_batches, make_probe
from leanvit.quant.elsewhere import Elsewhere
from leanvit.quant.evaluate import PlanLosses, make_network
from leanvit.quant.graph import Measure, QuantGraph, trace
from leanvit.quant.greedy_mp import highest_plan
from leanvit.quant.losses import measure_sites, network_divergence
from leanvit.quant.passes import run_passes
from leanvit.quant.plan import Plan, checked_plan, make_plan, sizes, with_bits_of
from leanvit.quant.sinks import find_sinks
from leanvit.quant.sq_b import readers_noise
from leanvit.quant.streams import find_streams
from leanvit.quant.token_merging import merge_where_it_costs_least
from leanvit.quant.work import Work

WALK_BYTES = 2 << 30
"""Memory that calibration may hold at a time; with larger networks fewer images take part. Half of the 4 GB that
benchmarks/ptq_cost.py allows, as the float and the quantized network are walked side by side."""

LIVE_TENSORS = 8
"""Tensors of the largest size that are alive at once in the walk: two networks, a residual, operands and results."""


@dataclass
class QuantizedModel:
    """A quantized network.

    module: simulated quantized forward, (B, 3, H, W) float32 -> logits (B, classes), or what else the network returns.
    plan: {site: (weight_bits, activation_bits)}; for two activations the first number is that of the second
        operand, 0 where there is none.
    report: JSON values: config, sites (SQNR, bits, MACs), sizes, calibration facts, what was left out.
    graph: the traced graph that `module` is of. example: one image (1, 3, H, W) that shapes were traced with.
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
    elsewhere: Elsewhere | None = None,
) -> QuantizedModel:
    """Quantize `model` after training (MPTQ-ViT, arXiv 2401.14895); the model itself is not changed.

    calibration_images: (N, 3, H, W) float32 normalised as the model expects, or an iterable of such
        batches or of (images, labels).
    model: any that returns one tensor, or a dictionary, dataclass or tuple with one; wrappers are looked through and
        half precision is taken as float32.
    plan: bits of every site, instead of uniform ones or a search. journal: file that keeps what a search of
        bits has evaluated; beside it, as .blocks.safetensors, what the pass `reconstruct` has learned. A killed run
        goes on where it was. elsewhere: computes losses of such a search in other processes (leanvit.scale.search).
    config.keep_tokens: the network merges tokens first; `report["token_merging"]` says where.
    Raises CalibrationError for images that are not finite or not normalised, NumericalError for weights that are
    not finite, ShapeError where the model can't run on these images, ExportError where the model can't be traced,
    ConfigError for an ignored_scope or a plan that names unknown sites, and for a pass that can't be imported.
    """
    config = config or MPTQConfig()
    if plan is not None and config.budget is not None:
        raise ConfigError("a plan and a budget are both given, expected one: the plan fixes the bits")
    batches = collect_batches(calibration_images)
    if batches and len(batches[0]):
        device = next(model.parameters()).device
        model = as_network(model, batches[0][:1].to(device, torch.float32))
    if config.keep_tokens == 1.0:
        return quantize_part(model, batches, config, plan=plan, journal=journal, elsewhere=elsewhere)
    check_calibration(batches)
    model, counts, facts = merge_where_it_costs_least(model, batches, config.keep_tokens)
    config = replace(config, keep_tokens=counts)
    quantized = quantize_part(model, batches, config, plan=plan, journal=journal, elsewhere=elsewhere)
    quantized.report["token_merging"] = facts
    return quantized


def quantize_part(
    model: nn.Module,
    inputs: Tensor | Iterable[Any],
    config: MPTQConfig,
    *,
    plan: dict[str, Iterable[int]] | None = None,
    journal: str | Path | None = None,
    measure: Measure | None = None,
    elsewhere: Elsewhere | None = None,
) -> QuantizedModel:
    """`quantize` of a network or of a part of one, which may return several tensors, as it is.

    inputs: as calibration_images there, or what else the part reads. measure: how far its outputs are from the float
    ones, where that is not for `losses.divergence` to say.
    """
    started = time.monotonic()
    check_weights(model)
    device = next(model.parameters()).device
    batches = [batch.to(device, torch.float32) for batch in collect_batches(inputs)]
    calibration = check_calibration(batches)
    searching = elsewhere if config.budget is not None and plan is None else None
    if searching is not None:
        searching.begin(model, batches, config, measure)
    traced, batches = _traced(model, batches, config, measure)
    given = None if plan is None else checked_plan(traced, plan)
    if given is not None:
        config = with_bits_of(config, traced, given)

    work = turned_where_it_pays(traced, batches, config, journal)  # SQ-b, and the choice of OPT-m
    work.elsewhere = searching
    done = set_quantizers(work, choose_plan(work, given))  # uniform, or Greedy MP; OPT-m
    done = after_passes(done)
    losses = None
    if config.active_passes:
        done, losses = _not_worse_than_paper(done, traced)

    work, quantized, chosen = done.work, done.graph, done.plan
    sinks = find_sinks(traced, work.images)
    if sinks["summary"]:
        note(sinks["summary"])
    report = {
        "config": to_dict(config),
        "calibration": {**calibration, "walked": len(work.images), "kl_divergence": done.loss},
        "probe": make_probe(work.graph.module, quantized.module, tuple(batches[0].shape[1:])),
        "sites": measure_sites(quantized, work.graph.module, chosen, work.images, done.found.notes),
        "smoothing_left_out": [],
        "smoothing_exponents": {},
        "histograms": {},
        "balanced_heads": {},
        "search": None,
        "rotation": None,
        "token_merging": None,
        "sinks": sinks,
        **work.notes,
        "kl_divergence": losses,
        "unquantized": work.graph.unquantized,
        **sizes(quantized, chosen, work.float_bytes),
        "seconds": time.monotonic() - started,
    }
    if getattr(model, "num_classes", None) in (0, 1):
        report["task"] = task_for(int(model.num_classes))  # type: ignore[arg-type]
    preprocess = _preprocess(model, tuple(batches[0].shape[1:])) if hasattr(model, "pretrained_cfg") else None
    return QuantizedModel(quantized, chosen, report, config, batches[0][:1].cpu(), preprocess, done.found.forms)


def _traced(
    model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None
) -> tuple[QuantGraph, list[Tensor]]:
    """The graph of a network, and its calibration images in batches that it may run on."""
    traced = trace(model, batches[0], config.scope)
    traced.measure = measure
    return traced, [part for batch in batches for part in torch.split(batch, images_at_once(traced))]


def plan_losses(model: nn.Module, batches: list[Tensor], config: MPTQConfig) -> PlanLosses:
    """The losses that the search of `quantize_part` asks for, in any process from the same model and images."""
    traced, batches = _traced(model, batches, config, None)
    work = turned_where_it_pays(traced, batches, config)
    return PlanLosses(make_network(work.graph, work.images, highest_plan(work.graph, config), work.choices))


def _preprocess(model: nn.Module, shape: tuple[int, ...]) -> Preprocess:
    """What the network's pretrained_cfg says, at the size and the channels that it was traced with."""
    found = preprocess_for(model)
    mean, std = (for_channels(values, shape[0]) for values in (found.mean, found.std))
    return replace(found, input_size=(shape[1], shape[2]), mean=mean, std=std)


def prepare(traced: QuantGraph, batches: list[Tensor], config: MPTQConfig, journal: str | Path | None = None) -> Work:
    """A copy of a traced graph after the passes of the stage `prepare`, which leave the float function unchanged."""
    graph = copy.deepcopy(traced)
    float_bytes = 4 * sum(p.numel() for p in graph.module.parameters())
    plain = Choices(search=False, two_region=frozenset())
    work = Work(config, graph, batches, walk_images(graph, batches), float_bytes, plain, journal=journal)
    run_passes(work, "prepare")
    return work


def choose_plan(work: Work, given: Plan | None = None) -> Plan:
    """The bits of every site: those that are given, those that a pass finds within a budget, or uniform ones."""
    if given is not None:
        return given
    run_passes(work, "bits")
    return make_plan(work.graph, work.config) if work.plan is None else work.plan


@dataclass(frozen=True)
class Done:
    """A float graph after its passes, the same with quantizers of these bits, what was found in setting them, and the
    loss on the calibration images."""

    work: Work
    graph: QuantGraph
    plan: Plan
    found: Calibrated
    loss: float


def set_quantizers(work: Work, plan: Plan) -> Done:
    """Put quantizers with the plan's bits into a copy of the float graph, and set all of them in one walk."""
    graph = copy.deepcopy(work.graph)
    attach(graph, plan)
    found = calibrate(graph, work.graph.module, work.images, work.choices)
    graph.outputs = found.outputs
    return Done(work, graph, plan, found, found.loss)


def after_passes(done: Done) -> Done:
    """The same after the passes of the stage `after`."""
    work = done.work
    work.plan, work.quantized = done.plan, done.graph
    if not run_passes(work, "after"):
        return done
    return replace(done, loss=network_divergence(work.graph.module, done.graph, work.images))


def turned_where_it_pays(
    traced: QuantGraph, batches: list[Tensor], config: MPTQConfig, journal: str | Path | None = None
) -> Work:
    """The graph after the passes of the stage `prepare`, with the pass `rotate` or without it: whichever leaves less
    noise in the linears that read norms.

    On ten pairs of a micro model and bits (W4A4, W3A3, seed 0) that told eight times which way diverges less on 4,000
    test images; one pair was a tie, and once the other way was 5% better. The divergence on the 128 calibration
    images, which few of them decide, told it four times.
    """
    if "rotate" not in config.active_passes:
        return prepare(traced, batches, config, journal)
    work = prepare(traced, batches, config.without("rotate"), journal)
    streams, left_out = find_streams(traced, batches[0][:2])
    facts: dict[str, Any] = {"taken": False, "noise_db": {}, "left_out": left_out}
    if streams:
        turned = prepare(traced, batches, config, journal)
        facts["noise_db"] = {"rotated": readers_noise(turned), "as it is": readers_noise(work)}
        facts["taken"] = facts["noise_db"]["rotated"] < facts["noise_db"]["as it is"]
        note("noise behind norms {rotated:.2f} dB with the residual stream rotated, {as it is:.2f} dB as it is".format(
            **facts["noise_db"]))  # fmt: skip
        work = turned if facts["taken"] else work
    work.notes["rotation"] = facts
    return work


def walk_images(graph: QuantGraph, batches: list[Tensor]) -> Tensor:
    """The calibration images, or the first of them where all would need too much memory at once."""
    return torch.cat(batches)[: images_at_once(graph)]


def images_at_once(graph: QuantGraph) -> int:
    """How many images a graph may run on at a time within WALK_BYTES."""
    largest = max(max(site.elements) for site in graph.sites.values())
    return max(1, WALK_BYTES // (4 * LIVE_TENSORS * largest))


def _not_worse_than_paper(done: Done, traced: QuantGraph) -> tuple[Done, dict[str, float]]:
    """What was done, or the paper's passes alone with the same plan where they have the lower loss; and both losses."""
    config = done.work.config
    work = prepare(traced, done.work.batches, replace(config, mode="paper", passes=(), budget=None))
    paper = set_quantizers(work, done.plan)
    losses = {"best": done.loss, "paper": paper.loss}
    if done.loss <= paper.loss:
        return done, losses
    note(f"without {', '.join(sorted(config.active_passes))} the loss is lower: the paper's passes alone are taken")
    work.notes |= {name: done.work.notes[name] for name in ("search", "rotation") if name in done.work.notes}
    return paper, losses
