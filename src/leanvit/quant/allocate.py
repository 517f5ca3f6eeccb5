"""Greedy MP: bits for every site within a budget, found by giving up what costs the answers least.

From all sites at the highest level, the next step down is the one with the least

    score = increase of the loss / cost saved

(MPTQ-ViT, arXiv 2401.14895; NetAdapt, arXiv 1804.03230). The loss is the KL divergence of the quantized from
the float answers on calibration images. What keeps the search short (ours): every candidate is measured once;
from there on its local output error predicts what each further bit costs, and only the candidate in front is
measured again on the current state, when enough predicted steps have gathered to matter; the network runs from the
changed site on. Every evaluation is written to a journal, from which a killed search goes on.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from leanvit.config import Budget, MPTQConfig
from leanvit.errors import ConfigError
from leanvit.files import read_json
from leanvit.progress import Bar, note
from leanvit.quant.calibrate import Choices
from leanvit.quant.evaluate import Evaluator
from leanvit.quant.graph import OPERANDS, QuantGraph, Site, end_sites
from leanvit.quant.plan import FLOAT_BITS, Plan, average_bits, bit_operations, make_plan, tensor_bits, weight_bytes

TRUST = 0.05
"""Share of the loss that predicted steps may add before the next one is measured."""

PROBE_BITS = 4
"""Level at which candidates are first measured: far enough down to stand out of the noise."""

UNMEASURED_STEPS = 4
"""Steps that may be taken on predictions alone before the state is measured."""

LEAST_SHARE = 0.05
"""Of the median increase: what a candidate is believed to cost at least, as no bits are free."""

TABLE_VERSION = 1

Candidate = tuple[str, int]
"""A site and which of its bits: 0 the weight or second operand, 1 the activation, 2 both together."""


@dataclass
class Search:
    """What a search did, for the report.

    steps: one entry each: site, part, bits, loss (predicted or measured), cost. evaluations: runs of the network.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    from_journal: int = 0


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
    """What a latency table calls sites that cost the same: kind, shape of the weight, and activations read."""
    return f"{site.kind} {'x'.join(map(str, site.weight_shape)) or site.macs} {'x'.join(map(str, site.elements))}"


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


def allocate(
    graph: QuantGraph, images: Tensor, config: MPTQConfig, choices: Choices, journal: str | Path | None = None
) -> tuple[Plan, dict[str, Any]]:
    """A plan within the budget of `config` by Greedy MP (see the module).

    graph: float, smoothed, without quantizers. images: (N, 3, H, W) calibration images.
    Returns the plan and, for the report: evaluations, sensitivities by site, the Pareto curve, estimate errors.
    Raises ConfigError where even the lowest levels exceed the budget.
    """
    if config.budget is None:
        raise ConfigError("no budget given, expected one. Give MPTQConfig(budget=Budget(average_bits=5)).")
    greedy = Greedy(graph, images, config, choices, Journal(journal, graph, images, config))
    return greedy.run()


class Journal:
    """Losses by plan, kept in a file line by line."""

    def __init__(self, path: str | Path | None, graph: QuantGraph, images: Tensor, config: MPTQConfig) -> None:
        """Read what the file holds of the same network, images and scheme."""
        self.path = Path(path) if path else None
        shape = {name: site.weight_shape for name, site in graph.sites.items()}
        weights = sum(float(p.double().abs().sum()) for p in graph.module.parameters())
        scheme = [config.scope, config.mode, sorted(config.active_passes), config.range_search, config.ratio_search]
        facts = [scheme, config.two_region, config.first_last_bits, shape, float(images.double().sum()), weights]
        self.run = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.losses: dict[str, float] = {}
        if self.path and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return  # the last line of a killed search may be cut
        if entry.get("run") == self.run:
            self.losses[entry["plan"]] = entry["loss"]

    def key(self, plan: Plan) -> str:
        """Short name of a plan."""
        return hashlib.sha256(json.dumps(sorted(plan.items())).encode()).hexdigest()[:24]

    def add(self, key: str, loss: float) -> None:
        """Remember one loss, at once on disk."""
        self.losses[key] = loss
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self.run, "plan": key, "loss": loss}) + "\n")


class Greedy:
    """The state of one search."""

    def __init__(
        self, graph: QuantGraph, images: Tensor, config: MPTQConfig, choices: Choices, journal: Journal
    ) -> None:
        self.budget = config.budget or Budget(average_bits=8)
        self.journal = journal
        self.levels = (FLOAT_BITS, 8) if self.budget.latency_ms is not None else self.budget.levels
        start = make_plan(graph, config)
        ends = end_sites(graph)
        self.free = [name for name in start if name not in ends]
        self.plan: Plan = {
            name: bits if name in ends else stepped((bits[0] and 1, 1), 2, self.levels[0])
            for name, bits in start.items()
        }
        self.costs = Costs(graph, self.budget, self.free)
        self.evaluator = Evaluator(copy.deepcopy(graph), images, self.plan, choices)
        self.search = Search()
        self.loss = self._evaluate(self.plan, None)
        self.measured_loss = self.loss
        self.sensitivity: dict[Candidate, float] = {}
        self.probes: dict[Candidate, tuple[float, float]] = {}
        self.unmeasured: list[Candidate] = []
        self.errors: list[tuple[float, float]] = []

    def run(self) -> tuple[Plan, dict[str, Any]]:
        """Step down until the budget holds."""
        start_cost, limit = self.costs.of(self.plan), self.costs.limit
        candidates = [(name, part) for name in self.free for part in self._parts(name)]
        with Bar("measuring sensitivities", len(candidates)) as bar:
            for candidate in candidates:
                self._probe(candidate)
                bar.advance()
        self._set_sensitivities()
        heap = [(self._score(c), i, c) for i, c in enumerate(candidates) if self._next(c) is not None]
        heapq.heapify(heap)
        fresh: Candidate | None = None
        cost = start_cost
        with Bar("Greedy MP", 100) as bar:
            while cost > limit:
                if not heap:
                    raise ConfigError(
                        f"budget {limit:g} can't be met: the lowest levels still cost {cost:g}. "
                        f"Raise it, or allow lower levels than {self.levels[-1]}."
                    )
                _, index, candidate = heapq.heappop(heap)
                level = self._next(candidate)
                if level is None or self.costs.saved(self.plan, candidate, level) <= 0:
                    continue
                score = self._score(candidate)
                if candidate != fresh and heap and score > heap[0][0]:
                    # Measurements since it was queued have moved it behind another.
                    heapq.heappush(heap, (score, index, candidate))
                    continue
                if candidate != fresh and self._must_measure(candidate, level):
                    self._measure(candidate, level)
                    fresh = candidate if self._score(candidate) <= 1.05 * (heap[0][0] if heap else math.inf) else None
                    heapq.heappush(heap, (self._score(candidate), index, candidate))
                    continue
                self._accept(candidate, level, self._predicted(candidate, level))
                fresh = None
                cost = self.costs.of(self.plan)
                if self._next(candidate) is not None:
                    heapq.heappush(heap, (self._score(candidate), index, candidate))
                done = 100 * (start_cost - cost) / max(start_cost - limit, 1e-12)
                bar.advance(max(0, min(100, int(done)) - bar.done), detail=f"cost {cost:.4g}, loss {self.loss:.3g}")
        final = self._evaluate(self.plan, None)
        uniform = self._best_uniform()
        if uniform is not None and uniform[0] < final:
            # A search led by estimates may end behind; what it is meant to beat is then the answer.
            final, self.plan = uniform
            cost = self.costs.of(self.plan)
            note(f"uniform bits have a lower loss ({final:.3g}) than the searched plan: taken instead")
        kept = {name: bits for name, bits in self.plan.items() if bits[1] != FLOAT_BITS}
        return kept, self._report(final, cost)

    def _best_uniform(self) -> tuple[float, Plan] | None:
        """Loss and plan of the most uniform bits that the budget allows, None where it allows none."""
        for level in self.levels:
            plan = {n: stepped(b, 2, level) if n in self.free else b for n, b in self.plan.items()}
            if level != FLOAT_BITS and self.costs.of(plan) <= self.costs.limit:
                return self._evaluate(plan, None), plan
        return None

    def _parts(self, name: str) -> tuple[int, ...]:
        site = self.evaluator.graph.sites[name]
        if self.budget.latency_ms is not None:
            return (2,)
        return (0, 1) if site.weight or OPERANDS[site.kind] == 2 else (1,)

    def _bits(self, candidate: Candidate) -> int:
        name, part = candidate
        return self.plan[name][1] if part == 2 else self.plan[name][part]

    def _next(self, candidate: Candidate) -> int | None:
        lower = [level for level in self.levels if level < self._bits(candidate)]
        return lower[0] if lower else None

    def _probe(self, candidate: Candidate) -> None:
        """Measure a candidate once, well below its level, and scale by its local error."""
        bits = self._bits(candidate)
        lower = [level for level in self.levels if level < bits]
        if not lower:
            return
        level = min(lower, key=lambda value: abs(value - PROBE_BITS))
        increase = self._evaluate(self._with(candidate, level), candidate) - self.loss
        local = self._local(candidate, level) - self._local(candidate, bits)
        self.probes[candidate] = (increase, max(local, 1e-30))

    def _set_sensitivities(self) -> None:
        """Increase of the loss per local error of every candidate, never below a share of the median increase."""
        increases = sorted(max(increase, 0.0) for increase, _ in self.probes.values())
        least = max(LEAST_SHARE * increases[len(increases) // 2], 1e-12) if increases else 0.0
        for candidate, (increase, local) in self.probes.items():
            self.sensitivity[candidate] = max(increase, least) / local

    def _local(self, candidate: Candidate, bits: int) -> float:
        return 0.0 if bits == FLOAT_BITS else self.evaluator.local_error(candidate, bits)

    def _predicted(self, candidate: Candidate, level: int) -> float:
        local = self._local(candidate, level) - self._local(candidate, self._bits(candidate))
        return self.sensitivity[candidate] * max(local, 1e-30)

    def _score(self, candidate: Candidate) -> float:
        level = self._next(candidate)
        if level is None:
            return math.inf
        saved = self.costs.saved(self.plan, candidate, level)
        return self._predicted(candidate, level) / saved if saved > 0 else math.inf

    def _must_measure(self, candidate: Candidate, level: int) -> bool:
        """Whether predicted steps have gathered enough to matter, or are many."""
        gathered = self.loss - self.measured_loss + self._predicted(candidate, level)
        enough = gathered > TRUST * max(self.measured_loss, 1e-6)
        return enough if len(self.unmeasured) < UNMEASURED_STEPS else True

    def _measure(self, candidate: Candidate, level: int) -> None:
        """Measure the front candidate on the current state; what gathered unmeasured is told apart from it."""
        predicted = self._predicted(candidate, level)
        self._measure_state()
        increase = self._evaluate(self._with(candidate, level), candidate) - self.loss
        self.errors.append((predicted, increase))
        self.sensitivity[candidate] *= max(increase, 0.1 * predicted, 1e-12) / max(predicted, 1e-30)

    def _measure_state(self) -> None:
        """Measure the plan so far; the steps since the last time share what they were wrong by."""
        if not self.unmeasured:
            return
        before, believed = self.measured_loss, self.loss - self.measured_loss
        self.loss = self.measured_loss = self._evaluate(self.plan, None)
        self.errors.append((believed, self.loss - before))
        factor = min(max((self.loss - before) / max(believed, 1e-30), 0.25), 16.0)
        for candidate in set(self.unmeasured):
            self.sensitivity[candidate] *= factor
        self.unmeasured.clear()

    def _accept(self, candidate: Candidate, level: int, predicted: float) -> None:
        self.plan = self._with(candidate, level)
        self.loss += predicted
        self.unmeasured.append(candidate)
        self.evaluator.accept(candidate[0], self.plan)
        self.search.steps.append(
            {"site": candidate[0], "part": candidate[1], "bits": level, "loss": self.loss,
             "cost": self.costs.of(self.plan)}
        )  # fmt: skip

    def _with(self, candidate: Candidate, level: int) -> Plan:
        name, part = candidate
        return {**self.plan, name: stepped(self.plan[name], part, level)}

    def _evaluate(self, plan: Plan, changed: Candidate | None) -> float:
        key = self.journal.key(plan)
        if key in self.journal.losses:
            self.search.from_journal += 1
            return self.journal.losses[key]
        loss = self.evaluator.loss(plan, changed[0] if changed else None)
        self.search.evaluations += 1
        self.journal.add(key, loss)
        return loss

    def _report(self, final: float, cost: float) -> dict[str, Any]:
        levels = [level for level in self.levels if level not in (FLOAT_BITS, self.levels[0])]
        sensitivities = [
            {"site": name, "part": part,
             "loss": {str(b): self.sensitivity[name, part] * self._local((name, part), b) for b in levels}}
            for name, part in self.sensitivity
        ]  # fmt: skip
        ratios = sorted(measured / predicted for predicted, measured in self.errors if predicted > 0)
        return {
            "evaluations": self.search.evaluations,
            "from_journal": self.search.from_journal,
            "candidates": len(self.sensitivity),
            "steps": self.search.steps,
            "loss": final,
            "cost": cost,
            "limit": self.costs.limit,
            "estimate_ratio_median": ratios[len(ratios) // 2] if ratios else None,
            "measured_steps": len(ratios),
            "sensitivities": sensitivities,
        }


Loss = Callable[[Plan], float]


def plain_greedy(plan: Plan, candidates: list[Candidate], levels: tuple[int, ...], costs: Costs, loss: Loss) -> Plan:
    """The search as published, every candidate measured at every step: the reference for `allocate`.

    plan: the start. loss: evaluates a plan. Returns the plan within the budget.
    """
    current, current_loss = dict(plan), loss(plan)
    while costs.of(current) > costs.limit:
        best: tuple[float, Plan, float] | None = None
        for name, part in candidates:
            lower = [level for level in levels if level < current[name][part]]
            if not lower or costs.saved(current, (name, part), lower[0]) <= 0:
                continue
            changed = {**current, name: stepped(current[name], part, lower[0])}
            value = loss(changed)
            score = (value - current_loss) / costs.saved(current, (name, part), lower[0])
            if best is None or score < best[0]:
                best = (score, changed, value)
        if best is None:
            raise ConfigError(f"budget {costs.limit:g} can't be met by the levels {levels}. Raise it.")
        _, current, current_loss = best
    return current
