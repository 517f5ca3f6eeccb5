"""Bit plans: which site gets how many bits, and what a plan costs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanvit.config import MPTQConfig
from leanvit.errors import ConfigError, did_you_mean
from leanvit.files import read_json
from leanvit.quant.graph import OPERANDS, QuantGraph, Site, end_sites

Plan = dict[str, tuple[int, int]]
"""{site: (weight bits, activation bits)}; for two activations the first number is that of the second operand, and
0 where there is none. Sites that are absent stay in float."""

FLOAT_BITS = 32

LIKELY_BITS = 6
"""Of a plan whose budget is none of bits: between the 8 and the 4 that searches mostly end with."""


def make_plan(graph: QuantGraph, config: MPTQConfig) -> Plan:
    """Uniform bits for every site; the ends (patch embedding, classifiers) at `first_last_bits`, ignored ones absent.

    Raises ConfigError for an `ignored_scope` that matches nothing.
    """
    for pattern in config.ignored_scope:
        if not fnmatch.filter(graph.sites, pattern):
            known = ", ".join(list(graph.sites)[:4])
            raise ConfigError(f"ignored_scope '{pattern}' matches no site; sites are {known}, ...")
    ends = end_sites(graph)
    plan: Plan = {}
    for name, site in graph.sites.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.ignored_scope):
            continue
        if name in ends:
            plan[name] = (config.first_last_bits, config.first_last_bits)
        elif site.weight:
            plan[name] = (config.weight_bits, config.activation_bits)
        else:
            plan[name] = (config.activation_bits if OPERANDS[site.kind] == 2 else 0, config.activation_bits)
    return plan


def with_likely_bits(config: MPTQConfig) -> MPTQConfig:
    """The configuration without its budget, whose average stands for a plan that is not known yet."""
    if config.budget is None:
        return config
    bits = round(config.budget.average_bits or LIKELY_BITS)
    return replace(config, weight_bits=bits, activation_bits=bits, budget=None)


def with_bits_of(config: MPTQConfig, graph: QuantGraph, plan: Plan) -> MPTQConfig:
    """The configuration with the bits that stand for a given plan where one number is needed, as SQ-b's exponents do.

    They are those of all sites that are free, where these are equal, else the plan's average, which is what a search
    with that average took: the plan that it found is quantized to the same network again.
    """
    ends = end_sites(graph)
    pairs = {bits for name, bits in plan.items() if name not in ends and graph.sites[name].weight}
    if not pairs:
        return config
    if len(pairs) == 1:
        weight_bits, activation_bits = pairs.pop()
    else:
        weight_bits = activation_bits = round(average_bits(graph, plan))
    return replace(config, weight_bits=weight_bits, activation_bits=activation_bits)


def checked_plan(graph: QuantGraph, values: dict[str, Iterable[int]]) -> Plan:
    """A plan that somebody edited, its bits as tuples.

    Raises ConfigError for an unknown site or bits outside 2 to 8.
    """
    plan: Plan = {}
    for name, pair in values.items():
        if name not in graph.sites:
            raise ConfigError(f"plan: unknown site '{name}'.{did_you_mean(name, graph.sites)}")
        bits = tuple(pair)
        site = graph.sites[name]
        single = not site.weight and OPERANDS[site.kind] == 1
        if len(bits) != 2 or not all(2 <= b <= 8 for b in bits[single:]) or (single and bits[0] != 0):
            expected = "[0, bits]" if single else "[weight bits, activation bits]"
            raise ConfigError(f"plan: site '{name}' has {list(pair)}, expected {expected} of 2 to 8")
        plan[name] = (int(bits[0]), int(bits[1]))
    return plan


def parts_of(site: Site) -> tuple[int, ...]:
    """Which bits of a site there are: 0 for the weight or the second operand, 1 for the activation."""
    return (0, 1) if site.weight or OPERANDS[site.kind] == 2 else (1,)


def tensor_bits(site: Site, bits: tuple[int, int]) -> list[tuple[int, int]]:
    """(elements, bits) of everything that a site quantizes: its weight, or activations for one image."""
    if site.weight:
        return [(math.prod(site.weight_shape), bits[0]), (site.elements[0], bits[1])]
    return list(zip(site.elements, (bits[1], bits[0]), strict=False))


def average_bits(graph: QuantGraph, plan: Plan, names: Iterable[str] | None = None) -> float:
    """Mean bits over the elements of all quantized tensors, weights and one image's activations alike.

    names: the sites that count; None counts all but the ends, which keep their bits by convention.
    """
    counted = [n for n in plan if n not in end_sites(graph)] if names is None else list(names)
    pairs = [pair for name in counted for pair in tensor_bits(graph.sites[name], plan[name])]
    total = sum(elements for elements, _ in pairs)
    return sum(elements * bits for elements, bits in pairs) / total if total else float(FLOAT_BITS)


def weight_bytes(graph: QuantGraph, plan: Plan) -> int:
    """Bytes of the model's weights: packed integers and a float32 scale a channel; what has no site in float32."""
    kept = sum(p.numel() for p in graph.module.parameters())
    stored = {p for p, _ in graph.module.named_parameters()}
    total = 4.0 * kept
    for name, (bits, _) in plan.items():
        site = graph.sites[name]
        if site.weight:
            elements = math.prod(site.weight_shape)
            total += math.ceil(elements * bits / 8) + 4 * site.weight_shape[0]
            total -= 4 * elements if site.weight in stored else 0
    return int(total)


def bit_operations(graph: QuantGraph, plan: Plan) -> int:
    """Sum over products of multiply-adds times the bits of both sides; float counts 32."""
    total = 0
    for name, site in graph.sites.items():
        weight, activation = plan.get(name, (FLOAT_BITS, FLOAT_BITS))
        total += site.macs * weight * activation
    return total


def sizes(graph: QuantGraph, plan: Plan, float_bytes: int) -> dict[str, Any]:
    """What a plan costs, for the report."""
    weights = {n: math.prod(graph.sites[n].weight_shape) for n in plan if graph.sites[n].weight}
    elements = sum(weights.values())
    packed = sum(count * plan[n][0] for n, count in weights.items())
    return {
        "float_bytes": float_bytes,
        "quantized_bytes": weight_bytes(graph, plan),
        "average_weight_bits": packed / elements if elements else float(FLOAT_BITS),
        "average_bits": average_bits(graph, plan),
        "bitops": bit_operations(graph, plan),
    }


def load_plan(path: str) -> dict[str, Iterable[int]]:
    """A plan from a JSON file {site: [weight bits, activation bits]}. Raises ConfigError where it is none."""
    if not Path(path).is_file():
        raise ConfigError(f"plan {path}: no such file. leanvit quantize writes plan.json beside its model.")
    try:
        plan = read_json(Path(path))
    except ValueError as error:
        raise ConfigError(f"plan {path} is not valid JSON: {error}. Correct the file.") from error
    if not isinstance(plan, dict) or not all(isinstance(v, list) for v in plan.values()):
        raise ConfigError(f"plan {path}: expected {{site: [weight bits, activation bits], ...}}. Correct the file.")
    return plan
