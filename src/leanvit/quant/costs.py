"""What a plan costs in the units of a budget: average bits, bytes, BitOps, or measured milliseconds."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from leanvit.config import Budget
from leanvit.errors import ConfigError
from leanvit.files import read_json
from leanvit.quant.graph import QuantGraph, Site
from leanvit.quant.plan import FLOAT_BITS, Plan, average_bits, bit_operations, tensor_bits, weight_bytes

TABLE_VERSION = 2
"""1: in its files the bias of a linear followed the product."""

Candidate = tuple[str, int]
"""A site and which of its bits: 0 the weight or second operand, 1 the activation, 2 both together."""


class Costs:
    """What a plan costs in the units of a budget, and its limit."""

    def __init__(self, graph: QuantGraph, budget: Budget, free: list[str]) -> None:
        """free: sites whose bits may change. Raises ConfigError for a latency table of another format."""
        self.graph, self.budget, self.free = graph, budget, free
        self.table = read_latency_table(budget.latency_table) if budget.latency_table else {}

    @property
    def limit(self) -> float:
        """The budget's one number."""
        b = self.budget
        limits = (b.average_bits, b.model_bytes, b.bitops, b.latency_ms)
        return float(next(v for v in limits if v is not None))

    def of(self, plan: Plan) -> float:
        """Average bits, bytes, BitOps or milliseconds of a plan."""
        if self.budget.average_bits is not None:
            return average_bits(self.graph, plan, self.free)
        if self.budget.model_bytes is not None:
            return float(weight_bytes(self.graph, plan))
        if self.budget.bitops is not None:
            return float(bit_operations(self.graph, plan))
        return sum(self._milliseconds(site, plan.get(name)) for name, site in self.graph.sites.items())

    def of_site(self, name: str, bits: tuple[int, int]) -> float:
        """What one free site adds to `of` a plan: bits of its elements among those that count, bytes, BitOps, ms."""
        site = self.graph.sites[name]
        if self.budget.average_bits is not None:
            return sum(count * own for count, own in tensor_bits(site, bits)) / self._elements
        if self.budget.model_bytes is not None:
            return float(math.ceil(math.prod(site.weight_shape) * bits[0] / 8)) if site.weight else 0.0
        return float(site.macs * math.prod(bits)) if self.budget.bitops is not None else self._milliseconds(site, bits)

    @cached_property
    def _elements(self) -> int:
        """Elements of all tensors of the free sites."""
        return sum(count for name in self.free for count, _ in tensor_bits(self.graph.sites[name], (8, 8)))

    def _milliseconds(self, site: Site, bits: tuple[int, int] | None) -> float:
        row = self.table.get(site_key(site))
        if row is None:
            return 0.0
        return row["float_ms"] if bits is None or bits[1] == FLOAT_BITS else row["int8_ms"]

    def saved(self, plan: Plan, candidate: Candidate, bits: int) -> float:
        """Cost that one candidate's step saves."""
        name, part = candidate
        after = {name: stepped(plan[name], part, bits)}
        site = self.graph.sites[name]
        if self.budget.average_bits is not None:
            both = zip(tensor_bits(site, plan[name]), tensor_bits(site, after[name]), strict=True)
            return float(sum(count * (old - new) for (count, old), (_, new) in both))
        if self.budget.model_bytes is not None:
            return (math.prod(site.weight_shape) * (plan[name][0] - after[name][0])) / 8 if site.weight else 0.0
        if self.budget.bitops is not None:
            return float(site.macs * (math.prod(plan[name]) - math.prod(after[name])))
        return self._milliseconds(site, plan[name]) - self._milliseconds(site, after[name])


def site_key(site: Site) -> str:
    """What a latency table calls sites that cost the same: kind, shape of the weight, activations read, products."""
    shape = "x".join(map(str, site.weight_shape)) or "-"
    return f"{site.kind} {shape} {'x'.join(map(str, site.elements))} {site.macs}"


def read_latency_table(path: str) -> dict[str, dict[str, float]]:
    """Milliseconds by site key. Raises ConfigError where the file is missing or of another format."""
    if not Path(path).is_file():
        raise ConfigError(f"latency table {path}: no such file. Make it: leanvit benchmark --table {path} MODEL")
    values = read_json(Path(path))
    if not isinstance(values, dict) or values.get("version") != TABLE_VERSION or "sites" not in values:
        raise ConfigError(f"latency table {path}: not one of version {TABLE_VERSION}. Measure it again.")
    table: dict[str, dict[str, float]] = values["sites"]
    return table


def stepped(bits: tuple[int, int], part: int, level: int) -> tuple[int, int]:
    """The bits of a site with one part at another level."""
    if part == 2:
        return (level if bits[0] else 0, level)
    return (level, bits[1]) if part == 0 else (bits[0], level)
