"""Why, in a line: how much of a network runs on integer kernels and what does not, and which sites cost the accuracy.

    integer_share(quantized, profile, lifted)     what runs on integers and what does not: known from the graph alone
    site_costs(quantized, network, inputs, ...)   what each site costs the outputs: every one is lifted in turn
    explain(quantized, network, x, profile, ...)  both, as JSON values that reports keep

export/explained.py says them in words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.export.onnx.profiles import Profile
from leanvit.export.onnx.quantizers import FloatQuantizer, branches_of
from leanvit.export.onnx.simulation import executed_form
from leanvit.progress import track
from leanvit.quant import QuantizedModel
from leanvit.quant.costs import site_key
from leanvit.quant.graph import OPERANDS, Site, node_argument, quantizer_of
from leanvit.quant.interpret import run
from leanvit.quant.losses import divergence, outputs_from
from leanvit.quant.parts import QuantizedNetwork, models_of, own_sites, site_name
from leanvit.quant.quantizers import ActivationQuantizer
from leanvit.tasks.parts import part_inputs, parts_of

COST_IMAGES = 4
"""Calibration images on which sites are lifted in turn: each site is a run of the whole network on them."""

COST_MACS = 1e11
"""Multiply-adds that lifting sites in turn may take, some five seconds on two cores; beyond it only the sites whose
SQNR is lowest are lifted, FEWEST_SITES at least."""

FEWEST_SITES = 8

Values = dict[str, Any]


def explain(
    model: QuantizedModel | QuantizedNetwork, network: nn.Module, x: Tensor, profile: Profile,
    lifted: Collection[str] = (), table: Mapping[str, Mapping[str, float]] | None = None, seed: int = 0,
) -> Values:  # fmt: skip
    """What `integer_share` returns, and under "costs" what `site_costs` does.

    network: float. x: (N, 3, H, W) float32 calibration images. seed: of the choice of boxes, for networks in parts.
    """
    found = integer_share(model, profile, lifted)
    if not found["integer_macs"]:
        return found | {"costs": []}
    inputs = part_inputs(network.eval(), x[:COST_IMAGES], seed)
    return found | {"costs": site_costs(model, network, inputs, profile, lifted, table)}


def integer_share(model: QuantizedModel | QuantizedNetwork, profile: Profile, lifted: Collection[str] = ()) -> Values:
    """What share of the multiply-adds of one image a profile runs on integer kernels, and why others run in float.

    lifted: sites that run in float to hold the accuracy. Of a network in parts each part counts once.
    Returns {"profile", "macs", "integer_macs", "float": [{"reason", "macs", "sites"}], "no_site": [...]}, most
    multiply-adds first; "no_site" are products that no quantizer supports, whose multiply-adds nobody has counted.
    """
    total = integer = 0
    reasons: dict[str, Values] = {}
    without: list[str] = []
    for part, quantized in models_of(model).items():
        form = executed_form(quantized.graph, profile, own_sites(model, part, lifted))
        nodes = {node.name: node for node in form.graph.nodes}
        without += [site_name(model, part, name) for name in quantized.graph.unquantized]
        for site in quantized.graph.sites.values():
            name = site_name(model, part, site.name)
            total += site.macs
            reason = "" if not site.macs else _why_float(form, nodes[site.node], site, quantized, profile)
            if site.macs and name in lifted:
                reason = "lifted to float to hold the accuracy"
            if not reason:
                integer += site.macs
                continue
            entry = reasons.setdefault(reason, {"reason": reason, "macs": 0, "sites": []})
            entry["macs"] += site.macs
            entry["sites"].append(name)
    ordered = sorted(reasons.values(), key=lambda entry: -entry["macs"])
    return {"profile": profile.name, "macs": total, "integer_macs": integer, "float": ordered, "no_site": without}


def _why_float(form: GraphModule, node: Node, site: Site, model: QuantizedModel, profile: Profile) -> str:
    """Why a product runs on float kernels; empty where it runs on integer ones."""
    if site.name not in model.plan:
        return "left in float by the plan"
    sources = [node_argument(node, index) for index in range(OPERANDS[site.kind])]
    found = [quantizer_of(form, source) for source in sources]
    quantizers = [quantizer for quantizer in found if isinstance(quantizer, ActivationQuantizer)]
    if len(quantizers) == len(sources):
        forms = [q.form for q in quantizers if any(isinstance(b.module, FloatQuantizer) for b in branches_of(q))]
        return f"no integer kernel reads {forms[0]} quantizers" if forms else ""
    kernels = {"linear": profile.linears, "conv2d": profile.convolutions, "matmul": profile.attention}[site.kind]
    if site.kind == "matmul":
        if kernels == "float":
            return f"products of two activations (attention) run in float in profile {profile.name}"
        return f"this product of two activations is not plain attention, which profile {profile.name} has integers for"
    if kernels == "float":
        return f"profile {profile.name} stores weights in few bits and multiplies in float"
    return "a convolution that integers would not make faster (in groups, few channels, or before a float one)"


# --- what sites cost ---


@torch.no_grad()
def site_costs(
    model: QuantizedModel | QuantizedNetwork,
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    profile: Profile,
    lifted: Collection[str] = (),
    table: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Values]:
    """What each site costs the outputs, those that cost most first: it runs in float in turn, all else as it is.

    network: float. inputs: of every part by its name, float32 (leanvit.tasks.parts.part_inputs). table: milliseconds
    by site key (quant.costs.read_latency_table), where they were measured.
    Returns one entry a site that runs on integers and was lifted in turn: {"site", "share": of the divergence from
    the float outputs that goes, "macs": share of the part's multiply-adds, "lifting_ms": more an image, or None}.
    """
    found: list[Values] = []
    for part, quantized in models_of(model).items():
        found += _costs_of(model, part, quantized, parts_of(network.eval())[part], inputs[part], profile, lifted, table)
    return sorted(found, key=lambda entry: -entry["share"])


def _costs_of(
    model: QuantizedModel | QuantizedNetwork, part: str, quantized: QuantizedModel, network: nn.Module, x: Tensor,
    profile: Profile, lifted: Collection[str], table: Mapping[str, Mapping[str, float]] | None,
) -> list[Values]:  # fmt: skip
    own = own_sites(model, part, lifted)
    graph, x = quantized.graph, x[:COST_IMAGES]
    macs = sum(site.macs for site in graph.sites.values())
    outside = {name for entry in integer_share(quantized, profile, own)["float"] for name in entry["sites"]}
    sites = [name for name in quantized.plan if graph.sites[name].macs and name not in outside]
    truth = outputs_from(network(x))
    form = executed_form(graph, profile, own)
    now = divergence(truth, outputs_from(run(form, x)))
    if not now or not math.isfinite(now):
        return []
    found = []
    suspects = _suspects(quantized, sites, macs * len(x))
    for name in track(suspects, "ranking sites", len(suspects)):
        if name in graph.outputs:  # which of its neighbours write integers changes with it
            outputs = run(executed_form(graph, profile, [*own, name]), x)
        else:
            outputs = _run_lifted(form, graph.sites[name].node, x)
        share = (now - divergence(truth, outputs_from(outputs))) / now
        if not math.isfinite(share):
            continue
        site = graph.sites[name]
        row = (table or {}).get(site_key(site))
        lifting = None if row is None else row["float_ms"] - row["int8_ms"]
        found.append(
            {"site": site_name(model, part, name), "share": share, "macs": site.macs / macs, "lifting_ms": lifting}
        )
    return found


def _run_lifted(form: GraphModule, name: str, x: Tensor) -> Any:
    """What a network returns where one operation reads what stands before its activation quantizers."""
    node = next(node for node in form.graph.nodes if node.name == name)
    args = node.args
    node.args = tuple(
        node_argument(arg, 0) if isinstance(arg, Node) and isinstance(quantizer_of(form, arg), ActivationQuantizer)
        else arg
        for arg in args
    )  # fmt: skip
    try:
        return run(form, x)
    finally:
        node.args = args


def _suspects(quantized: QuantizedModel, sites: Sequence[str], macs: int) -> list[str]:
    """All sites, or those with the lowest SQNR where all would take too long."""
    count = max(FEWEST_SITES, int(COST_MACS / max(1, macs)))
    if count >= len(sites):
        return list(sites)
    ratios = {entry["name"]: entry["sqnr_db"] for entry in quantized.report.get("sites", [])}
    return sorted(sites, key=lambda name: ratios.get(name, 0.0))[:count]
